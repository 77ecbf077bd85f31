"""Effective rank, spectral decay and the covariance that both come from."""

from __future__ import annotations

import math

import pytest
import torch

from lossmith.probes import SpectralMetrics, StreamingCovariance, alpha_req, rankme

FIVE = torch.tensor([[1, 2, 0.5], [0, -1, 1], [3, 1, -2], [-1, 0, 0], [2, 2, 2]], dtype=torch.float64)


def test_rankme_of_known_spectra() -> None:
    assert rankme(torch.ones(64)) == pytest.approx(64, rel=1e-14)
    assert rankme(torch.ones(64), eps=1e-7) == pytest.approx(64.00129389, rel=1e-9)
    assert rankme(torch.tensor([3.0, 0, 0])) == 1
    assert rankme(torch.tensor([4.0, 2, 1, 1])) == pytest.approx(2**1.75, rel=1e-14)


@pytest.mark.parametrize(
    ("a", "rank"),
    [(0.5, 409.554525352931), (1.0, 117.23118188401173), (1.5, 16.948084879182126), (2.0, 5.056094097426333)],
)
def test_power_laws(a: float, rank: float) -> None:
    values = torch.arange(1, 513, dtype=torch.float64) ** -a
    found = alpha_req(values)
    assert found.alpha == pytest.approx(a, abs=1e-12)
    assert found.r2 == pytest.approx(1, abs=1e-12)
    assert rankme(values) == pytest.approx(rank, rel=1e-12)


def test_weights_of_the_fit_matter() -> None:
    ranks = torch.arange(1, 201, dtype=torch.float64)
    broken = torch.where(ranks <= 50, ranks**-1, 50**2 * ranks**-3)
    assert alpha_req(broken).alpha == pytest.approx(1.489, abs=5e-4)


def test_the_fit_is_weighted_least_squares() -> None:
    values = torch.rand(150, dtype=torch.float64).sort(descending=True).values
    i = torch.arange(12, 101, dtype=torch.float64)
    x = torch.stack([-i.log(), torch.ones_like(i)], 1)
    w = (1 / i)[:, None]
    expected = torch.linalg.solve(x.T @ (w * x), x.T @ (w[:, 0] * values[11:100].log()))
    found = alpha_req(values)
    assert (found.alpha, found.log_constant) == pytest.approx(tuple(expected.tolist()), rel=1e-10)


def test_the_example_with_five_rows() -> None:
    found = SpectralMetrics.from_features(FIVE)
    shares = found.eigenvalues / found.eigenvalues.sum()
    torch.testing.assert_close(
        shares, torch.tensor([0.56247159, 0.35092253, 0.08660589], dtype=torch.float64), rtol=1e-7, atol=0
    )
    assert found.rankme == pytest.approx(2.4670138363832423, rel=1e-13)
    assert SpectralMetrics.from_features(FIVE, eps=1e-7).rankme == pytest.approx(2.4670141001, rel=1e-9)
    uncentred = torch.linalg.eigvalsh(FIVE.T @ FIVE)
    assert rankme(uncentred) == pytest.approx(2.2861954503947746, rel=1e-12)


def test_invariances() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 120, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.05, 120)
    q, _ = torch.linalg.qr(torch.randn(120, 120, generator=generator, dtype=torch.float64))
    first = SpectralMetrics.from_features(rows)
    changed = {
        "scale, rotation, shift": -3.7 * rows @ q + torch.randn(120, generator=generator, dtype=torch.float64),
        "permutation": rows[torch.randperm(600, generator=generator)],
        "duplication": rows.repeat(2, 1),
    }
    for other in changed.values():
        found = SpectralMetrics.from_features(other)
        assert found.rankme == pytest.approx(first.rankme, rel=1e-10)
        assert found.alpha == pytest.approx(first.alpha, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 100, 250])
def test_streaming_equals_all_at_once(batch: int) -> None:
    rows = torch.randn(250, 20, dtype=torch.float64) + 1e7
    stream = StreamingCovariance(20)
    for part in rows.split(batch):
        stream.update(part)
    singular = torch.linalg.svdvals(rows - rows.mean(0)) ** 2 / 250
    torch.testing.assert_close(stream.eigenvalues(), singular, rtol=1e-6, atol=0)
    halves = StreamingCovariance(20), StreamingCovariance(20)
    halves[0].update(rows[:90])
    halves[1].update(rows[90:])
    halves[0].merge(halves[1])
    torch.testing.assert_close(halves[0].covariance(), stream.covariance(), rtol=1e-7, atol=1e-7)
    assert halves[0].count == 250


def test_few_rows_are_biased_and_said_so() -> None:
    rows = torch.randn(30, 64, dtype=torch.float64)
    found = SpectralMetrics.from_features(rows)
    assert found.rankme <= 29
    assert any("rank is at most 29" in line for line in found.warnings)
    assert found.decay is not None
    assert (found.decay.first, found.decay.last) == (5, 25)
    # More rows, higher rank: the bias that the warning is about.
    assert SpectralMetrics.from_features(torch.randn(5000, 64, dtype=torch.float64)).rankme > 1.5 * found.rankme


@pytest.mark.parametrize(("rows", "features"), [(5, 40), (40, 5), (2, 3), (30, 30)])
def test_rankme_lies_between_one_and_what_the_rows_allow(rows: int, features: int) -> None:
    found = SpectralMetrics.from_features(torch.randn(rows, features, dtype=torch.float64))
    assert 1 <= found.rankme <= min(features, rows - 1) + 1e-9


def test_the_bias_of_few_rows_is_that_of_the_digest() -> None:
    """True alpha 1 in 256 dimensions: RankMe 74.6 of the spectrum itself, 51.6, 70.6 and 73.7 of samples."""
    spectrum = 1 / torch.arange(1, 257, dtype=torch.float64)
    assert rankme(spectrum) == pytest.approx(74.6, abs=0.05)
    generator = torch.Generator().manual_seed(0)
    ranks, alphas = [], []
    for rows in (200, 1000, 15000):
        drawn = torch.randn(rows, 256, generator=generator, dtype=torch.float64) * spectrum.sqrt()
        found = SpectralMetrics.from_features(drawn)
        ranks.append(found.rankme)
        alphas.append(found.alpha)
    # The first eigenvalues of a sample move RankMe by a few.
    assert ranks == [pytest.approx(51.6, abs=4), pytest.approx(70.6, abs=4), pytest.approx(73.7, abs=2)]
    assert alphas == [pytest.approx(1.092, abs=0.04), pytest.approx(1.019, abs=0.04), pytest.approx(1.001, abs=0.01)]


def test_a_truncated_spectrum_is_renormalised() -> None:
    """As in the paper's code, which keeps 2,048 components: the shares of those that are kept sum to 1."""
    rows = torch.randn(300, 20, dtype=torch.float64) * torch.linspace(2, 0.1, 20)
    values = SpectralMetrics.from_features(rows).eigenvalues
    assert SpectralMetrics.from_features(rows, max_components=7).rankme == pytest.approx(rankme(values[:7]), rel=1e-12)


def test_half_precision_and_slices_are_taken() -> None:
    rows = torch.randn(64, 40)
    expected = SpectralMetrics.from_features(rows[:, ::2].bfloat16().double()).rankme
    assert SpectralMetrics.from_features(rows[:, ::2].bfloat16()).rankme == pytest.approx(expected, rel=1e-12)


def test_wrong_features() -> None:
    bad = FIVE.clone()
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="row 3, feature 1 is not finite"):
        SpectralMetrics.from_features(bad)
    with pytest.raises(ValueError, match="constant"):
        SpectralMetrics.from_features(torch.ones(5, 3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        SpectralMetrics.from_features(FIVE[:1])
    with pytest.raises(ValueError, match="shape"):
        SpectralMetrics.from_features(FIVE[0])
    with pytest.raises(ValueError, match="last=64 would work"):
        alpha_req(torch.rand(64, dtype=torch.float64).sort(descending=True).values + 0.1)
    with pytest.raises(ValueError, match="negative"):
        rankme(torch.tensor([1.0, -1.0]))
