"""Trial functions: small networks that are exactly zero at the walls and know their own derivatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError, did_you_mean


class Jet(NamedTuple):
    """A function with its first two derivatives at the same places."""

    value: Tensor
    first: Tensor
    second: Tensor

    def times(self, other: Jet) -> Jet:
        """Product rule."""
        return Jet(
            self.value * other.value,
            self.first * other.value + self.value * other.first,
            self.second * other.value + 2 * self.first * other.first + self.value * other.second,
        )


def _tanh(z: Tensor) -> Jet:
    t = torch.tanh(z)
    slope = 1 - t * t
    return Jet(t, slope, -2 * t * slope)


def _sin(z: Tensor) -> Jet:
    s = torch.sin(z)
    return Jet(s, torch.cos(z), -s)


def _silu(z: Tensor) -> Jet:
    p = torch.sigmoid(z)
    q = p * (1 - p)
    return Jet(z * p, p + z * q, q * (2 + z * (1 - 2 * p)))


ACTIVATIONS: dict[str, Callable[[Tensor], Jet]] = {"tanh": _tanh, "sin": _sin, "silu": _silu}


class Trial(nn.Module):
    """``ψ_k(x) = s² (x - a)(b - x) Σ_j c_kj φ_j(u)``, ``s = 2 / (b - a)``, ``u = s (x - (a + b) / 2)``.

    ``φ`` are 1, the last hidden layer ``h(u)`` of a multi-layer perceptron, and for every jump ``x_i`` of the potential
    the same times ``max(0, u - u_i)²``: there ``ψ''`` jumps, which no smooth network can; for every kink of it
    ``max(0, u - u_i)³``. The factor in front is exactly 0 at the walls for any weights. Derivatives are carried forward
    through the layers in closed form, so that training needs one backward pass instead of three nested ones.

    Args:
        interval: the walls.
        jumps: of the potential.
        knots: its kinks.
        hidden: sizes of the hidden layers.
        states: how many functions share them.
        activation: ``tanh``, ``sin`` or ``silu``; it must have a second derivative.
        seed: of the weights.
        dtype: float64; float32 limits a residual to about 1e-6.

    Raises:
        InputError: an activation without second derivative, or unknown.

    >>> trial = Trial((0.0, 1.0), hidden=(8, 8))
    >>> trial(torch.tensor([0.0, 1.0], dtype=torch.float64)).flatten().tolist()
    [0.0, 0.0]
    """

    def __init__(
        self,
        interval: tuple[float, float],
        jumps: Sequence[float] = (),
        *,
        knots: Sequence[float] = (),
        hidden: Sequence[int] = (20, 20, 20),
        states: int = 1,
        activation: str = "tanh",
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            if activation in ("relu", "leaky_relu", "hardtanh"):
                raise InputError(f"activation {activation} has no second derivative; choose tanh, sin or silu")
            raise InputError(f"unknown activation '{activation}': {did_you_mean(activation, ACTIVATIONS)}")
        if not hidden or min(hidden) < 1 or states < 1:
            raise InputError(f"hidden needs sizes of at least 1 and states at least 1, got {hidden} and {states}")
        self.interval, self.activation = interval, activation
        self.jumps, self.knots = tuple(jumps), tuple(knots)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [1, *hidden]
            self.layers = nn.ModuleList(nn.Linear(i, o, dtype=dtype) for i, o in itertools.pairwise(sizes))
            features = (1 + len(self.jumps)) * (1 + hidden[-1]) + len(self.knots)
            bound = 1 / math.sqrt(hidden[-1])
            self.output = nn.Parameter(torch.empty(states, features, dtype=dtype).uniform_(-bound, bound))

    @torch.no_grad()
    def spread(self, centres: Float[Tensor, " hidden"], slopes: Float[Tensor, " hidden"]) -> None:
        """Put the units of the first layer where they are needed.

        Args:
            centres: places where their arguments are 0.
            slopes: of their arguments in ``x``.
        """
        a, b = self.interval
        first, *others = self.linear
        first.weight.copy_((slopes * (b - a) / 2)[:, None])
        first.bias.copy_(slopes * ((a + b) / 2 - centres))
        for layer in others:
            layer.weight.mul_(1.5 * 3**0.5)

    @property
    def linear(self) -> list[nn.Linear]:
        """The hidden layers."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def trunk(self) -> list[nn.Parameter]:
        """What the features are made of: everything but the output layer."""
        return list(self.layers.parameters())

    def features(self, x: Float[Tensor, " n"]) -> Jet:
        """``s² (x - a)(b - x) φ_j``, each ``(n, features)``."""
        a, b = self.interval
        s = 2 / (b - a)
        u = s * (x - (a + b) / 2)
        one = torch.ones_like(u)[:, None]
        jet = Jet(u[:, None], s * one, 0 * one)
        for layer in self.linear:
            w, bias = layer.weight, layer.bias
            f = ACTIVATIONS[self.activation](torch.addmm(bias, jet.value, w.T))
            first, second = jet.first @ w.T, jet.second @ w.T
            jet = Jet(f.value, f.first * first, f.first * second + f.second * first * first)
        jet = Jet(*(torch.cat([c, part], -1) for c, part in zip((one, 0 * one, 0 * one), jet, strict=True)))
        parts = [jet]
        for jump in self.jumps:
            right = torch.relu(s * (x - jump))[:, None]
            parts.append(jet.times(Jet(right**2, 2 * s * right, 2 * s * s * (right > 0).to(x.dtype))))
        if self.knots:
            right = torch.relu(s * (x[:, None] - torch.tensor(self.knots, dtype=x.dtype, device=x.device)))
            parts.append(Jet(right**3, 3 * s * right**2, 6 * s * s * right))
        joined = Jet(*(torch.cat(same, -1) for same in zip(*parts, strict=True)))
        walls = Jet(*(s * s * part[:, None] for part in ((x - a) * (b - x), a + b - 2 * x, torch.full_like(x, -2))))
        return walls.times(joined)

    def jet(self, x: Float[Tensor, " n"]) -> Jet:
        """``ψ_k``, ``ψ_k'`` and ``ψ_k''``, each ``(n, states)``."""
        return Jet(*(part @ self.output.T for part in self.features(x)))

    def forward(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n states"]:
        """``ψ_k(x)``."""
        return self.jet(x).value
