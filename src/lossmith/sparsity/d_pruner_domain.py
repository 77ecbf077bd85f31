"""The domain's importance of every weight: gradients while the model is fine-tuned on the domain, without an optimiser.

"Pruning as a Domain-specific LLM Extractor", NAACL 2024 Findings, arXiv 2405.06275 (released code: ``lomo.py``,
``lomo_trainer.py``); "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), 2023, arXiv
2306.09782.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.losses import cross_entropy
from lossmith.sparsity.calibration import Batch, call
from lossmith.sparsity.d_pruner import Importance, check_importance, regularized_gradient, taylor_term
from lossmith.sparsity.magnitude import block_weights
from lossmith.sparsity.restoring import check_finite

Loss = Callable[[nn.Module, Batch], Tensor]
# How often a scale of half-precision gradients is halved before a batch counts as not finite.
_HALVINGS = 16


@dataclass(frozen=True, slots=True)
class DomainImportance:
    """What :func:`dual_importance` found.

    Attributes:
        scores: by name, in the parameter's shape.
        losses: of each step's batch, before its update; NaN for one that was skipped.
        skipped: batches whose loss or gradient was not finite.
    """

    scores: Importance
    losses: tuple[float, ...]
    skipped: int


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over a batch's predicted tokens; ``labels`` are not shifted, -100 is left out."""
    if isinstance(batch, Tensor) or "input_ids" not in batch:
        raise TypeError("next_token_loss needs batches with input_ids; give a loss of your own for other models")
    logits = call(model, batch).logits[:, :-1]
    labels = batch.get("labels", batch["input_ids"])[:, 1:].to(logits.device)
    number = (labels != -100).sum()
    if not int(number):
        raise InputError("a batch has no token to predict: give texts of two tokens or more")
    return cross_entropy(logits.float(), labels).sum() / number


def dual_importance(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    general: Mapping[str, Tensor] | None,
    lam: float = 0.1,
    learning_rate: float = 0.03,
    epochs: int = 5,
    reg: Literal["code", "fisher"] = "code",
    reg_ratio: float | None = None,
    reg_in_update: bool = True,
    third_order: bool = False,
    grad_scale: float = 1.0,
    clip: float = 1.0,
    warmup: float = 0.1,
    texts: int | None = None,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    keep_finetuned: bool = False,
    loss: Loss = next_token_loss,
    progress: Callable[[int, int], None] | None = None,
) -> DomainImportance:
    r"""Sum of :func:`~lossmith.sparsity.taylor_term` over a fine-tuning on the domain with the refined gradient.

    Fused SGD (LOMO): each gradient is used and freed as soon as it is there, so that there is neither an optimiser
    state nor a whole set of gradients; a first backward pass finds the global norm, a second one updates. The learning
    rate rises from 0 over the first ``warmup`` of the steps and falls to 0 over the rest.

    Args:
        model: has its own weights again afterwards, unless ``keep_finetuned`` and no error; a copy of them is held
            meanwhile.
        batches: the domain; see :func:`~lossmith.sparsity.text_batches`.
        general: :math:`G` of every matrix, from :func:`~lossmith.sparsity.general_importance`; ``None``: the domain
            alone.
        lam, reg, reg_ratio: see :func:`~lossmith.sparsity.regularized_gradient`.
        learning_rate: the highest.
        epochs: passes over the batches.
        reg_in_update: the weights move by the refined gradient too, as in the paper; else by the plain one.
        third_order: see :func:`~lossmith.sparsity.taylor_term`.
        grad_scale: what gradients are multiplied by in the scores. With ``third_order`` the released code's is its loss
            scale, 65536 at first.
        clip: largest norm of the gradient over all parameters.
        warmup: share of the steps.
        texts: :math:`N`; by default the rows of all batches.
        targets, exclude: which matrices, see :func:`~lossmith.sparsity.block_weights`.
        keep_finetuned: leave the model as the fine-tuning made it.
        loss: mean loss of a batch, a number.
        progress: told of steps done and steps in all.

    Returns:
        A :class:`DomainImportance`. Weights that are 0 have importance 0.

    Raises:
        ValueError: fewer than two texts, an importance that is missing or of another shape (named), numbers out of
            range.
        FloatingPointError: more than a tenth of the batches have a loss or a gradient that is not finite.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = dual_importance(
    ...     net, [torch.randn(8, 4)], general=None, targets="all", loss=lambda m, x: m(x).square().mean()
    ... )
    >>> found.scores["0.weight"].shape, len(found.losses)
    (torch.Size([8, 4]), 5)
    """
    options = DescentOptions(
        lam=lam, learning_rate=learning_rate, epochs=epochs, reg=reg, reg_ratio=reg_ratio, reg_in_update=reg_in_update,
        third_order=third_order, grad_scale=grad_scale, clip=clip, warmup=warmup, texts=texts,
    )  # fmt: skip
    scored = block_weights(model, targets=targets, exclude=exclude).weights
    check_finite(scored)
    if general is not None:
        check_importance(general, scored, "general importance")
    scores = {
        name: torch.zeros_like(p, dtype=_wide(p), memory_format=torch.contiguous_format) for name, p in scored.items()
    }
    half = any(p.dtype == torch.float16 for p in model.parameters())
    state = Descent(options, count_texts(batches, texts), general or {}, scores, scale=2.0**16 if half else 1.0)
    # A matrix in several layers has several names.
    names = {id(p): name for name, p in model.named_parameters()} | {id(p): name for name, p in scored.items()}
    with _free(model, scored.values(), keep_finetuned) as parameters:
        handles = [p.register_post_accumulate_grad_hook(partial(state.take, names[id(p)])) for p in parameters]
        try:
            losses = state.run(model, batches, loss, progress)
        finally:
            for handle in handles:
                handle.remove()
    return DomainImportance(scores, losses, sum(map(math.isnan, losses)))


def schedule(progress: float, warmup: float = 0.1) -> float:
    """The learning rate as a share of the highest: up over ``warmup``, then down to 0.

    >>> [round(schedule(p), 3) for p in (0, 0.05, 0.1, 0.55, 1)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


@dataclass(frozen=True, slots=True, kw_only=True)
class DescentOptions:
    """Numbers of :func:`dual_importance`, checked."""

    lam: float = 0.1
    learning_rate: float = 0.03
    epochs: int = 5
    reg: Literal["code", "fisher"] = "code"
    reg_ratio: float | None = None
    reg_in_update: bool = True
    third_order: bool = False
    grad_scale: float = 1.0
    clip: float = 1.0
    warmup: float = 0.1
    texts: int | None = None

    def __post_init__(self) -> None:
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise ValueError(f"lam must be at least 0, got {self.lam}")
        if not (self.learning_rate >= 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be at least 0, got {self.learning_rate}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not self.clip > 0 or not 0 < self.warmup < 1 or not self.grad_scale > 0:
            raise ValueError(
                "clip and grad_scale must be above 0 and warmup in (0, 1), "
                f"got {self.clip}, {self.grad_scale} and {self.warmup}"
            )
        if self.reg not in ("code", "fisher"):
            raise ValueError(f"reg must be 'code' or 'fisher', got {self.reg!r}")
        if self.reg_ratio is not None and not (self.reg_ratio >= 0 and math.isfinite(self.reg_ratio)):
            raise ValueError(f"reg_ratio must be at least 0, got {self.reg_ratio}")


@dataclass(slots=True)
class Descent:
    """What happens to a gradient when it is there: counted for the norm, or scored, used and freed.

    Attributes:
        options: of the fine-tuning.
        texts: in all.
        general: by name; may be read from files.
        scores: zeros at first, of every matrix that is scored; what is set is what is kept.
        scale: of the loss, for gradients in half precision.
        coefficient: of clipping; ``None`` while the norm is being found.
    """

    options: DescentOptions
    texts: int
    general: Mapping[str, Tensor]
    scores: MutableMapping[str, Tensor]
    scale: float = 1.0
    learning_rate: float = 0.0
    coefficient: float | None = None
    squares: list[Tensor] = field(default_factory=list)

    def run(
        self, model: nn.Module, batches: Sequence[Batch], loss: Loss, progress: Callable[[int, int], None] | None
    ) -> tuple[float, ...]:
        """All steps; :meth:`take` must be hooked to the parameters. Returns losses, NaN where a batch was skipped."""
        steps = self.options.epochs * len(batches)
        losses: list[float] = []
        for step in range(steps):
            self.learning_rate = self.options.learning_rate * schedule(step / steps, self.options.warmup)
            losses.append(_step(model, batches[step % len(batches)], loss, self, self.options.clip))
            if progress is not None:
                progress(step + 1, steps)
            if (skipped := sum(map(math.isnan, losses))) > max(0.1 * steps, 1):
                raise FloatingPointError(
                    f"the loss or the gradient of {skipped} of {step + 1} batches was not finite: lower the "
                    "learning rate, or load the model in a type with more range"
                )
        if skipped := sum(map(math.isnan, losses)):
            warnings.warn(f"{skipped} of {steps} batches were left out: loss or gradient was not finite", stacklevel=3)
        return tuple(losses)

    @torch.no_grad()
    def take(self, name: str, parameter: Tensor) -> None:
        """The hook."""
        assert parameter.grad is not None
        options = self.options
        gradient = parameter.grad.to(_wide(parameter)) / self.scale
        parameter.grad = None
        scaled = gradient * options.grad_scale
        if (general := self.general.get(name)) is not None:
            scaled = regularized_gradient(
                scaled, general.to(scaled), texts=self.texts, learning_rate=self.learning_rate, lam=options.lam,
                reg=options.reg, reg_ratio=options.reg_ratio,
            )  # fmt: skip
        refined = scaled / options.grad_scale if options.reg_in_update else gradient
        if self.coefficient is None:
            self.squares.append(refined.square().sum().double().cpu())
            return
        weight = parameter.to(gradient.dtype)
        if name in self.scores:
            self.scores[name] += taylor_term(weight, scaled, texts=self.texts, third_order=options.third_order)
        parameter.copy_(weight - self.learning_rate * self.coefficient * refined)

    def norm(self) -> float:
        """Of all gradients since the last call, whatever their order."""
        total = float(torch.stack(self.squares).sort().values.sum().sqrt()) if self.squares else 0.0
        self.squares.clear()
        return total


def _step(model: nn.Module, batch: Batch, loss: Loss, state: Descent, clip: float) -> float:
    """Two backward passes; returns the loss, NaN where the batch was skipped."""
    for _ in range(_HALVINGS + 1):
        state.coefficient = None
        value = loss(model, batch)
        if value.ndim or not value.requires_grad:
            raise ValueError(f"the loss must be one number with a gradient, got shape {tuple(value.shape)}")
        found = float(value.detach())
        if not math.isfinite(found):
            return math.nan
        (value * state.scale).backward()
        norm = state.norm()
        if math.isfinite(norm):
            break
        if state.scale <= 1:
            return math.nan
        state.scale /= 2
    else:
        return math.nan
    state.coefficient = min(1.0, clip / (norm + 1e-6))
    (loss(model, batch) * state.scale).backward()
    return found


@contextmanager
def _free(model: nn.Module, scored: Any, keep: bool) -> Iterator[list[nn.Parameter]]:
    """Parameters that train, without dropout; afterwards all is as before, but weights if ``keep`` and no error."""
    was_training, required = model.training, {p: p.requires_grad for p in model.parameters()}
    for parameter in scored:
        parameter.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = [p.detach().clone() for p in parameters]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    model.eval()
    try:
        with torch.enable_grad():
            yield parameters
        if keep:
            own.clear()
    finally:
        model.train(was_training)
        with torch.no_grad():
            # None are left where the new weights are to stay.
            for parameter, before in zip(parameters, own, strict=False):
                parameter.copy_(before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def count_texts(batches: Sequence[Batch], texts: int | None = None) -> int:
    """Those of a domain: as told, or the rows of all batches."""
    number = texts if texts is not None else sum(_rows(batch) for batch in batches)
    if number < 2:
        raise InputError(f"a domain needs at least 2 texts, got {number}")
    return number


def _rows(batch: Batch) -> int:
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    return int(first.shape[0])
