"""``lossmith probe``: what a model's loss does not show."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from lossmith.cli import app
from lossmith.cli.sentences import say
from lossmith.errors import InputError
from lossmith.files import check_file_place


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model.")],
    what: Annotated[
        str, typer.Option(help="flatness, geometry, gradient-variance or superposition; or name(option=value).")
    ] = "superposition",
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to probe the model on, where the probe takes some; default: Python's own.", show_default=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for everything measured.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: a .png, .svg or .pdf file.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for machines.")] = False,
) -> None:
    """Measure something of a trained model that its loss does not show.

    **Examples**

    `lossmith probe gpt2 --what superposition --plot overlaps.png`

    `lossmith probe my_model/ --what "superposition(pair_rows=4096)" --json`

    `lossmith probe my_model/ --what geometry --data texts.jsonl --out geometry.json`
    """
    from lossmith.registry import PROBES

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot} must end in .png, .svg or .pdf")
    for path in (out, plot):
        if path is not None:
            check_file_place(path, data)
    # Names have underscores; a dash in one is a slip that nobody should have to correct.
    name, bracket, options = what.partition("(")
    measure = PROBES.bind(name.replace("-", "_") + bracket + options)
    parameters = inspect.signature(measure).parameters
    arguments: dict[str, Any] = {}
    if "data" in parameters:
        if data is None and parameters["data"].default is inspect.Parameter.empty:
            raise InputError(f"probe {what} needs text: --data PATH")
        if data is not None:
            arguments["data"] = data
        else:
            say(f"without --data {name.strip()} is measured on Python's own text", err=True)
    elif data is not None:
        raise InputError(f"probe {what} takes no --data: it looks at the model alone")
    report = _measured(measure, model, arguments, takes_progress="progress" in parameters, quiet=as_json)
    if out is not None:
        report.to_json(out)
    if plot is not None:
        report.plot(plot)
    if as_json:
        typer.echo(report.to_json().rstrip("\n"))
        return
    say(report.summary())
    for kind, path in (("report", out), ("plot", plot)):
        if path is not None:
            say(f"{kind}: {path}")


def _measured(measure: Any, model: str, arguments: dict[str, Any], *, takes_progress: bool, quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging

    logging.set_verbosity_error()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        if takes_progress:
            arguments = {
                **arguments,
                "progress": lambda done, total: progress.update(task, completed=done, total=total),
            }
        try:
            return measure(model, **arguments)
        except InputError:
            raise
        except ValueError as error:
            # An option out of range, or a matrix that has nothing to measure.
            raise InputError(str(error)) from None
