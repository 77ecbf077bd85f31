"""A recommender from implicit feedback: fit, recommend, evaluate, suspect, save."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.files import read_json, replacing, write_json
from lossmith.tasks.recommendation.backbones import BACKBONES, Backbone, make_backbone
from lossmith.tasks.recommendation.denoising import DENOISING, Denoising
from lossmith.tasks.recommendation.interactions import Interactions
from lossmith.tasks.recommendation.objective import ImplicitFeedback
from lossmith.tasks.recommendation.scores import RankingScores, ranking_scores
from lossmith.tasks.recommendation.triples import TripleSource

# Scores held at once while ranking.
BLOCK = 4_000_000


class Recommender:
    """Learns from a table of who used what, part of which may be noise.

    Args:
        backbone: ``mf``, ``lightgcn`` or ``neumf``.
        loss: ``bpr`` or ``bce``.
        denoise: ``plain``, ``personal(pool_size=5, tau=0.1, warmup_epochs=5)``, ``truncated(drop_rate=0.2)``,
            ``reweighted(beta=0.2)``, ``pooled(...)``, or an object like those of
            :mod:`lossmith.tasks.recommendation.denoising`. Whether one helps depends on data and backbone: compare.
        dim: of the embeddings.
        layers: of LightGCN.
        epochs: an epoch has as many examples as the table has interactions, rounded up to whole batches.
        batch_size: users drawn per step.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on embeddings, too.
        l2: times the squared norm of each triple's embeddings.
        by_interaction: draw users as often as they have interactions, instead of all equally often.
        evaluate_every: epochs between looks at the validation table.
        best_after: epochs after which the best look is kept.
        patience: looks without improvement after which to stop; ``None``: never.
        seed: of weights, users, positives and negatives: the same for every way of denoising.
        **training: further ``transformers.TrainingArguments``.

    Attributes after ``fit``: ``model_``, ``interactions_``, ``drawn_`` (how often each interaction was trained on),
    ``steps_``, ``history_`` (looks at the validation table: epoch and scores).

    >>> table = Interactions.from_pairs("aabbccdd", "xyxyzwzw")
    >>> recommender = Recommender(epochs=60, batch_size=8, dim=4, learning_rate=0.05).fit(table)
    >>> recommender.recommend(["a"], k=1)[["user", "rank"]].values.tolist()
    [['a', 1]]
    """

    def __init__(
        self,
        backbone: str = "mf",
        *,
        loss: str = "bpr",
        denoise: str | Denoising = "plain",
        dim: int = 64,
        layers: int = 3,
        epochs: int = 100,
        batch_size: int = 2048,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        l2: float = 1e-4,
        by_interaction: bool = False,
        evaluate_every: int = 20,
        best_after: int = 40,
        patience: int | None = None,
        seed: int = 0,
        **training: Any,
    ):
        self.backbone, self.loss, self.denoise, self.dim, self.layers = backbone, loss, denoise, dim, layers
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.weight_decay, self.l2, self.by_interaction = weight_decay, l2, by_interaction
        self.evaluate_every, self.best_after, self.patience = evaluate_every, best_after, patience
        self.seed, self.training = seed, training

    # ---- verbs ----------------------------------------------------------------------------------------------------

    def fit(self, interactions: Interactions, validation: Interactions | None = None) -> Recommender:
        """Train.

        Args:
            interactions: what was used.
            validation: further interactions of the same users; the model with the best Recall@20 on them is kept.
        """
        from lossmith.tasks.recommendation.watching import BestByRecall

        self._check()
        denoising = DENOISING.build(self.denoise) if isinstance(self.denoise, str) else self.denoise
        source = TripleSource(interactions, seed=self.seed, by_interaction=self.by_interaction)
        torch.manual_seed(self.seed)
        self.interactions_ = interactions
        self.model_: Backbone = make_backbone(self.backbone, interactions, self.dim, self.layers)
        steps = -(-len(interactions) // self.batch_size)
        objective = ImplicitFeedback(
            source,
            loss=self.loss,
            denoising=denoising,
            l2=self.l2,
            batch_size=self.batch_size,
            steps_per_epoch=steps,
        )
        watcher = None
        if validation is not None:
            watcher = BestByRecall(self, validation, steps)
        self.steps_ = self._train(objective, steps, [watcher] if watcher else [])
        self.model_.eval()
        self.drawn_ = objective.drawn.cpu().numpy()
        self.history_: list[tuple[int, RankingScores]] = []
        if watcher is not None:
            watcher.restore()
            self.history_ = watcher.history
        return self

    @torch.no_grad()
    def recommend(
        self,
        users: Iterable[object] | None = None,
        k: int = 20,
        *,
        exclude_seen: bool = True,
        exclude: Interactions | None = None,
    ) -> pd.DataFrame:
        """The best ``k`` items of each user: columns ``user``, ``item``, ``score``, ``rank`` (from 1).

        Args:
            users: by name; default: all with training interactions.
            k: at most so many; fewer where the user has used nearly all.
            exclude_seen: leave out the items of the training table.
            exclude: leave out these, too.
        """
        table = self._table()
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        rows = np.flatnonzero(table.counts) if users is None else self._rows(users)
        parts = [
            pd.DataFrame(
                {
                    "user": np.repeat(np.array(table.users, object)[chosen], np.diff(starts)),
                    "item": np.array(table.items, object)[items],
                    "score": scores,
                    "rank": np.concatenate([np.arange(1, n + 1) for n in np.diff(starts)]),
                }
            )
            for chosen, starts, items, scores in self._best(rows, k, exclude_seen, exclude)
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["user", "item", "score", "rank"])

    @torch.no_grad()
    def predict(self, users: Iterable[object], items: Iterable[object]) -> npt.NDArray[np.float64]:
        """Scores of pairs, by name; a higher score is a better guess, scores of two users do not compare."""
        rows, columns = self._rows(users), self._columns(items)
        if len(rows) != len(columns):
            raise InputError(f"users and items must have the same length, got {len(rows)} and {len(columns)}")
        device = self._device()
        scores = self.model_.score(
            self.model_.tables(), torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        )
        return _finite(scores).double().cpu().numpy()

    def evaluate(
        self,
        test: Interactions,
        k: Sequence[int] = (20, 50),
        *,
        exclude: Interactions | None = None,
        ndcg: Literal["truncated", "released"] = "truncated",
    ) -> RankingScores:
        """Recall and NDCG of the recommendations on held-out interactions.

        Args:
            test: by the same names; users that the model does not know are left out and counted, items that it does
                not know are misses, pairs of the training table are ignored.
            k: cuts.
            exclude: interactions that are not to be recommended, such as a validation table.
            ndcg: see :func:`lossmith.tasks.recommendation.ranking_scores`.
        """
        table = self._table()
        rows = {name: i for i, name in enumerate(table.users)}
        columns = {name: i for i, name in enumerate(table.items)}
        if not k or min(k) < 1:
            raise InputError(f"k must be one or more integers >= 1, got {list(k)}")
        relevant: dict[str, list[str]] = {}
        skipped = ignored = unknown = 0
        for u, name in enumerate(test.users):
            wanted = [test.items[i] for i in test.items_of(u)]
            if not wanted:
                continue
            if name not in rows or not table.counts[rows[name]]:
                skipped += 1
                continue
            seen = set(table.items_of(rows[name]).tolist())
            new = [item for item in wanted if columns.get(item, -1) not in seen]
            ignored += len(wanted) - len(new)
            unknown += sum(item not in columns for item in new)
            if new:
                relevant[name] = new
        if not relevant:
            raise InputError("no user of the test table is in the training table with other items")
        users = np.array([rows[name] for name in relevant])
        ranked: dict[str, list[str]] = {}
        with torch.no_grad():
            for chosen, starts, items, _ in self._best(users, max(k), True, exclude):
                for u, a, b in zip(chosen, starts[:-1], starts[1:], strict=True):
                    ranked[table.users[u]] = [table.items[i] for i in items[a:b]]
        found = ranking_scores(relevant, ranked, k, ndcg=ndcg)
        return RankingScores(found.recall, found.ndcg, found.users, skipped, ignored, unknown)

    @torch.no_grad()
    def interaction_losses(self, negatives: int = 10) -> pd.DataFrame:
        """The loss of each training interaction, and how suspicious it is *for its user*.

        Args:
            negatives: unused items per user to average over, the same for all of the user's interactions (``bpr``).

        Returns:
            ``user``, ``item``, ``loss``, ``suspicion`` (rank of the loss among the user's, 0 the least, 1 the largest;
            0.5 where there is one) and ``drawn``.
        """
        table, device = self._table(), self._device()
        tables = self.model_.tables()
        source = TripleSource(table, seed=self.seed)
        rows, items = torch.from_numpy(table.rows).to(device), torch.from_numpy(table.indices).to(device)
        every = torch.arange(len(table.users), device=device)
        against = self.model_.score(tables, every.unsqueeze(1), source.negatives(every, negatives))
        parts = []
        for block in torch.arange(len(rows), device=device).split(1 << 16):
            scores = self.model_.score(tables, rows[block], items[block])
            if self.loss == "bpr":
                part = torch.nn.functional.softplus(against[rows[block]] - scores.unsqueeze(1)).mean(-1)
            else:
                part = torch.nn.functional.softplus(-scores)
            parts.append(_finite(part))
        losses = torch.cat(parts).double().cpu().numpy()
        frame = pd.DataFrame({"loss": losses, "row": table.rows})
        rank = frame.groupby("row")["loss"].rank() - 1
        room = np.maximum(table.counts[table.rows] - 1, 1)
        suspicion = np.where(table.counts[table.rows] > 1, rank.to_numpy() / room, 0.5)
        return pd.DataFrame(
            {
                "user": np.array(table.users, object)[table.rows],
                "item": np.array(table.items, object)[table.indices],
                "loss": losses,
                "suspicion": suspicion,
                "drawn": getattr(self, "drawn_", np.full(len(table), np.nan)),
            }
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``interactions.safetensors``, ``names.json`` and, last, ``config.json``.

        Settings that are objects (your own ``denoise``) and those of the Trainer are not saved.
        """
        from safetensors.numpy import save_file as save_arrays
        from safetensors.torch import save_file

        table, folder = self._table(), Path(folder)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model_.state_dict().items()}
        with replacing(folder / "model.safetensors") as temporary:
            save_file(state, temporary)
        arrays = {"indptr": table.indptr, "indices": table.indices}
        with replacing(folder / "interactions.safetensors") as temporary:
            save_arrays(arrays, temporary)
        write_json(folder / "names.json", {"users": list(table.users), "items": list(table.items)})
        write_json(folder / "config.json", {"lossmith": "recommender", **self._settings()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Recommender:
        """What :meth:`save_pretrained` wrote.

        Raises:
            InputError: the folder does not hold a recommender.
        """
        from safetensors.numpy import load_file as load_arrays
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            settings = read_json(folder / "config.json")
            if not isinstance(settings, dict) or settings.pop("lossmith", None) != "recommender":
                raise ValueError("config.json is not that of a recommender")
            if strange := set(settings) ^ set(cls()._settings()):
                raise ValueError(f"config.json has other settings: {', '.join(sorted(strange))}")
            names = read_json(folder / "names.json")
            arrays = load_arrays(folder / "interactions.safetensors")
            recommender = cls(**settings)
            recommender._check()
            table = Interactions(tuple(names["users"]), tuple(names["items"]), arrays["indptr"], arrays["indices"])
            recommender.interactions_ = table
            recommender.model_ = make_backbone(recommender.backbone, table, recommender.dim, recommender.layers)
            recommender.model_.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{folder} holds no recommender: {str(error).splitlines()[0]}") from None
        recommender.model_.eval()
        return recommender

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        denoise = self.denoise if isinstance(self.denoise, str) else "plain"
        names = (
            "backbone loss dim layers epochs batch_size learning_rate weight_decay l2 by_interaction evaluate_every "
            "best_after patience seed"
        )
        return {name: getattr(self, name) for name in names.split()} | {"denoise": denoise}

    def _check(self) -> None:
        for name in ("dim", "epochs", "batch_size", "evaluate_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be an integer >= 1, got {value!r}")
        for name in ("learning_rate", "weight_decay", "l2"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a finite number >= 0, got {value!r}")
        if self.backbone not in BACKBONES:
            make_backbone(self.backbone, Interactions.from_pairs("a", "x"), 1)
        for name, limit in (("layers", 100), ("seed", 2**32 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
                raise InputError(f"{name} must be an integer between 0 and {limit}, got {value!r}")

    def _train(self, objective: ImplicitFeedback, steps_per_epoch: int, callbacks: list[Any]) -> int:
        import transformers

        from lossmith.training import Trainer

        transformers.utils.logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "output_dir": folder,
                "num_train_epochs": 1,
                "per_device_train_batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "weight_decay": self.weight_decay,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "seed": self.seed,
                "data_seed": self.seed,
                # Examples are random by their numbers; in order, so that the number tells the epoch.
                "train_sampling_strategy": "sequential",
                "report_to": "none",
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": not torch.cuda.is_available(),
                **self.training,
            }
            trainer = Trainer(
                self.model_,
                transformers.TrainingArguments(**options),
                objective=objective,
                train_dataset=range(self.epochs * steps_per_epoch * self.batch_size),
                data_collator=lambda numbers: {"index": torch.tensor(numbers)},
                callbacks=callbacks,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return int(trainer.state.global_step)

    def _best(
        self, rows: npt.NDArray[np.int64], k: int, exclude_seen: bool, exclude: Interactions | None
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Blocks of users: their numbers, where each one's items start, items, scores."""
        table, device, tables = self._table(), self._device(), self.model_.tables()
        hidden = [table] if exclude_seen else []
        if exclude is not None:
            hidden.append(exclude.renamed(table))
        size = max(1, BLOCK // len(table.items))
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            scores = _finite(self.model_.scores_of(tables, torch.from_numpy(chosen).to(device))).cpu()
            for other in hidden:
                for i, u in enumerate(chosen):
                    scores[i, other.items_of(int(u))] = -torch.inf
            values, items = scores.topk(min(k, len(table.items)), dim=-1)
            kept = values > -torch.inf
            starts = np.concatenate([[0], kept.sum(-1).cumsum(0).numpy()])
            yield chosen, starts, items[kept].numpy(), values[kept].double().numpy()

    def _table(self) -> Interactions:
        if not hasattr(self, "model_"):
            raise InputError("this recommender has not been trained; call fit, or Recommender.from_pretrained(folder)")
        return self.interactions_

    def _device(self) -> torch.device:
        return self.model_.users.weight.device

    def _rows(self, users: Iterable[object]) -> npt.NDArray[np.int64]:
        table = self._table()
        rows = _places(users, table.users, "user")
        if (cold := rows[table.counts[rows] == 0]).size:
            raise InputError(f"user '{table.users[cold[0]]}' has no training interactions")
        return rows

    def _columns(self, items: Iterable[object]) -> npt.NDArray[np.int64]:
        return _places(items, self._table().items, "item")


def _places(names: Iterable[object], known: Sequence[str], what: str) -> npt.NDArray[np.int64]:
    if isinstance(names, str):
        raise InputError(f"{what}s must be a list of names, got the single name '{names}'")
    numbers = {name: i for i, name in enumerate(known)}
    found = [str(name) for name in names]
    if strange := next((name for name in found if name not in numbers), None):
        raise InputError(f"{what} '{strange}' is not in the training table of {len(numbers)} {what}s")
    return np.array([numbers[name] for name in found], np.int64)


def _finite(scores: Tensor) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise InputError("the model's scores are not finite; train again with a smaller learning_rate")
    return scores
