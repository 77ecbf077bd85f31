"""The command line: one command per question."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lossmith import __version__
from lossmith.errors import InputError, is_disk_full

app = typer.Typer(
    name="lossmith",
    help="Which loss, on which data, with how many weights, how low will it get: compare ideas under an equal budget.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lossmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, never a traceback."""
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if is_disk_full(error):
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"the disk is full{where}; free some space and run the same command again to continue")
        if isinstance(error, PermissionError):
            _fail(f"no permission to use {error.filename}")
        raise


def _fail(sentence: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"lossmith: {sentence}", file=sys.stderr)
    sys.exit(2)


# The commands register themselves.
from lossmith.cli import (  # noqa: E402, F401
    adapt,
    advise,
    compare,
    curate,
    distill,
    fit,
    pairs,
    predict,
    probe,
    prune,
    rationale,
    recommend,
    score,
    select,
    solve_well,
    study,
    tag,
    visual,
)
