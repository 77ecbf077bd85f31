"""The Distillation objective: exact, streamed or not, cached or not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lossmith.data import PackedCollator, PaddedCollator
from lossmith.losses import cross_entropy, distillation_kl, plackett_luce_distillation
from lossmith.training import Distillation, Trainer


def llama(width: int, vocabulary: int = 50, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).double()


def corpus(number: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 5, 7, 3, 8, 6][:number]
    return [
        {"input_ids": torch.randint(1, 50, (n,), generator=generator).tolist(), "index": i}
        for i, n in enumerate(lengths)
    ]


def by_hand(student: Any, teacher: Any, rows: list[dict[str, Any]], gamma: float) -> torch.Tensor:
    """One example at a time, from full logits."""
    values = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        s, t = student(input_ids=ids).logits[0, :-1], teacher(input_ids=ids).logits[0, :-1]
        tokens = distillation_kl(s, t, temperature=2.0) + gamma * cross_entropy(s, ids[0, 1:])
        values.append(tokens.mean())
    return torch.stack(values)


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("cached", [False, True])
def test_language_models_get_the_mean_over_their_tokens(collator: Any, cached: bool, tmp_path: Path) -> None:
    student, teacher, rows = llama(8), llama(16, seed=1), corpus()
    objective = Distillation(
        teacher,
        "distillation_kl(temperature=2)",
        label_weight=0.3,
        chunk_size=4,
        cache=tmp_path / "teacher" if cached else None,
    )
    expected = by_hand(student, teacher, rows, 0.3)
    gradients = torch.autograd.grad(expected.sum(), list(student.parameters()))
    for _ in range(2):  # the second time from the cache
        values = objective(student, collator(rows))
        torch.testing.assert_close(values, expected.detach(), rtol=1e-9, atol=1e-9)
        ours = torch.autograd.grad(values.sum(), list(student.parameters()))
        for a, b in zip(ours, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_cache_on_disk_answers_for_the_teacher_in_another_batch(tmp_path: Path) -> None:
    student, teacher, rows = llama(8), llama(16, seed=1), corpus()
    objective = Distillation(teacher, cache=tmp_path)
    expected = objective(student, PaddedCollator(0)(rows)).detach()
    assert objective.cache is not None
    objective.cache.flush()
    again = Distillation(copy.deepcopy(teacher), cache=tmp_path)
    again.teacher.model.forward = None  # cannot run any more: the cache has to answer
    torch.testing.assert_close(again(student, PaddedCollator(0)(rows[2:4])), expected[2:4], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="holds the outputs of another teacher"):
        Distillation(llama(16, seed=2), cache=tmp_path)


class Network(nn.Module):
    """A classifier with dropout, which evaluation mode must switch off."""

    def __init__(self, classes: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, classes)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.tensor([0, 3, -100, 1, 2])}


@pytest.mark.parametrize("cached", [False, True])
def test_classifiers_are_compared_example_by_example(cached: bool, tmp_path: Path) -> None:
    student, teacher = Network().eval(), Network(seed=1)
    objective = Distillation(teacher, plackett_luce_distillation, cache=tmp_path if cached else None)
    teacher.train()  # somebody's mistake
    b = batch()
    for _ in range(2):
        values = objective(student, b)
        expected = plackett_luce_distillation(student(b["x"]), teacher.eval()(b["x"]), b["labels"])
        torch.testing.assert_close(values, expected)
    assert values[2] == 0
    assert not teacher.training


def test_token_classifiers_are_averaged_over_their_unmasked_tokens() -> None:
    student, teacher = Network().eval(), Network(seed=1)
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100], [-100, 2, -100]])
    values = Distillation(teacher)(student, {"x": x, "labels": labels})
    tokens = distillation_kl(student(x), teacher(x), labels)
    torch.testing.assert_close(values, torch.stack([tokens[0, :2].mean(), tokens[1, 1]]))


def test_training_is_the_same_in_every_layout_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    finals = []
    for size, accumulation in ((6, 1), (2, 3)):
        student, teacher = llama(8), llama(16, seed=1)
        before = copy.deepcopy(teacher.state_dict())
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
        )
        objective = Distillation(teacher, "jensen_shannon", label_weight=0.5)
        trainer = Trainer(
            student, arguments, objective=objective, train_dataset=corpus(), data_collator=PaddedCollator(0)
        )
        trainer.train()
        finals.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
        assert trainer.state.total_flos > 0
    assert finals[0] == pytest.approx(finals[1], abs=1e-9)
    assert finals[0][-1] < finals[0][0]


def test_the_teachers_passes_are_counted() -> None:
    b = PaddedCollator(0)(corpus())
    teacher = llama(16, seed=1)
    products = sum(p.numel() for n, p in teacher.named_parameters() if p.ndim > 1 and "embed" not in n)
    assert Distillation(teacher).extra_flops(b) == 2 * products * b["input_ids"].numel()


class Vocabulary:
    def __init__(self, **tokens: int):
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def test_wrong_input_is_one_sentence() -> None:
    b = PaddedCollator(0)(corpus())
    with pytest.raises(ValueError, match="vocabulary has 50 tokens and the teacher's 60"):
        Distillation(llama(16, 60))(llama(8), b)
    student = llama(8)
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        Distillation(student)(student, b)
    with pytest.raises(ValueError, match="got 4 and 5"):
        Distillation(Network(5))(Network(4), batch())
    with pytest.raises(ValueError, match=r"different tokenizers.*'b' is 1 for the student and 2 for the teacher"):
        Distillation(llama(16), tokenizer=Vocabulary(a=0, b=1), teacher_tokenizer=Vocabulary(a=0, b=2))
    with pytest.raises(ValueError, match="set gamma=0"):
        Distillation(llama(16, seed=1), "dist")(llama(8), b)
    with pytest.raises(ValueError, match="label_weight must be a finite number >= 0, got -1"):
        Distillation(llama(16), label_weight=-1)
    with pytest.raises(ValueError, match=r"has no option 'temprature'.*temperature"):
        Distillation(llama(16), "distillation_kl(temprature=2)")
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        Distillation(llama(16), "distillation_kl(temperature=0)")
