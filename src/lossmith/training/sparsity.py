"""Pruning while training, in the Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from lossmith.errors import InputError
from lossmith.sparsity import SparsePretraining
from lossmith.training.checkpoint import load_state, save_state

_FILE = "sparsity.safetensors"


class SparsityCallback(TrainerCallback):
    """Prunes the Trainer's model by a schedule, and keeps pruned weights at zero.

    Args:
        sparsity: what is pruned, and when; attached when training begins, unless it is already.

    - Works in lossmith's Trainer and in ``transformers.Trainer``. Lossmith's counts FLOPs with the weights that are
      active and logs their number as ``parameters`` (all matrices but input embeddings).
    - Checkpoints hold the masks (``sparsity.safetensors``); a resumed run goes on bit for bit.
    - Several processes prune the same weights, since they hold the same weights. FSDP and DeepSpeed, which cut matrices
      into pieces, are refused.

    Example:
        ``Trainer(model, args, callbacks=[SparsityCallback(sparse_pretraining(final=0.5))], ...)``
    """

    def __init__(self, sparsity: SparsePretraining):
        if not isinstance(sparsity, SparsePretraining):
            raise TypeError(f"sparsity must be a SparsePretraining, got {type(sparsity).__name__}")
        self.sparsity = sparsity
        self._checkpoint: Path | None = None

    @property
    def removed(self) -> int:
        """Weights that are pruned now."""
        return self.sparsity.number - self.sparsity.active if self.sparsity.attached else 0

    def resume_from(self, checkpoint: str | Path) -> None:
        """The checkpoint whose masks are to be taken when training begins."""
        self._checkpoint = Path(checkpoint)

    def save_into(self, checkpoint: str | Path) -> None:
        """Write the masks into a checkpoint's folder."""
        save_state(self.sparsity.state(), Path(checkpoint) / _FILE)

    def before_step(self, step: int) -> None:
        """Prune, if it is time."""
        self.sparsity.before_step(step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the model, or continue from the checkpoint's masks."""
        if args.fsdp or args.deepspeed:
            raise InputError("pruning while training works on whole matrices: use it without FSDP and DeepSpeed")
        if not self.sparsity.attached:
            self.sparsity.attach(kwargs["model"], state.max_steps)
        if state.global_step == 0:
            return
        folder = self._checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if (folder / _FILE).exists():
            self.sparsity.load_state(load_state(folder / _FILE))
        elif self.sparsity.begins < state.global_step:
            warnings.warn(
                f"{folder} has no {_FILE}: it was not written by a run that prunes; what is due is pruned at once",
                stacklevel=2,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, if it is time and nobody has asked before."""
        self.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put pruned weights back to zero."""
        self.sparsity.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In ``transformers.Trainer``, whose checkpoints do not know of masks."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (folder / _FILE).exists():
            self.save_into(folder)
