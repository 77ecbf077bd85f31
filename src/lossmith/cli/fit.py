"""``lossmith fit``, ``lossmith predict`` and ``lossmith plan``: laws on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app
from lossmith.errors import InputError

if TYPE_CHECKING:
    from lossmith.laws import Fitted, Law, Reading

_COLUMNS, _UNITS, _FIT, _OUTPUT = "Columns", "Units and rows", "Fit", "Output"


def _in(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@app.command()
def fit(
    source: Annotated[
        Path, typer.Argument(help="CSV, TSV, JSON, JSONL or Parquet of losses, or a folder of run records.")
    ],
    law: Annotated[str, typer.Option(help="Name of the law, or name(option=value).")] = "chinchilla",
    loss: Annotated[str | None, _in(_COLUMNS, "Header of the loss.")] = None,
    params: Annotated[str | None, _in(_COLUMNS, "Header of the number of parameters; or the number.")] = None,
    tokens: Annotated[str | None, _in(_COLUMNS, "Header of the tokens seen; or the number.")] = None,
    flops: Annotated[str | None, _in(_COLUMNS, "Header of the FLOPs, where tokens are to be computed.")] = None,
    column: Annotated[
        list[str] | None, _in(_COLUMNS, "Any quantity of the law as name=HEADER. Repeat.", "--column")
    ] = None,
    run: Annotated[str | None, _in(_COLUMNS, "Header that names the run of a row; several joined by +.")] = None,
    unit: Annotated[str | None, _in(_UNITS, "Of the loss: nats, bits or perplexity.")] = None,
    log10: Annotated[list[str] | None, _in(_UNITS, "A quantity given as log10. Repeat.")] = None,
    scale: Annotated[list[str] | None, _in(_UNITS, "Factor of a quantity: tokens=1e9. Repeat.")] = None,
    where: Annotated[list[str] | None, _in(_UNITS, "Only rows with header=value. Repeat.")] = None,
    above: Annotated[
        list[str] | None, _in(_UNITS, "Only rows whose quantity is larger: tokens=10e9 drops early training. Repeat.")
    ] = None,
    objective: Annotated[
        str | None, _in(_FIT, "huber (log residuals, threshold 1e-3; default) or squares (raw loss).")
    ] = None,
    schedule: Annotated[
        list[str] | None,
        _in(
            _COLUMNS,
            "Schedule of runs whose learning rate was not logged: cosine(peak=3e-4); or RUN: cosine(...). Repeat.",
        ),
    ] = None,
    fix: Annotated[list[str] | None, _in(_FIT, "A parameter that is given: alpha=0.35. Repeat.")] = None,
    by: Annotated[
        str | None, _in(_FIT, "Header of families: one law for each; --out is then a folder.", "--by")
    ] = None,
    backtest: Annotated[
        bool, _in(_FIT, "Also hide the largest fifth of the runs, predict them, and say how well.", "--backtest")
    ] = False,
    jobs: Annotated[int, _in(_FIT, "Processes, for many families [1].")] = 1,
    bootstrap: Annotated[int, _in(_FIT, "Refits on resampled runs, for intervals [200]; 0 for none.")] = 200,
    seed: Annotated[int, _in(_FIT, "Of the resampling [0].")] = 0,
    out: Annotated[Path | None, _in(_OUTPUT, "JSON file for the fitted law; default fitted.json.")] = None,
    plot: Annotated[Path | None, _in(_OUTPUT, "Picture of the fit: a .png, .svg or .pdf file.")] = None,
    as_json: Annotated[bool, _in(_OUTPUT, "Print for machines.", "--json")] = False,
) -> None:
    """Fit a law to measured losses: parameters with intervals, and what the data cannot determine.

    **Examples**

    `lossmith fit points.csv --loss loss --params N --tokens D`

    `lossmith fit runs/ --law chinchilla --out fitted.json --plot fit.png`

    `lossmith fit curves/ --law lr-annealing`
    """
    from lossmith.laws import Reading
    from lossmith.laws.plots import check_picture

    headers = {"loss": loss, "params": params, "tokens": tokens, "flops": flops}
    named = {name: header for name, header in headers.items() if header is not None}
    reading = Reading(
        columns={**named, **pairs(column, "--column")},
        run=run,
        unit=unit,
        log10=tuple(log10 or ()),
        scale=numbers(scale, "--scale"),
        where=pairs(where, "--where"),
        above=numbers(above, "--above"),
    )
    built = build_law(law, objective, numbers(fix, "--fix"))
    if schedule and not hasattr(built, "areas"):
        raise InputError(f"--schedule is for laws of learning-rate schedules; {built.name} is none")
    if above and hasattr(built, "areas"):
        raise InputError(f"--above is for laws of quantities; {built.name} reads whole curves")
    extra = {"schedules": _schedules(schedule)} if schedule else {}
    if by is not None:
        if extra or plot is not None or backtest:
            raise InputError("--by goes with neither --schedule nor --plot nor --backtest")
        _fit_families(built, source, by, reading, bootstrap, seed, jobs, out, as_json)
        return
    if plot is not None:
        check_picture(plot)
    fitted = _fit(built, source, reading, bootstrap, seed, as_json, **extra)
    target = out if out is not None else Path("fitted.json")
    tested = None
    if backtest:
        from lossmith.laws import backtest as run_backtest

        tested = run_backtest(built, fitted.table, bootstrap=bootstrap or 200, seed=seed)
    fitted.to_json(target)
    if plot is not None:
        fitted.plot(plot)
    if as_json:
        shown = {**_short(fitted), "file": str(target)}
        if tested is not None:
            names = ("coverage", "plain_coverage", "error", "best_seen_error", "scale_up")
            shown["backtest"] = {"points": len(tested.hidden), **{name: getattr(tested, name) for name in names}}
        typer.echo(json.dumps(shown, indent=2))
        return
    typer.echo(fitted.summary())
    if tested is not None:
        typer.echo(tested.text())
    typer.echo(f"fitted law: {target}{f', plot: {plot}' if plot is not None else ''}")


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
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the schedule.", show_default=False)] = None,
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
    typer.echo(f"{'loss':>10}{limits}   at")
    shown = rows if len(rows) <= 24 else [rows[round(i * (len(rows) - 1) / 19)] for i in range(20)]
    for row in shown:
        span = "" if row["low"] is None else f"  {row['low']:.4f} to {row['high']:.4f}"
        typer.echo(f"{row['loss']:10.4f}{span}   {row['at']}")
    if len(shown) < len(rows):
        typer.echo(
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
        raise InputError(f"law {law.law.name}: {error}".replace("plan() got an ", "")) from None
    if plot is not None:
        _plot_plan(law, found, plot)
    if as_json:
        from lossmith.files import finite_or_none

        typer.echo(json.dumps(finite_or_none(dataclasses.asdict(found)), indent=2))
        return
    typer.echo(found.text())


def _plot_plan(law: Fitted, found: Any, path: Path) -> None:
    from lossmith.laws import Plan
    from lossmith.laws.plots import plan_figure, save

    if not isinstance(found, Plan):
        raise InputError("--plot shows a plan for --flops or --loss, without --what-if")
    save(plan_figure(law, found), path)


def _short(fitted: Fitted) -> dict[str, Any]:
    """What to print of a fit for machines."""
    value = json.loads(fitted.to_json())
    kept = ("law", "options", "parameters", "objective", "calibration", "warnings")
    return {**{key: value[key] for key in kept}, "intervals": fitted.parameter_intervals()}


def _fit_families(
    law: Law,
    source: Path,
    by: str,
    reading: Reading,
    bootstrap: int,
    seed: int,
    jobs: int,
    out: Path | None,
    quiet: bool,
) -> None:
    """One law for each family: a file each, and a table of parameters."""
    import re

    from lossmith.laws import fit_groups

    if bootstrap < 0:
        raise InputError(f"--bootstrap must not be negative, got {bootstrap}")
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    folder = out if out is not None else Path("fitted")
    if folder.suffix == ".json":
        raise InputError(f"--out must be a folder with --by, got {folder}")
    found = fit_groups(law, source, by, reading=reading, bootstrap=bootstrap, seed=seed, jobs=jobs)
    for family, fitted in found.items():
        fitted.to_json(folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', family)}.json")
    if quiet:
        typer.echo(json.dumps({family: _short(fitted) for family, fitted in found.items()}, indent=2))
        return
    names = law.names
    width = max(len(by), *(len(family) for family in found))
    typer.echo(f"{by:{width}}  {'points':>6}  {'error':>7}  " + "  ".join(f"{name:>10}" for name in names))
    for family, fitted in found.items():
        values = "  ".join(f"{fitted.parameters[name]:10.4g}" for name in names)
        error = abs(fitted.residuals)
        median = (
            f"{100 * sorted(error)[len(error) // 2]:.2g}%"
            if law.objective.residual == "log"
            else (f"{sorted(error)[len(error) // 2]:.3g}")
        )
        typer.echo(f"{family:{width}}  {len(fitted.table):6}  {median:>7}  {values}")
    for family, fitted in found.items():
        for warning in fitted.warnings:
            typer.echo(f"{family}: {warning}")
    typer.echo(f"fitted laws: {folder}/")


def build_law(text: str, objective: str | None = None, fixed: Mapping[str, float] | None = None) -> Law:
    """The law of ``name`` or ``name(option=value)``; names are written with dashes or underscores."""
    from lossmith.laws import HUBER_LOG, SQUARES
    from lossmith.registry import LAWS, Spec, parse_spec

    head, bracket, rest = text.partition("(")
    spec = parse_spec(head.strip().replace("-", "_") + bracket + rest)
    options: dict[str, Any] = dict(spec.options)
    kinds = {"huber": HUBER_LOG, "squares": SQUARES}
    if objective is not None:
        if objective not in kinds:
            raise InputError(f"--objective must be huber or squares, got '{objective}'")
        options["objective"] = kinds[objective]
    if fixed:
        options["fixed"] = dict(fixed)
    return LAWS.build(Spec(spec.name.replace("_", "-"), spec.arguments, options))


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


def _fit(law: Law, source: Path, reading: Reading, bootstrap: int, seed: int, quiet: bool, **extra: Any) -> Fitted:
    from rich.console import Console
    from rich.progress import Progress

    if bootstrap < 0:
        raise InputError(f"--bootstrap must not be negative, got {bootstrap}")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("refits", total=bootstrap or None)
        return law.fit(
            source,
            reading=reading,
            bootstrap=bootstrap,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **extra,
        )


def _fitted(path: Path) -> Fitted:
    from lossmith.laws import Fitted

    return Fitted.from_json(str(path))


def _example(law: Law) -> str:
    names = [column.name for column in law.needed if column.name != law.target]
    return '"' + ", ".join(f"{name}=..." for name in names) + '"'


def _inputs(text: str) -> dict[str, Any]:
    from lossmith.registry import parse_assignments

    return parse_assignments(text)


def _schedules(given: list[str]) -> dict[str, str]:
    """``RUN: schedule`` pairs; a schedule without a run is for all others."""
    found = {}
    for text in given:
        run, colon, rest = text.partition(":")
        named = bool(colon) and "(" not in run
        found[run.strip() if named else "*"] = rest.strip() if named else text
    return found


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
        typer.echo(f"caution: {caution}", err=True)


def pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    """``name=value`` pairs of a repeated option, as text."""
    pairs: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(f"{option} takes name=value, got '{text}'")
        pairs[name.strip()] = value.strip()
    return pairs


def numbers(given: list[str] | None, option: str) -> dict[str, float]:
    """``name=number`` pairs of a repeated option."""
    numbers = {}
    for name, value in pairs(given, option).items():
        try:
            numbers[name] = float(value)
        except ValueError:
            raise InputError(f"{option} takes name=number, got '{name}={value}'") from None
    return numbers


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    import io

    from lossmith.files import write_text

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["at", "loss", "low", "high"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
