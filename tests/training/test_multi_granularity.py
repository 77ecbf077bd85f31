"""The objective of three granularities: its parts by hand, where its text comes from, and training with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lossmith.data import (
    Completion,
    CompletionCollator,
    PackedCollator,
    PhraseFinder,
    encode_completions,
    phrase_tokens,
    train_tokenizer,
)
from lossmith.errors import InputError
from lossmith.heads import AdaptiveClippedKL, attach_adaptive_clipped_kl
from lossmith.losses import clipped_kl, cross_entropy, distillation_kl, span_correlation
from lossmith.training import (
    Distillation,
    MultiGranularityCallback,
    MultiGranularityDistillation,
    NextToken,
    ReplaySchedule,
    Trainer,
)
from lossmith.training.models import with_exact_norms

PAIRS = [
    Completion("say it:", " big red fox, small cat"),
    Completion("again:", " cat"),
    Completion("more:", " red fox and big cat"),
    Completion("last:", " small fox"),
]
TOKENIZER = train_tokenizer([p.prompt + p.completion for p in PAIRS] * 3, vocab_size=275)
ROWS = encode_completions(TOKENIZER, PAIRS)
SHORT: dict[str, Any] = {"max_new_tokens": 6, "phrases": "words"}


def llama(width: int = 8, seed: int = 0, vocabulary: int | None = None) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary or len(TOKENIZER),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return with_exact_norms(transformers.LlamaForCausalLM(config).double())


def batch(rows: list[dict[str, Any]] | None = None) -> dict[str, Tensor]:
    return CompletionCollator(0)(ROWS if rows is None else rows)


def by_hand(student: Any, teacher: Any, row: dict[str, Any], token_loss: Any, weights: tuple[float, ...]) -> Tensor:
    """One example of the data set, from its own logits, without padding."""
    ids = torch.tensor([row["input_ids"]])
    response = [t for t in row["labels"] if t != -100]
    start = len(row["input_ids"]) - len(response)
    s, t = (m(input_ids=ids).logits[:, start - 1 : -1] for m in (student, teacher))
    label, token, span = weights
    spans = phrase_tokens(TOKENIZER, response, PhraseFinder("words"))
    return (
        label * cross_entropy(s[0], torch.tensor(response)).mean()
        + token * token_loss(s[0], t[0]).mean()
        + span * span_correlation(s, t, [spans])[0]
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 0.5, 3.0), (0.3, 0.0, 2.0)])
def test_on_the_data_sets_responses_it_is_the_sum_of_its_parts_with_their_gradient(weights: Any) -> None:
    student, teacher = llama(), llama(12, seed=1)
    objective = MultiGranularityDistillation(
        teacher,
        TOKENIZER,
        loss="clipped_kl(upper=0.8)",
        responses="dataset",
        label_weight=weights[0],
        distillation_weight=weights[1],
        span_weight=weights[2],
        phrases="words",
    )
    values = objective(student, batch())
    expected = torch.stack(
        [by_hand(student, teacher, r, lambda s, t: clipped_kl(s, t, upper=0.8), weights) for r in ROWS]
    )
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(values.sum(), list(student.parameters()))
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_without_the_teachers_parts_it_is_plain_fine_tuning_bit_for_bit() -> None:
    student, teacher = llama(), llama(12, seed=1)
    objective = MultiGranularityDistillation(teacher, TOKENIZER, distillation_weight=0, span_weight=0)
    state = torch.random.get_rng_state()
    ours, plain = objective(student, batch()), NextToken()(student, batch())
    assert torch.equal(ours, plain)
    assert torch.equal(state, torch.random.get_rng_state())  # nothing was generated
    assert objective.last_revision is None


@pytest.mark.parametrize("responses", ["revised", "student"])
def test_on_generated_responses_each_part_is_on_its_own_text(responses: Any) -> None:
    student, teacher = llama(), llama(12, seed=1)
    objective = MultiGranularityDistillation(
        teacher, TOKENIZER, loss="distillation_kl", responses=responses, span_weight=2.0, **SHORT
    )
    torch.manual_seed(5)
    values = objective(student, batch())
    made = objective.last_revision
    assert made is not None
    assert (made.responses == made.drafts) == (responses == "student")
    labels = NextToken()(student, batch())
    for i, (row, response) in enumerate(zip(ROWS, made.responses, strict=True)):
        prompt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        written = {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        expected = by_hand(student, teacher, written, distillation_kl, (0.0, 1.0, 2.0)) + labels[i]
        torch.testing.assert_close(values[i], expected, rtol=1e-9, atol=1e-9)
    assert all(module.training for module in student.modules())  # put back as it was


def test_the_learned_band_is_trained_with_the_student() -> None:
    student, teacher = llama(), llama(12, seed=1)
    objective = MultiGranularityDistillation(teacher, TOKENIZER, span_weight=0.0, **SHORT)
    with pytest.raises(InputError, match=r"call lossmith\.heads\.attach_adaptive_clipped_kl\(student\)"):
        objective(student, batch())
    band = attach_adaptive_clipped_kl(student)
    objective(student, batch()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in band.parameters())
    assert any(p.grad.any() for p in band.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_an_example_without_labels_has_no_loss_and_does_not_disturb_the_others() -> None:
    student, teacher = llama(), llama(12, seed=1)
    objective = MultiGranularityDistillation(teacher, TOKENIZER, loss="distillation_kl", **SHORT)
    rows = [ROWS[0], {**ROWS[1], "labels": [-100] * len(ROWS[1]["labels"])}, ROWS[2]]
    values = objective(student, batch(rows))
    assert values[1] == 0
    assert (values[[0, 2]] > 0).all()
    assert len(objective.last_revision.responses) == 2  # type: ignore[union-attr]


def test_left_padding_changes_nothing_but_where_the_padding_is() -> None:
    student, teacher = llama(), llama(12, seed=1)
    objective = MultiGranularityDistillation(
        teacher, TOKENIZER, loss="distillation_kl", label_weight=0.0, position="random", **SHORT
    )
    right = batch()
    left = {k: v.clone() for k, v in right.items()}
    for i, row in enumerate(ROWS):
        shift = right["input_ids"].shape[1] - len(row["input_ids"])
        for name in ("input_ids", "labels", "attention_mask"):
            left[name][i] = right[name][i].roll(shift)
    results = []
    for b in (right, left):
        torch.manual_seed(3)
        results.append(objective(student, b).detach())
    torch.testing.assert_close(*results)


def test_replayed_responses_come_from_the_buffer() -> None:
    student, teacher = llama(), llama(12, seed=1)
    replay = ReplaySchedule(1.0, capacity=4)
    objective = MultiGranularityDistillation(teacher, TOKENIZER, loss="distillation_kl", replay=replay, **SHORT)
    objective(student, batch())
    assert len(replay.buffer) == 4
    first = objective.last_revision
    replay.progress = 1.0  # and the buffer is full: nothing new any more
    values = objective(student, batch())
    assert objective.last_revision is first
    assert values.shape == (4,)
    replay.threshold = 0.0
    expected = MultiGranularityDistillation(teacher, TOKENIZER, loss="distillation_kl", responses="dataset", **SHORT)
    torch.testing.assert_close(objective(student, batch()), expected(student, batch()))


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def test_training_moves_student_and_band_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    student, teacher = llama(), llama(12, seed=1)
    band = attach_adaptive_clipped_kl(student)
    before = copy.deepcopy([student.state_dict(), teacher.state_dict()])
    objective = MultiGranularityDistillation(
        teacher, TOKENIZER, replay=ReplaySchedule(0.5, capacity=8, tolerance=0.0), **SHORT
    )
    callback = MultiGranularityCallback(objective)
    trainer = Trainer(
        student,
        arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        objective=objective,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=CompletionCollator(0),
        callbacks=[callback],
    )
    trainer.train()
    after = [student.state_dict(), teacher.state_dict()]
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    moved = {k for k in before[0] if not torch.equal(before[0][k], after[0][k])}
    assert {f"adaptive_clipped_kl.{n}" for n, _ in band.named_parameters()} <= moved
    assert [line["step"] for line in callback.history] == [1, 2, 3, 4, 5, 6]
    assert 0 < callback.history[-1]["lower"] < callback.history[-1]["upper"] < 1
    assert objective.replay is not None
    assert objective.replay.progress == pytest.approx(5 / 6)
    assert objective.replay._lowest < float("inf")
    # Passes of the teacher and generation cost more than the student's own six products per weight.
    positions = sum(len(r["input_ids"]) for r in ROWS) * 6
    assert trainer.state.total_flos > 6 * positions * sum(p.numel() for p in student.model.layers.parameters())


def test_gradient_accumulation_does_not_change_a_step_on_the_data_set(tmp_path: Path) -> None:
    finals = []
    for size, accumulation in ((4, 1), (2, 2)):
        student, teacher = llama(), llama(12, seed=1)
        attach_adaptive_clipped_kl(student)
        torch.manual_seed(0)
        objective = MultiGranularityDistillation(teacher, TOKENIZER, responses="dataset", phrases="words")
        trainer = Trainer(
            student,
            arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation),
            objective=objective,
            train_dataset=ROWS,
            data_collator=CompletionCollator(0),
        )
        for p in student.adaptive_clipped_kl.parameters():
            torch.nn.init.constant_(p, 0.01)
        trainer.train()
        finals.append({k: v.clone() for k, v in student.state_dict().items()})
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], rtol=1e-7, atol=1e-9)


def test_the_same_seed_gives_the_same_training(tmp_path: Path) -> None:
    finals = []
    for _ in range(2):
        student, teacher = llama(), llama(12, seed=1)
        objective = MultiGranularityDistillation(teacher, TOKENIZER, loss="jensen_shannon", **SHORT)
        Trainer(
            student,
            arguments(tmp_path, max_steps=3, seed=7),
            objective=objective,
            train_dataset=ROWS,
            data_collator=CompletionCollator(0),
        ).train()
        finals.append(student.lm_head.weight.detach().clone())
    assert torch.equal(*finals)


def test_streaming_refuses_a_loss_that_learns() -> None:
    student, teacher = llama(), llama(12, seed=1)
    with pytest.raises(
        ValueError, match="AdaptiveClippedKL has weights of its own, whose gradient streaming would lose"
    ):
        Distillation(teacher, AdaptiveClippedKL(len(TOKENIZER)))(student, batch())


def test_wrong_input_is_one_sentence() -> None:
    teacher = llama(12, seed=1)
    for options, message in (
        ({"span_weight": -1.0}, "span_weight must be a finite number >= 0, got -1"),
        ({"distillation_weight": float("nan")}, "distillation_weight must be a finite number >= 0, got nan"),
        ({"responses": "teacher"}, "responses must be revised or student or dataset, got 'teacher'"),
        ({"rounds": -1}, "rounds must be >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"phrases": "spacy"}, "chunker must be auto, nltk or words, got 'spacy'"),
        ({"loss": "distilation_kl"}, "did you mean 'distillation_kl'"),
        ({"responses": "dataset", "replay": ReplaySchedule()}, "replay is of generated responses"),
        ({"tokenizer": None}, "span_weight > 0 needs a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiGranularityDistillation(**{"teacher": teacher, "tokenizer": TOKENIZER, **options})  # type: ignore[arg-type]
    objective = MultiGranularityDistillation(teacher, TOKENIZER, loss="distillation_kl", **SHORT)
    with pytest.raises(InputError, match="the student's vocabulary has 400 tokens"):
        objective(llama(vocabulary=400), batch())
    with pytest.raises(InputError, match="a row must be one example"):
        objective(llama(), PackedCollator()(ROWS))
    with pytest.raises(InputError, match="an example has no prompt"):
        objective(llama(), batch([{"input_ids": [5, 6], "labels": [5, 6]}]))
    with pytest.raises(InputError, match="the teacher is the student itself"):
        objective(teacher, batch())
