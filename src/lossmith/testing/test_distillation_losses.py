"""What every loss between a student and a teacher must do."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from lossmith.registry import DISTILLATION_LOSSES

CLASSES = 6

every_loss = pytest.mark.parametrize("name", DISTILLATION_LOSSES.names())
# The part of DIST that correlates over the batch relates examples by its definition.
ALONE = {"dist": {"gamma": 0.0}}


def inputs(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Random student and teacher logits and targets."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(*batch, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(CLASSES, batch, generator=generator)


def loss(name: str) -> functools.partial[Tensor]:
    """The loss with options under which each example stands alone."""
    return functools.partial(DISTILLATION_LOSSES.get(name), **ALONE.get(name, {}))


@every_loss
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0, 3), (1,)])
def test_gives_one_finite_value_per_example(name: str, batch: tuple[int, ...]) -> None:
    """Shapes, among them an empty batch."""
    values = loss(name)(*inputs(*batch))
    assert values.shape == batch
    assert torch.isfinite(values).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The result is that of the same numbers in float64, to the accumulation's precision."""
    student, teacher, targets = inputs(32, dtype=dtype)
    values = loss(name)(student, teacher, targets)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = loss(name)(student.double(), teacher.double(), targets)
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-5)


@every_loss
def test_ignored_examples_are_exact_zeros_in_value_and_gradient(name: str) -> None:
    """Even when their logits are NaN or infinite, and with the parts that relate examples."""
    student, teacher, targets = inputs(5)
    student[1], teacher[1], student[3], targets[1], targets[3] = float("nan"), float("nan"), float("inf"), -100, -100
    student.requires_grad_()
    whole = DISTILLATION_LOSSES.get(name)
    values = whole(student, teacher, targets)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values[1] == values[3] == 0
    assert not gradient[[1, 3]].any()
    assert torch.isfinite(gradient).all()
    keep = [0, 2, 4]
    torch.testing.assert_close(values[keep], whole(student[keep], teacher[keep], targets[keep]))


@every_loss
def test_shifting_either_side_changes_nothing(name: str) -> None:
    """All compare distributions or orders of classes, not levels of logits, unless the loss says otherwise."""
    if name.startswith("binary"):
        pytest.skip("compares levels of logits, by its definition")
    student, teacher, targets = inputs(5)
    torch.testing.assert_close(
        loss(name)(student + 3, teacher - 2, targets), loss(name)(student, teacher, targets), rtol=1e-10, atol=1e-12
    )


@every_loss
def test_the_order_of_classes_does_not_matter(name: str) -> None:
    """Permuting both logits and the targets together."""
    student, teacher, targets = inputs(5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        loss(name)(student[:, order], teacher[:, order], order.argsort()[targets]),
        loss(name)(student, teacher, targets),
    )


@every_loss
def test_first_and_second_derivatives_are_those_of_the_value(name: str) -> None:
    """Against finite differences in float64."""
    student, teacher, targets = inputs(3)
    targets[1] = -100
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(name)(s, teacher, targets), student)
    assert torch.autograd.gradgradcheck(lambda s: loss(name)(s, teacher, targets), student)


@every_loss
def test_the_teacher_gets_no_gradient(name: str) -> None:
    """Not even where it asks for one."""
    student, teacher, targets = inputs(3)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(name)(student, teacher, targets).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@every_loss
def test_works_under_vmap(name: str) -> None:
    """Over a leading dimension."""
    student, teacher, targets = inputs(4, 3)
    mapped = torch.func.vmap(loss(name))(student, teacher, targets)
    torch.testing.assert_close(mapped, loss(name)(student, teacher, targets))


@every_loss
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_extreme_logits_stay_finite(name: str, size: float) -> None:
    """Values and gradients in float32."""
    student, teacher, targets = inputs(8, dtype=torch.float32)
    student = (size * student).requires_grad_()
    values = loss(name)(student, size * teacher, targets)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()


@every_loss
def test_classes_that_the_teacher_rules_out_leave_gradients_finite(name: str) -> None:
    """A teacher's logit of ``-inf`` for a class that the student rules out as well."""
    if name.startswith("binary"):
        pytest.skip("a logit of -inf has no finite difference to another")
    student, teacher, targets = inputs(4)
    student[:, 2] = teacher[:, 2] = -torch.inf
    targets[targets == 2] = 0
    student.requires_grad_()
    values = loss(name)(student, teacher, targets)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()


@every_loss
def test_wrong_input_is_named(name: str) -> None:
    """Class counts, shapes, targets and temperature."""
    student, teacher, targets = inputs(4)
    with pytest.raises(ValueError, match=r"same classes, got 6 and 5"):
        loss(name)(student, teacher[:, :5], targets)
    with pytest.raises(ValueError, match=r"teacher_logits must have the shape \(4, 6\), got \(3, 6\)"):
        loss(name)(student, teacher[:3], targets)
    with pytest.raises(ValueError, match=r"targets must have the shape \(4,\), got \(3,\)"):
        loss(name)(student, teacher, targets[:3])
    with pytest.raises(TypeError, match="hard"):
        loss(name)(student, teacher, teacher.softmax(-1))
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        loss(name)(student, teacher, targets, temperature=0)
