"""What every ``lossmith prune`` ends with: the pruned model beside the dense one, measured here."""

from __future__ import annotations

import shutil
from pathlib import Path

from lossmith.cli.sentences import say
from lossmith.errors import InputError


def check_text(data: str | None) -> None:
    """Refuse text that cannot be read before anything is pruned."""
    if data is not None:
        from lossmith.data import read_corpus

        next(iter(read_corpus(data)), None)


def finish(
    model: str,
    out: Path,
    *,
    compact: bool,
    measure: bool,
    data: str | None = None,
    texts: int | None = None,
    max_length: int | None = None,
) -> None:
    """Leave the zeros out of the files if that is wanted, and say what the pruning is worth on this machine.

    With ``texts=0`` the loss is left out.
    """
    if compact:
        say(_make_compact(out))
    if measure:
        try:
            say(_measured(model, out, data, texts, max_length))
        except InputError as error:
            # The pruned model is there.
            reason = str(error)
            say(reason if reason.startswith("not measured") else f"not measured: {reason}")
    if not compact:
        say("the file holds its zeros: --compact leaves them out, and --expand puts them back")
    say(f"model: {out}")


def expand(folder: str, out: Path | None) -> None:
    """``--expand``."""
    from lossmith.sparsity import expand_compact

    if out is None:
        raise InputError("--out FOLDER says where the plain model goes")
    say(f"model: {expand_compact(folder, out)}")


def _make_compact(out: Path) -> str:
    from lossmith.sparsity import save_compact

    plain = out.with_name(f".{out.name}.plain")
    shutil.rmtree(plain, ignore_errors=True)
    out.rename(plain)
    try:
        report = save_compact(plain, out)
    except BaseException:
        plain.rename(out)
        raise
    shutil.rmtree(plain)
    return report.summary()


def _measured(model: str, out: Path, data: str | None, texts: int | None, max_length: int | None) -> str:
    from lossmith.sparsity.measured_checkpoint import compare_checkpoints

    if not Path(model).is_dir():
        raise InputError(f"not measured: {model} is no folder")
    found = compare_checkpoints(
        model,
        out,
        data=data,
        texts=32 if texts is None else texts,
        max_length=128 if max_length is None else max_length,
    )
    return found.summary()
