"""Ways to train on implicit feedback part of which is noise: what to draw from a pool, and how much it counts.

A way of denoising looks at losses under the current model, without gradient. ``personal`` and ``pooled`` choose one
of a pool, ``truncated`` and ``reweighted`` weigh what was drawn; ``plain`` does neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.registry import Registry

__all__ = ["Denoising", "personal", "personal_loss_probabilities", "plain", "pooled", "reweighted", "truncated"]


def personal_loss_probabilities(
    losses: Float[Tensor, "*batch pool"], *, tau: float = 0.1
) -> Float[Tensor, "*batch pool"]:
    r"""With which probability each positive of a user's pool is trained on: the lower its loss, the likelier.

    .. math:: P_c = \frac{e^{-\ell_c/\tau}}{\sum_{c'} e^{-\ell_{c'}/\tau}}

    Args:
        losses: of the pool, one user per row; never of several users in one row.
        tau: temperature in the unit of the losses; ``inf`` is uniform.

    Returns:
        Rows that sum to 1, without gradient. Adding a constant to a row changes nothing: only the order and distances
        within the user count. A loss of ``inf`` has probability 0; if all are, the row is uniform.

    Source: Zhang, Cao, Wu, Sun, Shen and Cheng, "Personalized Denoising Implicit Feedback for Robust Recommender
    System", WWW 2025, arXiv 2502.00348.

    >>> personal_loss_probabilities(torch.tensor([[0.1, 0.1, 2.0]]), tau=0.1).round(decimals=3)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses need a last dimension with at least one column, got {tuple(losses.shape)}")
    losses = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    # A row of infinite losses becomes one of equal losses; the least is taken off before a small tau can overflow.
    losses = losses.clamp_max(torch.finfo(losses.dtype).max)
    # The largest is exactly 1. On rows as short as these torch.softmax takes several times as long.
    odds = torch.exp((losses - losses.amin(-1, keepdim=True)) / -tau)
    return odds / odds.sum(-1, keepdim=True)


def draw_column(probabilities: Float[Tensor, "batch pool"], choice: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """One column per row by its probability; ``choice`` is uniform in [0, 1)."""
    passed = probabilities.double().cumsum(-1) <= choice.unsqueeze(-1)
    # Rounding may leave the last sum below 1.
    return passed.sum(-1).clamp_max(probabilities.shape[-1] - 1)


class Denoising(Protocol):
    """What training asks of a way of denoising.

    ``pool_size`` positives are offered from epoch ``warmup_epochs`` on; ``across_users`` says whether they are those
    of one user. ``relates_examples``: weights depend on the other examples of the batch.
    """

    @property
    def pool_size(self) -> int:
        """``k``."""
        ...

    @property
    def warmup_epochs(self) -> int:
        """Epochs of plain draws."""
        ...

    @property
    def across_users(self) -> bool:
        """Whether a pool holds triples of any users."""
        ...

    @property
    def relates_examples(self) -> bool:
        """Whether gradient accumulation would change the weights."""
        ...

    def probabilities(self, losses: Float[Tensor, "batch pool"]) -> Float[Tensor, "batch pool"]:
        """Of each positive of the pool."""
        ...

    def weights(self, losses: Float[Tensor, " batch"], step: int, *, positive: bool) -> Float[Tensor, " batch"] | None:
        """How much each positive (or negative) part counts; ``None``: all the same."""
        ...


@dataclass(frozen=True)
class _Resampling:
    pool_size: int = 1
    tau: float = math.inf
    warmup_epochs: int = 0
    across_users: bool = False
    relates_examples: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pool_size, bool) or not isinstance(self.pool_size, int) or not 1 <= self.pool_size <= 1000:
            raise ValueError(f"pool_size must be an integer between 1 and 1000, got {self.pool_size}")
        if not self.tau > 0:
            raise ValueError(f"tau must be > 0, got {self.tau}")
        if isinstance(self.warmup_epochs, bool) or not isinstance(self.warmup_epochs, int) or self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be an integer >= 0, got {self.warmup_epochs}")

    def probabilities(self, losses: Tensor) -> Tensor:
        return personal_loss_probabilities(losses, tau=self.tau)

    def weights(self, losses: Tensor, step: int, *, positive: bool) -> Tensor | None:
        return None


@dataclass(frozen=True)
class _Truncated(_Resampling):
    drop_rate: float = 0.2
    gradual_steps: int = 30_000
    relates_examples: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate}")
        if not self.gradual_steps >= 0:
            raise ValueError(f"gradual_steps must be >= 0, got {self.gradual_steps}")

    def weights(self, losses: Tensor, step: int, *, positive: bool) -> Tensor | None:
        if not positive:
            return None
        rate = self.drop_rate * (min(step / self.gradual_steps, 1.0) if self.gradual_steps else 1.0)
        n = len(losses)
        kept = max(1, int((1 - rate) * n))
        weights = torch.zeros_like(losses)
        weights[losses.argsort(stable=True)[:kept]] = n / kept
        return weights


@dataclass(frozen=True)
class _Reweighted(_Resampling):
    beta: float = 0.2

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must be a finite number >= 0, got {self.beta}")

    def weights(self, losses: Tensor, step: int, *, positive: bool) -> Tensor | None:
        # Both losses are -log of a sigmoid: its power.
        return torch.exp(-self.beta * losses)


def plain() -> Denoising:
    """Every positive counts, and is drawn, as often as any other of its user."""
    return _Resampling()


def personal(pool_size: int = 5, tau: float = 0.1, warmup_epochs: int = 5) -> Denoising:
    """Draw ``pool_size`` positives of the user, train on one of them by :func:`personal_loss_probabilities`.

    Args:
        pool_size: ``k``; 1 is :func:`plain`.
        tau: temperature in nats. 0.1 suits BPR losses that have come apart; 0.5 is safer on data that may be clean.
        warmup_epochs: epochs of plain training first: the losses of random weights say nothing.

    Source: "Personalized Denoising Implicit Feedback for Robust Recommender System", WWW 2025, arXiv 2502.00348.
    """
    return _Resampling(pool_size, tau, warmup_epochs)


def pooled(pool_size: int = 5, tau: float = 0.1, warmup_epochs: int = 5) -> Denoising:
    """As :func:`personal`, but of a pool of *any* users' triples: the control that shows what "personal" is worth.

    Easy users are drawn more often, noise of easy users looks better than true interests of hard ones.
    """
    return _Resampling(pool_size, tau, warmup_epochs, across_users=True)


def truncated(drop_rate: float = 0.2, gradual_steps: int = 30_000) -> Denoising:
    """Truncated loss (T-CE): leave out the positives of the batch with the largest losses.

    Args:
        drop_rate: the share left out in the end.
        gradual_steps: over how many steps it grows from 0.

    The batch is what is sorted, hence no gradient accumulation. With binary cross entropy only the positive part of a
    triple can be left out; what is kept counts for the whole.

    Source: Wang, Feng, He, Nie and Chua, "Denoising Implicit Feedback for Recommendation", WSDM 2021,
    arXiv 2006.04153, section 4.1, written there for binary cross entropy.
    """
    return _Truncated(drop_rate=drop_rate, gradual_steps=gradual_steps)


def reweighted(beta: float = 0.2) -> Denoising:
    """Reweighted loss (R-CE): a loss of -log p counts p^beta, so that positives with large losses count less.

    Source: "Denoising Implicit Feedback for Recommendation", WSDM 2021, arXiv 2006.04153, section 4.2, written there
    for binary cross entropy; with BPR, p is the sigmoid of the margin. The weight carries no gradient.
    """
    return _Reweighted(beta=beta)


# Others add theirs by entry point.
DENOISING = Registry(
    "way of denoising",
    "lossmith.tasks.recommendation.denoising",
    "lossmith.denoising",
    lambda name, thing: name in {"personal", "plain", "pooled", "reweighted", "truncated"},
)
