"""Questions, labels and rationales as token ids: what a batch is made of, and what each question has to choose from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lossmith.data.rationales import RationaleExample, corrupt_rationale
from lossmith.errors import InputError
from lossmith.training.objectives import IGNORE_INDEX
from lossmith.training.text_sampling import encoded, padded

PREDICT, EXPLAIN = "predict: ", "explain: "


@dataclass(frozen=True, slots=True)
class Candidates:
    """The rationales of a batch's questions, one row each, without filling rows.

    Attributes:
        owners: the question of each row, by its place in the batch.
        columns: the row's place among the question's good, or bad, rationales.
        is_good: which rows are good rationales.
        labels: targets, -100 where there is none.
        judge_ids: question and rationale, for the judge; and
        judge_mask: which of it is no filling.
    """

    owners: Int[Tensor, rows]
    columns: Int[Tensor, rows]
    is_good: Bool[Tensor, rows]
    labels: Int[Tensor, "rows targets"]
    judge_ids: Int[Tensor, "rows length"]
    judge_mask: Int[Tensor, "rows length"]

    def spread(self, values: Tensor, questions: int, *, good: bool) -> tuple[Tensor, Bool[Tensor, "questions columns"]]:
        """``values`` of the good (bad) rows as one line per question, and the mask of what is there."""
        mine = self.is_good == good
        width = int(self.columns[mine].max()) + 1 if bool(mine.any()) else 0
        place = self.owners[mine] * width + self.columns[mine]
        table = torch.zeros(questions * width, dtype=values.dtype, device=values.device)
        mask = torch.zeros(questions * width, dtype=torch.bool, device=values.device)
        table = table.index_put((place,), values[mine])
        mask[place] = True
        return table.reshape(questions, width), mask.reshape(questions, width)


class RationaleTable:
    """Everything that a student is taught, by the example's number; a data set of its rows, and their collator.

    Args:
        examples: see :func:`lossmith.data.build_contrastive_rationales`.
        tokenizer: the student's.
        max_input_length: longest question in tokens, with its task's prefix; the rest is cut off.
        max_target_length: longest label or rationale.
        predict: the prefix of the task whose target is the label; and
        explain: that of the task whose target is a rationale.

    Batches hold the example's number only, and the rationales are looked up when the loss is computed: negatives that
    change in the middle of a run change for the very next step, whatever loaders have fetched ahead.
    """

    def __init__(
        self,
        examples: Sequence[RationaleExample],
        tokenizer: Any,
        *,
        max_input_length: int = 1024,
        max_target_length: int = 256,
        predict: str = PREDICT,
        explain: str = EXPLAIN,
    ):
        if not examples:
            raise InputError("no examples to learn from")
        if max_input_length < 4 or max_target_length < 2:
            raise InputError(
                f"max_input_length must be at least 4 and max_target_length 2, got {max_input_length} and "
                f"{max_target_length}"
            )
        for number, example in enumerate(examples):
            if not example.positives:
                raise InputError(f"example {number} has no rationale to learn ({example.question[:60]!r})")
        self.examples, self.tokenizer = tuple(examples), tokenizer
        self.max_input_length, self.max_target_length = max_input_length, max_target_length
        self.predict, self.explain = predict, explain
        self._prompts, self._explains, self._questions = (
            encoded(tokenizer, [task + e.question for e in examples], max_input_length)
            for task in (predict, explain, "")
        )
        self._labels = encoded(tokenizer, [e.label for e in examples], max_target_length)
        self._good = self._targets([e.positives for e in examples])
        self._bad = self._targets([e.negatives for e in examples])
        self._own: list[list[list[int]]] = [[] for _ in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: number, predict prompt and label of each example."""
        input_ids, mask = padded([self._prompts[i] for i in indices], self._pad)
        return {
            "index": torch.tensor(list(indices)),
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": _labels([self._labels[i] for i in indices]),
        }

    def explain_inputs(self, indices: Sequence[int], device: Any = None) -> tuple[Tensor, Tensor]:
        """The explain prompts, and their mask."""
        ids, mask = padded([self._explains[i] for i in indices], self._pad)
        return ids.to(device), mask.to(device)

    def candidates(
        self, indices: Sequence[int], device: Any = None, *, negatives: bool = True, corruptions: bool = False
    ) -> Candidates:
        """The rationales of these examples.

        Args:
            indices: numbers of examples.
            device: for the tensors.
            negatives: whether bad ones, too.
            corruptions: whether spoilt copies of the good ones make up for bad ones that are missing; see
                :meth:`corrupt`.
        """
        owners, columns, kinds, labels, read = [], [], [], [], []
        for owner, index in enumerate(indices):
            bad = self._bad[index] + self._own[index] if negatives else []
            if corruptions:
                bad = bad + self._spoilt[index]
            for is_good, group in ((True, self._good[index]), (False, bad)):
                for column, target in enumerate(group):
                    owners.append(owner)
                    columns.append(column)
                    kinds.append(is_good)
                    labels.append(target)
                    room = max(1, self.max_input_length + self.max_target_length - len(target))
                    read.append(self._questions[index][:room] + target)
        judge_ids, judge_mask = padded(read, self._pad)
        return Candidates(
            torch.tensor(owners, device=device),
            torch.tensor(columns, device=device),
            torch.tensor(kinds, device=device),
            _labels(labels).to(device),
            judge_ids.to(device),
            judge_mask.to(device),
        )

    def corrupt(self, seed: int, *, rate: float = 0.15) -> None:
        """Spoil good rationales until each example has as many bad as good ones, and at least one."""
        draw = random.Random(seed)
        words = sorted({word for e in self.examples for r in e.positives for word in r.split()})
        mask = self.tokenizer.mask_token or "<extra_id_0>"
        spoilt: list[list[str]] = []
        for example, bad in zip(self.examples, self._bad, strict=True):
            missing = max(0 if bad else 1, len(example.positives) - len(bad))
            spoilt.append(
                [
                    corrupt_rationale(example.positives[i % len(example.positives)], words, draw, rate=rate, mask=mask)
                    for i in range(missing)
                ]
            )
        self._spoilt = self._targets(spoilt)

    def replace_own(self, texts: Mapping[int, Sequence[str]]) -> tuple[int, int]:
        """Set the rationales of the student's own earlier self, in place of those of the last time.

        Empty ones are dropped, and those that say what a good rationale says.

        Returns:
            How many were taken, and how many dropped.
        """
        taken = dropped = 0
        kept: list[list[str]] = [[] for _ in self.examples]
        for index, said in texts.items():
            good = {" ".join(r.split()).casefold() for r in self.examples[index].positives}
            for text in said:
                if not text.strip() or " ".join(text.split()).casefold() in good:
                    dropped += 1
                else:
                    kept[index].append(text)
                    taken += 1
        self._own = self._targets(kept)
        return taken, dropped

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def _targets(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each example's texts; the tokenizer is called once for all."""
        rows = iter(encoded(self.tokenizer, [text for group in texts for text in group], self.max_target_length))
        return [list(itertools.islice(rows, len(group))) for group in texts]


def _labels(rows: Sequence[Sequence[int]]) -> Tensor:
    ids, mask = padded(rows, IGNORE_INDEX)
    return ids.masked_fill(mask == 0, IGNORE_INDEX)
