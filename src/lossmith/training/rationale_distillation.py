"""Learning to answer and to explain: labels, good rationales to fit, bad ones to move away from, weighed by a judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.losses import contrastive_rationale_loss, rationale_quality_loss
from lossmith.losses.contrastive import Scheme, check_contrast, choose_rationale
from lossmith.training.objectives import IGNORE_INDEX, Batch, ExampleEvaluation, unwrapped
from lossmith.training.rationale_judge import RationaleJudge
from lossmith.training.rationale_table import Candidates, RationaleTable
from lossmith.training.sequence_to_sequence import SequenceToSequence, check_sequence_to_sequence


@dataclass(frozen=True, slots=True)
class RationaleLosses:
    """The parts of the loss, one value per example: of the label, of the contrast, and of the judge (or ``None``)."""

    answer: Float[Tensor, examples]
    contrast: Float[Tensor, examples]
    judge: Float[Tensor, examples] | None


class RationaleDistillation:
    r"""An objective: predict the label; explain like good rationales, and unlike bad ones.

    .. math:: \ell_i = \alpha_1\, \mathrm{CE}(y_i \mid x_i) + \alpha_2\, \ell^{cl}_i

    with :func:`lossmith.losses.contrastive_rationale_loss` over the mean cross entropies of the example's rationales
    under the explain prompt. One model does both tasks, told apart by a prefix; when it is used, it only predicts.

    Args:
        table: the examples; also the Trainer's ``train_dataset``, and ``table.collate`` its ``data_collator``.
        judge: weighs rationales; without one all good ones count 1 and all bad ones fully.
        answer_weight: ``α₁ >= 0``.
        rationale_weight: ``α₂ >= 0``; at 0 rationales are not even looked up.
        beta: weight of moving away; at 0 bad rationales are not even looked up.
        margin: nats per token up to which to move away.
        scheme: which rationales of a question count; see the loss.
        all_at_once: compute the gradient of all rationales, and not of the two chosen only. The same numbers
            (without dropout) for about twice the memory. Schemes that count all rationales always do.
        rows_at_once: rationales per forward pass while choosing.
        seed: of the choices of ``scheme="sampling"``.

    With ``answer_weight=rationale_weight=0.5``, ``beta=0``, one good rationale per question and no judge this is
    "Distilling step-by-step". :class:`RationaleTrainer` adds what changes in the course of training: rationales of the
    student's earlier self, and the judge's own steps. In a plain :class:`Trainer` both stay as they are.

    The encoder reads each question once, however many rationales it has.

    Source: "QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models", 2024,
    arXiv 2405.13014, equations 3 to 8; Hsieh et al., "Distilling Step-by-Step!", 2023, arXiv 2305.02301.
    """

    def __init__(
        self,
        table: RationaleTable,
        judge: RationaleJudge | None = None,
        *,
        answer_weight: float = 0.5,
        rationale_weight: float = 0.5,
        beta: float = 0.2,
        margin: float = 3.0,
        scheme: Scheme = "minmax",
        all_at_once: bool = False,
        rows_at_once: int = 512,
        seed: int = 0,
    ):
        check_contrast(beta, margin, scheme)
        for name, value in (("answer_weight", answer_weight), ("rationale_weight", rationale_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
        self.table, self.judge = table, judge
        self.answer_weight, self.rationale_weight = answer_weight, rationale_weight
        self.beta, self.margin, self.scheme = beta, margin, scheme
        self.all_at_once = all_at_once or scheme in ("mean", "weighted_mean")
        self.rows_at_once = rows_at_once
        self.sequences = SequenceToSequence()
        #: Whether the judge's own loss is computed, too (with its graph).
        self.judge_learns = False
        #: The parts of the last call.
        self.last: RationaleLosses | None = None
        #: Cross entropies of the last call's rationales, without graph: chosen good, chosen bad (NaN where none).
        self.last_chosen: tuple[Tensor, Tensor] | None = None
        #: Tokens that the last call sent through encoder, decoder and judge: (with gradient, without).
        self.tokens: dict[str, list[int]] = {}
        self._draws = torch.Generator().manual_seed(seed)
        self._checked: int | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example: the weighted sum of the student's two parts."""
        self.last = parts = self.parts(model, batch)
        return self.answer_weight * parts.answer + self.rationale_weight * parts.contrast

    def parts(self, model: nn.Module, batch: Batch) -> RationaleLosses:
        """The parts by themselves."""
        self._prepare(model)
        self.tokens = {name: [0, 0] for name in ("encoder", "decoder", "judge")}
        self.last_chosen = None
        answer = self._answer(model, batch)
        if self.rationale_weight == 0:
            return RationaleLosses(answer, torch.zeros_like(answer), None)
        indices, device = batch["index"].tolist(), batch["labels"].device
        input_ids, mask = self.table.explain_inputs(indices, device)
        states = self.sequences.encode(model, input_ids, mask)
        self._count("encoder", input_ids, gradient=True)
        candidates = self.table.candidates(indices, device, negatives=self.beta > 0 or self.judge_learns)
        scores = self._scores(candidates)
        judged = None
        if scores is not None and self.judge_learns:
            judged = self.judge_loss(candidates, scores, len(indices))
        way = self._of_all if self.all_at_once else self._of_chosen
        contrast = way(model, states, mask, candidates, None if scores is None else scores.detach())
        return RationaleLosses(answer, contrast, judged)

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Number of tokens of each label."""
        return self.sequences.target_counts(batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """Cross entropy of the labels, and correct tokens; the rationales are not asked for."""
        return self.sequences.evaluate(model, batch)

    def rationale_losses(self, model: nn.Module, batch: Batch) -> tuple[Candidates, Float[Tensor, rows]]:
        """The rationales of a batch and the student's cross entropy of each; with gradient where that is on."""
        indices, device = batch["index"].tolist(), batch["labels"].device
        input_ids, mask = self.table.explain_inputs(indices, device)
        states = self.sequences.encode(model, input_ids, mask)
        candidates = self.table.candidates(indices, device)
        rows = torch.arange(len(candidates.owners), device=device)
        return candidates, self._of_rows(model, states, mask, candidates, rows)

    def judge_loss(
        self, candidates: Candidates, scores: Float[Tensor, rows], questions: int
    ) -> Float[Tensor, questions]:
        """The judge's own loss, 0 for a question without bad rationales."""
        good, good_mask = candidates.spread(scores, questions, good=True)
        bad, bad_mask = candidates.spread(scores, questions, good=False)
        return rationale_quality_loss(good, bad, positive_mask=good_mask, negative_mask=bad_mask)

    def judge_scores(self, candidates: Candidates) -> Float[Tensor, rows]:
        """What the judge says of each rationale; with gradient where that is on."""
        assert self.judge is not None
        self._count("judge", candidates.judge_ids, gradient=torch.is_grad_enabled())
        return self.judge(candidates.judge_ids, candidates.judge_mask)

    def _answer(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.answer_weight == 0:
            return torch.zeros(len(batch["labels"]), device=batch["labels"].device)
        self._count("encoder", batch["input_ids"], gradient=True)
        self._count("decoder", batch["labels"], gradient=True)
        return self.sequences(model, batch)

    def _scores(self, candidates: Candidates) -> Tensor | None:
        if self.judge is None:
            return None
        with torch.set_grad_enabled(self.judge_learns and torch.is_grad_enabled()):
            return self.judge_scores(candidates)

    def _of_all(
        self, model: nn.Module, states: Tensor, mask: Tensor, candidates: Candidates, scores: Tensor | None
    ) -> Tensor:
        rows = torch.arange(len(candidates.owners), device=states.device)
        losses = self._of_rows(model, states, mask, candidates, rows)
        good, good_mask = candidates.spread(losses, len(states), good=True)
        bad, bad_mask = candidates.spread(losses, len(states), good=False)
        self._remember(good, good_mask, bad, bad_mask)
        return contrastive_rationale_loss(
            good,
            bad,
            None if scores is None else candidates.spread(scores, len(states), good=True)[0],
            None if scores is None else candidates.spread(scores, len(states), good=False)[0],
            positive_mask=good_mask,
            negative_mask=bad_mask,
            beta=self.beta,
            margin=self.margin,
            scheme=self.scheme,
            generator=self._draws,
        )

    def _of_chosen(
        self, model: nn.Module, states: Tensor, mask: Tensor, candidates: Candidates, scores: Tensor | None
    ) -> Tensor:
        """Choose without gradient, then compute the chosen again with gradient: two rows of each question."""
        questions = len(states)
        chosen = {good: self._choose(model, states, mask, candidates, good) for good in (True, False)}
        rows = torch.cat([chosen[True][chosen[True] >= 0], chosen[False][chosen[False] >= 0]])
        losses = self._of_rows(model, states, mask, candidates, rows)
        place = torch.full((len(candidates.owners) + 1,), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)

        def of(good: bool) -> tuple[Tensor, Tensor, Tensor | None]:
            is_there = chosen[good] >= 0
            if not bool(is_there.any()):
                empty = losses.new_zeros(questions, 0)
                return empty, empty.bool(), None if scores is None else empty
            values = losses[place[chosen[good]].clamp_min(0)].masked_fill(~is_there, 0.0)
            own = None if scores is None else scores[chosen[good].clamp_min(0)].unsqueeze(-1)
            return values.unsqueeze(-1), is_there.unsqueeze(-1), own

        (good, good_mask, good_scores), (bad, bad_mask, bad_scores) = of(True), of(False)
        self._remember(good, good_mask, bad, bad_mask)
        return contrastive_rationale_loss(
            good,
            bad,
            good_scores,
            bad_scores,
            positive_mask=good_mask,
            negative_mask=bad_mask,
            beta=self.beta,
            margin=self.margin,
        )

    @torch.no_grad()
    def _choose(
        self, model: nn.Module, states: Tensor, mask: Tensor, candidates: Candidates, good: bool
    ) -> Int[Tensor, questions]:
        """The row that counts of each question; -1 where there is none."""
        questions, device = len(states), states.device
        rows = (candidates.is_good == good).nonzero().squeeze(-1)
        if not len(rows) or (not good and self.beta == 0):
            return torch.full((questions,), -1, device=device)
        owners = candidates.owners[rows]
        losses = torch.zeros(len(candidates.owners), device=device, dtype=torch.float32)
        # A question with a single rationale has no choice; one that moves away needs no look ahead: the loss clips it.
        contested = rows[torch.bincount(owners, minlength=questions)[owners] > 1]
        if len(contested) and self.scheme != "sampling":
            for part in contested.split(self.rows_at_once):
                losses[part] = self._of_rows(model, states, mask, candidates, part).float()
        table, there = candidates.spread(losses, questions, good=good)
        numbers, _ = candidates.spread(torch.arange(len(losses), device=device), questions, good=good)
        column = choose_rationale(table, there, positive=good, scheme=self.scheme, generator=self._draws)
        row = numbers.gather(-1, column.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return row.masked_fill(column < 0, -1)

    def _of_rows(self, model: nn.Module, states: Tensor, mask: Tensor, candidates: Candidates, rows: Tensor) -> Tensor:
        owners, labels = candidates.owners[rows], candidates.labels[rows]
        if not len(rows):
            return states.new_zeros(0)
        # No longer than the longest target among these rows.
        labels = labels[:, : int((labels != IGNORE_INDEX).sum(-1).max())]
        self._count("decoder", labels, gradient=torch.is_grad_enabled())
        return self.sequences.of_targets(model, states[owners], mask[owners], labels)

    def _remember(self, good: Tensor, good_mask: Tensor, bad: Tensor, bad_mask: Tensor) -> None:
        def chosen(losses: Tensor, there: Tensor, positive: bool) -> Tensor:
            none = float("nan")
            if losses.shape[-1] == 0:
                return torch.full((len(losses),), none)
            key = losses.detach().masked_fill(~there, float("inf") if positive else -float("inf"))
            value = key.amin(-1) if positive else key.amax(-1)
            return value.masked_fill(~there.any(-1), none)

        self.last_chosen = (chosen(good, good_mask, True), chosen(bad, bad_mask, False))

    def _count(self, part: str, tokens: Tensor, *, gradient: bool) -> None:
        self.tokens.setdefault(part, [0, 0])[0 if gradient else 1] += tokens.numel()

    def _prepare(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        if self._checked == id(inner):
            return
        check_sequence_to_sequence(inner)
        if self.judge is not None:
            self.judge.to(next(inner.parameters()).device)
        self._checked = id(inner)
