"""``lossmith solve-well``: stationary states of a quantum well by a physics-informed network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say

if TYPE_CHECKING:
    from lossmith.tasks.physics import Potential

KINDS = ("infinite", "finite", "barrier", "table", "formula", "function")


@app.command("solve-well")
def solve_well(
    kind: Annotated[str, typer.Argument(help=f"The potential: {', '.join(KINDS)}.")],
    source: Annotated[
        str | None,
        typer.Argument(help="table: CSV file (x, V). formula: 'x**2'. function: file.py:name.", show_default=False),
    ] = None,
    depth: Annotated[float | None, typer.Option(help="finite: height of its sides.", show_default=False)] = None,
    height: Annotated[float | None, typer.Option(help="barrier: its height.", show_default=False)] = None,
    width: Annotated[
        float | None, typer.Option(help="Of the well or barrier; infinite: 1.", show_default=False)
    ] = None,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Walls. finite: open space; barrier: 0 1.", show_default=False),
    ] = None,
    states: Annotated[int, typer.Option(help="How many, from the ground state.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Wanted relative error of the energies.")] = 1e-4,
    kinetic: Annotated[
        float, typer.Option(help="hbar^2/2m in your units: 0.5 atomic units, 38.1 for an electron in meV and nm.")
    ] = 1.0,
    method: Annotated[
        str, typer.Option(help="projection (accurate, fast) or residual (the paper's loss, trained by Adam).")
    ] = "projection",
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps at most: 400, or 3000 (residual).", show_default=False, callback=checks.at_least(1)
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the network's weights.", callback=checks.seed)] = 0,
    plot: Annotated[bool, typer.Option("--plot", help="Write wave functions and convergence as PNG.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for levels, network and plot.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Solve -psi'' + V psi = E psi with psi = 0 at the walls: energies with error bounds, beside a classical solution.

    `lossmith solve-well finite --depth 50 --width 1 --states 3 --plot`

    `lossmith solve-well formula "x**2" --interval -7 7 --states 4`
    """
    import json

    from lossmith.files import write_picture
    from lossmith.tasks.physics import solve_schrodinger

    potential = _potential(kind, source, interval, states, depth=depth, height=height, width=width)
    levels = solve_schrodinger(
        potential,
        states=states,
        tolerance=tolerance,
        method=method,  # type: ignore[arg-type]
        kinetic=kinetic,
        max_steps=max_steps,
        seed=seed,
    )
    if out is not None:
        levels.save(out)
    picture = None
    if plot:
        picture = (out or Path()) / f"solve-well-{kind}.png"
        write_picture(levels.plot(), picture)
    if as_json:
        typer.echo(
            json.dumps(levels.to_dict() | ({"plot": str(picture)} if picture else {}), allow_nan=False, indent=1)
        )
        return
    say(levels.summary())
    say("A classical solver takes milliseconds for this; the network is here to show what a residual loss can do.")
    if picture is not None:
        say(f"plot: {picture}")


def _potential(
    kind: str, source: str | None, interval: tuple[float, float] | None, states: int, **sizes: float | None
) -> Potential:
    from lossmith.errors import InputError, did_you_mean
    from lossmith.tasks import physics

    if kind not in KINDS:
        raise InputError(f"unknown potential '{kind}': {did_you_mean(kind, KINDS)}")
    takes = {"infinite": {"width"}, "finite": {"depth", "width"}, "barrier": {"height", "width"}}.get(kind, set())
    given = {name: value for name, value in sizes.items() if value is not None}
    if strange := sorted(set(given) - takes):
        raise InputError(f"--{strange[0]} does not go with '{kind}'")
    # The infinite well has width 1 unless told otherwise.
    if missing := sorted(takes - set(given) if kind != "infinite" else ()):
        raise InputError(f"'{kind}' needs {' and '.join('--' + name for name in missing)}")
    if (source is None) != (kind in ("infinite", "finite", "barrier")):
        raise InputError(f"'{kind}' {'needs a second argument' if source is None else 'takes no second argument'}")
    if kind in ("infinite", "table") and interval is not None:
        raise InputError(f"--interval does not go with '{kind}', which has its own walls")
    if kind == "infinite":
        return physics.infinite_well(**given)
    if kind == "finite":
        return physics.finite_well(**given, interval=interval, states=states)
    if kind == "barrier":
        return physics.barrier(**given, interval=interval or (0.0, 1.0))
    assert source is not None
    if kind == "table":
        return physics.table(source)
    if interval is None:
        raise InputError(f"'{kind}' needs --interval A B, the places of the walls")
    if kind == "formula":
        return physics.formula(source, interval)
    return physics.from_function(_function(source), interval, name=source)


def _function(source: str) -> Any:
    """``name`` from ``file.py:name``."""
    import runpy

    from lossmith.cli.functions import NamedFunction
    from lossmith.errors import InputError

    path, _, name = source.rpartition(":")
    if not path or not Path(path).is_file():
        raise InputError(f"function must be written file.py:name, and the file must exist; got '{source}'")
    try:
        found = runpy.run_path(path).get(name)
    except Exception as error:
        raise InputError(f"{path} cannot be run ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise InputError(f"{path} defines no function '{name}'")
    return NamedFunction(found, source)
