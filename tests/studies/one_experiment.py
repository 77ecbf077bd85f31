"""One experiment of a study at once, without the runs around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.studies.study import Study


def smoke_experiment(
    study: Study, toy: Mapping[str, Any], arm: str, folder: Path, seed: int = 0, **changes: Any
) -> Any:
    """Prepare and run one arm at ``smoke``, with the options ``toy`` and ``changes`` over those of the study."""
    options = {**study.options["smoke"], **toy, **changes}
    assert study.prepare is not None
    assert study.experiment is not None
    given = {**options, **study.prepare(options, folder)}
    return study.experiment(arm, seed, given, folder / "runs" / arm / f"seed-{seed}")
