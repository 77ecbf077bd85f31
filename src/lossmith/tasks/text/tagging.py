"""Token tagging (named entities and the like) with any Hugging Face token classifier and any loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.tasks.text.conll import Sentence
from lossmith.tasks.text.encoder_training import check_head, load_encoder, train_encoder

IGNORED = -100


@dataclass(frozen=True, slots=True)
class TaggingScores:
    """Entity-level scores (by ``seqeval``, an entity counts if its type and both ends are right), and by type."""

    precision: float
    recall: float
    f1: float
    accuracy: float
    by_type: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """One line."""
        types = ", ".join(f"{name} {value:.3f}" for name, value in self.by_type.items())
        return f"F1 {self.f1:.3f} (precision {self.precision:.3f}, recall {self.recall:.3f}; {types})"


class TokenTagger:
    """A tagger with ``fit``, ``predict``, ``evaluate``, ``save_pretrained`` and ``from_pretrained``.

    Args:
        model: folder or hub id of any encoder or token classifier; default a small encoder from random weights, with
            byte-level BPE trained on the words: nothing is downloaded.
        loss: ``cross_entropy``, ``weighted_cross_entropy`` (classes weighed by their frequency, see
            :func:`lossmith.losses.class_weights`), any registered loss (``"focal_loss(gamma=2)"``, ``"dice_loss"``), or
            the losses of a whole batch, ``set_dice_loss`` and ``set_tversky_loss``.
        epochs: passes over the sentences.
        batch_size: sentences per step.
        learning_rate: of AdamW, with a linear schedule.
        max_length: tokens of a window; longer sentences are cut into windows that overlap by ``stride`` words, each
            word being judged once.
        stride: words of left context that a later window repeats.
        seed: of weights, order and dropout.
        width, layers: of the small encoder.
        **training: further ``transformers.TrainingArguments``.

    A word's first token carries its tag; its other tokens do not count.

    >>> tagger = TokenTagger(epochs=1)
    >>> sentences = [Sentence(("see", "Ann", "Lee"), ("O", "B-person", "I-person"))] * 8
    >>> tagger.fit(sentences).predict([["see", "Ann"]])[0].__len__()
    2
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        loss: str = "cross_entropy",
        epochs: float = 3,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        max_length: int = 128,
        stride: int = 16,
        seed: int = 0,
        width: int = 64,
        layers: int = 2,
        **training: Any,
    ):
        self.model, self.loss, self.epochs, self.batch_size = model, loss, epochs, batch_size
        self.learning_rate, self.max_length, self.stride, self.seed = learning_rate, max_length, stride, seed
        self.width, self.layers, self.training = width, layers, training

    # ---- verbs ----------------------------------------------------------------------------------------------------

    def fit(self, sentences: Sequence[Sentence]) -> TokenTagger:
        """Train on tagged sentences."""
        from lossmith.training.set_classification import classification_objective

        if not sentences:
            raise InputError("no sentences to train on")
        counts = Counter(tag for s in sentences for tag in s.tags)
        if len(counts) < 2:
            raise InputError(f"all words have the tag {next(iter(counts))!r}: there is nothing to learn")
        self.tags_ = sorted(counts, key=lambda tag: (tag != "O", tag))
        torch.manual_seed(self.seed)
        self._build(sentences)
        rows = [row for s in sentences for row in self._windows(s.words, s.tags)]
        self.steps_ = train_encoder(
            self.model_,
            rows,
            classification_objective(self.loss, [counts[tag] for tag in self.tags_]),
            self._collate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            **self.training,
        )
        return self

    @torch.no_grad()
    def predict(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """Tags of each sentence's words."""
        self._check_fitted()
        self.model_.eval()
        result: list[list[str]] = [[] for _ in sentences]
        rows = [(i, row) for i, words in enumerate(sentences) for row in self._windows(words, ["O"] * len(words))]
        device = next(self.model_.parameters()).device
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            batch = {k: v.to(device) for k, v in self._collate([row for _, row in part]).items()}
            labels = batch.pop("labels")
            best = self.model_(**batch).logits.argmax(-1)
            for (i, _), chosen, kept in zip(part, best, labels != IGNORED, strict=True):
                result[i] += [self.tags_[c] for c in chosen[kept].tolist()]
        return result

    def evaluate(self, sentences: Sequence[Sentence]) -> TaggingScores:
        """Predict, and compare with the tags."""
        return tagging_scores([s.tags for s in sentences], self.predict([s.words for s in sentences]))

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that plain ``AutoModelForTokenClassification`` and ``AutoTokenizer`` load, too."""
        self._check_fitted()
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> TokenTagger:
        """A trained tagger, by folder or hub id."""
        from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

        check_head(AutoConfig.from_pretrained(folder), "ForTokenClassification", folder)
        tagger = cls(folder, **arguments)
        tagger.model_ = AutoModelForTokenClassification.from_pretrained(folder)
        tagger.tokenizer_ = AutoTokenizer.from_pretrained(folder)
        tagger.tags_ = [tagger.model_.config.id2label[i] for i in range(tagger.model_.config.num_labels)]
        return tagger

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _build(self, sentences: Sequence[Sentence]) -> None:
        from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification

        labels: dict[str, Any] = {
            "id2label": dict(enumerate(self.tags_)),
            "label2id": {t: i for i, t in enumerate(self.tags_)},
        }
        if self.model is not None:
            self.tokenizer_, self.model_ = load_encoder(
                AutoModelForTokenClassification, self.model, num_labels=len(self.tags_), **labels
            )
            return
        from lossmith.data import train_tokenizer

        self.tokenizer_ = train_tokenizer((" ".join(s.words) for s in sentences), vocab_size=2048)
        config = BertConfig(
            vocab_size=len(self.tokenizer_),
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.width // 32),
            intermediate_size=4 * self.width,
            max_position_embeddings=self.max_length,
            pad_token_id=self.tokenizer_.pad_token_id,
            **labels,
        )
        self.model_ = BertForTokenClassification(config)

    def _windows(self, words: Sequence[str], tags: Sequence[str]) -> list[dict[str, list[int]]]:
        """Windows of tokens; each word's first token is labelled in exactly one of them."""
        tokenizer = self.tokenizer_
        before = [i for i in (tokenizer.cls_token_id,) if i is not None]
        after = [i for i in (tokenizer.sep_token_id,) if i is not None]
        room = self.max_length - len(before) - len(after)
        # Byte-level tokenizers tell a word's beginning by the space before it.
        space = " " if tokenizer.tokenize(" a") != tokenizer.tokenize("a") else ""
        unknown = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
        # One call for all words: a call costs far more than a word.
        encoded = tokenizer([space + word for word in words], add_special_tokens=False)["input_ids"] if words else []
        pieces = [ids[:room] or [unknown] for ids in encoded]
        windows, start = [], 0
        while start < len(words):
            # Words of context, as many of the last ones as leave half of the room.
            first, used = start, 0
            while first > max(0, start - self.stride) and used + len(pieces[first - 1]) <= room // 2:
                first -= 1
                used += len(pieces[first])
            end = start
            while end < len(words) and used + len(pieces[end]) <= room:
                used += len(pieces[end])
                end += 1
            if end == start:  # a very long word beside much context
                first, end = start, start + 1
            ids, labels = list(before), [IGNORED] * len(before)
            for i in range(first, end):
                ids += pieces[i]
                label = self.tags_.index(tags[i]) if i >= start and tags[i] in self.tags_ else 0
                labels += [label if i >= start else IGNORED] + [IGNORED] * (len(pieces[i]) - 1)
            windows.append({"input_ids": ids + after, "labels": labels + [IGNORED] * len(after)})
            start = end
        return windows

    def _collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        pad = self.tokenizer_.pad_token_id or 0
        fill = [longest - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor([r["input_ids"] + [pad] * n for r, n in zip(rows, fill, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in fill]),
            "labels": torch.tensor([r["labels"] + [IGNORED] * n for r, n in zip(rows, fill, strict=True)]),
        }

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise InputError("this tagger has not been trained; call fit, or TokenTagger.from_pretrained(folder)")


def tagging_scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> TaggingScores:
    """Entity-level precision, recall and F1 by ``seqeval`` (its default mode, that of ``conlleval``).

    >>> tagging_scores([["B-a", "I-a", "O"]], [["B-a", "O", "O"]]).f1
    0.0
    """
    try:
        from seqeval.metrics import accuracy_score, classification_report
    except ImportError:
        raise InputError("entity scores need the extra 'tagging': pip install 'lossmith[tagging]'") from None
    if [len(t) for t in truth] != [len(p) for p in predicted]:
        raise ValueError("truth and predictions must have the same numbers of words")
    truth, predicted = [list(t) for t in truth], [list(p) for p in predicted]
    if not any(tag != "O" for tags in (*truth, *predicted) for tag in tags):
        return TaggingScores(0.0, 0.0, 0.0, 1.0)
    report = classification_report(truth, predicted, output_dict=True, zero_division=0)
    micro = report["micro avg"]
    types = {k: float(v["f1-score"]) for k, v in report.items() if not k.endswith(" avg")}
    return TaggingScores(
        float(micro["precision"]),
        float(micro["recall"]),
        float(micro["f1-score"]),
        float(accuracy_score(truth, predicted)),
        types,
    )
