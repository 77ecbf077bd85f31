"""How densely a language model packs its tokens: norms and overlaps of the rows of its unembedding.

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossmith.files import finite_or_none, write_text
from lossmith.probes.unembedding import Unembedding, find_unembedding
from lossmith.theory.overlaps import DEAD, welch_bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS, _COSINE_BINS = 120, 1000
# Products below this many operations are made in float64, which costs nothing then.
_SMALL = 2e11


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, standard deviation and range of some numbers."""

    mean: float
    deviation: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Of a tensor with at least one number."""
        wide = values.double()
        return cls(float(wide.mean()), float(wide.std(correction=0)), float(wide.min()), float(wide.max()))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges; one edge more than counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SuperpositionReport:
    """What :func:`superposition` found.

    Attributes:
        name, parameter, dtype: of what was measured.
        rows: tokens, ``n``.
        dimensions: of their vectors, ``m``.
        width: of the residual stream, where known; the abscissa of scaling laws by width.
        tied: whether the input embedding is the same matrix.
        dead: rows without direction (norm at most 1e-6), which count in nothing else.
        duplicates: rows that repeat another, number for number.
        norms: of the rows.
        represented: share of rows longer than 1/2, the paper's measure of its toys; language models have norms of
            their own scale.
        strongly_represented: share of rows longer than 1.
        represented_of_mean: share of rows longer than half the mean norm.
        mean_square_overlap: over all pairs, exactly.
        centred_mean_square_overlap: the same after the mean row is taken away: softmax does not see it, and in trained
            models it is long.
        mean_row: norm of the mean row over the mean norm.
        mean_absolute_overlap, absolute_error: over the pairs of ``pair_rows`` random rows with all others, and its
            standard error (0 where all rows are taken).
        pair_rows: see above.
        bias: of the output layer, where it has one.
        cosines: of those pairs.
        norm_histogram: of the rows.
    """

    name: str
    parameter: str
    dtype: str
    rows: int
    dimensions: int
    width: int | None
    tied: bool | None
    dead: int
    duplicates: int
    norms: Spread
    represented: float
    strongly_represented: float
    represented_of_mean: float
    mean_square_overlap: float
    centred_mean_square_overlap: float
    mean_row: float
    mean_absolute_overlap: float
    absolute_error: float
    pair_rows: int
    bias: Spread | None
    cosines: Histogram
    norm_histogram: Histogram

    @property
    def one_over_m(self) -> float:
        """Mean squared overlap of random vectors."""
        return 1 / self.dimensions

    @property
    def welch(self) -> float:
        """The least mean squared overlap that is possible."""
        return welch_bound(self.rows - self.dead, self.dimensions)

    @property
    def ratio(self) -> float:
        """Mean squared overlap in units of that of random vectors."""
        return self.mean_square_overlap * self.dimensions

    @property
    def centred_ratio(self) -> float:
        """The same of the centred rows."""
        return self.centred_mean_square_overlap * self.dimensions

    def summary(self) -> str:
        """A few lines, for people."""
        tied = {True: ", tied to the input embedding", False: ", not tied", None: ""}[self.tied]
        width = f" (width {self.width})" if self.width not in (None, self.dimensions) else ""
        norms = self.norms
        lines = [
            f"{self.name}: {self.parameter}, {self.rows} x {self.dimensions}{width}, {self.dtype}{tied}",
            f"  norms                    {norms.mean:.4g} ± {norms.deviation:.2g}, "
            f"{norms.least:.3g} to {norms.most:.3g}",
            f"  longer than 1/2          {100 * self.represented:.1f}%; than half the mean norm "
            f"{100 * self.represented_of_mean:.1f}%",
            f"  mean squared overlap     {self.mean_square_overlap:.4g} = {self.ratio:.3g} / m "
            f"(random vectors 1 / m = {self.one_over_m:.4g}, Welch bound {self.welch:.4g})",
            f"  without the mean row     {self.centred_mean_square_overlap:.4g} = {self.centred_ratio:.3g} / m "
            f"(the mean row is {self.mean_row:.2g} mean norms long)",
            f"  mean absolute overlap    {self.mean_absolute_overlap:.4g} ± {self.absolute_error:.1g} "
            f"({self.pair_rows} rows with all others)",
        ]
        if self.bias is not None:
            lines.append(f"  bias                     {self.bias.mean:.3g} ± {self.bias.deviation:.2g}")
        if self.dead:
            lines.append(f"  {self.dead} rows have no direction and are left out")
        if self.duplicates:
            lines.append(f"  {self.duplicates} rows repeat others: tokens that were never trained, perhaps")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Cosines beside those of random vectors, and norms; saved where ``path`` is given (.png, .svg or .pdf)."""
        from lossmith.probes.plots import superposition_figure

        return superposition_figure(self, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON text; also written to ``path`` where one is given."""
        derived = {name: getattr(self, name) for name in ("one_over_m", "welch", "ratio", "centred_ratio")}
        value = {"probe": "superposition", **dataclasses.asdict(self), **derived}
        text = json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text


def superposition(
    model: Any,
    *,
    pair_rows: int = 1024,
    block_rows: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SuperpositionReport:
    r"""Norms and overlaps of a model's unembedding: how far it is from random vectors, and from the Welch bound.

    Under strong superposition all tokens are represented and their mean squared overlap is about :math:`1/m`, and with
    it the part of the loss that falls with the width. The mean square comes from the Gram matrix of the columns, over
    all pairs exactly, for ``n m²`` operations; the matrix is read twice, in blocks, and never held: memory is that of a
    few blocks and of ``m x m`` matrices in float64.

    Args:
        model: a folder or hub id, whose other weights are not read; a model; an output layer; or a matrix.
        pair_rows: random rows whose cosines with all others are looked at one by one.
        block_rows: rows read at a time; by default four million numbers' worth.
        seed: of the choice of those rows.
        device: where to multiply.
        progress: told ``(blocks done, blocks)``.

    Raises:
        InputError: no such model, one without unembedding, or values that are not finite.
        ValueError: fewer than two rows with a direction, or options out of range.

    Source: Liu et al. 2025, arXiv 2505.10465 (``overlap-0.py``, ``norm-0.py``), which multiplies all pairs of rows; the
    result is the same.

    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> report = superposition(weight)
    >>> round(report.mean_square_overlap, 6), round(report.mean_absolute_overlap, 6), report.welch
    (0.333333, 0.466667, 0.25)
    """
    for name, value in (("pair_rows", pair_rows), ("block_rows", 1 if block_rows is None else block_rows)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    found = find_unembedding(model)
    size = block_rows if block_rows is not None else max(1, (1 << 22) // found.dimensions)
    number = -(-found.rows // size)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, 2 * number)

    norms, mean, duplicates = _first_pass(found, size, tell)
    alive = norms > DEAD
    count = int(alive.sum())
    if count < 2:
        raise ValueError(f"{found.parameter} of {found.name} has {count} rows with a direction; overlaps need 2")
    generator = torch.Generator().manual_seed(seed)
    living = alive.nonzero().squeeze(-1)
    chosen = living[torch.randperm(count, generator=generator)[:pair_rows]].sort().values
    pairs = _Pairs(found, chosen, norms, device)
    operations = 4.0 * found.rows * found.dimensions**2
    dtype = torch.float64 if operations < _SMALL else torch.float32
    plain, centred = (_SquareSum(found.dimensions, device) for _ in range(2))
    for done, (first, block) in enumerate(found.blocks(size, torch.float64), number):
        own = norms[first : first + len(block)]
        unit = _units(block.to(device), own)
        plain.add(unit, dtype)
        moved = block - mean
        centred.add(_units(moved.to(device), torch.where(own > DEAD, moved.norm(dim=-1), 0.0)), dtype)
        pairs.add(first, unit.float())
        tell(done + 1)
    norms = norms[alive]
    low, high = float(norms.min()), float(norms.max())
    if not low < high:
        low, high = 0.99 * low, 1.01 * high
    return SuperpositionReport(
        name=found.name,
        parameter=found.parameter,
        dtype=found.dtype,
        rows=found.rows,
        dimensions=found.dimensions,
        width=found.width,
        tied=found.tied,
        dead=found.rows - count,
        duplicates=duplicates,
        norms=Spread.of(norms),
        represented=float((norms > 0.5).sum()) / found.rows,
        strongly_represented=float((norms > 1).sum()) / found.rows,
        represented_of_mean=float((norms > 0.5 * norms.mean()).sum()) / found.rows,
        mean_square_overlap=plain.mean(),
        centred_mean_square_overlap=centred.mean(),
        mean_row=float(mean.norm() / norms.mean()),
        mean_absolute_overlap=pairs.mean(count),
        absolute_error=pairs.error(count),
        pair_rows=len(chosen),
        bias=None if found.bias is None else Spread.of(found.bias),
        cosines=pairs.histogram(),
        norm_histogram=_histogram(torch.histc(norms, _BINS, low, high), low, high),
    )


def _first_pass(found: Unembedding, size: int, tell: Callable[[int], None]) -> tuple[Tensor, Tensor, int]:
    """Norms, the mean row, and how many rows repeat another."""
    norms = torch.empty(found.rows, dtype=torch.float64)
    marks = torch.empty(found.rows, dtype=torch.float64)
    total = torch.zeros(found.dimensions, dtype=torch.float64)
    # Rows that agree in every number have the same product with a random vector; others, as good as never.
    direction = torch.randn(found.dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for number, (first, block) in enumerate(found.blocks(size)):
        here = slice(first, first + len(block))
        norms[here] = block.norm(dim=-1)
        total += block[norms[here] > DEAD].sum(0)
        marks[here] = (block * direction).sum(-1)
        tell(number + 1)
    living = marks[norms > DEAD]
    return norms, total / max(len(living), 1), len(living) - len(living.unique())


def _units(block: Tensor, norms: Tensor) -> Tensor:
    lengths = norms.to(block.device).unsqueeze(-1)
    return torch.where(lengths > DEAD, block / lengths, 0.0)


class _SquareSum:
    """The sum of squared cosines over all pairs of rows: the squared norm of the Gram matrix less its diagonal part."""

    def __init__(self, dimensions: int, device: str):
        self.gram = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
        self.diagonal, self.count = 0.0, 0

    def add(self, unit: Tensor, dtype: torch.dtype) -> None:
        part = unit.to(dtype)
        self.gram += part.mT @ part
        squares = unit.square().sum(-1)
        self.diagonal += float(squares.square().sum())
        self.count += int((squares > 0.5).sum())

    def mean(self) -> float:
        if self.count < 2:
            return float("nan")
        return max(0.0, float(self.gram.square().sum()) - self.diagonal) / (self.count * (self.count - 1))


class _Pairs:
    """Cosines of some rows with all others."""

    def __init__(self, found: Unembedding, chosen: Tensor, norms: Tensor, device: str):
        rows = torch.cat([found.read(int(i), int(i) + 1) for i in chosen]).double()
        self.chosen = chosen
        self.rows = _units(rows, norms[chosen]).float().to(device)
        self.sums = torch.zeros(len(chosen), dtype=torch.float64)
        self.counts = torch.zeros(_COSINE_BINS, dtype=torch.float64)
        self.all = len(chosen)

    def add(self, first: int, unit: Tensor) -> None:
        # Rows that are none of a living row's business: itself, and the dead ones, whose cosines would count as 0.
        cosine = self.rows @ unit.mT
        own = (self.chosen >= first) & (self.chosen < first + len(unit))
        places = own.nonzero().squeeze(-1)
        cosine[places, self.chosen[places] - first] = torch.nan
        cosine[:, (unit.square().sum(-1) < 0.5)] = torch.nan
        self.sums += cosine.abs().nansum(-1).double().cpu()
        inside = cosine[cosine.isfinite()].clamp_(-1, 1)
        self.counts += torch.histc(inside, _COSINE_BINS, -1, 1).double().cpu()

    def mean(self, count: int) -> float:
        return float(self.sums.mean()) / (count - 1)

    def error(self, count: int) -> float:
        """Of the mean over the chosen rows, which are a share of all."""
        if self.all < 2 or self.all == count:
            return 0.0
        spread = float(self.sums.std()) / (count - 1)
        return spread / self.all**0.5 * (1 - self.all / count) ** 0.5

    def histogram(self) -> Histogram:
        return _histogram(self.counts, -1.0, 1.0)


def _histogram(counts: Tensor, low: float, high: float) -> Histogram:
    edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
    return Histogram(tuple(edges.tolist()), tuple(int(count) for count in counts))
