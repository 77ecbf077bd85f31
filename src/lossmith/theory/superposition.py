r"""The toy model of superposition, and what theory says of its loss.

.. math:: h = W^\top x, \qquad y = \mathrm{ReLU}(W h + b), \qquad L = E \|y - x\|^2

with ``n`` features in ``m < n`` dimensions. Where only the most frequent features are stored (weak superposition),
the loss is the frequency of the rest; where all are stored, overlapping (strong), it is their interference, about
``1/m``.

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lossmith.theory.features import check_probabilities


def toy_outputs(
    x: Float[Tensor, "*batch rows features"],
    weight: Float[Tensor, "*batch features width"],
    bias: Float[Tensor, "*batch features"],
) -> Float[Tensor, "*batch rows features"]:
    """``ReLU(x W Wᵀ + b)``.

    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> toy_outputs(torch.tensor([[1.0, 0.0, 0.5]]), weight, torch.tensor([0.0, -0.1, 0.2]))
    tensor([[1.3000, 0.3000, 1.3000]])
    """
    if weight.shape[-2] != x.shape[-1] or bias.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, weight {weight.shape[-2]} and bias {bias.shape[-1]}: they must agree"
        )
    return torch.relu(x @ weight @ weight.mT + bias.unsqueeze(-2))


def toy_loss(
    x: Float[Tensor, "*batch rows features"],
    weight: Float[Tensor, "*batch features width"],
    bias: Float[Tensor, "*batch features"],
) -> Float[Tensor, "*batch rows"]:
    """Squared error of the reconstruction, summed over features: one number per row.

    (The authors train on the mean over features and report the sum.)
    """
    return (toy_outputs(x, weight, bias) - x).square().sum(-1)


def truncation_loss(
    probabilities: Float[Tensor, " features"], stored: int, *, bias: Literal["zero", "optimal"] = "zero"
) -> float:
    r"""The loss where the ``stored`` most frequent features are perfect and the rest are dropped (weak superposition).

    .. math:: L = \tfrac43 \sum_{i>k} p_i \qquad\text{or, with the best bias for the dropped,}\qquad
        \sum_{i>k} \tfrac43 p_i - p_i^2

    For frequencies :math:`i^{-\alpha}` with :math:`\alpha > 1` and many features this falls like
    :math:`k^{-(\alpha-1)}`; at finite ``n`` the tail ends, and it falls faster.

    Args:
        probabilities: of the features, in any order.
        stored: ``k``, between 0 and their number.
        bias: ``"zero"`` or ``"optimal"``.

    Raises:
        ValueError: ``stored`` out of range.

    Source: Liu et al. 2025, arXiv 2505.10465.

    >>> from lossmith.theory import feature_frequencies
    >>> round(truncation_loss(feature_frequencies("power", 4), 2), 6)
    0.373333
    """
    check_probabilities(probabilities)
    if not 0 <= stored <= len(probabilities):
        raise ValueError(f"stored must lie between 0 and the {len(probabilities)} features, got {stored}")
    if bias not in ("zero", "optimal"):
        raise ValueError(f"bias must be 'zero' or 'optimal', got {bias!r}")
    rest = probabilities.double().sort(descending=True).values[stored:]
    return float((4 / 3 * rest - (rest.square() if bias == "optimal" else 0)).sum())


def expected_exponent(regime: Literal["weak", "strong"], exponent: float) -> float | None:
    r"""The exponent of the loss by width that theory gives for frequencies :math:`i^{-\alpha}` and very many features.

    Weak superposition: :math:`\alpha - 1` (none, that is no power law, for :math:`\alpha \le 1`). Strong: 1, and about
    :math:`2(\alpha - 1)` for very skewed frequencies, :math:`\alpha > 1.5`.

    Source: Liu et al. 2025, arXiv 2505.10465.

    >>> expected_exponent("weak", 1.25), expected_exponent("weak", 0.5), expected_exponent("strong", 1.0)
    (0.25, None, 1.0)
    """
    if regime not in ("weak", "strong"):
        raise ValueError(f"regime must be 'weak' or 'strong', got {regime!r}")
    if not exponent >= 0:
        raise ValueError(f"exponent must be at least 0, got {exponent}")
    if regime == "weak":
        return exponent - 1 if exponent > 1 else None
    return max(1.0, 2 * (exponent - 1))


class Slope(NamedTuple):
    """A line through logarithms: ``loss = factor / width**exponent``, and the share of variance that it explains."""

    exponent: Tensor
    factor: Tensor
    r_squared: Tensor


def loglog_slope(widths: Float[Tensor, " points"], losses: Float[Tensor, "*batch points"]) -> Slope:
    """Ordinary least squares of log loss on log width, for each row of a batch.

    Raises:
        ValueError: fewer than 3 different widths, or numbers that are not positive.

    >>> slope = loglog_slope(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([5.0, 0.5, 0.05]))
    >>> round(slope.exponent.item(), 6), round(slope.factor.item(), 6), round(slope.r_squared.item(), 6)
    (1.0, 5.0, 1.0)
    """
    if widths.ndim != 1 or losses.shape[-1:] != widths.shape:
        raise ValueError(f"losses must have one value per width, got {tuple(losses.shape)} and {tuple(widths.shape)}")
    if len(set(widths.tolist())) < 3:
        raise ValueError(f"a slope needs at least 3 different widths, got {sorted(set(widths.tolist()))}")
    for name, values in (("widths", widths), ("losses", losses)):
        if not (values.isfinite().all() and (values > 0).all()):
            raise ValueError(f"{name} must be positive and finite")
    x, y = widths.double().log(), losses.double().log()
    x0, y0 = x - x.mean(), y - y.mean(-1, keepdim=True)
    slope = (x0 * y0).sum(-1) / x0.square().sum()
    total = y0.square().sum(-1)
    left = (y0 - slope.unsqueeze(-1) * x0).square().sum(-1)
    factor = torch.exp(y.mean(-1) - slope * x.mean())
    return Slope(-slope, factor, torch.where(total > 0, 1 - left / total, 1.0))
