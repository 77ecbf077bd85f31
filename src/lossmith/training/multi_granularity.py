"""Distillation at three granularities: sequences that the teacher mends, clipped token distributions, phrases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from lossmith.data.phrases import Chunker, PhraseFinder, Span, phrase_tokens
from lossmith.errors import InputError
from lossmith.heads.adaptive_clipped_kl import attached_adaptive_clipped_kl
from lossmith.losses import span_correlation
from lossmith.registry import Spec
from lossmith.training.distillation import Distillation
from lossmith.training.models import matmul_parameters
from lossmith.training.objectives import (
    IGNORE_INDEX,
    Batch,
    LossFunction,
    accepted_inputs,
    output_logits,
    shifted,
    unwrapped,
)
from lossmith.training.replay import ReplaySchedule
from lossmith.training.response_sampling import check_sampling, response_batch
from lossmith.training.sequence_revision import Position, Revision, TeacherToken, correct_and_regenerate

Responses = Literal["revised", "student", "dataset"]


class MultiGranularityDistillation(Distillation):
    r"""An objective for causal language models: labels, a token loss against the teacher, and one on phrases.

    .. math::
        \ell_i = \gamma\, \mathrm{CE}(y_i) + \alpha\, \frac{1}{|z_i|} \sum_t \mathrm{loss}(q_{i,t}, p_{i,t})
        + \beta\, \frac{1}{|P_i|} \sum_{(t, t+1) \in P_i}
        \lVert p_{i,t} \odot p_{i,t+1} - q_{i,t} \odot q_{i,t+1} \rVert_2

    The labels are the completion ``y`` of the data set. The other two parts are taken on a response ``z``, which the
    student writes to the same prompt and the teacher mends (:func:`lossmith.training.correct_and_regenerate`), or on
    what ``responses`` says.

    Args:
        teacher: see :class:`Distillation`.
        tokenizer: of both models: needed to find phrases; ends responses with its end token.
        loss: ``None``: the clipped KL that is learned with the student: call
            :func:`lossmith.heads.attach_adaptive_clipped_kl` on the student before training. Else any distillation
            loss (``"distillation_kl"``, ``"clipped_kl(upper=0.9)"``).
        distillation_weight: ``α >= 0``.
        span_weight: ``β >= 0``.
        label_weight: ``γ >= 0``. With ``α = β = 0`` this is plain fine-tuning, bit for bit, and nothing is generated.
        responses: ``"revised"``: as above; ``"student"``: as the student wrote them (on-policy distillation);
            ``"dataset"``: the completions: one pass for all parts, nothing generated.
        replay: a :class:`ReplaySchedule`, which generates in a part of the steps only; needs
            :class:`MultiGranularityCallback` in the Trainer to know how far training is. Default: new responses in
            every step.
        max_new_tokens: longest response.
        rounds: corrections per response; the paper's is 1.
        temperature: of the student's samples.
        top_p: of the student's samples.
        teacher_token: see :func:`correct_and_regenerate`.
        position: see :func:`correct_and_regenerate`.
        phrases: a chunker's name (see :class:`lossmith.data.PhraseFinder`), or a function from a text to the places of
            its phrases.
        squared: the square of the distance in the last part.
        label_loss: see :class:`Distillation`.
        teacher_tokenizer: see :class:`Distillation`.
        **options: of ``loss``.

    The batch holds ``input_ids`` (padded on either side, with ``attention_mask`` where it is the left) and ``labels``
    that are -100 in the prompt: see :class:`lossmith.data.CompletionCollator`. Every row is one example; its prompt is
    all before the first label.

    Logits of whole batches are held (they are not streamed: the band's network needs its gradient). What generation and
    the teacher cost is counted in ``total_flos``. Random choices come from torch's global generator. Where weights
    depend on losses, use no ``replay``: replayed responses belong to other examples.

    Raises:
        InputError: different vocabularies, packed rows, a student without what ``loss=None`` needs, options out of
            range.

    Source: "Multi-Granularity Semantic Revision for Large Language Model Distillation", 2024, arXiv 2407.10068, as
    described by others; which text each part is computed on is a choice.

    >>> from lossmith.data import Completion, CompletionCollator, encode_completions, train_tokenizer
    >>> from lossmith.heads import attach_adaptive_clipped_kl
    >>> from lossmith.training.models import build_model
    >>> tokenizer = train_tokenizer(["red blue green"], vocab_size=260)
    >>> teacher, student = (build_model("nano", vocab_size=260, sequence_length=32) for _ in range(2))
    >>> _ = attach_adaptive_clipped_kl(student)
    >>> objective = MultiGranularityDistillation(teacher, tokenizer, max_new_tokens=4, phrases="words")
    >>> rows = encode_completions(tokenizer, [Completion("red", " blue"), Completion("a", " green")])
    >>> objective(student, CompletionCollator(0)(rows)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        teacher: nn.Module,
        tokenizer: Any = None,
        *,
        loss: str | Spec | Callable[..., Tensor] | None = None,
        distillation_weight: float = 1.0,
        span_weight: float = 1.0,
        label_weight: float = 1.0,
        responses: Responses = "revised",
        replay: ReplaySchedule | None = None,
        max_new_tokens: int = 128,
        rounds: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        teacher_token: TeacherToken = "sample",
        position: Position = "largest",
        phrases: Chunker | Callable[[str], Sequence[Span]] = "auto",
        squared: bool = False,
        label_loss: str | Spec | LossFunction = "cross_entropy",
        teacher_tokenizer: Any = None,
        **options: Any,
    ):
        super().__init__(
            teacher,
            "distillation_kl" if loss is None else loss,
            distillation_weight=distillation_weight,
            label_weight=label_weight,
            label_loss=label_loss,
            task="next_token",
            tokenizer=tokenizer if teacher_tokenizer is not None else None,
            teacher_tokenizer=teacher_tokenizer,
            **options,
        )
        if not 0 <= span_weight < float("inf"):
            raise InputError(f"span_weight must be a finite number >= 0, got {span_weight}")
        for name, value, allowed in (
            ("responses", responses, Responses),
            ("teacher_token", teacher_token, TeacherToken),
            ("position", position, Position),
        ):
            if value not in get_args(allowed):
                raise InputError(f"{name} must be {' or '.join(get_args(allowed))}, got '{value}'")
        if rounds < 0 or max_new_tokens < 1:
            raise InputError(f"rounds must be >= 0 and max_new_tokens >= 1, got {rounds} and {max_new_tokens}")
        check_sampling(temperature=temperature, top_p=top_p)
        if span_weight and tokenizer is None:
            raise InputError("span_weight > 0 needs a tokenizer, to find phrases; give one or set span_weight=0")
        if replay is not None and responses == "dataset":
            raise InputError("replay is of generated responses; set responses to revised or student")
        self.tokenizer, self.responses, self.replay = tokenizer, responses, replay
        self.span_weight, self.squared = span_weight, squared
        self._learned = loss is None
        self._revision_options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "rounds": rounds if responses == "revised" else 0,
            "temperature": temperature,
            "top_p": top_p,
            "teacher_token": teacher_token,
            "position": position,
            "eos_token_id": None if tokenizer is None else tokenizer.eos_token_id,
            "pad_token_id": None if tokenizer is None else tokenizer.pad_token_id,
        }
        self.phrases = phrases if callable(phrases) else PhraseFinder(phrases)
        # The data set's responses come again in every epoch.
        self._phrase_tokens = functools.lru_cache(maxsize=4096)(self._find_phrases)
        #: What was last generated.
        self.last_revision: Revision | None = None
        self._extra_flops = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example; 0 for an example without labels."""
        self._extra_flops = 0
        if not (self.distillation_weight or self.span_weight):
            return self._of_labels(model, batch)
        self._prepare(model)
        labels = batch["labels"]
        if labels.ndim != 2 or ("index" in batch and len(batch["index"]) != len(labels)):
            raise InputError(f"a row must be one example, got labels of shape {tuple(labels.shape)}, packed perhaps")
        source = "dataset" if self.responses == "dataset" else "generate"
        if source == "generate" and self.replay is not None:
            source = self.replay.choose()
        if source == "dataset":
            return self._of_responses(model, batch, self.label_weight)
        rows = (shifted(labels) != IGNORE_INDEX).any(-1).nonzero().squeeze(-1)
        written = self._written(unwrapped(model), batch, rows, source)
        values = self._of_responses(model, written, 0.0)
        total = torch.zeros(len(labels), dtype=values.dtype, device=values.device).index_copy(0, rows, values)
        student = 6 * matmul_parameters(unwrapped(model))
        self._extra_flops += student * written["input_ids"].numel()
        if self.label_weight:
            return total + self._of_labels(model, batch)
        # The Trainer counts a pass over the batch, which there was not.
        self._extra_flops -= student * labels.numel()
        return total

    def extra_flops(self, batch: Batch) -> int:
        """What the last call computed besides the student's pass over ``batch``."""
        return self._extra_flops

    def _of_labels(self, model: nn.Module, batch: Batch) -> Tensor:
        values = self._next_token.mean_by_example(model, batch, self.label_loss, shifted(batch["labels"]))
        return values if self.label_weight == 1 else self.label_weight * values

    def _of_responses(self, model: nn.Module, batch: Batch, label_weight: float) -> Tensor:
        """The parts that compare with the teacher, and that of labels where it is on the same responses."""
        inner = unwrapped(model)
        logits = output_logits(model(**accepted_inputs(inner, batch)))
        with torch.no_grad():
            teacher_logits = output_logits(self.teacher(**accepted_inputs(self.teacher, batch)))
        if logits.shape[-1] != teacher_logits.shape[-1]:
            raise InputError(
                f"student and teacher must have the same classes, got {logits.shape[-1]} and {teacher_logits.shape[-1]}"
            )
        self._extra_flops += 2 * matmul_parameters(self.teacher) * batch["input_ids"].numel()
        targets = shifted(batch["labels"])
        keep = targets != IGNORE_INDEX
        ours, chosen = logits[keep], targets[keep]
        rows = torch.zeros_like(ours[..., 0], dtype=torch.float64 if ours.dtype == torch.float64 else torch.float32)
        if self.distillation_weight:
            loss = self._learned_loss(inner) if self._learned else self.loss
            rows = rows + self.distillation_weight * loss(ours, teacher_logits[keep], chosen)
        if label_weight:
            rows = rows + label_weight * self.label_loss(ours, chosen)
        by_token = torch.zeros(targets.shape, dtype=rows.dtype, device=rows.device).masked_scatter(keep, rows)
        total = by_token.sum(-1) / keep.sum(-1).clamp_min(1)
        if self.span_weight:
            linked = self._linked(targets, keep)
            total = total + self.span_weight * span_correlation(logits, teacher_logits, linked, squared=self.squared)
        return total

    def _learned_loss(self, inner: nn.Module) -> Callable[..., Tensor]:
        found = attached_adaptive_clipped_kl(inner)
        if found is None:
            raise InputError(
                "the student has no adaptive clipped KL: call lossmith.heads.attach_adaptive_clipped_kl(student) "
                "before the Trainer is made, or name another loss"
            )
        return found

    @torch.no_grad()
    def _written(self, inner: nn.Module, batch: Batch, rows: Tensor, source: str) -> dict[str, Tensor]:
        """Prompts of ``rows`` with responses that the student wrote, or others from the buffer."""
        device = batch["labels"].device
        if source == "replay":
            assert self.replay is not None
            prompts, responses = self.replay.draw(len(rows))
        else:
            prompts = [_prompt(batch, int(row)) for row in rows]
            made = correct_and_regenerate(inner, self.teacher, prompts, **self._revision_options)
            responses, self.last_revision = made.responses, made
            self._extra_flops += 2 * matmul_parameters(inner) * made.student_positions
            self._extra_flops += 2 * matmul_parameters(self.teacher) * made.teacher_positions
            if self.replay is not None:
                self.replay.add(prompts, responses)
        written = response_batch(prompts, responses, pad_token_id=self._revision_options["pad_token_id"] or 0)
        return {name: column.to(device) for name, column in written.items()}

    def _linked(self, targets: Tensor, keep: Tensor) -> Bool[Tensor, "rows length"]:
        """True where a token and the one after it are in one phrase of the response."""
        linked = torch.zeros(targets.shape, dtype=torch.bool)
        for i, (row, kept) in enumerate(zip(targets.tolist(), keep.tolist(), strict=True)):
            places = [t for t, used in enumerate(kept) if used]
            for start, end in self._phrase_tokens(tuple(row[t] for t in places)):
                for k in range(start, end - 1):
                    linked[i, places[k]] = places[k + 1] == places[k] + 1
        return linked.to(targets.device)

    def _find_phrases(self, ids: tuple[int, ...]) -> list[Span]:
        return phrase_tokens(self.tokenizer, ids, self.phrases)


class MultiGranularityCallback(TrainerCallback):
    """Tells a :class:`ReplaySchedule` of the Trainer's progress and validations, and keeps what was learned of bands.

    Args:
        objective: the Trainer's objective.

    :attr:`history` holds a dictionary for each logged step: ``upper``, ``lower`` and ``kept`` of the band (means over
    the last batch), ``corrected`` (share of the last generated responses that the teacher mended) and ``threshold``.
    The same numbers go into the log, for callbacks that come after this one.
    """

    def __init__(self, objective: MultiGranularityDistillation):
        self.objective = objective
        self.history: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Progress."""
        if self.objective.replay is not None and state.max_steps > 0:
            self.objective.replay.progress = state.global_step / state.max_steps

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Validation."""
        if self.objective.replay is not None and metrics and "eval_loss" in metrics:
            self.objective.replay.observe(metrics["eval_loss"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The band."""
        if logs is None or "loss" not in logs:
            return
        found: dict[str, float] = {}
        band = attached_adaptive_clipped_kl(unwrapped(kwargs["model"]))
        if band is not None and band.has_band:
            last = band.last_band
            found |= {"upper": last.upper, "lower": last.lower, "kept": last.kept}
        revision = self.objective.last_revision
        if revision is not None and revision.error_positions.numel():
            found["corrected"] = float((revision.error_positions >= 0).any(-1).double().mean())
        if self.objective.replay is not None:
            found["threshold"] = self.objective.replay.threshold
        self.history.append({"step": state.global_step, **found})
        logs.update(found)


def _prompt(batch: Batch, row: int) -> list[int]:
    """The tokens before the first label."""
    first = int((batch["labels"][row] != IGNORE_INDEX).nonzero()[0])
    ids = batch["input_ids"][row, :first]
    mask = batch.get("attention_mask")
    prompt: list[int] = (ids if mask is None else ids[mask[row, :first] != 0]).tolist()
    if not prompt:
        raise InputError("an example has no prompt: its first token has a label")
    return prompt
