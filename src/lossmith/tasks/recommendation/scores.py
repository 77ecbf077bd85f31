"""How good ranked items are: Recall@K and NDCG@K by ``pytrec_eval``, as TREC defines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lossmith.errors import InputError


@dataclass(frozen=True, slots=True)
class RankingScores:
    """Means over users, by ``K``.

    ``users`` were judged; ``skipped_users`` of the test table are not known to the model; ``ignored`` test
    interactions were training interactions, too, and do not count. ``unknown_items`` counts test interactions whose
    items the model does not know: misses.
    """

    recall: Mapping[int, float]
    ndcg: Mapping[int, float]
    users: int
    skipped_users: int = 0
    ignored: int = 0
    unknown_items: int = 0

    def summary(self) -> str:
        """One line."""
        values = [f"Recall@{k} {v:.4f}" for k, v in self.recall.items()] + [
            f"NDCG@{k} {v:.4f}" for k, v in self.ndcg.items()
        ]
        notes = [f"{self.skipped_users} users unknown"] * bool(self.skipped_users)
        notes += [f"{self.ignored} pairs of the training table ignored"] * bool(self.ignored)
        notes += [f"{self.unknown_items} pairs with unknown items count as misses"] * bool(self.unknown_items)
        return "; ".join([f"{', '.join(values)} ({self.users} users)", *notes])


def ranking_scores(
    relevant: Mapping[str, Sequence[str]],
    ranked: Mapping[str, Sequence[str]],
    k: Sequence[int] = (20, 50),
    *,
    ndcg: Literal["truncated", "released"] = "truncated",
) -> RankingScores:
    """Recall and NDCG at ``k``.

    Args:
        relevant: items that each user should get; at least one.
        ranked: items that each user got, best first.
        k: cuts.
        ndcg: ``truncated``: the ideal ranking has at most ``K`` items (TREC's). ``released``: it has all of the user's
            items, as in the released code of "Personalized Denoising Implicit Feedback", which is lower for users
            with more than ``K``.

    >>> scores = ranking_scores({"ann": ["x", "y"]}, {"ann": ["x", "z", "y"]}, k=[2])
    >>> round(scores.recall[2], 3), round(scores.ndcg[2], 3)
    (0.5, 0.613)
    """
    try:
        import pytrec_eval
    except ImportError:
        raise InputError(
            "ranking scores need the extra 'recommendation': pip install 'lossmith[recommendation]'"
        ) from None
    cuts = list(dict.fromkeys(int(cut) for cut in k))
    if not cuts or min(cuts) < 1:
        raise InputError(f"k must be one or more integers >= 1, got {list(k)}")
    if ndcg not in ("truncated", "released"):
        raise InputError(f"ndcg must be 'truncated' or 'released', got '{ndcg}'")
    if not relevant:
        raise InputError("there are no users to judge")
    listing = ",".join(map(str, cuts))
    truth = {user: dict.fromkeys(items, 1) for user, items in relevant.items()}
    judge = pytrec_eval.RelevanceEvaluator(truth, {f"recall.{listing}", f"ndcg_cut.{listing}"})
    # Falling scores: TREC orders by score, ties by name.
    run = {u: {item: float(-place) for place, item in enumerate(ranked.get(u, ()))} for u in truth}
    found = judge.evaluate(run)
    # A user without any ranked item is left out by TREC's tool; a miss here.
    rows = [found.get(user, {}) for user in truth]
    recall = {cut: float(np.mean([row.get(f"recall_{cut}", 0.0) for row in rows])) for cut in cuts}
    ndcgs = {}
    for cut in cuts:
        values = np.array([row.get(f"ndcg_cut_{cut}", 0.0) for row in rows])
        if ndcg == "released":
            sizes = np.array([len(items) for items in truth.values()])
            gains = np.cumsum(1 / np.log2(np.arange(2, sizes.max() + 2)))
            values = values * gains[np.minimum(sizes, cut) - 1] / gains[sizes - 1]
        ndcgs[cut] = float(values.mean())
    return RankingScores(recall, ndcgs, users=len(truth))


def noise_auc(losses: np.ndarray, noisy: np.ndarray, users: np.ndarray | None = None) -> float:
    """How well a loss tells noise from true interactions: chance that a noisy one has the larger loss.

    Args:
        losses: one per interaction.
        noisy: true where the interaction is noise.
        users: of each interaction: the mean over users of what is told within each, over users that have both kinds;
            ``None``: over all interactions at once.

    >>> noise_auc(np.array([0.1, 0.2, 5.0, 5.1]), np.array([False, True, False, True]))
    0.75
    >>> noise_auc(np.array([0.1, 0.2, 5.0, 5.1]), np.array([False, True, False, True]), np.array([0, 0, 1, 1]))
    1.0
    """
    from scipy.stats import rankdata

    losses, noisy = np.asarray(losses, float), np.asarray(noisy, bool)
    if losses.shape != noisy.shape or (users is not None and np.shape(users) != losses.shape):
        raise ValueError("losses, noisy and users must have the same length")
    groups = [np.arange(len(losses))]
    if users is not None:
        order = np.argsort(users, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(np.asarray(users)[order])) + 1)
    found = []
    for group in groups:
        m = int(noisy[group].sum())
        if 0 < m < len(group):
            above = rankdata(losses[group])[noisy[group]].sum() - m * (m + 1) / 2
            found.append(above / (m * (len(group) - m)))
    return float(np.mean(found)) if found else float("nan")
