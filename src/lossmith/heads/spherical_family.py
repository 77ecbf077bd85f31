"""The spherical family: losses that see the outputs only through those of the targets, their sum and sum of squares.

Each member is a closed form with its derivatives for the three kinds of input taken as independent, which is what an
update of the whole output matrix at constant cost needs. Sources: Vincent, de Brébisson and Bouthillier, "Efficient
Exact Gradient Update for training Deep Networks with Very Large Sparse Targets", 2015, arXiv 1412.7091; de Brébisson
and Vincent, 2016, arXiv 1511.05042 and arXiv 1604.08859.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Outputs(NamedTuple):
    """What a spherical loss sees of one row's ``D`` outputs.

    ``centred`` is ``q - s²/D``, the sum of squared deviations from the mean, computed without that subtraction.
    """

    targets: Float[Tensor, "rows targets"]
    values: Float[Tensor, "rows targets"]
    s: Float[Tensor, " rows"]
    centred: Float[Tensor, " rows"]
    classes: int

    @property
    def q(self) -> Float[Tensor, " rows"]:
        """Sum of squares."""
        return torch.addcmul(self.centred, self.s, self.s, value=1 / self.classes)


class Derivatives(NamedTuple):
    """The loss of each row, and its derivatives by the targets' outputs, ``q`` (twice that) and ``s``."""

    loss: Float[Tensor, " rows"]
    by_targets: Float[Tensor, "rows targets"]
    two_q: Float[Tensor, " rows"]
    by_s: Float[Tensor, " rows"]


@dataclass(frozen=True, slots=True)
class SphericalLoss:
    """A member of the family with its options bound; ``several`` says whether it takes several valued targets."""

    name: str
    derivatives: Callable[[Outputs], Derivatives]
    several: bool = False


def spherical_loss(name: str, **options: float) -> SphericalLoss:
    """The member called ``name``: ``z_loss(a, b)``, ``taylor_softmax``, ``spherical_softmax(eps)``, ``squared_error``.

    The names of the dense functions (``taylor_softmax_loss``) mean the same.
    """
    short = name.removesuffix("_loss") if name != "z_loss" else name
    makers: dict[str, Callable[..., SphericalLoss]] = {
        "z_loss": _z_loss,
        "taylor_softmax": _taylor_softmax,
        "spherical_softmax": _spherical_softmax,
        "squared_error": _squared_error,
    }
    if short not in makers:
        raise ValueError(
            f"loss '{name}' is not spherical (it depends on more than the target's output, the sum and the sum of "
            f"squares); choose one of {', '.join(makers)}"
        )
    try:
        return makers[short](**options)
    except TypeError:
        raise ValueError(f"loss '{name}' has no such options: {', '.join(options)}") from None


def _z_loss(a: float = 1.0, b: float = 0.0) -> SphericalLoss:
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"a must be a finite number > 0, got {a}")
    if not math.isfinite(b):
        raise ValueError(f"b must be a finite number, got {b}")

    def derivatives(outputs: Outputs) -> Derivatives:
        s, classes = outputs.s, outputs.classes
        # All outputs equal: z is taken as 0 with gradient 0, as in lossmith.losses.z_loss.
        inverse = torch.threshold(outputs.centred / classes, 0.0, math.inf).rsqrt_()
        z = torch.sub(outputs.targets[:, 0], s, alpha=1 / classes).mul_(inverse)
        behind = torch.rsub(z, b).mul_(a)
        loss = F.softplus(behind).div_(a)
        by_z = behind.sigmoid_().mul_(inverse)
        two_q = z.mul_(by_z).mul_(inverse).div_(classes)
        by_s = torch.addcmul(by_z, two_q, s, value=-1).div_(classes)
        return Derivatives(loss, by_z.neg_().unsqueeze(-1), two_q, by_s)

    return SphericalLoss("z_loss", derivatives)


def _taylor_softmax() -> SphericalLoss:
    def derivatives(outputs: Outputs) -> Derivatives:
        o = outputs.targets[:, 0]
        numerator, denominator = 1 + o + o.square() / 2, outputs.classes + outputs.s + outputs.q / 2
        return Derivatives(
            denominator.log() - numerator.log(),
            (-(1 + o) / numerator).unsqueeze(-1),
            1 / denominator,
            1 / denominator,
        )

    return SphericalLoss("taylor_softmax", derivatives)


def _spherical_softmax(eps: float = 1e-2) -> SphericalLoss:
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number > 0, got {eps}")

    def derivatives(outputs: Outputs) -> Derivatives:
        o = outputs.targets[:, 0]
        numerator, denominator = o.square() + eps, outputs.q + outputs.classes * eps
        return Derivatives(
            denominator.log() - numerator.log(),
            (-2 * o / numerator).unsqueeze(-1),
            2 / denominator,
            torch.zeros_like(denominator),
        )

    return SphericalLoss("spherical_softmax", derivatives)


def _squared_error() -> SphericalLoss:
    def derivatives(outputs: Outputs) -> Derivatives:
        o, y = outputs.targets, outputs.values
        return Derivatives(
            outputs.q - 2 * (o * y).sum(-1) + y.square().sum(-1),
            -2 * y,
            torch.full_like(outputs.q, 2.0),
            torch.zeros_like(outputs.q),
        )

    return SphericalLoss("squared_error", derivatives, several=True)
