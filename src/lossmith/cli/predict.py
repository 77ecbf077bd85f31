"""``lossmith predict`` and ``lossmith plan``: what a fitted law says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.fit import pairs
from lossmith.cli.sentences import say
from lossmith.errors import InputError
from lossmith.files import check_file_place

if TYPE_CHECKING:
    from lossmith.laws import Fitted, Law


@app.command()
def predict(
    fitted: Annotated[Path, typer.Argument(help="What `lossmith fit` wrote.")],
    at: Annotated[
        list[str] | None,
        typer.Option(help="Inputs of the law: params=70e9, tokens=1.4e12. Repeat.", show_default=False),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="A learning-rate schedule, for laws that take one: wsd(peak=3e-4, ...). Repeat.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps of the schedule.", show_default=False, callback=checks.at_least(1)),
    ] = None,
    level: Annotated[float, typer.Option(help="Share of cases that the limits are to hold.")] = 0.9,
    out: Annotated[Path | None, typer.Option(help="CSV file for every predicted value.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Predict the loss of a run that is not made yet, with limits.

    **Examples**

    `lossmith predict fitted.json --at "params=70e9, tokens=1.4e12"`

    `lossmith predict fitted.json --schedule "wsd(peak=3e-4, warmup=2000, stable=20000, decay=4000)"`
    """
    law = _fitted(fitted)
    if schedule and not hasattr(law.law, "areas"):
        raise InputError(f"--schedule is for laws of learning-rate schedules; {fitted} holds {law.law.name}")
    if steps is not None and not schedule:
        raise InputError("--steps belongs to --schedule")
    if out is not None:
        check_file_place(out, fitted)
    asked: list[dict[str, Any]] = [_inputs(text) for text in at or []]
    extra = {"steps": steps} if steps is not None else {}
    for text in schedule or []:
        asked.append({"schedule": text, **extra})
    for inputs in asked:
        _say_where(law, inputs, 1000 if out is not None else 20)
    if not asked:
        raise InputError(f"say what to predict: --at {_example(law.law)}, or --schedule for a law of schedules")
    rows = [row for inputs in asked for row in prediction_rows(law, inputs, level)]
    if out is not None:
        _write_csv(out, rows)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    limits = "" if rows[0]["low"] is None else f"   {100 * level:g}% limits"
    say(f"{'loss':>10}{limits}   at")
    shown = rows if len(rows) <= 24 else [rows[round(i * (len(rows) - 1) / 19)] for i in range(20)]
    for row in shown:
        span = "" if row["low"] is None else f"  {row['low']:.4f} to {row['high']:.4f}"
        say(f"{row['loss']:10.4f}{span}   {row['at']}")
    if len(shown) < len(rows):
        say(
            f"{len(shown)} of {len(rows)} values shown{f'; all are in {out}' if out else '; --out FILE.csv writes all'}"
        )


@app.command()
def plan(
    fitted: Annotated[Path, typer.Argument(help="What `lossmith fit` wrote.")],
    flops: Annotated[float | None, typer.Option(help="Budget of training FLOPs.", show_default=False)] = None,
    loss: Annotated[float | None, typer.Option(help="A loss to reach, instead.", show_default=False)] = None,
    params: Annotated[float | None, typer.Option(help="A size that is given.", show_default=False)] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens that are given.", show_default=False)] = None,
    level: Annotated[float | None, typer.Option(help="Of the limits [0.9].", show_default=False)] = None,
    mixture: Annotated[
        bool,
        typer.Option("--mixture", help="The critical mixture ratio, by a fitted critical-mixture law."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, for a law of schedules.", show_default=False)
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help='A training to rank: "params=7e9, tokens=2e12", with --flops one of them or "ratio=20" is enough; '
            "for a law of schedules a schedule. Repeat.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other wish that the law knows, as key=value. Repeat.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of what the budget gives by size: a .png, .svg or .pdf file.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """The best training for a budget, or the cheapest for a goal, by a fitted law.

    **Examples**

    `lossmith plan fitted.json --flops 1e21`

    `lossmith plan fitted.json --loss 2.2`

    `lossmith plan fitted.json --flops 1e21 --what-if "params=1e9" --what-if "ratio=20"`

    `lossmith plan fitted.json --mixture --tokens 20e9 --set tolerance=0.03`

    `lossmith plan fitted.json --steps 24000 --what-if "cosine(peak=3e-4)" --what-if "wsd(peak=3e-4)"`
    """
    law = _fitted(fitted)
    if mixture and law.law.name != "critical-mixture":
        raise InputError(f"--mixture needs a fitted critical-mixture law; {fitted} holds {law.law.name}")
    wishes: dict[str, Any] = {"flops": flops, "loss": loss, "params": params, "tokens": tokens, "level": level}
    wishes |= {"steps": steps, "what_if": what_if}
    wishes = {name: value for name, value in wishes.items() if value is not None} | pairs(set_, "--set")
    try:
        found = law.plan(**wishes)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise InputError(f"law {law.law.name}: {error}") from None
        raise InputError(f"a plan by the law {law.law.name} takes no '{unknown[1]}'") from None
    if plot is not None:
        _plot_plan(law, found, plot)
    if as_json:
        from lossmith.files import finite_or_none

        typer.echo(json.dumps(finite_or_none(dataclasses.asdict(found)), indent=2))
        return
    say(found.text())


def _plot_plan(law: Fitted, found: Any, path: Path) -> None:
    from lossmith.laws import Plan
    from lossmith.laws.plots import plan_figure, save

    if not isinstance(found, Plan):
        raise InputError("--plot shows a plan for --flops or --loss, without --what-if")
    save(plan_figure(law, found), path)


def prediction_rows(fitted: Fitted, inputs: Mapping[str, Any], level: float) -> list[dict[str, Any]]:
    """One row per predicted value: where, the loss, and its limits (``None`` without bootstrap refits)."""
    import numpy as np

    if not 0 < level < 1:
        raise InputError(f"--level must lie between 0 and 1, got {level:g}")
    labels = fitted.law.labels(**inputs)
    if len(fitted.samples):
        found = fitted.interval(level, **inputs)
        low, value, high = (np.atleast_1d(part).ravel() for part in (found.low, found.value, found.high))
        return [
            {"at": at, "loss": float(v), "low": float(a), "high": float(b)}
            for at, v, a, b in zip(labels, value, low, high, strict=True)
        ]
    value = np.atleast_1d(fitted.predict(**inputs)).ravel()
    return [{"at": at, "loss": float(v), "low": None, "high": None} for at, v in zip(labels, value, strict=True)]


def _fitted(path: Path) -> Fitted:
    from lossmith.laws import Fitted

    return Fitted.from_json(str(path))


def _example(law: Law) -> str:
    names = [column.name for column in law.needed if column.name != law.target]
    return '"' + ", ".join(f"{name}=..." for name in names) + '"'


def _inputs(text: str) -> dict[str, Any]:
    from lossmith.registry import parse_assignments

    return parse_assignments(text)


def _say_where(fitted: Fitted, inputs: dict[str, Any], points: int) -> None:
    """Predict along a schedule at some of its steps, the last among them, and warn where the law was not fitted."""
    if "schedule" not in inputs or not hasattr(fitted.law, "areas"):
        return
    import numpy as np

    from lossmith.laws import schedule
    from lossmith.laws.schedule_plan import cautions

    made = schedule(inputs["schedule"])
    total = len(made.values(inputs.get("steps")))
    inputs.setdefault("at", np.unique(np.linspace(total / points, total, points).round().clip(1)))
    for caution in cautions(fitted, [made], inputs.get("steps")):
        say(f"caution: {caution}", err=True)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    import io

    from lossmith.files import write_text

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["at", "loss", "low", "high"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
