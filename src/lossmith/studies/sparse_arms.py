"""What arms with fewer weights need beside the dense baseline: a line for each, measured when the runs are done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError
from lossmith.files import read_json, write_json

if TYPE_CHECKING:
    from lossmith.studies.compare import Planned
    from lossmith.studies.settings import CompareSettings

_FILE = "against_dense.json"
# A large model would take longer to measure than what it tells is worth.
_LARGEST = 2_000_000_000
_MODEL_OPTIONS = ("model", "model_overrides")


def measure_sparse_arms(settings: CompareSettings, planned: list[Planned], out: Path) -> None:
    """Write the line of each finished arm with ``weights=`` into the folder of the comparison, once.

    The dense model is that of the baseline and of the same seed; an arm of another model has none.
    """
    path = out / _FILE
    lines: dict[str, str] = read_json(path) if path.exists() else {}
    baseline = next(arm for arm in settings.arms if arm.name == settings.baseline_arm())
    folders: dict[str, dict[int, Path]] = {}
    for p in planned:
        if (p.folder / "model" / "model.safetensors").exists() and (p.folder / "evaluation.safetensors").exists():
            folders.setdefault(p.run.arm, {})[p.run.seed] = p.folder
    for arm in settings.arms:
        alike = all(arm.options.get(name) == baseline.options.get(name) for name in _MODEL_OPTIONS)
        if arm.name in lines or "weights" not in arm.options or "weights" in baseline.options or not alike:
            continue
        dense = folders.get(baseline.name, {})
        seed = next((seed for seed in sorted(folders.get(arm.name, {})) if seed in dense), None)
        if seed is not None:
            lines[arm.name] = _line(dense[seed], folders[arm.name][seed], arm.name, settings.sequence_length, seed)
            write_json(path, lines)


def measured_lines(out: Path) -> list[str]:
    """What :func:`measure_sparse_arms` has written."""
    path = out / _FILE
    return list(read_json(path).values()) if path.exists() else []


def _line(dense: Path, sparse: Path, name: str, length: int, seed: int) -> str:
    import torch

    from lossmith.sparsity import compare_with_dense, file_bytes, load_checkpoint

    try:
        sizes = file_bytes(dense / "model"), file_bytes(sparse / "model")
        if max(sizes) > _LARGEST:
            raise InputError(f"models of more than {_LARGEST / 1e9:g} GB are not loaded for it")
        before: Any = load_checkpoint(dense / "model")
        after = load_checkpoint(sparse / "model")
        number = min(length, getattr(before.config, "max_position_embeddings", None) or length)
        ids = torch.randint(before.get_input_embeddings().weight.shape[0], (1, number))
        found = compare_with_dense(
            before,
            after,
            {"input_ids": ids},
            evaluate=lambda model: _examples(dense if model is before else sparse),
            metric="eval/loss",
            files=sizes,
            name=f"{name} (seed {seed})",
        )
    except (InputError, OSError, RuntimeError, ValueError) as error:
        # A finished comparison must not fail for what is said beyond it.
        return f"{name}: not measured beside the dense model: {str(error).strip().splitlines()[0]}"
    return found.summary()


def _examples(folder: Path) -> tuple[Any, Any]:
    """Mean loss of each held-out example, and how many targets it has."""
    from lossmith.training.checkpoint import load_state

    stored = load_state(folder / "evaluation.safetensors")
    targets = stored["targets"].double()
    return (stored["loss_sums"].double() / targets.clamp_min(1)).numpy(), targets.numpy()
