"""``lossmith advise``: what to train and fit so that a prediction can be trusted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from lossmith.cli import app
from lossmith.cli.fit import numbers, pairs
from lossmith.cli.sentences import say
from lossmith.errors import InputError
from lossmith.files import finite_or_none


@app.command()
def advise(
    source: Annotated[
        Path, typer.Argument(help="Checkpoints of models of several sizes: a table or a folder, as for fit.")
    ],
    target: Annotated[
        float | None, typer.Option(help="Parameters of the model to be predicted in the end.", show_default=False)
    ] = None,
    loss: Annotated[str | None, typer.Option(help="Header of the loss.", show_default=False)] = None,
    params: Annotated[str | None, typer.Option(help="Header of the number of parameters.", show_default=False)] = None,
    tokens: Annotated[str | None, typer.Option(help="Header of the tokens seen.", show_default=False)] = None,
    flops: Annotated[str | None, typer.Option(help="Header of the FLOPs.", show_default=False)] = None,
    run: Annotated[str | None, typer.Option(help="Header that names the run of a row.", show_default=False)] = None,
    unit: Annotated[str | None, typer.Option(help="Of the loss: nats, bits or perplexity.", show_default=False)] = None,
    log10: Annotated[
        list[str] | None, typer.Option(help="A quantity given as log10. Repeat.", show_default=False)
    ] = None,
    scale: Annotated[
        list[str] | None, typer.Option(help="Factor of a quantity: tokens=1e9. Repeat.", show_default=False)
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only rows with header=value (one family). Repeat.", show_default=False)
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also the error by number of models and share of the training.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Predict the largest model of a table from the others in several ways, and say how to go on.

    **Examples**

    `lossmith advise runs.csv --target 70e9`

    `lossmith advise opt.csv --params model_size --tokens num_token --log10 tokens --grid`
    """
    from lossmith.laws import Reading, estimation_grid, read_family
    from lossmith.laws import advise as find

    headers = {"loss": loss, "params": params, "tokens": tokens, "flops": flops}
    reading = Reading(
        columns={name: header for name, header in headers.items() if header is not None},
        run=run,
        unit=unit,
        log10=tuple(log10 or ()),
        scale=numbers(scale, "--scale"),
        where=pairs(where, "--where"),
    )
    table = read_family(source, reading)
    advice = find(table, target_params=target)
    cells = estimation_grid(table, protocol=advice.protocol) if grid and advice.check is not None else []
    if grid and not cells:
        raise InputError(f"--grid needs models of at least two sizes; {source} has one")
    if as_json:
        value = {
            "recommendations": [dataclasses.asdict(one) for one in advice.recommendations],
            "error": None if advice.check is None else advice.check.are,
            "grid": [
                {"models": len(c.models), "first": c.first, "flops": c.flops, "error": c.are, "reason": c.reason}
                for c in cells
            ],
        }
        typer.echo(json.dumps(finite_or_none(value), indent=2))
        return
    say(advice.text())
    if cells:
        shares = sorted({cell.first for cell in cells})
        say("\nerror on the largest model, by models fitted and share of their training (FLOPs)")
        say("models  " + "  ".join(f"{f'first {100 * share:g}%':>18}" for share in shares))
        for start in range(0, len(cells), len(shares)):
            row = cells[start : start + len(shares)]
            most = max(len(cell.models) for cell in row)
            texts = ["-" if math.isnan(c.are) else f"{100 * c.are:.2g}% ({c.flops:.2g})" for c in row]
            say(f"{most:6}  " + "  ".join(f"{text:>18}" for text in texts))
    for note in table.notes:
        say(f"note: {note}")
