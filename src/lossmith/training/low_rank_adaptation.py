"""LoRA: training two thin matrices beside every linear layer, and putting them into the weights at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossmith.errors import InputError


class LowRankAdaptation:
    r"""Adapters in the linear layers of a model, which alone are trained; made by the package ``peft``.

    .. math:: W' = W + \frac{\alpha}{r} B A, \qquad A \in \mathbb{R}^{r \times in},\ B = 0 \in \mathbb{R}^{out \times r}

    The model stays what it was: the same class, the same outputs until the first step.

    Args:
        model: changed in place; its own parameters are frozen.
        rank: ``r``.
        alpha: by default ``2 r``.
        dropout: before ``A``.
        target_modules: names of layers, or ``all-linear``: all but the output layer.
        seed: of ``A``.

    Raises:
        InputError: ``peft`` is missing, a rank below 1, or no such layers.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.

    >>> from lossmith.training.models import build_model
    >>> adaptation = LowRankAdaptation(build_model("nano", vocab_size=300, sequence_length=16), rank=2)
    >>> adaptation.trainable
    1280
    >>> model = adaptation.merge()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        seed: int = 0,
    ):
        try:
            import peft
        except ImportError:
            raise InputError("LoRA needs peft: pip install 'lossmith[lora]'") from None
        if rank < 1:
            raise InputError(f"the rank of LoRA must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise InputError(f"the dropout of LoRA must be at least 0 and less than 1, got {dropout}")
        options: dict[str, Any] = {
            "r": rank,
            "lora_alpha": 2 * rank if alpha is None else alpha,
            "lora_dropout": dropout,
            "target_modules": target_modules,
            "task_type": "CAUSAL_LM",
        }
        devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            try:
                self._wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(**options))  # type: ignore[arg-type]
            except ValueError as error:
                raise InputError(f"LoRA: {str(error).splitlines()[0]}") from None
        # The model itself, not the wrapper, whose forward hides what a model takes.
        self.model: Any = self._wrapped.base_model.model
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the two matrices of each layer, as ``peft.PeftModel.from_pretrained`` reads them."""
        self._wrapped.save_pretrained(str(folder))

    def merge(self) -> nn.Module:
        """Put the adapters into the weights; the model is an ordinary one again, all of it trainable."""
        merged: Any = self._wrapped.merge_and_unload()
        merged.requires_grad_(True)
        return merged  # type: ignore[no-any-return]
