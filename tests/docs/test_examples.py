"""What the documentation shows must work: Python blocks are run, commands are checked against the program."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pages
import pytest
import typer
import yaml

from lossmith.cli import app
from lossmith.cli.compare import overrides
from lossmith.registry import LOSSES, WEIGHTINGS
from lossmith.studies.settings import make_settings

# Those whose blocks start training processes.
SLOW = {"docs/quickstart.md"}

WITH_PYTHON = [
    pytest.param(page, id=pages.name(page), marks=[pytest.mark.slow] if pages.name(page) in SLOW else [])
    for page in pages.PAGES
    if pages.blocks(page, "python")
]
SHOWN = {
    f"{pages.name(page)}: {' '.join(arguments)}": arguments
    for page in pages.PAGES
    for words in pages.commands(page)
    if (arguments := pages.lossmith_arguments(words)) is not None
}
# Those that take seconds.
SMALL = {name: a for name, a in SHOWN.items() if "nano" in a or "--dry-run" in a or a[0] == "list"}


@pytest.fixture
def workplace(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples expect to find."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text_folder, tmp_path / "my_corpus")
    return tmp_path


@pytest.fixture
def _own_registrations() -> Any:
    """What an example registers must not outlive it."""
    before = [dict(registry._own) for registry in (LOSSES, WEIGHTINGS)]
    yield
    for registry, own in zip((LOSSES, WEIGHTINGS), before, strict=True):
        registry._own = own


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.usefixtures("workplace", "_own_registrations")
def test_every_python_block_runs_in_the_order_of_its_page(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in pages.blocks(page, "python"):
        # Padded, so that a traceback names the page's own line.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, namespace)


def parse(arguments: list[str]) -> Any:
    """The context of a command line, as the program itself parses it; nothing is run."""
    group = typer.main.get_command(app)
    if not arguments or arguments[0].startswith("-"):
        return group.make_context("lossmith", list(arguments))
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    return command.make_context(arguments[0], list(arguments[1:]))


@pytest.mark.parametrize("arguments", SHOWN.values(), ids=SHOWN)
def test_every_command_shown_is_one_that_the_program_understands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, "_own", {"brier": lambda logits, targets, *, scale=1.0: logits.sum(-1)})
    given = parse(arguments).params
    if arguments[0] == "compare":
        names = ("arms", *(name for name in given if name not in ("arm", "set_")))
        values = {**given, "arms": given["arm"] or None}
        known = make_settings({}).model_fields_set | set(type(make_settings({})).model_fields)
        values = {name: values[name] for name in names if name in known and values[name] not in (None, False)}
        make_settings({**values, **overrides(given["set_"] or [])})
    elif arguments[0] == "study":
        overrides(given["set_"] or [])


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["compare", "--no-such-option", "3"])


@pytest.mark.parametrize("page", [p for p in pages.PAGES if pages.blocks(p, "yaml", "toml")], ids=pages.name)
def test_every_configuration_shown_is_accepted(page: Path) -> None:
    for block in pages.blocks(page, "yaml"):
        values = yaml.safe_load(block.text)
        make_settings({key: value for key, value in values.items() if key not in ("out", "jobs", "threads", "cache")})
    for block in pages.blocks(page, "toml"):
        groups = tomllib.loads(block.text)["project"]["entry-points"]
        assert set(groups) <= {LOSSES._group, WEIGHTINGS._group, "lossmith.studies"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SMALL.values(), ids=SMALL)
@pytest.mark.usefixtures("workplace")
def test_the_small_commands_really_run(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lossmith", *arguments], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
