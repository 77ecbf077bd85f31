"""One step of many toys at once: examples as the few features that are on, gradients written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lossmith.theory.features import expected_points, sample_active
from lossmith.theory.signed_decay import SignedDecayAdamW

if TYPE_CHECKING:
    from lossmith.theory.toys import ToyTraining

# Outputs (runs x rows x features) that are in work at once on a CPU: more would leave its cache.
_BLOCK = 1 << 18
# Points of the sampler's Poisson process that are drawn at once.
_CHUNK = 1 << 20


class Batch(NamedTuple):
    """The active features of one step of some runs, as positions in flattened arrays."""

    rows: Tensor  # run, row
    vectors: Tensor  # run, feature
    cells: Tensor  # run, row, feature
    values: Tensor


def loss_and_gradients(
    weight: Float[Tensor, "runs features width"],
    bias: Float[Tensor, "runs features"],
    batch: Batch,
    rows: int,
) -> tuple[Float[Tensor, " runs"], Float[Tensor, "runs features width"], Float[Tensor, "runs features"]]:
    """The loss (mean over rows, sum over features) and its gradients, for each run.

    With ``e = 2 (y - x) [y > 0] / rows``: the gradient of the bias is the column sum of ``e``; that of the weight is
    ``eᵀ h + xᵀ (e W)``, where products with ``x`` touch active features only.
    """
    runs, features, width = weight.shape
    values = batch.values.unsqueeze(-1)
    scaled = weight.reshape(runs * features, width).index_select(0, batch.vectors) * values
    hidden = weight.new_zeros(runs * rows, width).index_add_(0, batch.rows, scaled).view(runs, rows, width)
    outputs = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT).clamp_(min=0)
    cells = outputs.view(-1)
    reached = cells.take(batch.cells)
    residual = reached - batch.values
    cells.put_(batch.cells, residual)
    losses = torch.linalg.vector_norm(outputs, dim=(1, 2)).square() / rows
    # Where an output is cut off at 0 its residual carries no gradient. (Inactive ones have no residual there.)
    cells.put_(batch.cells, torch.where(reached > 0, residual, 0))
    by_hidden = torch.bmm(outputs, weight).view(runs * rows, width)
    by_weight = torch.bmm(outputs.mT, hidden)
    by_weight.view(runs * features, width).index_add_(0, batch.vectors, by_hidden.index_select(0, batch.rows) * values)
    scale = 2 / rows
    return losses, by_weight.mul_(scale), outputs.sum(1).mul_(scale)


class Stream:
    """The examples of one seed and one row of frequencies, step by step.

    Drawn in chunks whose size depends on nothing but the frequencies and the training, so that a seed has the same
    examples whatever else is trained beside it.
    """

    def __init__(self, probabilities: Tensor, seed: int, training: ToyTraining):
        self.probabilities, self.rows = probabilities, training.batch_size
        points = expected_points(probabilities) * self.rows
        self.chunk = int(max(1, min(training.steps, _CHUNK // max(1, int(points)))))
        self.generator = torch.Generator().manual_seed(mixed(seed, 0))

    def batches(self, device: str, dtype: torch.dtype) -> Iterator[Batch]:
        """Endless."""
        features = len(self.probabilities)
        while True:
            found = sample_active(self.probabilities, self.chunk * self.rows, self.generator)
            edges = torch.searchsorted(found.rows, torch.arange(self.chunk + 1) * self.rows).tolist()
            rows = (found.rows % self.rows).to(device)
            vectors, values = found.features.to(device), found.values.to(device, dtype)
            cells = rows * features + vectors
            for first, last in itertools.pairwise(edges):
                yield Batch(rows[first:last], vectors[first:last], cells[first:last], values[first:last])


def side_by_side(parts: Sequence[Batch], rows: int, features: int, block: int) -> list[tuple[slice, Batch]]:
    """The batches of some runs as one, ``block`` runs at a time: which runs, and their batch."""
    joined = []
    for start in range(0, len(parts), block):
        some = parts[start : start + block]
        here = slice(start, start + len(some))
        if len(some) == 1:
            joined.append((here, some[0]))
            continue
        counts = torch.tensor([len(part.rows) for part in some], device=some[0].rows.device)
        run = torch.repeat_interleave(counts)
        row, vector, cell, values = (torch.cat(column) for column in zip(*some, strict=True))
        joined.append((here, Batch(row + run * rows, vector + run * features, cell + run * (rows * features), values)))
    return joined


class Runs:
    """All runs: for each width the stacked weights and biases, their optimiser, their losses by step."""

    def __init__(
        self,
        features: int,
        widths: Sequence[int],
        decays: Sequence[float],
        seeds: Sequence[int],
        tables: int,
        training: ToyTraining,
        dtype: torch.dtype,
        device: str,
    ):
        self.features, self.widths, self.training = features, widths, training
        number = tables * len(decays) * len(seeds)
        self.weights, self.biases, self.peaks, groups = [], [], [], []
        # Runs are ordered by table, then decay, then seed.
        gamma = torch.tensor(decays, dtype=dtype).repeat_interleave(len(seeds)).repeat(tables).to(device)
        by_rate: dict[tuple[str, float], list[Tensor]] = {}
        for width in widths:
            first = [_start(features, width, seed) for seed in seeds]
            repeats = tables * len(decays)
            self.weights.append(torch.stack([weight for weight, _ in first] * repeats).to(device, dtype))
            self.biases.append(torch.stack([bias for _, bias in first] * repeats).to(device, dtype))
            for kind, rate, tensors in zip(("w", "b"), training.rates(width), (self.weights, self.biases), strict=True):
                by_rate.setdefault((kind, rate), []).append(tensors[-1])
        for (kind, rate), tensors in by_rate.items():
            groups.append({"params": tensors, "lr": rate, "weight_decay": gamma if kind == "w" else 0.0})
            self.peaks.append(rate)
        self.optimizer = SignedDecayAdamW(groups)
        for tensor in (*self.weights, *self.biases):
            tensor.grad = torch.zeros_like(tensor)
        self.curves = torch.empty(training.steps, len(widths), number, dtype=torch.float64, device=device)
        self.block = number if device != "cpu" else max(1, _BLOCK // (training.batch_size * features))

    def step(self, parts: Sequence[Batch], step: int) -> None:
        """Make one optimiser step of every run."""
        rows = self.training.batch_size
        scale = self.training.loss_scale / self.features
        for here, batch in side_by_side(parts, rows, self.features, self.block):
            for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                losses, by_weight, by_bias = loss_and_gradients(weight[here], bias[here], batch, rows)
                self.curves[step, i, here] = losses
                assert weight.grad is not None
                assert bias.grad is not None
                torch.mul(by_weight, scale, out=weight.grad[here])
                torch.mul(by_bias, scale, out=bias.grad[here])
        share = self.training.schedule(step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = share * peak
        self.optimizer.step()

    def check(self, step: int) -> None:
        """Refuse to go on with losses that are not finite."""
        lost = ~self.curves[step].isfinite().all(-1)
        if bool(lost.any()):
            width = self.widths[int(lost.nonzero()[0])]
            raise ValueError(f"the loss of a toy of width {width} is not finite at step {step}; lower learning_rate")


def _start(features: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(mixed(seed, width))
    weight = torch.randn(features, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return weight, torch.randn(features, generator=generator, dtype=torch.float64)


def mixed(seed: int, width: int) -> int:
    """Seeds that differ in every bit, so that streams of neighbouring seeds have nothing in common."""
    return int(np.random.SeedSequence([seed, width]).generate_state(1, np.uint64)[0] >> np.uint64(1))
