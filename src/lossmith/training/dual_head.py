"""Dual-head distillation: labels teach one head, the teacher's logits another, and both the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.heads.dual import DualHead, dual_head
from lossmith.registry import Spec
from lossmith.training.distillation import Distillation
from lossmith.training.objectives import (
    EXAMPLE_WEIGHTS,
    Batch,
    LossFunction,
    accepted_inputs,
    output_logits,
    shifted,
    unwrapped,
)
from lossmith.training.trainer import Trainer


class DualHeadDistillation(Distillation):
    r"""An objective: labels for the main head, the teacher's logits for the auxiliary one.

    .. math:: \ell_i = \gamma\, \mathrm{CE}(s^1_i, y_i) + \alpha\, \mathrm{loss}(s^2_i, t_i)

    The student needs a :class:`lossmith.heads.DualHead` (:func:`lossmith.heads.attach_dual_head`). Gradients of both
    parts reach the backbone, neither reaches the other's head. Evaluation and inference use the main head only.

    Args:
        teacher: see :class:`Distillation`.
        loss: any distillation loss; the paper's is ``binary_kl_norm`` at temperature 2.
        alpha: weight of the teacher's part; ``1`` for about a hundred classes, ``0.1`` for a thousand (the loss sums
            over classes). At 0 the auxiliary head is not even run: the plain run, bit for bit.
        gamma: weight of the labels' part.
        heads: ``"dual"``, or ``"single"``: both losses on the model's only head, what the paper warns of.
        label_loss: see :class:`Distillation`.
        task: see :class:`Distillation`. Full logits are held, also for language models.
        cache: see :class:`Distillation`.
        **options: of ``loss``.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024,
    arXiv 2411.08937.

    >>> from lossmith.heads import attach_dual_head
    >>> student, teacher = nn.Sequential(nn.Linear(3, 4)), nn.Linear(3, 4)
    >>> _ = attach_dual_head(student)
    >>> objective = DualHeadDistillation(teacher, alpha=1.0)
    >>> objective(student, {"input": torch.zeros(2, 3), "labels": torch.tensor([0, 3])}).shape
    torch.Size([2])
    """

    def __init__(
        self,
        teacher: nn.Module,
        loss: str | Spec | Callable[..., Tensor] = "binary_kl_norm",
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        heads: Literal["dual", "single"] = "dual",
        label_loss: str | Spec | LossFunction = "cross_entropy",
        task: Literal["auto", "next_token", "classification"] = "auto",
        cache: str | Path | None = None,
        **options: Any,
    ):
        if heads not in ("dual", "single"):
            raise ValueError(f"heads must be dual or single, got '{heads}'")
        super().__init__(
            teacher,
            loss,
            distillation_weight=alpha,
            label_weight=gamma,
            label_loss=label_loss,
            task=task,
            cache=cache,
            **options,
        )
        self.heads = heads
        #: The teacher's part of the last call, per example and with its graph: what gradient alignment needs.
        self.auxiliary_losses: Tensor | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example."""
        labels_part, self.auxiliary_losses = self.parts(model, batch)
        return labels_part + self.auxiliary_losses

    def parts(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, examples], Float[Tensor, examples]]:
        """The labels' part and the teacher's part, per example."""
        self._prepare(model)
        inner = unwrapped(model)
        head = dual_head(inner) if self.heads == "dual" else None
        with _switched_off(head, self.distillation_weight == 0):
            logits = output_logits(model(**accepted_inputs(inner, batch)))
        labels = shifted(batch["labels"]) if self._is_next_token(batch) else batch["labels"]
        labels_part = self.label_weight * self._mean(self.label_loss(logits, labels), batch)
        if self.distillation_weight == 0:
            return labels_part, torch.zeros_like(labels_part)
        compared = logits if head is None else head.auxiliary_logits
        if compared is None:
            raise InputError("the dual head gives auxiliary logits in training mode only; call model.train() first")
        values = self.loss(compared, self.teacher_logits(batch), labels)
        return labels_part, self.distillation_weight * self._mean(values, batch)

    def _mean(self, rows: Tensor, batch: Batch) -> Tensor:
        return rows if rows.ndim == 1 else rows.flatten(1).sum(-1) / self.target_counts(batch).clamp_min(1)


class _switched_off:
    """Within it the auxiliary head is not run, and draws no random number."""

    def __init__(self, head: DualHead | None, off: bool):
        self.head = head if off else None

    def __enter__(self) -> None:
        if self.head is not None:
            self.was, self.head.training = self.head.training, False

    def __exit__(self, *_: object) -> None:
        if self.head is not None:
            self.head.training = self.was


class GradientAlignedTrainer(Trainer):
    r"""A Trainer that takes out of the teacher's gradient what opposes the labels'.

    .. math::
        g_1 \leftarrow g_1 - \frac{\langle g_1, g_0 \rangle}{\lVert g_0 \rVert^2}\, g_0
        \quad \text{if } \langle g_1, g_0 \rangle < 0, \qquad g = g_0 + g_1

    once per optimiser step, over the gradients of the whole step (all micro-batches), before clipping. The labels'
    gradient ``g₀`` is never changed.

    Args:
        objective: a :class:`DualHeadDistillation` (it must leave ``auxiliary_losses``).
        scope: ``"all"``, the flattened vector of all parameters, as released (the subtraction then enlarges the main
            head's own gradient in a conflict), or ``"shared"``: only parameters that both losses reach.
        *args, **kwargs: of :class:`Trainer`.

    Costs one more backward pass of the teacher's part. One process, no gradient scaler (float16) and weights known
    before the forward pass: other settings are refused, since the projection would not be exact there.

    Source: released code of Yang et al., 2024, arXiv 2411.08937.
    """

    def __init__(self, *args: Any, scope: Literal["all", "shared"] = "all", **kwargs: Any):
        if scope not in ("all", "shared"):
            raise ValueError(f"scope must be all or shared, got '{scope}'")
        super().__init__(*args, **kwargs)
        self.scope = scope
        if not hasattr(self.objective, "auxiliary_losses"):
            raise InputError("gradient alignment needs an objective with two parts, such as DualHeadDistillation")
        if self.accelerator.num_processes > 1 or self.accelerator.scaler is not None:
            raise InputError("gradient alignment works on one process and without a gradient scaler (float16)")
        self._opposing: dict[nn.Parameter, Tensor] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in :class:`Trainer`; the gradient of the teacher's part is also kept apart."""
        total = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights, auxiliary = inputs.get(EXAMPLE_WEIGHTS), self.objective.auxiliary_losses
        if return_outputs or auxiliary is None or not auxiliary.requires_grad:
            return total
        if weights is None:
            raise InputError("gradient alignment needs example weights that do not depend on the losses")
        parameters = [p for p in model.parameters() if p.requires_grad]
        part = (weights.to(auxiliary.dtype) * auxiliary).sum()
        gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                kept = self._opposing.get(parameter)
                self._opposing[parameter] = gradient if kept is None else kept + gradient
        return total

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._align(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._align(model)  # where gradients are not clipped
        return super()._get_grad_norm(model, grad_norm)

    def _align(self, model: nn.Module) -> None:
        if not self._opposing:
            return
        apart = {id(p) for m in model.modules() if isinstance(m, DualHead) for p in m.parameters()}
        pairs = []
        for parameter in model.parameters():
            if parameter.grad is None or (self.scope == "shared" and id(parameter) in apart):
                continue
            opposing = self._opposing.get(parameter)
            pairs.append((parameter.grad, parameter.grad if opposing is None else parameter.grad - opposing, opposing))
        if all(opposing is None for _, _, opposing in pairs):
            raise InputError("gradient alignment needs parameters that both losses reach; the backbone is frozen")
        align_gradients(pairs)
        self._opposing.clear()


def align_gradients(parts: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> float:
    """Project in place: each part is (sum of both gradients, primary gradient, auxiliary gradient or ``None``).

    Returns:
        The inner product of the two gradients before the projection.

    >>> g0, g1 = torch.tensor([1.0, 2.0, 0.5, 0.0]), torch.tensor([-2.0, 0.5, 0.0, 3.0])
    >>> total = g0 + g1
    >>> align_gradients([(total, g0, g1)]), total
    (-1.0, tensor([-0.8095,  2.8810,  0.5952,  3.0000]))
    """
    parts = list(parts)
    product = sum(float((a.double() * p.double()).sum()) for _, p, a in parts if a is not None)
    norm = sum(float(p.double().square().sum()) for _, p, _ in parts)
    if product < 0 and norm > 0:
        for total, primary, _ in parts:
            total.sub_(primary, alpha=product / norm)
    return product


@dataclass(frozen=True, slots=True)
class GradientCosines:
    """Cosine between the gradients of the two losses, in the output layer's weight and in everything before it."""

    head: float
    backbone: float


def gradient_cosines(
    model: nn.Module, objective: DualHeadDistillation, batch: Batch, *, head: nn.Linear
) -> GradientCosines:
    """Where the two losses of a single-head model agree, and where they do not.

    Args:
        model: in the mode (training or evaluation) in which to measure.
        objective: with ``heads="single"``.
        batch: the examples to average over.
        head: the model's output layer; its weight is the head, all other parameters are the backbone.
    """
    labels_part, auxiliary = objective.parts(model, batch)
    counted = objective.target_counts(batch) > 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(part[counted].mean(), parameters, retain_graph=True, allow_unused=True)
        for part in (labels_part, auxiliary)
    ]

    def cosine(chosen: Callable[[nn.Parameter], bool]) -> float:
        sums = [0.0, 0.0, 0.0]
        for parameter, a, b in zip(parameters, *gradients, strict=True):
            if chosen(parameter) and a is not None and b is not None:
                a, b = a.double(), b.double()
                sums = [x + float(y.sum()) for x, y in zip(sums, (a * b, a * a, b * b), strict=True)]
        scale = (sums[1] * sums[2]) ** 0.5
        return sums[0] / scale if scale else float("nan")

    own = {id(p) for p in head.parameters()}
    return GradientCosines(cosine(lambda p: p is head.weight), cosine(lambda p: id(p) not in own))
