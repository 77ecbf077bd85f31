"""Dual-head distillation and gradient alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lossmith.heads import attach_dual_head, dual_head
from lossmith.losses import binary_kl_norm, cross_entropy
from lossmith.training import Classification, DualHeadDistillation, GradientAlignedTrainer, Trainer, gradient_cosines
from lossmith.training.dual_head import align_gradients


def network(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, classes)).double()


class Opinion(nn.Module):
    """A teacher for the examples of :func:`batch` that speaks for their labels, or (negative) against them."""

    def __init__(self, strength: float):
        super().__init__()
        b = batch()
        self.register_buffer("known", b["input"])
        self.register_buffer("logits", strength * nn.functional.one_hot(b["labels"], 4).double())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.logits[torch.cdist(input, self.known).argmin(-1)]


def with_equal_heads() -> nn.Module:
    model = network(2)
    head = attach_dual_head(model)
    head.auxiliary.load_state_dict(head.main.state_dict())
    return model


def batch() -> dict[str, torch.Tensor]:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {"input": x, "labels": torch.tensor([0, 3, 1, 1, 2, 0])}


def test_each_loss_reaches_its_own_head_and_both_reach_the_backbone() -> None:
    student, teacher, b = network(), network(1), batch()
    head = attach_dual_head(student)
    labels_part, teachers_part = DualHeadDistillation(teacher, alpha=0.5).parts(student, b)
    features = student[1](student[0](b["input"]))
    torch.testing.assert_close(labels_part, cross_entropy(head.main(features), b["labels"]))
    torch.testing.assert_close(
        teachers_part, 0.5 * binary_kl_norm(head.auxiliary(features), teacher(b["input"]), temperature=2.0)
    )

    def reached(part: torch.Tensor) -> set[str]:
        names, parameters = zip(*student.named_parameters(), strict=True)
        gradients = torch.autograd.grad(part.sum(), parameters, retain_graph=True, allow_unused=True)
        return {n.rsplit(".", 1)[0] for n, g in zip(names, gradients, strict=True) if g is not None and g.any()}

    assert reached(labels_part) == {"0", "2.main"}
    assert reached(teachers_part) == {"0", "2.auxiliary"}


def train(model: nn.Module, objective: Any, folder: Path, cls: type = Trainer, **options: Any) -> list[torch.Tensor]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=options.pop("max_steps", 3),
        per_device_train_batch_size=options.pop("size", 6),
        gradient_accumulation_steps=options.pop("accumulation", 1),
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=options.pop("max_grad_norm", 0.0),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    b = batch()
    trainer = cls(
        model,
        arguments,
        objective=objective,
        train_dataset=range(6),
        data_collator=lambda rows: {k: v[rows] for k, v in b.items()},
        **options,
    )
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]


def test_without_the_teachers_part_training_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    plain, dual = network(), network()
    attach_dual_head(dual, "mlp")
    train(plain, Classification(), tmp_path)
    train(dual, DualHeadDistillation(network(1), alpha=0.0), tmp_path)
    head = dual_head(dual)
    for ours, theirs in zip([*dual[0].parameters(), *head.main.parameters()], plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_alignment_gives_the_digests_vectors() -> None:
    g0 = torch.tensor([1, 2, 0.5, 0], dtype=torch.float64)
    for g1, expected in (
        ([-2, 0.5, 0, 3], [-0.8095238095, 2.8809523810, 0.5952380952, 3]),
        ([2, 0.5, 0, 3], [3, 2.5, 0.5, 3]),
    ):
        opposing = torch.tensor(g1, dtype=torch.float64)
        total = g0 + opposing
        align_gradients([(total, g0, opposing)])
        assert total.tolist() == pytest.approx(expected, abs=1e-9)
        assert ((total - g0) * g0).sum() >= -1e-12


@pytest.mark.parametrize("scope", ["all", "shared"])
@pytest.mark.parametrize("layout", [(6, 1), (2, 3), (1, 6)], ids=str)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_one_aligned_step_equals_the_step_by_hand(
    scope: str, layout: tuple[int, int], max_grad_norm: float, tmp_path: Path
) -> None:
    """Whatever the micro-batches, and before clipping."""
    teacher, b = Opinion(-10), batch()
    model = with_equal_heads()
    parts = DualHeadDistillation(teacher, alpha=5.0).parts(model, b)
    names, parameters = zip(*model.named_parameters(), strict=True)
    g0, g1 = (
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(
                parameters,
                torch.autograd.grad(part.mean(), parameters, retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
        for part in parts
    )
    inside = [scope == "all" or not n.startswith("2.") for n in names]
    product = sum((a * c).sum() for a, c, i in zip(g0, g1, inside, strict=True) if i)
    norm = sum((a * a).sum() for a, i in zip(g0, inside, strict=True) if i)
    assert product < 0, "the example must have a conflict"
    gradient = [a + c - (product / norm) * a * i for a, c, i in zip(g0, g1, inside, strict=True)]
    if max_grad_norm:
        size = torch.sqrt(sum((g * g).sum() for g in gradient))
        gradient = [g * min(1, max_grad_norm / (size + 1e-6)) for g in gradient]
    expected = [p.detach() - 0.1 * g for p, g in zip(parameters, gradient, strict=True)]

    trained = train(
        with_equal_heads(),
        DualHeadDistillation(teacher, alpha=5.0),
        tmp_path,
        GradientAlignedTrainer,
        scope=scope,
        max_steps=1,
        size=layout[0],
        accumulation=layout[1],
        max_grad_norm=max_grad_norm,
    )
    for ours, theirs in zip(trained, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_alignment_without_conflict_is_the_plain_sum(tmp_path: Path) -> None:
    teacher, model, b = Opinion(10), with_equal_heads(), batch()
    parts = DualHeadDistillation(teacher, alpha=0.1).parts(model, b)
    backbone = list(model[0].parameters())
    g0, g1 = (torch.autograd.grad(p.mean(), backbone, retain_graph=True) for p in parts)
    assert sum((a * c).sum() for a, c in zip(g0, g1, strict=True)) > 0, "the example must have no conflict"
    objective = DualHeadDistillation(teacher, alpha=0.1)
    aligned = train(with_equal_heads(), objective, tmp_path, GradientAlignedTrainer, max_steps=1)
    plain = train(with_equal_heads(), objective, tmp_path, max_steps=1)
    for a, c in zip(aligned, plain, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_cosines_are_those_of_the_two_gradients() -> None:
    model, b = network(), batch()
    objective = DualHeadDistillation(network(1), heads="single")
    found = gradient_cosines(model, objective, b, head=model[2])
    parts = objective.parts(model, b)
    a, c = (torch.autograd.grad(p.mean(), model[2].weight, retain_graph=True)[0].flatten() for p in parts)
    assert found.head == pytest.approx(torch.cosine_similarity(a, c, dim=0).item())
    assert -1 <= found.backbone <= 1


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no dual head"):
        DualHeadDistillation(network(1))(network(), batch())
    student = network()
    attach_dual_head(student)
    with pytest.raises(ValueError, match="training mode only"):
        DualHeadDistillation(network(1))(student.eval(), batch())
    with pytest.raises(ValueError, match="heads must be dual or single"):
        DualHeadDistillation(network(1), heads="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs an objective with two parts"):
        train(network(), Classification(), tmp_path, GradientAlignedTrainer)
    student = network()
    attach_dual_head(student)
    student[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the backbone is frozen"):
        train(student, DualHeadDistillation(network(1)), tmp_path, GradientAlignedTrainer, scope="shared")
