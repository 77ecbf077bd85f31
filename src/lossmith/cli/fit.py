"""``lossmith fit``: laws on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say
from lossmith.errors import InputError

if TYPE_CHECKING:
    from lossmith.laws import Fitted, Law, Reading

_COLUMNS, _UNITS, _FIT, _OUTPUT = "Columns", "Units and rows", "Fit", "Output"


def _in(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


@app.command()
def fit(
    source: Annotated[
        Path, typer.Argument(help="CSV, TSV, JSON, JSONL or Parquet of losses, or a folder of run records.")
    ],
    law: Annotated[
        str,
        typer.Option(
            help="chinchilla, tied-chinchilla, tokens, width, lr-annealing, lr-annealing-size, critical-mixture, "
            "average-parameter; or name(option=value)."
        ),
    ] = "chinchilla",
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
    seed: Annotated[int, _in(_FIT, "Of the resampling [0].", callback=checks.seed)] = 0,
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
    from lossmith.files import check_file_place
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
    target = out if out is not None else Path("fitted.json")
    check_file_place(target, source)
    fitted = _fit(built, source, reading, bootstrap, seed, as_json, **extra)
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
    say(fitted.summary())
    if tested is not None:
        say(tested.text())
    say(f"fitted law: {target}{f', plot: {plot}' if plot is not None else ''}")


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
    say(f"{by:{width}}  {'points':>6}  {'error':>7}  " + "  ".join(f"{name:>10}" for name in names))
    for family, fitted in found.items():
        values = "  ".join(f"{fitted.parameters[name]:10.4g}" for name in names)
        error = abs(fitted.residuals)
        median = (
            f"{100 * sorted(error)[len(error) // 2]:.2g}%"
            if law.objective.residual == "log"
            else (f"{sorted(error)[len(error) // 2]:.3g}")
        )
        say(f"{family:{width}}  {len(fitted.table):6}  {median:>7}  {values}")
    for family, fitted in found.items():
        for warning in fitted.warnings:
            say(f"{family}: {warning}")
    say(f"fitted laws: {folder}/")


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


def _schedules(given: list[str]) -> dict[str, str]:
    """``RUN: schedule`` pairs; a schedule without a run is for all others."""
    found = {}
    for text in given:
        run, colon, rest = text.partition(":")
        named = bool(colon) and "(" not in run
        found[run.strip() if named else "*"] = rest.strip() if named else text
    return found


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
            if not math.isfinite(numbers[name]):
                raise ValueError
        except ValueError:
            raise InputError(f"{option} takes name=number, got '{name}={value}'") from None
    return numbers
