"""Drawing triples, choosing from pools, weighing: the digest's numbers and identities."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossmith.errors import InputError
from lossmith.losses import bpr_loss
from lossmith.tasks.recommendation import DENOISING, Interactions, TripleSource, personal_loss_probabilities
from lossmith.tasks.recommendation.denoising import draw_column
from lossmith.tasks.recommendation.pool_theory import pool_marginals, selection_gap
from lossmith.tasks.recommendation.triples import split_mix, uniform

LOSSES = (0.1, 0.3, 0.5, 0.7, 2.0)
SCORES = torch.tensor([[2, 1.5, -0.5, 0, 1]], dtype=torch.float64)
NEGATIVE = torch.tensor([[0.2]], dtype=torch.float64)


def table(seed: int = 0, users: int = 40, items: int = 30) -> Interactions:
    """Users with 1 to 29 of 30 items."""
    draw = np.random.default_rng(seed)
    pairs = [(u, i) for u in range(users) for i in draw.choice(items, 1 + u % (items - 1), replace=False)]
    return Interactions.from_pairs(*zip(*pairs, strict=True), known_items=[str(i) for i in range(items)])


# ---- the softmax over a pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.1, (0.653932344553, 0.271156315443, 0.000048846112, 0.001031889212, 0.073830604679)),
        (1.0, (0.275406414526, 0.252198640861, 0.106488759964, 0.144472130269, 0.221434054381)),
    ],
)
def test_probabilities_of_the_digests_pool(tau: float, expected: tuple[float, ...]) -> None:
    found = personal_loss_probabilities(bpr_loss(SCORES, NEGATIVE), tau=tau)
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_at_temperature_1_they_are_sigmoids_of_the_margins() -> None:
    margins = torch.sigmoid(SCORES - NEGATIVE)
    found = personal_loss_probabilities(bpr_loss(SCORES, NEGATIVE), tau=1.0)
    torch.testing.assert_close(found, margins / margins.sum(), atol=1e-15, rtol=0)


@given(st.lists(st.floats(0, 20), min_size=2, max_size=6), st.floats(-5, 5), st.floats(0.05, 5))
def test_only_the_order_and_distances_within_the_user_count(losses: list[float], shift: float, tau: float) -> None:
    row = torch.tensor(losses, dtype=torch.float64)
    alone = personal_loss_probabilities(row, tau=tau)
    torch.testing.assert_close(personal_loss_probabilities(row + shift, tau=tau), alone, atol=1e-9, rtol=0)
    permutation = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(personal_loss_probabilities(row[permutation], tau=tau), alone[permutation])
    # Other users are other rows.
    both = personal_loss_probabilities(torch.stack([row, row.flip(0) * 3 + 1]), tau=tau)
    torch.testing.assert_close(both[0], alone, atol=1e-15, rtol=0)
    assert float(alone[row.argmin()]) >= float(alone[row.argmax()])


def test_extreme_losses_and_temperatures() -> None:
    inf = math.inf
    assert personal_loss_probabilities(torch.tensor([[0.0, inf]]), tau=1e-30).tolist() == [[1, 0]]
    assert personal_loss_probabilities(torch.tensor([[inf, inf]])).tolist() == [[0.5, 0.5]]
    assert personal_loss_probabilities(torch.tensor([[1e30, 3e30]]), tau=1e-30).tolist() == [[1, 0]]
    assert personal_loss_probabilities(torch.tensor([[1.0, 2.0]]), tau=inf).tolist() == [[0.5, 0.5]]
    assert personal_loss_probabilities(torch.zeros(0, 3)).shape == (0, 3)
    assert personal_loss_probabilities(torch.zeros(1, 2, dtype=torch.float16)).dtype == torch.float32
    assert not personal_loss_probabilities(torch.zeros(1, 2, requires_grad=True)).requires_grad
    for tau in (0, -1, math.nan):
        with pytest.raises(ValueError, match="tau must be > 0"):
            personal_loss_probabilities(torch.zeros(1, 2), tau=tau)
    with pytest.raises(ValueError, match="at least one column"):
        personal_loss_probabilities(torch.zeros(3, 0))


def test_a_column_is_drawn_by_its_probability() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3]).expand(100_000, 4)
    choice = (torch.arange(100_000) + 0.5) / 100_000
    share = torch.bincount(draw_column(probabilities, choice.double()), minlength=4) / 100_000
    torch.testing.assert_close(share, probabilities[0], atol=2e-5, rtol=0)
    # Sums that rounding leaves below 1.
    assert draw_column(torch.tensor([[0.1, 0.2]]), torch.tensor([0.999])).tolist() == [1]


# ---- marginals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "tau", "expected"),
    [
        (2, 1.0, (0.266406948929, 0.244422239503, 0.221888681608, 0.199165701939, 0.068116428021)),
        (3, 0.1, (0.558565901163, 0.308508071334, 0.116911517080, 0.016014474164, 0.000000036258)),
        (5, 0.1, (0.864954872608, 0.117058912671, 0.015842201102, 0.002144008773, 0.000000004846)),
        (1, 0.1, (0.2,) * 5),
        (3, math.inf, (0.2,) * 5),
        (3, 1e-9, (0.6, 0.3, 0.1, 0.0, 0.0)),
    ],
)
def test_marginals_of_the_digest(k: int, tau: float, expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(pool_marginals(LOSSES, k, tau), expected, atol=1e-11)


@pytest.mark.parametrize(
    ("tau", "mass"), [(math.inf, 0.2), (1.0, 0.107327667698), (0.5, 0.053056126928), (0.1, 0.0000962752)]
)
def test_mass_of_noise_by_temperature(tau: float, mass: float) -> None:
    assert pool_marginals([0.2] * 8 + [1.0] * 2, 5, tau)[8:].sum() == pytest.approx(mass, abs=1e-10)


def test_coldest_marginals_are_counts_of_pools() -> None:
    n, k = 9, 4
    expected = [math.comb(n - r, k - 1) / math.comb(n, k) for r in range(1, n + 1)]
    np.testing.assert_allclose(pool_marginals(np.arange(n), k, 1e-9), expected, atol=1e-12)


def test_draws_follow_the_marginals() -> None:
    losses, k, tau, n = torch.tensor(LOSSES, dtype=torch.float64), 3, 0.3, 60_000
    source = TripleSource(Interactions.from_pairs(["a"] * 5, range(5), known_items=[str(i) for i in range(9)]))
    triples = source.draw(torch.arange(n), k)
    chosen = draw_column(personal_loss_probabilities(losses[triples.items], tau=tau), triples.choice)
    share = np.bincount(triples.items.gather(1, chosen[:, None])[:, 0].numpy(), minlength=5) / n
    # Four standard deviations of a share.
    np.testing.assert_allclose(share, pool_marginals(LOSSES, k, tau), atol=4 * 0.5 / math.sqrt(n))


def test_selection_gap_is_the_limit_of_large_pools() -> None:
    draw, n, m, tau, k = np.random.default_rng(0), 280, 80, 0.7, 200
    gaps = []
    for _ in range(4000):
        losses = np.concatenate([draw.normal(1.0, 0.2, n), draw.normal(1.5, 0.2, m)])
        pool = draw.choice(n + m, k, replace=False)
        weight = np.exp(-losses[pool] / tau)
        gaps.append((weight[pool < n].sum() - weight[pool >= n].sum()) / weight.sum())
    # The mean's standard error is about 0.001.
    assert np.mean(gaps) == pytest.approx(selection_gap(n, m, 0.5, tau), abs=0.005)
    assert selection_gap(n, m, 0.5, tau) > selection_gap(n, m, 0.0, tau) == (n - m) / (n + m)
    assert selection_gap(n, m, 0.5, 0.1) > selection_gap(n, m, 0.5, 1.0)


def test_marginals_refuse_what_they_do_not_cover() -> None:
    for arguments, message in (
        (([1.0, math.nan], 1, 1.0), "finite"),
        (([1.0], 2, 1.0), "between 1 and the number of losses, 1, got 2"),
        (([1.0, 2.0], 1, 0.0), "tau must be > 0"),
        ((range(100), 10, 1.0), "more than 5,000,000 pools"),
    ):
        with pytest.raises(ValueError, match=message):
            pool_marginals(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both 0"):
        selection_gap(0, 0, 1.0)


# ---- random numbers by example ----------------------------------------------------------------------------------


def test_split_mix_is_the_published_generator() -> None:
    # The first outputs from seed 1234567 (Rosetta Code, Java's SplittableRandom).
    golden = 0x9E3779B97F4A7C15 - 2**64
    state = torch.tensor([1234567]) + torch.arange(1, 4) * golden
    found = [int(z) % 2**64 for z in split_mix(state)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_numbers_are_uniform_and_unrelated() -> None:
    numbers = uniform(3, torch.arange(50_000), 6)
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
    # Chi-square with 99 degrees of freedom: beyond 160 once in 10,000 times.
    assert float(((counts - 3000) ** 2 / 3000).sum()) < 160
    related = torch.corrcoef(torch.cat([numbers[:-1], numbers[1:]], -1).T) - torch.eye(12)
    assert float(related.abs().max()) < 5 / math.sqrt(50_000)
    assert not torch.equal(numbers, uniform(4, torch.arange(50_000), 6))


def test_examples_do_not_depend_on_the_batch_that_they_are_in() -> None:
    source = TripleSource(table(), seed=5)
    whole = source.draw(torch.arange(64), 4)
    parts = [source.draw(torch.arange(a, a + 16), 4) for a in (48, 0, 32, 16)]
    for name in ("users", "pool", "items", "negatives", "choice"):
        joined = torch.cat([getattr(parts[i], name) for i in (1, 3, 2, 0)])
        assert torch.equal(getattr(whole, name), joined)


# ---- triples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_positives_are_the_users_and_distinct_where_there_are_enough(k: int) -> None:
    interactions = table()
    triples = TripleSource(interactions).draw(torch.arange(4000), k)
    for user, items, places in zip(triples.users.tolist(), triples.items, triples.pool, strict=True):
        own = interactions.items_of(user).tolist()
        assert set(items.tolist()) <= set(own)
        assert interactions.indices[places.numpy()].tolist() == items.tolist()
        if len(own) >= k:
            assert len(set(items.tolist())) == k


def test_negatives_are_unused_and_uniform() -> None:
    interactions = table()
    source = TripleSource(interactions)
    triples = source.draw(torch.arange(40_000), 1)
    seen = interactions.contains(triples.users.numpy(), triples.negatives.numpy())
    assert not seen.any()
    of_first = triples.negatives[triples.users == 0].numpy()
    counts = np.delete(np.bincount(of_first, minlength=30), interactions.items_of(0))
    # Chi-square with 28 degrees of freedom: beyond 62 once in 4,000 times.
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 62
    # Every unused item is reached, by its rank.
    for user in (0, 7, 28):
        unused = np.setdiff1d(np.arange(30), interactions.items_of(user))
        found = source.nth_unused(torch.full((len(unused),), user), torch.arange(len(unused)))
        assert found.tolist() == unused.tolist()


def test_pools_are_uniform_subsets() -> None:
    source = TripleSource(Interactions.from_pairs(["a"] * 5, range(5), known_items=[str(i) for i in range(6)]))
    drawn = source.draw(torch.arange(20_000), 3).items.sort(-1).values.tolist()
    counts = [drawn.count(list(subset)) for subset in combinations(range(5), 3)]
    assert sum(counts) == 20_000
    # Chi-square with 9 degrees of freedom: beyond 34 once in 10,000 times.
    assert sum((c - 2000) ** 2 / 2000 for c in counts) < 34


def test_users_are_drawn_equally_often_or_by_their_interactions() -> None:
    interactions = table(users=20)
    for by_interaction in (False, True):
        source = TripleSource(interactions, by_interaction=by_interaction)
        counts = np.bincount(source.draw(torch.arange(40_000)).users.numpy(), minlength=20)
        share = interactions.counts / len(interactions) if by_interaction else np.full(20, 1 / 20)
        # Chi-square with 19 degrees of freedom: beyond 51 once in 10,000 times.
        assert ((counts - 40_000 * share) ** 2 / (40_000 * share)).sum() < 51


def test_few_positives_are_drawn_with_replacement() -> None:
    source = TripleSource(Interactions.from_pairs("ab", "xy"))
    assert source.draw(torch.arange(8), 5).items.unique(dim=1).shape == (8, 1)
    one = TripleSource(Interactions.from_pairs("aa", "xy", known_items="xyz"))
    assert set(one.draw(torch.arange(50), 3).items.flatten().tolist()) == {0, 1}
    assert set(one.draw(torch.arange(50), 3).negatives.tolist()) == {2}


def test_who_has_used_everything_is_named() -> None:
    with pytest.raises(InputError, match=r"user 'b' has used all 2 items \(as have 0 others\)"):
        TripleSource(Interactions.from_pairs("abb", "xxy"))
    with pytest.raises(InputError, match="user 'a' has used all 1 items"):
        TripleSource(Interactions.from_pairs("a", "x"))
    with pytest.raises(ValueError, match="pool_size must be between 1"):
        TripleSource(table()).draw(torch.arange(2), 0)


# ---- ways of denoising ------------------------------------------------------------------------------------------


def test_truncation_leaves_out_the_largest_losses_and_grows() -> None:
    losses = torch.tensor([0.1, 5.0, 0.2, 4.0, 0.3])
    way = DENOISING.build("truncated(drop_rate=0.4, gradual_steps=10)")
    assert way.weights(losses, 0, positive=True).tolist() == [1] * 5
    # Half of the way: a fifth of the batch.
    assert way.weights(losses, 5, positive=True).tolist() == [1.25, 0, 1.25, 1.25, 1.25]
    torch.testing.assert_close(way.weights(losses, 99, positive=True), torch.tensor([5 / 3, 0, 5 / 3, 0, 5 / 3]))
    assert way.weights(losses, 99, positive=False) is None
    # The mean of weighted losses is the mean of those kept.
    assert float((way.weights(losses, 99, positive=True) * losses).mean()) == pytest.approx(0.2)


def test_reweighting_is_a_power_of_the_probability() -> None:
    scores = torch.tensor([-2.0, 0.5])
    losses = torch.nn.functional.softplus(-scores)
    way = DENOISING.build("reweighted(beta=0.3)")
    torch.testing.assert_close(way.weights(losses, 0, positive=True), torch.sigmoid(scores) ** 0.3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("personal(tau=0)", "tau must be > 0"),
        ("personal(pool_size=0)", "pool_size must be an integer"),
        ("personal(pool_size=2.5)", "pool_size must be an integer"),
        ("personal(warmup_epochs=-1)", "warmup_epochs must be"),
        ("personal(temperature=1)", "has no option 'temperature'"),
        ("truncated(drop_rate=1)", r"drop_rate must be in \[0, 1\)"),
        ("truncated(gradual_steps=-1)", "gradual_steps must be"),
        ("reweighted(beta=-1)", "beta must be"),
        ("persnal", "did you mean 'personal'"),
    ],
)
def test_options_out_of_range(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DENOISING.build(spec)
