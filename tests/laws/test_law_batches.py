from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import Chinchilla, backtest, fit_groups, fit_many, rank_trainings


def table(points: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n, d = np.exp(rng.uniform(np.log([1e7, 1e9]), np.log([1e9, 1e11]), (points, 2)).T)
    loss = (1.7 + 400 * n**-0.34 + 1500 * d**-0.33) * np.exp(0.004 * rng.standard_normal(points))
    return {"params": n, "tokens": d, "loss": loss}


TABLES = [table(points, seed) for seed, points in enumerate((30, 45, 38))]


def test_many_tables_of_different_lengths_give_what_each_gives_alone() -> None:
    told: list[tuple[int, int]] = []
    together = fit_many(Chinchilla(), TABLES, bootstrap=15, calibrated=False, progress=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]
    for source, fitted in zip(TABLES, together, strict=True):
        alone = Chinchilla().fit(source, bootstrap=15, calibrated=False)
        assert fitted.objective == pytest.approx(alone.objective, rel=1e-9)
        at = {"params": 1e10, "tokens": 1e12}
        assert float(fitted.predict(**at)) == pytest.approx(float(alone.predict(**at)), rel=1e-6)
        np.testing.assert_allclose(fitted.predict_samples(**at), alone.predict_samples(**at), rtol=1e-4)
        assert len(fitted.table) == len(source["loss"])


@pytest.mark.slow
def test_processes_change_nothing() -> None:
    one = fit_many(Chinchilla(), TABLES, bootstrap=15, calibrated=False)
    two = fit_many(Chinchilla(), TABLES, bootstrap=15, calibrated=False, jobs=2)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.samples, b.samples)


def test_groups_are_named_by_their_value_and_by_what_is_wrong_with_them() -> None:
    frame = pd.concat([pd.DataFrame(t).assign(family=name) for t, name in zip(TABLES, "cab", strict=True)])
    found = fit_groups(Chinchilla(), frame, "family", bootstrap=0)
    assert list(found) == ["a", "b", "c"]
    assert len(found["a"].table) == 45
    with pytest.raises(InputError, match="family d: the table has 2 points; law chinchilla has 5 free parameters"):
        fit_groups(Chinchilla(), pd.concat([frame, frame.head(2).assign(family="d")]), "family", bootstrap=0)
    with pytest.raises(InputError, match="no column 'set' to group by"):
        fit_groups(Chinchilla(), frame, "set")


def test_differences_of_trainings_are_surer_than_their_losses() -> None:
    fitted = Chinchilla().fit(TABLES[1], bootstrap=100, calibrated=False)
    found = rank_trainings(fitted, ["params=1b, ratio=20", {"params": 1.5e9, "tokens": 3e10}, "tokens=20b, ratio=10"])
    assert [one.loss for one in found.ranked] == sorted(one.loss for one in found.ranked)
    for one in found.ranked:
        assert one.flops == pytest.approx(6 * one.params * one.tokens)
        assert one.above_low <= one.above <= one.above_high
    assert {round(one.tokens) for one in found.ranked} == {20_000_000_000, 30_000_000_000}
    second = found.ranked[1]
    assert second.above_high - second.above_low < second.high - second.low
    assert len(found.text().splitlines()) == 4
    bare = rank_trainings(
        Chinchilla().fit(TABLES[1], bootstrap=0), ["params=1e9, tokens=1e10", "params=1e8, tokens=1e10"]
    )
    assert np.isnan(bare.ranked[0].low)
    assert "nan" not in bare.text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("params=1e9", "needs two of params, tokens and ratio, or one of them with flops; got params"),
        ("params=1e9, tokens=1e9, ratio=1", "needs two of"),
        ("params=-1, tokens=1e9", "params must be positive"),
        ("params=many, tokens=1e9", "params must be a number, got 'many'"),
        ({"size": 3}, "got 'size'"),
    ],
)
def test_trainings_that_are_not_clear_are_refused(asked, message) -> None:
    fitted = Chinchilla().fit(TABLES[0], bootstrap=0)
    with pytest.raises(InputError, match=message):
        rank_trainings(fitted, [asked])


def test_the_largest_fifth_is_hidden_and_predicted() -> None:
    found = backtest(Chinchilla(), TABLES[1], bootstrap=40)
    size = TABLES[1]["params"] * TABLES[1]["tokens"]
    assert len(found.hidden) == 9
    hidden = found.hidden.columns["params"] * found.hidden.columns["tokens"]
    assert hidden.min() >= np.sort(size)[-9]
    assert found.scale_up == pytest.approx(size.max() / np.sort(size)[-10])
    assert found.error < found.best_seen_error
    assert found.coverage == found.interval.covers(found.hidden.columns["loss"]).mean()
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1"):
        backtest(Chinchilla(), TABLES[1], share=1)
    with pytest.raises(InputError, match="none is left to fit"):
        backtest(Chinchilla(), TABLES[1] | {"run": np.zeros(45), "params": np.full(45, 1e8)})
