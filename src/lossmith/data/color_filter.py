"""Selection of training data by a loss difference (CoLoR-Filter), the baselines, and what each costs.

"CoLoR-Filter: Conditional Loss Reduction Filtering for Targeted Language Model Pre-training", 2024, arXiv 2406.10670.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ..errors import InputError, did_you_mean

NORMALIZATIONS = ("token", "sum")
Indices = np.ndarray[Any, np.dtype[np.int64]]


def color_filter_scores(
    marginal: Sequence[float] | np.ndarray,
    conditional: Sequence[float] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    *,
    normalize: str = "token",
) -> np.ndarray:
    r"""How much worse the model of the target finds each text than the generic one: keep the smallest.

    .. math:: s(x) = \frac{\mathrm{NLL}(x; \theta_\mathrm{cond}) - \mathrm{NLL}(x; \theta_\mathrm{marg})}{|x|}

    The conditional model is the marginal one, fine-tuned on a sample of the target for one epoch. The mean over a
    generic corpus is positive (fine-tuning harms what is not the target), so that 0 is no threshold: select by rank.

    Args:
        marginal: nats of each text under the generic (prior) model, summed over its tokens.
        conditional: the same under the fine-tuned one.
        tokens: numbers of predicted tokens, the same for both models.
        normalize: ``"token"`` divides by ``tokens``; ``"sum"`` does not, and then favours long texts.

    Returns:
        One score per text, float64, NaN where a loss is. (The released code stores the opposite sign.)

    Raises:
        ValueError: lengths differ, ``tokens`` holds less than 1, or the normalisation is unknown.

    Source: arXiv 2406.10670, section 2, equation 8 and algorithm 1.

    >>> color_filter_scores([6.0, 3.0], [4.5, 3.3], [3, 3]).round(6).tolist()
    [-0.5, 0.1]
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalize '{normalize}': {did_you_mean(normalize, NORMALIZATIONS)}")
    a, b, counts = (np.asarray(values, dtype=np.float64) for values in (marginal, conditional, tokens))
    if not (a.ndim == 1 and a.shape == b.shape == counts.shape):
        raise ValueError(
            f"marginal, conditional and tokens must be lists of one length, got {a.shape}, {b.shape} and {counts.shape}"
        )
    if not (counts >= 1).all():
        raise ValueError("every text must have at least 1 predicted token")
    return (b - a) / counts if normalize == "token" else b - a


def select_lowest(
    scores: Sequence[float] | np.ndarray,
    *,
    number: int | None = None,
    keep: float | None = None,
    tau: float | None = None,
    batch: int | None = None,
) -> Indices:
    """Indices of the lowest scores, lowest first; ties go to the smaller index, so that no sharding changes them.

    Give exactly one of the three. What a larger ``tau`` keeps is part of what a smaller one keeps.

    Args:
        scores: one per candidate.
        number: how many to keep.
        keep: share to keep, in (0, 1]; the number is rounded down (exactly: 0.29 of 100 are 29).
        tau: keep one of ``tau`` candidates, at least 1; the number is rounded down.
        batch: choose among each ``batch`` consecutive candidates by themselves instead (the paper's batch-wise variant,
            which needs no global sort); only with ``keep`` or ``tau``. Then the batches follow each other, and a batch
            too small for its share gives none.

    Raises:
        ValueError: an option is out of range, a score is NaN, or nothing would be left (with the smallest pool that
            leaves one).

    >>> select_lowest([-0.5, 0.1, -0.4, -0.2, 0.0, -0.4], tau=2).tolist()
    [0, 2, 5]
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must be one number per candidate, got shape {values.shape}")
    if missing := int(np.isnan(values).sum()):
        raise ValueError(
            f"{missing} of {len(values)} scores are NaN, the first at index {int(np.isnan(values).argmax())}"
        )
    share = _share(number, keep, tau)
    if batch is not None:
        if share is None:
            raise ValueError("batch needs keep or tau, not number")
        if isinstance(batch, bool) or batch != int(batch) or batch < 1:
            raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
        starts = range(0, len(values), batch)
        chosen = [start + _lowest(values[start : start + batch], share) for start in starts]
        found = np.concatenate([np.empty(0, dtype=np.int64), *chosen])
    else:
        if share is None:
            assert number is not None
            if isinstance(number, bool) or number != int(number) or not 1 <= number <= len(values):
                raise ValueError(
                    f"number must be a whole number from 1 to the {len(values)} candidates, got {number!r}"
                )
            return np.argsort(values, kind="stable")[:number]
        found = _lowest(values, share)
    if len(found) == 0:
        smallest = -(-share.denominator // share.numerator)
        raise ValueError(
            f"nothing is left of {len(values)} candidates; one needs at least {smallest}"
            + ("" if batch is None else " in a batch")
        )
    return found


def _share(number: int | None, keep: float | None, tau: float | None) -> Fraction | None:
    if sum(option is not None for option in (number, keep, tau)) != 1:
        raise ValueError("give exactly one of number, keep and tau")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {keep}")
        return Fraction(str(keep))
    if tau is not None:
        if not 1 <= tau < float("inf"):
            raise ValueError(f"tau must be a finite number of at least 1, got {tau}")
        return 1 / Fraction(str(tau))
    return None


def _lowest(values: np.ndarray, share: Fraction) -> Indices:
    # Fractions: int(1 / 49 * 98) is 1 in floating point.
    return np.argsort(values, kind="stable")[: int(share * len(values))]


def select_at_random(candidates: int, number: int, *, seed: int = 0) -> Indices:
    """``number`` of ``candidates``, each set of them equally likely; more of one seed contain fewer of it.

    >>> sorted(select_at_random(3, 3).tolist())
    [0, 1, 2]
    """
    if not 1 <= number <= candidates:
        raise ValueError(f"number must lie between 1 and the {candidates} candidates, got {number}")
    return np.random.default_rng(seed).permutation(candidates)[:number].astype(np.int64)


def rho_down(
    conditional: Sequence[float] | np.ndarray,
    learner_losses: Callable[[Indices], np.ndarray],
    learn: Callable[[Indices], None],
    *,
    number: int,
    batch_size: int,
    tau: int,
    seed: int = 0,
) -> Indices:
    r"""Select online, against the model in training: reducible holdout loss for a target (RHO-down).

    .. math:: S_t = \text{the } b \text{ smallest of } \ell_\mathrm{cond}(x) - \ell_t(x)
              \text{ among } \tau b \text{ random } x

    Args:
        conditional: loss of every candidate under a fixed model of the target, per token.
        learner_losses: the same, now, under the model that learns, of the candidates that it is given.
        learn: one step of training on the candidates that it is given.
        number: how many to train on in all.
        batch_size: per step.
        tau: candidates looked at for each one kept.
        seed: of the order; no candidate is looked at twice.

    Returns:
        The candidates, in the order in which they were learned.

    Raises:
        ValueError: there are fewer than ``number * tau`` candidates, or an option is below 1.

    Source: arXiv 2406.10670, algorithm 2, after Mindermann et al., 2022, arXiv 2206.07137.

    >>> unmoved = {"learner_losses": lambda chosen: np.zeros(len(chosen)), "learn": lambda chosen: None}
    >>> rho_down([3.0, 1.0, 2.0, 4.0], **unmoved, number=1, batch_size=1, tau=4).tolist()
    [1]
    """
    fixed = np.asarray(conditional, dtype=np.float64)
    if min(number, batch_size, tau) < 1:
        raise ValueError(f"number, batch_size and tau must be at least 1, got {number}, {batch_size} and {tau}")
    if number * tau > len(fixed):
        raise ValueError(f"{number} examples at tau {tau} need {number * tau} candidates, there are {len(fixed)}")
    order = np.random.default_rng(seed).permutation(len(fixed))
    kept: list[Indices] = []
    for start in range(0, number, batch_size):
        size = min(batch_size, number - start)
        seen = order[start * tau : (start + size) * tau]
        # Sorted, so that ties go to the smaller index here too.
        seen = np.sort(seen)
        batch = seen[select_lowest(fixed[seen] - np.asarray(learner_losses(seen)), number=size)]
        learn(batch)
        kept.append(batch)
    return np.concatenate(kept)


METHOD_COSTS = ("color-filter", "conditional-only", "rho-down", "rho-down-prior", "random")


def selection_cost(method: str, *, kept: float, prior: float = 0.0, tau: float = 1.0, ratio: float = 1.0) -> float:
    r"""Total cost of selecting and training, in forward passes of the small model, per token.

    CoLoR-Filter: :math:`3m + 2 \tau n + 3 n L`.

    Args:
        method: one of ``METHOD_COSTS``.
        kept: n, tokens trained on.
        prior: m, tokens on which the prior model was trained.
        tau: tokens looked at for each one kept.
        ratio: L, cost of the target model's forward pass over the small one's.

    Raises:
        InputError: the method is unknown.

    Source: arXiv 2406.10670, table 1. The fine-tuning of the conditional model is left out, as there.

    >>> selection_cost("color-filter", kept=1.5, prior=3.1, tau=16, ratio=5.5)
    82.05
    >>> selection_cost("random", kept=25, ratio=5.5)
    412.5
    """
    training, looking = 3 * kept * ratio, tau * kept
    costs = {
        "color-filter": 3 * prior + 2 * looking + training,
        "conditional-only": 3 * prior + looking + training,
        "rho-down": looking + 2 * kept + looking + training,
        "rho-down-prior": 3 * prior + looking + 2 * kept + looking + training,
        "random": training,
    }
    if method not in costs:
        raise InputError(f"unknown method '{method}': {did_you_mean(method, METHOD_COSTS)}")
    return round(costs[method], 12)
