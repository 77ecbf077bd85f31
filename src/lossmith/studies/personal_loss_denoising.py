"""Personal-loss denoising: compare the losses of implicit feedback within users, not over all of them?

"Personalized Denoising Implicit Feedback for Robust Recommender System", WWW 2025, arXiv 2502.00348.

Feedback of users whose tastes are known, with 30 % false positives, and the same without (metrics ``clean/...``);
``uneven/auc`` is measured on users of very different predictability. ``--data`` takes your own table of interactions,
to which the noise is added; ``full`` needs one (Gowalla, Yelp2018 and MIND in the paper).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study

# Ways of denoising by arm; the truncated loss reaches its share half-way through the run.
WAYS = {
    "plain": "plain",
    "t-ce": "truncated(drop_rate={noise_share}, gradual_steps={half})",
    "r-ce": "reweighted(beta=0.2)",
    "pooled": "pooled(pool_size=5, tau=0.1, warmup_epochs={warmup})",
    "pld": "personal(pool_size=5, tau=0.1, warmup_epochs={warmup})",
    "pld-soft": "personal(pool_size=5, tau=0.5, warmup_epochs={warmup})",
}

ARMS = {
    "plain": "every positive of a user is as likely as any other",
    "t-ce": "positives with the largest losses of the batch are left out, as many as are noise",
    "r-ce": "positives weighed by their probability to the power 0.2",
    "pooled": "one of a pool of five triples of any users, by softmax(-loss / 0.1)",
    "pld": "one of a pool of five positives of the user, by softmax(-loss / 0.1)",
    "pld-soft": "the same at temperature 0.5",
}

CLAIMS = (
    Claim("Personal loss gains 15 % recall under noise", "pld", "recall", "higher", ratio=1.15),
    Claim("It trains on less noise, by a quarter or more", "pld", "noise_share", "lower", ratio=0.75),
    Claim("It beats the truncated loss", "pld", "recall", "higher", "t-ce"),
    Claim("It beats the reweighted loss", "pld", "recall", "higher", "r-ce"),
    Claim("It beats the same softmax over all users' losses", "pld", "recall", "higher", "pooled"),
    Claim("Losses tell noise better within users than over all", "pld", "uneven/auc", "higher", "pooled"),
    Claim("On clean data a temperature of 0.1 costs recall", "pld", "clean/recall", "lower"),
    Claim("On clean data a temperature of 0.5 costs none", "pld-soft", "clean/recall", "higher", margin=-0.005),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Recall of one way of denoising with noise, and where the arm has a claim, without noise and by user."""
    from lossmith.tasks.recommendation import noise_auc

    world = _world(seed, options, float(options["noise"]))
    started = time.perf_counter()
    recommender = _fit(arm, seed, options, world)
    seconds = time.perf_counter() - started
    scores = recommender.evaluate(world.test, (20, 50), exclude=world.held)
    losses = recommender.interaction_losses().loss.to_numpy()
    metrics = {
        "recall": scores.recall[20],
        "ndcg": scores.ndcg[20],
        "recall_50": scores.recall[50],
        "noise_share": float(recommender.drawn_[world.noisy].sum() / recommender.drawn_.sum()),
        "auc": noise_auc(losses, world.noisy),
        "personal_auc": noise_auc(losses, world.noisy, world.train.rows),
    }
    if arm in ("plain", "pld", "pld-soft"):
        clean = _world(seed, options, 0.0)
        found = _fit(arm, seed, options, clean).evaluate(clean.test, (20,), exclude=clean.held)
        metrics["clean/recall"] = found.recall[20]
    if arm in ("pooled", "pld") and options["data"] is None:
        # By the comparison that the arm makes, of the losses of a model that was trained plainly.
        uneven = _world(seed, options, float(options["noise"]), spread=float(options["spread"]))
        losses = _fit("plain", seed, options, uneven).interaction_losses().loss.to_numpy()
        metrics["uneven/auc"] = noise_auc(losses, uneven.noisy, uneven.train.rows if arm == "pld" else None)
    # What is scored without gradient, in pairs of user and item, negatives included.
    pool = {"pooled": 10, "pld": 6, "pld-soft": 6}.get(arm, 0)
    steps = recommender.steps_
    warm = int(options["warmup"]) * steps // int(options["epochs"])
    batch = int(options["batch_size"])
    cost = Cost(
        tokens=steps * batch,
        steps=steps,
        seconds=seconds,
        scored_tokens=pool * batch * max(0, steps - warm),
    )
    return Experiment(metrics, cost)


class _World:
    """A training table with noise, which of it is noise, and what is held out."""

    def __init__(self, train: Any, noisy: Any, test: Any, held: Any = None):
        self.train, self.noisy, self.test, self.held = train, noisy, test, held


def _world(seed: int, options: Mapping[str, Any], noise: float, spread: float = 0.0) -> _World:
    import numpy as np

    from lossmith.tasks.recommendation import inject_noise, split_interactions, synthetic_feedback
    from lossmith.tasks.recommendation.reading import read_parts

    if options["data"] is None:
        if options["users"] is None:
            raise InputError("scale full needs --data: a table of interactions, such as Gowalla or Yelp2018")
        made = synthetic_feedback(
            int(options["users"]),
            int(options["items"]),
            per_user=int(options["per_user"]),
            noise=noise,
            spread=spread,
            seed=seed,
        )
        return _World(made.train, made.noisy, made.test)
    table, test = read_parts(options["data"])
    if test is None:
        train, held, test = split_interactions(table, seed=seed)
    else:
        test = test.renamed(table)
        train, held, _ = split_interactions(table, train=0.9, test=0.0, least=1, seed=seed)
    # What is held out is no noise.
    every = table.with_pairs(
        *(np.concatenate([getattr(t, name) for t in (table, test)]) for name in ("rows", "indices"))
    )
    noisy, is_noise = inject_noise(train, noise, exclude=every, seed=seed)
    return _World(noisy, is_noise, test, held)


def _fit(arm: str, seed: int, options: Mapping[str, Any], world: _World) -> Any:
    from lossmith.tasks.recommendation import Recommender

    batch, epochs = int(options["batch_size"]), int(options["epochs"])
    steps = epochs * -(-len(world.train) // batch)
    way = WAYS[arm].format(
        noise_share=float(world.noisy.mean()), half=max(1, steps // 2), warmup=int(options["warmup"])
    )
    recommender = Recommender(
        options["backbone"],
        loss=options["loss"],
        denoise=way,
        dim=int(options["dim"]),
        epochs=epochs,
        batch_size=batch,
        learning_rate=float(options["learning_rate"]),
        evaluate_every=int(options["evaluate_every"]),
        best_after=int(options["best_after"]),
        seed=seed,
    )
    return recommender.fit(world.train, world.held)


SYNTHETIC = {
    "data": None,
    "backbone": "mf",
    "loss": "bpr",
    "users": 600,
    "items": 800,
    "per_user": 40,
    "noise": 0.3,
    "spread": 1.0,
    "dim": 32,
    "batch_size": 2048,
    "learning_rate": 1e-2,
    "epochs": 40,
    "warmup": 5,
    # Of the user's table a tenth is held out, by which the epoch is chosen.
    "evaluate_every": 20,
    "best_after": 40,
}

STUDY = Study(
    slug="personal-loss-denoising",
    family="tasks.recommendation",
    question="Should losses of implicit feedback be compared within users to find its noise?",
    paper=Paper("Personalized Denoising Implicit Feedback for Robust Recommender System", 2025, "2502.00348"),
    arms=ARMS,
    baseline="plain",
    metric="recall",
    metrics=("recall", "ndcg", "recall_50", "noise_share", "auc", "personal_auc", "clean/recall", "uneven/auc"),
    lower_is_better=False,
    better={
        "ndcg": "higher",
        "recall_50": "higher",
        "noise_share": "lower",
        "auc": "higher",
        "personal_auc": "higher",
        "clean/recall": "higher",
    },
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 5},
    options={
        "smoke": {**SYNTHETIC, "users": 60, "items": 80, "per_user": 10, "batch_size": 256, "epochs": 3, "warmup": 1},
        "quick": SYNTHETIC,
        "full": {
            **SYNTHETIC,
            "users": None,
            "items": None,
            "per_user": None,
            "dim": 64,
            "learning_rate": 1e-3,
            "epochs": 100,
        },
    },
    experiment=experiment,
    data="a table of interactions (user item [count], JSON or Parquet), or a folder with train.txt and test.txt",
    notes=(
        "recall: Recall@20 on held-out true interactions, with 30 % false positives added to training; recall_50 and "
        "ndcg (NDCG@20) likewise. noise_share: of what is trained on. auc, personal_auc: how well final losses tell "
        "noise over all interactions, and within users. uneven/auc: the same of a plainly trained model on users of "
        "uneven predictability, over all (pooled) and within users (pld).",
    ),
)
