"""The command line: one command per question."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lossmith import __version__
from lossmith.cli.sentences import say
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
    except (SystemExit, KeyboardInterrupt) as ended:
        # Once a command runs, typer makes this exit code of Ctrl-C.
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        say(f"\nlossmith: {_stopped(sys.argv[1:])}", err=True)
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
        if error.filename is None and error.errno is not None:
            raise
        # A library's own, such as that of a model which is on no hub, has neither.
        where = f"cannot use {error.filename}: {(error.strerror or type(error).__name__).lower()}"
        _fail(where if error.filename is not None else str(error).strip().partition("\n")[0])
    except RuntimeError as error:
        # Not imported where nothing is trained.
        trainer = sys.modules.get("lossmith.training.trainer")
        if trainer is None or not isinstance(error, trainer.NonFiniteLossError):
            raise
        _fail(f"{error}; choose a smaller learning rate, or look at these data")
    except ValueError as error:
        # A library's own complaint would need its traceback; Lossmith's checks name the argument and what was found.
        if "LOSSMITH_TRACEBACK" in os.environ or not _raised_here(error):
            raise
        _fail(str(error))


def _raised_here(error: BaseException) -> bool:
    """Whether a function of Lossmith raised it, not one that it called."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__", "")).startswith("lossmith.")


def _stopped(arguments: list[str]) -> str:
    """What becomes of work that Ctrl-C ends."""
    if arguments[:1] in (["compare"], ["study"], ["score"]) or arguments[:2] == ["rationale", "sample"]:
        return "stopped; the same command continues where it was"
    return "stopped; nothing is kept of what was not finished"


def _fail(sentence: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"lossmith: {sentence}", err=True)
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
