"""What several arms of a study need alike, such as a pre-trained model, is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.files import read_json, replacing, write_json
from lossmith.training.record import locked

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = 24 * 3600.0


def tensors_once(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` makes, read from the ``.safetensors`` file ``path`` if another arm has made it already.

    Arms that ask at once wait for the first. The file appears whole or not at all; an arm that is killed while it
    makes it leaves the work to the next. The first arm, too, reads the file, so that all see the same bits.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "seed-0.safetensors"
    >>> [tensors_once(path, lambda: {"a": torch.tensor([value])})["a"].item() for value in (1.0, 2.0)]
    [1.0, 1.0]
    """
    from safetensors.torch import load_file, save_file

    with locked(path.with_suffix(""), wait_seconds=_PATIENCE):
        if not path.exists():
            made = make()
            with replacing(path) as temporary:
                save_file({name: value.contiguous() for name, value in made.items()}, temporary)
    return load_file(path)


def json_once(path: Path, make: Callable[[], Any]) -> Any:
    """The same for the JSON file ``path``: what was measured, or what it cost to make the files beside it.

    Those files are complete where this one exists: ``make`` writes them before it returns. As JSON has it, tuples come
    back as lists and numbers that are not finite as ``None``.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "seed-0" / "cost.json"
    >>> [json_once(path, lambda: {"tokens": tokens})["tokens"] for tokens in (1, 2)]
    [1, 1]
    """
    with locked(path.with_suffix(""), wait_seconds=_PATIENCE):
        if not path.exists():
            write_json(path, make())
    return read_json(path)
