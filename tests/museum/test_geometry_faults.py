"""Faults of measuring the geometry of representations: the faulty form fails what ours passes."""

from __future__ import annotations

import math

import pytest
import torch

from lossmith.probes import SpectralMetrics, alpha_req, rankme


def entropy_rank(shares: torch.Tensor) -> float:
    p = shares / shares.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


def test_singular_values_for_eigenvalues_give_another_rank() -> None:
    """RankMe of variances 4, 2, 1, 1 is 2 to the power of 1.75."""
    # Columns that are orthogonal and centred, with these variances.
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    signs = torch.cat([torch.cat([signs, signs]), torch.tensor([1.0] * 4 + [-1.0] * 4).double()[:, None]], 1)
    rows = signs * torch.tensor([4.0, 2, 1, 1], dtype=torch.float64).sqrt()
    assert SpectralMetrics.from_features(rows).rankme == pytest.approx(2**1.75, rel=1e-12)
    assert entropy_rank(torch.linalg.svdvals(rows)) == pytest.approx(3.8284, abs=5e-5)


def test_a_mean_that_is_left_in_is_a_direction_of_its_own() -> None:
    """A shift of all rows says nothing of their shape; uncentred it hides it."""
    rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = rows + 10
    assert SpectralMetrics.from_features(shifted).rankme == pytest.approx(SpectralMetrics.from_features(rows).rankme)
    assert rankme(torch.linalg.eigvalsh(shifted.T @ shifted).clamp_min(0)) < 1.1


def test_a_fit_without_weights_follows_the_tail() -> None:
    """A power law that breaks at rank 50: the weights 1 / i follow its head, as in the released code."""
    ranks = torch.arange(1, 201, dtype=torch.float64)
    broken = torch.where(ranks <= 50, ranks**-1, 50**2 * ranks**-3)
    x, y = -ranks[11:100].log(), broken[11:100].log()
    unweighted = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert unweighted == pytest.approx(1.721, abs=5e-4)
    assert alpha_req(broken).alpha == pytest.approx(1.489, abs=5e-4)
