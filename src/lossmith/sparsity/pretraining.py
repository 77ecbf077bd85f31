"""Sparse pre-training: a model that starts dense and loses its smallest weights while it is trained.

Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
2025, arXiv 2501.12486.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lossmith.laws.sparse_compute import step_fractions
from lossmith.sparsity.masks import Prunable, largest_of_groups, magnitude_masks, parse_structure, prunable_weights
from lossmith.sparsity.schedule import PruningSchedule


@dataclass(frozen=True, slots=True)
class ComputeSchedule:
    """A schedule by shares of the training compute, for a run whose number of steps is not known yet.

    Attributes:
        sparsity: share of the prunable weights that is removed in the end, in [0, 1).
        start: share of the compute spent before pruning begins.
        end: share of the compute spent when it is over.
        interval: steps between prunings; default: see :meth:`PruningSchedule.from_compute`.
    """

    sparsity: float
    start: float = 0.25
    end: float = 0.75
    interval: int | None = None

    def __post_init__(self) -> None:
        step_fractions(self.sparsity, start=self.start, end=self.end)
        if self.interval is not None and (not isinstance(self.interval, int) or self.interval < 1):
            raise ValueError(f"interval must be a whole number of at least 1 step, got {self.interval!r}")

    def over(self, steps: int) -> PruningSchedule:
        """The schedule of a run of so many steps."""
        return PruningSchedule.from_compute(
            steps, self.sparsity, start=self.start, end=self.end, interval=self.interval
        )


class SparsePretraining:
    r"""Iterative magnitude pruning of a model while it is trained, by a schedule; counts the average parameters.

    Before a step of the schedule the weights of smallest magnitude, in one ranking over all linear layers, are set to
    zero; from then on they get no gradient and stay zero. What remains is trained exactly as with weights
    :math:`w \odot m`: gradients of pruned weights are 0 before they are clipped; the optimiser keeps its state, which
    for pruned weights decays to 0 and moves nothing. Pruned weights *are* zeros in the model, so that evaluation,
    export and ``save_pretrained`` need no masks.

    In a Trainer: ``callbacks=[SparsityCallback(sparsity)]``. In a loop of one's own:

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> sparsity = SparsePretraining(PruningSchedule(steps=20, sparsity=0.5, start=5, end=15, interval=5))
    >>> sparsity.attach(model)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> for step in range(20):
    ...     sparsity.before_step(step)
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     sparsity.after_step()
    >>> sparsity.number, sparsity.active, sparsity.average_parameters()
    (160, 80, 116.5)

    Args:
        schedule: steps, or shares of the compute (:class:`ComputeSchedule`).
        structure: ``"2:4"`` or any ``"N:M"``; see :func:`magnitude_masks`.
        score: ``"magnitude"``, or ``"random"`` (uniform in [0.1, 1], the same numbers at every pruning) as a control.
        exclude: parts of names of layers to leave alone.
        seed: of the random scores.
        variant: ``"exact"`` or ``"released"``; see :func:`magnitude_masks`.

    Raises:
        ValueError: an option out of range, or a structure that removes less than the schedule is to.
    """

    def __init__(
        self,
        schedule: PruningSchedule | ComputeSchedule,
        *,
        structure: str | None = None,
        score: Literal["magnitude", "random"] = "magnitude",
        exclude: Sequence[str] = (),
        seed: int = 0,
        variant: Literal["exact", "released"] = "exact",
    ):
        if not isinstance(schedule, PruningSchedule | ComputeSchedule):
            raise TypeError(f"schedule must be a PruningSchedule or ComputeSchedule, got {type(schedule).__name__}")
        if score not in ("magnitude", "random"):
            raise ValueError(f"score must be 'magnitude' or 'random', got {score!r}")
        if variant not in ("exact", "released"):
            raise ValueError(f"variant must be 'exact' or 'released', got {variant!r}")
        group = parse_structure(structure)
        if group is not None and schedule.sparsity > 1 - group[0] / group[1] + 1e-9:
            raise ValueError(
                f"{structure} leaves {group[0] / group[1]:g} of the weights; sparsity must be at most "
                f"{1 - group[0] / group[1]:g}, got {schedule.sparsity:g}"
            )
        self.recipe, self.structure, self.score, self.seed, self.variant = schedule, structure, score, seed, variant
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.schedule: PruningSchedule | None = schedule if isinstance(schedule, PruningSchedule) else None
        self.events: list[tuple[int, int]] = []
        self._prunable: Prunable | None = None
        self._live: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._last = -1

    # ---- the loop -----------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, steps: int | None = None) -> None:
        """Take charge of a model's linear layers; nothing is pruned yet.

        Args:
            model: before it is wrapped for several processes.
            steps: of the run; needed where the schedule speaks of compute.

        Raises:
            InputError: nothing to prune in the model.
            ValueError: a length that the structure does not divide; the steps are missing, or not the schedule's.
        """
        if self._prunable is not None:
            raise ValueError("this SparsePretraining has a model already; make another one, or detach it")
        schedule = self.schedule
        if isinstance(self.recipe, ComputeSchedule):
            if steps is None:
                raise ValueError("a schedule by compute needs the number of steps of the run")
            schedule = self.recipe.over(steps)
        assert schedule is not None
        if steps is not None and schedule.steps != steps:
            raise ValueError(f"the schedule is for {schedule.steps} steps, the run has {steps}")
        prunable = prunable_weights(model, exclude=self.exclude)
        if (group := parse_structure(self.structure)) is not None:
            for name, weight in prunable.weights.items():
                largest_of_groups(torch.empty(1, weight.shape[-1]), *group, name=name)
        self.schedule, self._prunable = schedule, prunable

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Prune, if it is time, before the forward pass of ``step`` (from 0); the same step again changes nothing."""
        schedule, prunable = self._attached()
        self._last = max(self._last, step)
        if schedule.sparsity == 0 or step < schedule.start:
            return
        due = min(step - schedule.start, schedule.end - schedule.start) // schedule.interval + 1
        if due <= len(self.events):
            return
        masks = magnitude_masks(
            prunable.weights,
            schedule.density(step),
            masks=self._live or None,
            structure=self.structure,
            scores=self._random_scores() if self.score == "random" else None,
            variant=self.variant,
        )
        self._keep(masks)
        active = sum(int(mask.sum()) for mask in masks.values())
        # Prunings that a caller has skipped happened now.
        self.events += [(step, active)] * (due - len(self.events))
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Put pruned weights back to zero, after the optimiser's step: momentum and decay may have moved them."""
        _, prunable = self._attached()
        for name, live in self._live.items():
            # As bytes: several times faster on a CPU than masked_fill_ or a product with bool.
            prunable.weights[name].mul_(live.view(torch.uint8))

    def detach(self) -> None:
        """Let go of the model, which stays as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._live, self._prunable, self.events, self._last = [], {}, None, [], -1

    # ---- counting -----------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether it has a model."""
        return self._prunable is not None

    @property
    def begins(self) -> int:
        """The first step before which is pruned."""
        return self._attached()[0].start

    @property
    def number(self) -> int:
        """Prunable weights at the start, ``N_0``."""
        return self._attached()[1].number

    @property
    def active(self) -> int:
        """Prunable weights that are active now, ``N_t``."""
        return self.events[-1][1] if self.events else self.number

    def average_parameters(self, steps: int | None = None) -> float:
        """Active prunable weights averaged over the first ``steps`` steps (default: those seen so far): equation 1.

        With batches of different sizes weigh by tokens: the FLOPs that the Trainer counts do.
        """
        steps = self._last + 1 if steps is None else steps
        if steps < 1:
            return float(self.number)
        edges = [(0, self.number), *((step, active) for step, active in self.events if step < steps), (steps, 0)]
        pairs = itertools.pairwise(edges)
        return sum((after[0] - before[0]) * before[1] for before, after in pairs) / steps

    def densities(self) -> dict[str, float]:
        """Active share of every prunable matrix: layers lose different shares, and a small one may vanish."""
        prunable = self._attached()[1]
        live = {name: float(mask.double().mean()) for name, mask in self._live.items()}
        return {name: live.get(name, 1.0) for name in prunable.weights}

    @property
    def masks(self) -> dict[str, Tensor]:
        """``True`` where a weight is active, by name."""
        prunable = self._attached()[1]
        return {
            name: self._live[name].clone() if self._live else torch.ones_like(weight, dtype=torch.bool)
            for name, weight in prunable.weights.items()
        }

    @property
    def tied(self) -> tuple[str, ...]:
        """Layers that share their matrix with an embedding and are left alone."""
        return self._attached()[1].tied

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: masks (a live weight may be zero by chance) and when was pruned."""
        return {"events": [list(event) for event in self.events], "last": self._last, "masks": dict(self._live)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ValueError: the masks are of another model.
        """
        _, prunable = self._attached()
        masks = dict(state["masks"])
        for name, mask in masks.items():
            weight = prunable.weights.get(name)
            if weight is None or weight.shape != mask.shape:
                raise ValueError(f"the masks are of another model: {name} {tuple(mask.shape)} has no such weight here")
        self.events = [(int(step), int(active)) for step, active in state["events"]]
        self._last = int(state["last"])
        if masks:
            self._keep({name: mask.to(prunable.weights[name].device) for name, mask in masks.items()})

    def _keep(self, masks: Mapping[str, Tensor]) -> None:
        prunable = self._attached()[1]
        self._live = {name: mask.contiguous() for name, mask in masks.items()}

        def mask_gradient(name: str, weight: Tensor) -> None:
            # In place, and before several processes add their gradients up.
            if weight.grad is not None:
                weight.grad.mul_(self._live[name].view(torch.uint8))

        if not self._hooks:
            # Only now: the model has reached its device.
            self._hooks = [
                weight.register_post_accumulate_grad_hook(functools.partial(mask_gradient, name))
                for name, weight in prunable.weights.items()
                if weight.requires_grad
            ]

    def _random_scores(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: (0.1 + 0.9 * torch.rand(weight.shape, generator=generator)).to(weight.device)
            for name, weight in self._attached()[1].weights.items()
        }

    def _attached(self) -> tuple[PruningSchedule, Prunable]:
        if self._prunable is None or self.schedule is None:
            raise ValueError("attach a model first")
        return self.schedule, self._prunable


class Dense:
    """All weights, all the time."""

    def attach(self, model: nn.Module, steps: int | None = None) -> None:
        """Change nothing."""


def dense() -> Dense:
    """All weights, all the time: what an arm without ``weights=`` trains."""
    return Dense()


def sparse_pretraining(
    *,
    final: float = 0.5,
    start: float = 0.25,
    end: float = 0.75,
    interval: int | None = None,
    structure: str | None = None,
    score: Literal["magnitude", "random"] = "magnitude",
    exclude: str | Sequence[str] = (),
    variant: Literal["exact", "released"] = "exact",
) -> SparsePretraining:
    """Sparse pre-training by shares of the compute: ``weights=sparse_pretraining(final=0.5)`` in an arm.

    Args:
        final: sparsity in the end: share of the prunable weights that is removed.
        start: share of the training compute before pruning begins.
        end: share of the compute when pruning is over.
        interval: steps between prunings; default: about 24 prunings, at most 100 steps apart.
        structure: ``"2:4"`` or any ``"N:M"``.
        score: ``"magnitude"`` or, as a control, ``"random"``.
        exclude: parts of names of layers to leave alone.
        variant: ``"exact"`` or ``"released"``; see :func:`magnitude_masks`.

    Source: Jin et al. 2025, arXiv 2501.12486.

    >>> sparse_pretraining(final=0.8).recipe.over(1200)
    PruningSchedule(steps=1200, sparsity=0.8, start=120, end=600, interval=20)
    """
    return SparsePretraining(
        ComputeSchedule(final, start, end, interval),
        structure=structure,
        score=score,
        exclude=exclude,
        variant=variant,
    )
