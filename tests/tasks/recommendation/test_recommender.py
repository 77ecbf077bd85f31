"""Fitting, recommending, judging, suspecting, saving."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lossmith.errors import InputError
from lossmith.losses import bpr_loss, implicit_bce_loss
from lossmith.tasks.recommendation import (
    DENOISING,
    ImplicitFeedback,
    Interactions,
    Recommender,
    TripleSource,
    noise_auc,
    synthetic_feedback,
)
from lossmith.tasks.recommendation.backbones import make_backbone

FEEDBACK = synthetic_feedback(120, 150, per_user=20, noise=0.3)
FAST = {"dim": 8, "batch_size": 256, "learning_rate": 0.03, "epochs": 12}


def objective(denoise: str, loss: str = "bpr", **options: object) -> ImplicitFeedback:
    return ImplicitFeedback(
        TripleSource(FEEDBACK.train),
        loss=loss,
        denoising=DENOISING.build(denoise),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("backbone", ["mf", "lightgcn", "neumf"])
def test_it_learns_and_is_the_same_after_saving(backbone: str, tmp_path: Path) -> None:
    recommender = Recommender(backbone, denoise="personal", **FAST).fit(FEEDBACK.train)  # type: ignore[arg-type]
    scores = recommender.evaluate(FEEDBACK.test, k=(20,))
    assert scores.users == 120
    assert scores.recall[20] > 1.3 * 20 / 124  # chance: twenty of the items that were not used
    recommender.save_pretrained(tmp_path / "model")
    again = Recommender.from_pretrained(tmp_path / "model")
    assert again.evaluate(FEEDBACK.test, k=(20,)) == scores
    assert again.recommend(["3"], 5).equals(recommender.recommend(["3"], 5))
    assert again.interaction_losses().loss.equals(recommender.interaction_losses().loss)


@pytest.mark.slow
def test_personal_resampling_draws_less_noise_and_recommends_better() -> None:
    feedback = synthetic_feedback(300, 400, per_user=40, noise=0.3, seed=1)
    noisy, recall = {}, {}
    for way in ("plain", "personal", "personal(tau=0.5)"):
        recommender = Recommender(denoise=way, dim=16, batch_size=1024, learning_rate=0.03, epochs=20)
        recommender.fit(feedback.train)
        noisy[way] = recommender.drawn_[feedback.noisy].sum() / recommender.drawn_.sum()
        recall[way] = recommender.evaluate(feedback.test, k=(20,)).recall[20]
        assert recommender.drawn_.sum() == recommender.steps_ * 1024
    # Users are drawn equally often and have 8 of 36 each.
    assert noisy["plain"] == pytest.approx(8 / 36, abs=0.005)
    assert noisy["personal"] < 0.75 * noisy["plain"]
    assert noisy["personal"] < noisy["personal(tau=0.5)"] < noisy["plain"]
    assert recall["personal"] > 1.05 * recall["plain"]


def test_a_pool_of_one_is_the_baseline_bit_by_bit() -> None:
    runs = [Recommender(denoise=way, **FAST).fit(FEEDBACK.train) for way in ("plain", "personal(pool_size=1)")]  # type: ignore[arg-type]
    assert torch.equal(runs[0].model_.users.weight, runs[1].model_.users.weight)
    assert np.array_equal(runs[0].drawn_, runs[1].drawn_)


def test_warm_up_is_plain_training_bit_by_bit() -> None:
    short = FAST | {"epochs": 3}
    runs = [Recommender(denoise=way, **short).fit(FEEDBACK.train) for way in ("plain", "personal(warmup_epochs=3)")]  # type: ignore[arg-type]
    assert torch.equal(runs[0].model_.users.weight, runs[1].model_.users.weight)
    later = Recommender(denoise="personal(warmup_epochs=2)", **short).fit(FEEDBACK.train)  # type: ignore[arg-type]
    assert not torch.equal(runs[0].model_.users.weight, later.model_.users.weight)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_micro_batches_the_same_numbers() -> None:
    options = {**FAST, "denoise": "personal(warmup_epochs=1)"}
    first, again = (Recommender(**options).fit(FEEDBACK.train) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first.model_.users.weight, again.model_.users.weight)
    # Embeddings are looked up in float32; sums in another order differ by rounding, which AdamW enlarges.
    cut = Recommender(**options, per_device_train_batch_size=64, gradient_accumulation_steps=4).fit(FEEDBACK.train)  # type: ignore[arg-type]
    assert cut.steps_ == first.steps_
    torch.testing.assert_close(cut.model_.users.weight, first.model_.users.weight, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="micro-batches"):
        Recommender(denoise="truncated", **FAST, per_device_train_batch_size=64, gradient_accumulation_steps=4).fit(  # type: ignore[arg-type]
            FEEDBACK.train
        )


@pytest.mark.parametrize("loss", ["bpr", "bce"])
@pytest.mark.parametrize("way", ["plain", "personal(warmup_epochs=0)", "pooled(warmup_epochs=0)", "reweighted"])
def test_losses_are_those_of_the_triples_that_are_drawn(loss: str, way: str) -> None:
    torch.manual_seed(0)
    model = make_backbone("mf", FEEDBACK.train, 8)
    asked = objective(way, loss, l2=0.01)
    found = asked(model, {"index": torch.arange(64)})
    assert found.shape == (64,)
    # One example alone has the loss that it has among others.
    torch.testing.assert_close(asked(model, {"index": torch.arange(5, 6)}), found[5:6])
    if way == "plain":
        triples = asked.source.draw(torch.arange(64))
        tables = model.tables()
        positive = model.score(tables, triples.users, triples.items[:, 0])
        negative = model.score(tables, triples.users, triples.negatives)
        expected = (bpr_loss if loss == "bpr" else implicit_bce_loss)(positive, negative)
        expected = (
            expected + 0.01 * model.triple_scores(tables, triples.users, triples.items[:, 0], triples.negatives)[2]
        )
        torch.testing.assert_close(found, expected)
    assert float(asked.drawn.sum()) > 0


def test_truncation_in_training_counts_what_it_keeps() -> None:
    recommender = Recommender(denoise="truncated(drop_rate=0.5, gradual_steps=0)", **FAST).fit(FEEDBACK.train)  # type: ignore[arg-type]
    assert recommender.drawn_.sum() == pytest.approx(recommender.steps_ * 256)
    assert set(np.unique(recommender.drawn_ / 2 % 1)) == {0.0}  # those kept count twice


def test_the_best_epoch_on_validation_is_kept() -> None:
    options = FAST | {"epochs": 9, "learning_rate": 0.2}
    recommender = Recommender(**options, evaluate_every=2, best_after=4)  # type: ignore[arg-type]
    recommender.fit(FEEDBACK.train, FEEDBACK.test)
    assert [epoch for epoch, _ in recommender.history_] == [2, 4, 6, 8, 9]
    best = max(scores.recall[20] for epoch, scores in recommender.history_ if epoch >= 4)
    assert recommender.evaluate(FEEDBACK.test, k=(20,)).recall[20] == best
    stopped = Recommender(**options, evaluate_every=1, best_after=1, patience=1)  # type: ignore[arg-type]
    stopped.fit(FEEDBACK.train, FEEDBACK.test)
    recalls = [scores.recall[20] for _, scores in stopped.history_]
    assert len(recalls) < 9
    assert recalls[-1] <= max(recalls[:-1])


def test_recommendations_leave_out_what_was_used() -> None:
    recommender = Recommender(**FAST).fit(FEEDBACK.train)  # type: ignore[arg-type]
    train = FEEDBACK.train
    found = recommender.recommend(k=1000)
    rows = np.array([int(user) for user in found.user])
    items = np.array([int(item) for item in found.item])
    assert not train.contains(rows, items).any()
    assert found.groupby("user").size().to_dict() == {str(u): 150 - n for u, n in enumerate(train.counts)}
    assert (found.groupby("user").score.diff().dropna() <= 0).all()
    assert len(recommender.recommend([], 3)) == 0
    assert len(recommender.recommend(["7"], 1000, exclude_seen=False)) == 150
    hidden = recommender.recommend(["7"], 1000, exclude=FEEDBACK.test)
    assert not set(hidden.item) & {FEEDBACK.test.items[i] for i in FEEDBACK.test.items_of(7)}
    best = found[found.user == "7"].iloc[0]
    assert recommender.predict(["7"], [best["item"]])[0] == pytest.approx(best["score"], abs=1e-5)


def test_users_and_items_that_are_not_known() -> None:
    recommender = Recommender(**FAST).fit(FEEDBACK.train)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="user 'nobody' is not in the training table of 120 users"):
        recommender.recommend(["nobody"])
    with pytest.raises(InputError, match="must be a list of names"):
        recommender.recommend("7")
    seen = FEEDBACK.train.items[FEEDBACK.train.items_of(0)[0]]
    new = str(next(i for i in range(150) if i not in FEEDBACK.train.items_of(0)))
    test = Interactions.from_pairs(["0", "0", "0", "stranger"], [seen, new, "novelty", new])
    scores = recommender.evaluate(test, k=(150,))
    assert (scores.users, scores.skipped_users, scores.ignored, scores.unknown_items) == (1, 1, 1, 1)
    assert scores.recall[150] == 0.5
    assert "1 users unknown" in scores.summary()
    with pytest.raises(InputError, match="no user of the test table"):
        recommender.evaluate(Interactions.from_pairs(["stranger"], [new]))
    with pytest.raises(InputError, match="k must be one or more integers"):
        recommender.evaluate(FEEDBACK.test, k=(0,))


def test_users_without_training_interactions_are_not_guessed_at() -> None:
    cold = Interactions.from_pairs("aab", "xyx", known_users="abc", known_items="xyz")
    recommender = Recommender(**FAST).fit(cold)  # type: ignore[arg-type]
    assert set(recommender.recommend().user) == {"a", "b"}
    with pytest.raises(InputError, match="user 'c' has no training interactions"):
        recommender.recommend(["c"])
    scores = recommender.evaluate(Interactions.from_pairs("bc", "yy"), k=(2,))
    assert (scores.users, scores.skipped_users) == (1, 1)


def test_suspicion_is_a_rank_within_the_user() -> None:
    recommender = Recommender(denoise="plain", **FAST).fit(FEEDBACK.train)  # type: ignore[arg-type]
    found = recommender.interaction_losses()
    assert len(found) == len(FEEDBACK.train)
    for _, own in list(found.groupby("user"))[:5]:
        assert own.suspicion.min() == 0
        assert own.suspicion.max() == 1
        assert own.suspicion.rank().equals(own.loss.rank())
    within = noise_auc(found.loss.to_numpy(), FEEDBACK.noisy, FEEDBACK.train.rows)
    assert within > 0.55
    assert within == pytest.approx(noise_auc(found.suspicion.to_numpy(), FEEDBACK.noisy, FEEDBACK.train.rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"backbone": "lightgnc"}, "did you mean 'lightgcn'"),
        ({"loss": "bpe"}, "did you mean 'bpr'"),
        ({"denoise": "personal(tau=-1)"}, "tau must be > 0"),
        ({"layers": -1}, "layers must be an integer between 0 and 100, got -1"),
        ({"seed": -1}, "seed must be an integer between 0"),
        ({"l2": -1}, "l2 must be a finite number"),
    ],
)
def test_settings_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recommender(**options).fit(FEEDBACK.train)  # type: ignore[arg-type]


def test_a_run_that_diverges_says_where() -> None:
    from lossmith.training import NonFiniteLossError

    with pytest.raises(NonFiniteLossError, match="not finite at step"):
        Recommender(dim=4, batch_size=256, learning_rate=1e38, epochs=4).fit(FEEDBACK.train)


def test_one_user() -> None:
    one = Interactions.from_pairs("aa", "xy", known_items="xyz")
    recommender = Recommender(**FAST).fit(one)  # type: ignore[arg-type]
    assert recommender.recommend(["a"]).item.tolist() == ["z"]
    assert recommender.interaction_losses().suspicion.tolist() in ([0.0, 1.0], [1.0, 0.0], [0.5, 0.5])


def test_what_is_not_a_recommender(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has not been trained"):
        Recommender().recommend()
    with pytest.raises(InputError, match="holds no recommender"):
        Recommender.from_pretrained(tmp_path)
    Recommender(**FAST).fit(FEEDBACK.train).save_pretrained(tmp_path)  # type: ignore[arg-type]
    settings = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({**settings, "dim": 9}, {**settings, "color": 1}, {"model_type": "bert"}, []):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="holds no recommender"):
            Recommender.from_pretrained(tmp_path)


def test_scores_are_a_record() -> None:
    scores = Recommender(**FAST).fit(FEEDBACK.train).evaluate(FEEDBACK.test)  # type: ignore[arg-type]
    assert set(dataclasses.asdict(scores)["recall"]) == {20, 50}
    assert scores.recall[20] <= scores.recall[50]
