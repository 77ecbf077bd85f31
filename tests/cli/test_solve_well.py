"""``lossmith solve-well`` as a user would type it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pytest

from lossmith.errors import InputError

run = partial(command_line.run, "solve-well")


def test_the_finite_well_as_json_with_a_plot(tmp_path: Path) -> None:
    out = run("finite", "--depth", 50, "--width", 1, "--states", 3, "--plot", "--json", "--out", tmp_path / "well")
    found = json.loads(out)
    assert found["energies"] == pytest.approx([5.942243, 22.976755, 46.497502], rel=1e-4)
    assert max(map(abs, found["reference"]["relative_errors"])) < 1e-4
    assert sorted(p.name for p in (tmp_path / "well").iterdir()) == [
        "levels.json",
        "model.safetensors",
        "solve-well-finite.png",
    ]


def test_a_table_a_formula_and_a_function(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("x V\n0 0\n1 10\n2 0\n")
    assert "finite differences" in run("table", tmp_path / "v.csv", "--states", 2)
    assert "1.0000" in run("formula", "x**2", "--interval", -7, 7, "--states", 1)
    (tmp_path / "mine.py").write_text("def well(x):\n    return x**2\n")
    assert "1.0000" in run("function", f"{tmp_path / 'mine.py'}:well", "--interval", -7, 7, "--states", 1)
    assert "on [0, 1]" in run("infinite", "--states", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("box",), "unknown potential 'box'"),
        (("finite", "--depth", 50), "needs --width"),
        (("finite", "--depth", 50, "--width", 1, "--states", 4), "3 bound states"),
        (("infinite", "--width", -1), "positive"),
        (("barrier", "--height", 20, "--width", 0.1, "--depth", 3), "--depth does not go"),
        (("table",), "second argument"),
        (("infinite", "x"), "no second argument"),
        (("formula", "x"), "needs --interval"),
        (("formula", "1/x", "--interval", 0, 1, "--kinetic", 0), "kinetic"),
        (("formula", "1/(x-0.5)", "--interval", "nan", 1), "finite walls"),
        (("formula", "log(x)", "--interval", -1, 1), "not finite"),
        (("function", "nowhere.py:f", "--interval", 0, 1), "file must exist"),
    ],
)
def test_wrong_input_is_one_sentence(words: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*words)
