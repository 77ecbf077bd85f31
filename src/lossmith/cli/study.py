"""``lossmith study`` and ``lossmith list``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lossmith.cli import app, checks


@app.command()
def study(
    slug: Annotated[str, typer.Argument(help="Name of the study; see `lossmith list`.")],
    scale: Annotated[
        str, typer.Option(help="smoke (seconds), quick (about two minutes) or full (real models and data).")
    ] = "quick",
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds; default: the scale's.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own data: what the study asks for (its card says), else text for language models.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Preset, folder or hub id, where the study trains or loads a model.", show_default=False),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Budget per run, where language models are compared.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any option of the study, or setting of `lossmith compare`, as key=value.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for records and report; default runs/SLUG-SCALE.", show_default=False),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="Markdown file whose measured table is to be rewritten.", show_default=False),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for prepared corpora.", show_default=False)] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs side by side; default: as many as cores allow.", show_default=False, callback=checks.at_least(1)
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads per run; default: 1 for small models, else the cores by the runs.",
            show_default=False,
            callback=checks.at_least(1),
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="local or ray.")] = "local",
) -> None:
    """Run a published idea's study: its arms and claims, with verdicts computed from paired intervals.

    **Examples**

    `lossmith study dynamic-reweighting`

    `lossmith study dynamic-reweighting --data my_corpus/ --tokens 1M --seeds 5`
    """
    from rich.console import Console

    from lossmith.cli.compare import finish_report, overrides
    from lossmith.cli.progress import ProgressDisplay
    from lossmith.errors import InputError
    from lossmith.reporting import summarise
    from lossmith.reporting.card import check_card, write_measured
    from lossmith.studies.settings import Execution
    from lossmith.studies.study import default_folder, get_study, run_study

    if backend not in ("local", "ray"):
        raise InputError(f"--backend must be local or ray, got '{backend}'")
    changes: dict[str, Any] = overrides(set_ or [])
    changes |= {name: value for name, value in (("model", model), ("tokens", tokens)) if value is not None}
    chosen = get_study(slug)
    if card is not None:
        # Before hours of work, not after.
        check_card(card, data)
    out = out if out is not None else default_folder(chosen, scale, data)
    execution = Execution(out=out, jobs=jobs, threads=threads, backend=backend, cache=cache)  # type: ignore[arg-type]
    watcher = ProgressDisplay(Console(stderr=True)).watcher()
    comparison = run_study(
        chosen, scale, seeds=seeds, data=data, execution=execution, overrides=changes, watcher=watcher
    )
    if card is not None:
        words = " ".join(["lossmith study", chosen.slug, f"--scale {scale}", *(["--data", data] if data else [])])
        heading = f"Written by `{words} --card {_from_here(card)}`; {environment_line(comparison.environment)}."
        write_measured(card, f"{heading}\n\n{summarise(comparison).to_markdown()}", data)
    finish_report(comparison, out, Console())


def _from_here(path: Path) -> str:
    """The path as seen from the current folder where it lies below: a card is read on other machines, too."""
    here = Path.cwd().resolve()
    place = path.resolve()
    return (place.relative_to(here) if place.is_relative_to(here) else path).as_posix()


def environment_line(environment: Any) -> str:
    """Versions and machine in a few words."""
    versions = environment.get("versions", {})
    known = [f"{name} {versions[name]}" for name in ("lossmith", "torch", "transformers") if name in versions]
    return ", ".join([*known, str(environment.get("processor", "unknown processor"))])


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Every study: its family, its question and its paper (titles with --json).

    `lossmith list --json`
    """
    from lossmith.studies.study import studies

    every = studies()
    if as_json:
        rows = [
            {
                "slug": s.slug,
                "family": s.family,
                "question": s.question,
                "paper": {"title": s.paper.title, "year": s.paper.year, "arxiv": s.paper.arxiv},
                "arms": dict(s.arms),
                "baseline": s.baseline,
                "scales": list(s.seeds),
            }
            for s in every.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False)
    for s in every.values():
        # Titles would hide the questions; the cards and --json have them.
        paper = f"arXiv {s.paper.arxiv}" if s.paper.arxiv else str(s.paper.year)
        console.print(f"[bold]{s.slug}[/bold]  {s.family}, {paper}")
        console.print(Padding(s.question, (0, 0, 0, 4)))
