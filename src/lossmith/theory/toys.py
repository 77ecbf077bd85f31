"""Training the toy model of superposition: many widths, weight decays and seeds at once.

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lossmith.theory.features import check_probabilities
from lossmith.theory.overlaps import mean_square_overlap, represented
from lossmith.theory.superposition import Slope, loglog_slope
from lossmith.theory.toy_steps import Runs, Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.laws import Fitted


@dataclass(frozen=True, slots=True)
class ToyTraining:
    """How toys are trained; the defaults are the paper's sweep (1,000 features, widths 10 to 100).

    Attributes:
        steps: optimiser steps.
        batch_size: fresh examples per step.
        learning_rate: peak of the schedule.
        bias_learning_rate: of the bias; ``None`` for the same.
        rate_power, bias_rate_power: rates are multiplied by ``(8 / width)`` to this power.
        warmup: share of the steps over which the rate rises linearly.
        floor: share of the peak at which the cosine ends.
        loss_scale: the mean over features is multiplied by it (with 10,000 features Adam's epsilon would matter).
        averaged: the loss of a run is the mean over this many last steps.
    """

    steps: int = 20_000
    batch_size: int = 2048
    learning_rate: float = 1e-2
    bias_learning_rate: float | None = None
    rate_power: float = 0.0
    bias_rate_power: float = 0.0
    warmup: float = 0.1
    floor: float = 0.05
    loss_scale: float = 1.0
    averaged: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "averaged"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.averaged > self.steps:
            raise ValueError(f"averaged must be at most the {self.steps} steps, got {self.averaged}")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("learning_rate", "loss_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value}")

    @classmethod
    def large(cls) -> ToyTraining:
        """The paper's settings for 10,240 features and widths 8 to 1,024."""
        return cls(
            steps=40_000,
            batch_size=8192,
            learning_rate=0.02,
            bias_learning_rate=0.25,
            rate_power=0.25,
            bias_rate_power=1.0,
            warmup=0.05,
            loss_scale=100.0,
        )

    def schedule(self, step: int) -> float:
        """Share of the peak rate at a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(self.steps - warm, 1)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))

    def rates(self, width: int) -> tuple[float, float]:
        """Peak rates of the weight and of the bias."""
        bias = self.learning_rate if self.bias_learning_rate is None else self.bias_learning_rate
        return self.learning_rate * (8 / width) ** self.rate_power, bias * (8 / width) ** self.bias_rate_power


@dataclass(frozen=True, slots=True, eq=False)
class Toys:
    """Trained toys: a grid of weight decays, seeds and widths; one more dimension in front for several frequencies.

    Attributes:
        probabilities: of the features.
        widths, weight_decays, seeds: the grid.
        losses: mean squared error summed over features, over the last steps: ``(decays, seeds, widths)``, float64.
        curves: the same of every step, ``(decays, seeds, widths, steps)``, float32.
        weights: for each width, ``(decays, seeds, features, width)``.
        biases: for each width, ``(decays, seeds, features)``.

    ``toys[k]`` are those of the ``k``-th row of frequencies; ``table``, ``fit``, ``summary`` and ``plot`` are for
    one row.
    """

    probabilities: Tensor
    widths: tuple[int, ...]
    weight_decays: tuple[float, ...]
    seeds: tuple[int, ...]
    losses: Tensor
    curves: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __getitem__(self, table: int) -> Toys:
        if self.probabilities.ndim == 1:
            raise IndexError("these toys have one row of frequencies only")
        return dataclasses.replace(
            self,
            probabilities=self.probabilities[table],
            losses=self.losses[table],
            curves=self.curves[table],
            weights=tuple(weight[table] for weight in self.weights),
            biases=tuple(bias[table] for bias in self.biases),
        )

    def represented(self, threshold: float = 0.5) -> Float[Tensor, "*tables decays seeds widths"]:
        """Share of features whose vector is longer than ``threshold``; see :func:`represented`."""
        return torch.stack([represented(weight, threshold) for weight in self.weights], -1)

    def overlaps(self) -> Float[Tensor, "*tables decays seeds widths"]:
        """Mean squared overlaps; see :func:`mean_square_overlap`."""
        return torch.stack([mean_square_overlap(weight) for weight in self.weights], -1)

    def slopes(self) -> Slope:
        """Exponent, factor and R² of the loss by width, each ``(decays, seeds)``."""
        return loglog_slope(torch.tensor(self.widths, dtype=torch.float64), self.losses)

    def table(self, weight_decay: float) -> dict[str, list[float] | list[str]]:
        """Columns ``width``, ``loss`` and ``run`` (the seed) of one weight decay, as laws take them."""
        self._one()
        if weight_decay not in self.weight_decays:
            allowed = ", ".join(f"{decay:g}" for decay in self.weight_decays)
            raise ValueError(f"weight_decay must be one of {allowed}, got {weight_decay:g}")
        row = self.weight_decays.index(weight_decay)
        return {
            "width": [float(width) for _ in self.seeds for width in self.widths],
            "loss": self.losses[row].flatten().tolist(),
            "run": [f"seed {seed}" for seed in self.seeds for _ in self.widths],
        }

    def fit(self, weight_decay: float, *, bootstrap: int = 200, seed: int = 0) -> Fitted:
        """The law ``loss = A / width**alpha`` of one weight decay, with intervals over seeds."""
        from lossmith.laws import LOG_SQUARES, Width

        law = Width(offset=False, objective=LOG_SQUARES)
        return law.fit(self.table(weight_decay), bootstrap=bootstrap, seed=seed, calibrated=False)

    def summary(self) -> str:
        """A line per weight decay: exponent (of 3 widths or more), share represented, overlaps; means over seeds."""
        self._one()
        shares, overlaps = self.represented(), self.overlaps()
        slopes = self.slopes() if len(self.widths) >= 3 else None
        across = torch.tensor(self.widths, dtype=torch.float64)
        lines = [
            f"{len(self.probabilities)} features, widths {', '.join(map(str, self.widths))}; "
            f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}"
        ]
        for row, decay in enumerate(self.weight_decays):
            slope = (
                ""
                if slopes is None
                else (f"exponent {slopes.exponent[row].mean():.2f} (R² {slopes.r_squared[row].mean():.2f}); ")
            )
            lines.append(
                f"  weight decay {decay:g}: {slope}represented {_span(shares[row].mean(0))}; "
                f"width x mean squared overlap {_span((overlaps[row] * across).mean(0))}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Loss, share represented and overlaps by width; saved where ``path`` is given (.png, .svg or .pdf)."""
        self._one()
        from lossmith.theory.plots import toys_figure

        return toys_figure(self, path)

    def _one(self) -> None:
        if self.probabilities.ndim != 1:
            raise ValueError("these toys have several rows of frequencies: choose one, toys[0]")


def train_toys(
    probabilities: Float[Tensor, "*tables features"],
    widths: Sequence[int],
    *,
    weight_decays: Sequence[float] = (-1.0,),
    seeds: Sequence[int] = (0,),
    training: ToyTraining = ToyTraining(),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Toys:
    """Train a toy model for every width, weight decay and seed.

    Toys of one seed see the same examples and, at one width, start from the same weights (normal, deviation
    ``1/sqrt(width)``; bias standard normal), whatever else is in the grid. Examples are drawn, encoded and
    differentiated as the few features that are on; gradients are written out instead of recorded.

    Args:
        probabilities: how often each feature is on, as :func:`feature_frequencies` gives it; or several such rows.
        widths: hidden dimensions, each below the number of features.
        weight_decays: -1 makes for strong superposition, 0.1 and more for weak.
        seeds: of weights and examples.
        training: steps, batch, rates.
        dtype: float32 or float64. (The authors found other results in float16.)
        device: where to train.
        progress: told ``(steps done, steps)`` now and then.

    Returns:
        Everything trained, on the CPU.

    Raises:
        ValueError: wrong probabilities; widths that do not lie between 1 and the features; a grid without entries or
            with the same entry twice; a loss that is no longer finite.

    Source: Liu et al. 2025, arXiv 2505.10465; defaults of the sweep with 1,000 features.

    >>> from lossmith.theory import feature_frequencies
    >>> toys = train_toys(feature_frequencies("power", 20), [2, 4, 8],
    ...                   training=ToyTraining(steps=50, batch_size=32, averaged=5))
    >>> toys.losses.shape
    torch.Size([1, 1, 3])
    """
    if probabilities.ndim not in (1, 2) or probabilities.numel() == 0:
        raise ValueError(f"probabilities must be one or two dimensional, got shape {tuple(probabilities.shape)}")
    for table in probabilities.reshape(-1, probabilities.shape[-1]):
        check_probabilities(table)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    features = probabilities.shape[-1]
    for name, given in (("widths", widths), ("weight_decays", weight_decays), ("seeds", seeds)):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{name} must be different and at least one, got {list(given)}")
    if wrong := [width for width in widths if not 1 <= width < features]:
        raise ValueError(f"widths must lie between 1 and {features - 1}, below the {features} features; got {wrong[0]}")
    if wrong_decays := [decay for decay in weight_decays if not math.isfinite(decay)]:
        raise ValueError(f"weight_decays must be finite, got {wrong_decays[0]}")
    tables = probabilities.reshape(-1, features)
    runs = Runs(features, widths, weight_decays, seeds, len(tables), training, dtype, device)
    streams = [[Stream(table, seed, training).batches(device, dtype) for seed in seeds] for table in tables]
    every = max(1, training.steps // 100)
    for step in range(training.steps):
        parts = [batch for row in streams for batch in [next(stream) for stream in row] * len(weight_decays)]
        runs.step(parts, step)
        if (step + 1) % every == 0 or step + 1 == training.steps:
            runs.check(step)
            if progress is not None:
                progress(step + 1, training.steps)
    grid = (*probabilities.shape[:-1], len(weight_decays), len(seeds))
    curves = runs.curves.permute(2, 1, 0).reshape(*grid, len(widths), training.steps).cpu()
    return Toys(
        probabilities,
        tuple(widths),
        tuple(weight_decays),
        tuple(seeds),
        curves[..., -training.averaged :].mean(-1),
        curves.float(),
        tuple(weight.detach().reshape(*grid, features, -1).cpu() for weight in runs.weights),
        tuple(bias.detach().reshape(*grid, features).cpu() for bias in runs.biases),
    )


def _span(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.2g}" if math.isclose(low, high, rel_tol=0.005) else f"{low:.2g} to {high:.2g}"
