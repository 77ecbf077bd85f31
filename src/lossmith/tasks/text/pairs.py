"""Classification of pairs of texts (paraphrases, entailment) with any Hugging Face encoder and any loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.tasks.text.encoder_training import check_head, load_encoder, train_encoder
from lossmith.tasks.text.pair_files import Pair


@dataclass(frozen=True, slots=True)
class PairScores:
    """Accuracy; precision, recall and F1 of the positive label (with more than two labels: their plain means)."""

    accuracy: float
    precision: float
    recall: float
    f1: float

    def summary(self) -> str:
        """One line."""
        return (
            f"F1 {self.f1:.3f} (precision {self.precision:.3f}, recall {self.recall:.3f}), accuracy {self.accuracy:.3f}"
        )


class PairClassifier:
    """A classifier of pairs with ``fit``, ``predict``, ``evaluate``, ``save_pretrained`` and ``from_pretrained``.

    Args:
        model: folder or hub id of any encoder or sequence classifier; default a small encoder from random weights, with
            byte-level BPE trained on the texts: nothing is downloaded (and little of language is known).
        loss: ``cross_entropy``, ``weighted_cross_entropy``, any registered loss (``"focal_loss(gamma=2)"``), or the
            losses of a whole batch, ``set_dice_loss`` and ``set_tversky_loss``.
        positive: the label whose F1 is meant; default the last in order (``"1"`` of ``"0"`` and ``"1"``).
        epochs: passes over the pairs.
        batch_size: pairs per step.
        learning_rate: of AdamW, with a linear schedule.
        max_length: tokens of a pair; the longer text is cut first.
        seed: of weights, order and dropout.
        width, layers: of the small encoder.
        **training: further ``transformers.TrainingArguments``.

    With two labels the Dice and Tversky losses train a single logit (positive above 0), as the paper's code does for
    MRPC; other losses train a softmax.

    >>> pairs = [Pair("it rains", "rain falls", "1"), Pair("it rains", "we eat", "0")] * 8
    >>> classifier = PairClassifier(loss="set_dice_loss(alpha=0.01)", epochs=1).fit(pairs)
    >>> len(classifier.predict([("it rains", "it snows")]))
    1

    Source of the loss and the task: Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2020, arXiv 1911.02855.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        loss: str = "cross_entropy",
        positive: str | None = None,
        epochs: float = 3,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        max_length: int = 128,
        seed: int = 0,
        width: int = 64,
        layers: int = 2,
        **training: Any,
    ):
        self.model, self.loss, self.positive, self.epochs = model, loss, positive, epochs
        self.batch_size, self.learning_rate, self.max_length = batch_size, learning_rate, max_length
        self.seed, self.width, self.layers, self.training = seed, width, layers, training

    # ---- verbs ----------------------------------------------------------------------------------------------------

    def fit(self, pairs: Sequence[Pair]) -> PairClassifier:
        """Train on labelled pairs."""
        from lossmith.training.set_classification import classification_objective, takes_single_logit

        if not pairs:
            raise InputError("no pairs to train on")
        counts = Counter(pair.label for pair in pairs)
        if len(counts) < 2:
            raise InputError(f"all pairs have the label {next(iter(counts))!r}: there is nothing to learn")
        if self.positive is not None and self.positive not in counts:
            raise InputError(
                f"positive={self.positive!r} is no label of the pairs; there are {', '.join(sorted(counts))}"
            )
        self.labels_ = sorted(counts, key=lambda label: (label == self.positive, label))
        objective = classification_objective(self.loss, [counts[label] for label in self.labels_])
        torch.manual_seed(self.seed)
        self._build(pairs, single=len(counts) == 2 and takes_single_logit(self.loss))
        index = {label: i for i, label in enumerate(self.labels_)}
        rows = [{**self._encode(pair.first, pair.second), "labels": index[pair.label]} for pair in pairs]
        self.steps_ = train_encoder(
            self.model_,
            rows,
            objective,
            self._collate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            **self.training,
        )
        return self

    @torch.no_grad()
    def decide(self, pairs: Sequence[tuple[str, ...]]) -> Tensor:
        """Logits of each pair, one column per label (one column alone after training by Dice on two labels)."""
        from lossmith.training.objectives import accepted_inputs

        self._check_fitted()
        self.model_.eval()
        device, parts = next(self.model_.parameters()).device, []
        for start in range(0, len(pairs), self.batch_size):
            rows = [self._encode(*pair[:2]) for pair in pairs[start : start + self.batch_size]]
            batch = {k: v.to(device) for k, v in self._collate(rows).items()}
            parts.append(self.model_(**accepted_inputs(self.model_, batch)).logits.float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.model_.config.num_labels)

    def predict(self, pairs: Sequence[tuple[str, ...]]) -> list[str]:
        """The label of each pair of texts (what else a pair holds, such as its label, is not looked at)."""
        logits = self.decide(pairs)
        best = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(-1)
        return [self.labels_[i] for i in best.tolist()]

    def evaluate(self, pairs: Sequence[Pair]) -> PairScores:
        """Predict, and compare with the labels."""
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        if not pairs:
            raise InputError("no pairs to judge by")
        truth, predicted = [pair.label for pair in pairs], self.predict(pairs)
        if unknown := set(truth) - set(self.labels_):
            raise InputError(f"the label {sorted(unknown)[0]!r} did not occur in training ({', '.join(self.labels_)})")
        if len(self.labels_) == 2:
            options: dict[str, Any] = {"average": "binary", "pos_label": self.labels_[-1]}
            if len(set(truth) | set(predicted)) < 2:  # scikit-learn wants to see both
                options = {"average": "macro", "labels": [self.labels_[-1]]}
        else:
            options = {"average": "macro", "labels": self.labels_}
        precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, zero_division=0, **options)
        return PairScores(float(accuracy_score(truth, predicted)), float(precision), float(recall), float(f1))

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that plain ``AutoModelForSequenceClassification`` and ``AutoTokenizer`` load, too."""
        self._check_fitted()
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> PairClassifier:
        """A trained classifier, by folder or hub id."""
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        check_head(AutoConfig.from_pretrained(folder), "ForSequenceClassification", folder)
        classifier = cls(folder, **arguments)
        classifier.model_ = AutoModelForSequenceClassification.from_pretrained(folder)
        classifier.tokenizer_ = AutoTokenizer.from_pretrained(folder)
        config = classifier.model_.config
        classifier.labels_ = getattr(config, "pair_labels", None) or [
            config.id2label[i] for i in range(config.num_labels)
        ]
        if len(classifier.labels_) < 2:
            raise InputError(f"{folder} gives one number per pair and no labels: it is no classifier of pairs")
        return classifier

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _build(self, pairs: Sequence[Pair], single: bool) -> None:
        from transformers import (
            AutoModelForSequenceClassification,
            BertConfig,
            BertForSequenceClassification,
        )

        options: dict[str, Any] = {"num_labels": 1 if single else len(self.labels_)}
        if not single:
            options["id2label"] = dict(enumerate(self.labels_))
            options["label2id"] = {label: i for i, label in enumerate(self.labels_)}
        if self.model is not None:
            self.tokenizer_, self.model_ = load_encoder(AutoModelForSequenceClassification, self.model, **options)
        else:
            from lossmith.data import train_tokenizer

            self.tokenizer_ = train_tokenizer((text for pair in pairs for text in pair[:2]), vocab_size=2048)
            config = BertConfig(
                vocab_size=len(self.tokenizer_),
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=max(1, self.width // 32),
                intermediate_size=4 * self.width,
                max_position_embeddings=self.max_length,
                pad_token_id=self.tokenizer_.pad_token_id,
                **options,
            )
            self.model_ = BertForSequenceClassification(config)
        self.model_.config.pair_labels = list(self.labels_)
        if self.model_.config.pad_token_id is None:
            self.model_.config.pad_token_id = self._pad()

    def _encode(self, first: str, second: str) -> dict[str, list[int]]:
        """Ids of a pair: by the tokenizer's own template, or separated by its end token where it has none."""
        tokenizer = self.tokenizer_
        if tokenizer.num_special_tokens_to_add(pair=True) > 0:
            options = {"truncation": "longest_first", "max_length": self.max_length, "return_token_type_ids": True}
            encoded = tokenizer(first, second, **options)
            return {k: list(v) for k, v in encoded.items() if k in ("input_ids", "token_type_ids")}
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second))
        # Longest first.
        room = self.max_length - 2
        keep = min(len(a), max(room // 2, room - len(b)))
        a, b = a[:keep], b[: room - keep]
        end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        end = end if end is not None else self._pad()
        return {"input_ids": [end, *a, end, *b], "token_type_ids": [0] * (len(a) + 2) + [1] * len(b)}

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = [longest - len(row["input_ids"]) for row in rows]
        batch = {"attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in fill])}
        names = [("input_ids", self._pad())]
        # Not every model has types of tokens; some (RoBERTa, GPT-2) take such an argument and mean something else.
        if "token_type_ids" in rows[0] and getattr(self.model_.config, "type_vocab_size", 0) > 1:
            names.append(("token_type_ids", 0))
        for name, value in names:
            batch[name] = torch.tensor([r[name] + [value] * n for r, n in zip(rows, fill, strict=True)])
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def _pad(self) -> int:
        tokenizer = self.tokenizer_
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise InputError(
                "this classifier has not been trained; call fit, or PairClassifier.from_pretrained(folder)"
            )
