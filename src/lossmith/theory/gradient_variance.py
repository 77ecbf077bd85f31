"""Variance of a stochastic gradient over domains: examples of small ones drawn more often, or counted more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.data.temperature import temperature_probabilities, weight_second_moment


@dataclass(frozen=True, slots=True)
class GradientVariances:
    """Of one draw, summed over coordinates; a batch of ``B`` independent draws has a ``B``-th of it.

    Attributes:
        tau: temperature.
        upsampling: drawing domains at the temperature.
        upweighting: drawing all examples alike, weighed to the same expectation.
        mean_squared: squared norm of the expected gradient, which both have.
        weight_second_moment: F(tau), what the ratio of the second moments is where all domains have the same.
    """

    tau: float
    upsampling: float
    upweighting: float
    mean_squared: float
    weight_second_moment: float

    @property
    def difference(self) -> float:
        """Variance of upweighting less that of upsampling."""
        return self.upweighting - self.upsampling

    @property
    def ratio(self) -> float:
        """Variance of upweighting over that of upsampling."""
        return self.upweighting / self.upsampling if self.upsampling else float("nan")


def gradient_variances(
    sizes: Sequence[float] | Tensor,
    second_moments: Float[Tensor, " domains"] | Sequence[float],
    products: Float[Tensor, "domains domains"] | Sequence[Sequence[float]],
    tau: float = 5.0,
) -> GradientVariances:
    r"""Variances of both estimators of the gradient at temperature :math:`\tau`, exactly.

    .. math::
        \mathrm{Var}_S = \sum_i \frac{p(i; \tau)^2}{p(i; 1)}\, m_i - \lVert G \rVert^2, \qquad
        \mathrm{Var}_{TS} = \sum_i p(i; \tau)\, m_i - \lVert G \rVert^2, \qquad
        G = \sum_i p(i; \tau)\, \bar g_i

    The difference is :math:`\sum_i p(i; \tau)(w_i - 1) m_i`. It is not negative where all :math:`m_i` are equal (the
    paper's theorem 2, whose proof takes them so), or where the domains that gain weight have second moments at least as
    large as the others; otherwise upweighting can have less variance.

    Args:
        sizes: of the domains.
        second_moments: :math:`m_i = \mathbb{E}_{x \in D_i} \lVert g(x) \rVert^2`.
        products: inner products :math:`\langle \bar g_i, \bar g_j \rangle` of the domains' mean gradients.
        tau: temperature.

    Raises:
        ValueError: shapes that do not belong together, sizes or ``tau`` out of range, a negative second moment.

    Source: Li et al., "Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", 2025,
    arXiv 2410.04579, theorem 2.

    >>> found = gradient_variances([900, 100], [2.0, 2.0], [[1.0, 1.0], [1.0, 1.0]], tau=5)
    >>> round(found.upweighting, 9), found.upsampling
    (2.893110885, 1.0)
    """
    p, proportional = temperature_probabilities(sizes, tau), temperature_probabilities(sizes, 1.0)
    m = torch.as_tensor(second_moments, dtype=torch.float64)
    inner = torch.as_tensor(products, dtype=torch.float64)
    number = len(p)
    if m.shape != (number,) or inner.shape != (number, number):
        raise ValueError(
            f"{number} sizes need second_moments of shape ({number},) and products of shape ({number}, {number}), "
            f"got {tuple(m.shape)} and {tuple(inner.shape)}"
        )
    if bool((m < 0).any()):
        raise ValueError(f"second_moments must not be negative, got {m.tolist()}")
    mean_squared = float(p @ inner @ p)
    return GradientVariances(
        tau=float(tau),
        upsampling=float(p @ m) - mean_squared,
        upweighting=float((p * p / proportional) @ m) - mean_squared,
        mean_squared=mean_squared,
        weight_second_moment=weight_second_moment(sizes, tau),
    )


def gradient_moments(
    gradients: Float[Tensor, "examples parameters"], domains: Int[Tensor, " examples"]
) -> tuple[Int[Tensor, " domains"], Float[Tensor, " domains"], Float[Tensor, "domains domains"]]:
    """Sizes, second moments and products of mean gradients, from the gradient of every example there is.

    Args:
        gradients: one row per example.
        domains: number of each example's domain; those that do not occur are left out.

    >>> sizes, second, products = gradient_moments(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 0, 1]))
    >>> sizes.tolist(), second.tolist(), products.tolist()
    ([2, 1], [5.0, 4.0], [[4.0, 4.0], [4.0, 4.0]])
    """
    if gradients.ndim != 2 or domains.shape != gradients.shape[:1]:
        raise ValueError(
            f"gradients must be one row per example and domains one number, got {tuple(gradients.shape)} and "
            f"{tuple(domains.shape)}"
        )
    values = gradients.detach().double()
    parts = [values[domains == number] for number in domains.unique().tolist()]
    means = torch.stack([part.mean(0) for part in parts])
    second = torch.stack([part.square().sum(-1).mean() for part in parts])
    return torch.tensor([len(part) for part in parts]), second, means @ means.T
