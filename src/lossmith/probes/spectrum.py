"""The shape of a cloud of representations: its covariance in one pass, effective rank, spectral decay.

"Tracing the Representation Geometry of Language Models from Pretraining to Post-training", NeurIPS 2025,
arXiv 2509.23024; RankMe after arXiv 2210.02885, alpha-ReQ after Agrawal et al., NeurIPS 2022.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Ranks of the fit of the spectral decay (the first ones are outliers' on purpose).
_FIRST, _LAST = 12, 100


class StreamingCovariance:
    """Mean and covariance of rows that come in batches: O(features²) memory, whatever their number.

    Batches are centred by their own mean and joined by Chan, Golub and LeVeque's update, so that a mean far from 0
    costs no digits. Order and size of the batches change nothing but rounding.

    Args:
        features: of a row.
        dtype: of the sums and products; float32 is faster, and loses eigenvalues below 1e-6 of the largest.
        device: of the sums.

    >>> rows = torch.randn(100, 3, dtype=torch.float64) + 1e6
    >>> stream = StreamingCovariance(3)
    >>> for part in rows.split(33):
    ...     stream.update(part)
    >>> bool(torch.allclose(stream.covariance(), torch.cov(rows.T, correction=0), rtol=1e-9))
    True
    """

    def __init__(
        self, features: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._dtype = dtype

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        """Take more rows.

        Raises:
            ValueError: another number of features, or values that are not finite (row and feature are named).
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"rows must have shape (n, {len(self.mean)}), got {tuple(rows.shape)}")
        if not len(rows):
            return
        wide = rows.to(self.mean.device, self._dtype)
        # A sum is finite if all its addends are (or cancel, which infinities do not).
        if not bool(torch.isfinite(wide.sum())):
            bad = (~torch.isfinite(wide)).nonzero()
            if len(bad):
                row, feature = (int(i) for i in bad[0])
                raise ValueError(
                    f"row {self.count + row}, feature {feature} is not finite: {float(rows[row, feature])}"
                )
        mean = wide.mean(0)
        centred = wide - mean
        self._join(len(rows), mean.double(), (centred.T @ centred).double())

    def merge(self, other: StreamingCovariance) -> None:
        """Take all rows of another stream."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"streams of {len(self.mean)} and {len(other.mean)} features do not merge")
        self._join(other.count, other.mean.to(self.mean.device), other.products.to(self.mean.device))

    def all_reduce(self) -> None:
        """Merge the streams of all processes of ``torch.distributed``; every process then has the same."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return
        own = torch.cat([self.mean.new_tensor([self.count]), self.mean, self.products.reshape(-1)])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        features = len(self.mean)
        self.count, self.mean, self.products = 0, torch.zeros_like(self.mean), torch.zeros_like(self.products)
        for part in parts:
            self._join(int(part[0]), part[1 : features + 1], part[features + 1 :].view(features, features))

    def _join(self, count: int, mean: Tensor, products: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        shift = mean - self.mean
        self.products += products
        self.products.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def covariance(self) -> Float[Tensor, "features features"]:
        """``Σ (f - f̄)(f - f̄)ᵀ / M``.

        Raises:
            ValueError: fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return self.products / self.count

    def eigenvalues(self) -> Float[Tensor, " features"]:
        """Of the covariance, largest first; rounding below 0 becomes 0."""
        return torch.linalg.eigvalsh(self.covariance()).flip(0).clamp_min(0)


def rankme(eigenvalues: Float[Tensor, " n"], *, eps: float = 0.0) -> float:
    """Effective rank, ``exp(-Σ p_i ln p_i)`` with ``p_i = σ_i / Σσ``, from 1 to ``n``.

    Args:
        eigenvalues: ``σ``, of the covariance (variances, not singular values).
        eps: added to every ``p_i``; the paper's code has 1e-7.

    Raises:
        ValueError: all are 0, one is negative or not finite.

    >>> rankme(torch.tensor([4.0, 2.0, 1.0, 1.0]))  # 2 ** 1.75
    3.363585661014858
    """
    p = _shares(eigenvalues) + eps
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


class PowerLaw(NamedTuple):
    """``σ_i ≈ C i^-alpha``.

    Attributes:
        alpha: decay; small for a high effective rank.
        log_constant: ``ln C``.
        first, last: ranks fitted, counted from 1.
        r2: of the line over all ranks from ``first`` to 499 (or the last usable), unweighted.
        r2_fitted: over the fitted ranks.
    """

    alpha: float
    log_constant: float
    first: int
    last: int
    r2: float
    r2_fitted: float


def alpha_req(
    eigenvalues: Float[Tensor, " n"], *, first: int = _FIRST, last: int = _LAST, usable: int | None = None
) -> PowerLaw:
    """Spectral decay by least squares of ``ln σ_i`` on ``ln i`` over ranks ``first..last`` with weights ``1/i``.

    Args:
        eigenvalues: of the covariance, largest first.
        first: rank to begin with, counted from 1.
        last: rank to end with.
        usable: how many of them are more than rounding; default: those above 1e-12 of the largest.

    Raises:
        ValueError: fewer than 3 usable eigenvalues in the range; says which range would work.

    >>> ranks = torch.arange(1, 513, dtype=torch.float64)
    >>> round(alpha_req(ranks**-1.5).alpha, 12)
    1.5
    """
    values = eigenvalues.double()
    shares = _shares(values)
    known = usable if usable is not None else int((shares > 1e-12 * shares.max()).sum())
    if first < 1 or last < first + 2:
        raise ValueError(f"ranks must satisfy 1 <= first <= last - 2, got {first} to {last}")
    if last > known:
        raise ValueError(
            f"ranks {first} to {last} need {last} eigenvalues that are more than rounding, there are {known}"
            + (f"; first={max(1, known // 6)}, last={known} would work" if known >= 3 else "")
        )
    ranks = torch.arange(first, last + 1, dtype=torch.float64)
    x, y, w = -ranks.log(), values[first - 1 : last].cpu().log(), 1 / ranks
    w = w / w.sum()
    mean_x, mean_y = (w * x).sum(), (w * y).sum()
    alpha = float((w * (x - mean_x) * (y - mean_y)).sum() / (w * (x - mean_x) ** 2).sum())
    constant = float(mean_y) - alpha * float(mean_x)
    wide = min(499, known)
    all_ranks = torch.arange(first, max(wide, last) + 1, dtype=torch.float64)
    return PowerLaw(
        alpha,
        constant,
        first,
        last,
        _r2(values[first - 1 : max(wide, last)].cpu().log(), constant - alpha * all_ranks.log()),
        _r2(y, constant + alpha * x),
    )


def _r2(measured: Tensor, line: Tensor) -> float:
    spread = float(((measured - measured.mean()) ** 2).sum())
    return 1 - float(((measured - line) ** 2).sum()) / spread if spread > 0 else 1.0


def _shares(eigenvalues: Tensor) -> Tensor:
    values = eigenvalues.double()
    if values.ndim != 1 or not len(values):
        raise ValueError(f"eigenvalues must have shape (n,), got {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("eigenvalues must be finite and not negative")
    total = values.sum()
    if not total > 0:
        raise ValueError("all eigenvalues are 0: the features are constant")
    return values / total


@dataclass(frozen=True)
class SpectralMetrics:
    """Effective rank and decay of a spectrum.

    Attributes:
        rankme: effective rank.
        decay: the power law; ``None`` where there are too few eigenvalues for one.
        eigenvalues: of the covariance, largest first.
        samples: rows.
        warnings: what the numbers suffer from.
    """

    rankme: float
    decay: PowerLaw | None
    eigenvalues: Tensor
    samples: int
    warnings: tuple[str, ...] = ()

    @property
    def alpha(self) -> float:
        """Of the decay, NaN where there is none."""
        return self.decay.alpha if self.decay is not None else math.nan

    @classmethod
    def from_features(cls, features: Float[Tensor, "rows features"], **options: object) -> SpectralMetrics:
        """Of features in memory.

        >>> rows = [[1, 2, 0.5], [0, -1, 1], [3, 1, -2], [-1, 0, 0], [2, 2, 2]]
        >>> round(SpectralMetrics.from_features(torch.tensor(rows)).rankme, 12)
        2.467013836383
        """
        if features.ndim != 2:
            raise ValueError(f"features must have shape (rows, features), got {tuple(features.shape)}")
        stream = StreamingCovariance(features.shape[1], device=features.device)
        stream.update(features)
        return cls.from_covariance(stream, **options)  # type: ignore[arg-type]

    @classmethod
    def from_covariance(
        cls,
        stream: StreamingCovariance,
        *,
        eps: float = 0.0,
        max_components: int | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> SpectralMetrics:
        """Of a stream of features.

        Args:
            stream: of at least 2 rows.
            eps: see :func:`rankme`; the paper's code: 1e-7.
            max_components: leading eigenvalues that count; the paper's code: 2048.
            first: first rank of the fit, default 12; less where there are fewer than 100 eigenvalues.
            last: last rank of the fit, default 100.

        Raises:
            ValueError: fewer than 2 rows, or constant features.
        """
        eigenvalues = stream.eigenvalues().cpu()
        dimensions, samples = len(eigenvalues), stream.count
        warnings = []
        if samples <= dimensions:
            warnings.append(
                f"{samples} rows for {dimensions} features: the rank is at most {samples - 1}; about ten times as many "
                "rows as features are needed for numbers that do not depend on their number"
            )
        kept = eigenvalues[:max_components]
        usable = min(len(kept), samples - 1, int((kept > 1e-12 * kept[0]).sum()))
        low, high = first or _FIRST, last or _LAST
        if usable < high and first is None and last is None:
            high = min(_LAST, usable - 4)
            low = min(_FIRST - 1, usable // 6) + 1
            warnings.append(f"only {usable} eigenvalues: decay fitted on ranks {low} to {high} instead of 12 to 100")
        decay = None
        if high - low >= 2 and kept[0] > 0:
            decay = alpha_req(kept, first=low, last=high, usable=usable)
        else:
            warnings.append("too few eigenvalues for a decay")
        return cls(rankme(kept, eps=eps), decay, eigenvalues, samples, tuple(warnings))

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "rankme": self.rankme,
            "alpha": None if self.decay is None else self.decay.alpha,
            "decay": None if self.decay is None else self.decay._asdict(),
            "eigenvalues": self.eigenvalues.tolist(),
            "samples": self.samples,
            "warnings": list(self.warnings),
        }

    def without_spectrum(self) -> SpectralMetrics:
        """The numbers alone."""
        return dataclasses.replace(self, eigenvalues=self.eigenvalues[:0])
