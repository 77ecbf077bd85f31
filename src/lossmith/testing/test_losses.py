"""What every loss over logits and class indices must do."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from lossmith.registry import LOSSES

CLASSES = 7
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

every_loss = pytest.mark.parametrize("name", LOSSES.names())


def inputs(*batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*batch, CLASSES, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(CLASSES, batch, generator=generator)


@every_loss
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0, 3), (1,)])
def test_gives_one_finite_value_per_example(name: str, batch: tuple[int, ...]) -> None:
    """Shapes, among them an empty batch."""
    logits, targets = inputs(*batch)
    loss = LOSSES.get(name)(logits, targets)
    assert loss.shape == batch
    assert torch.isfinite(loss).all()


@every_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The result is that of the same numbers in float64, to the accumulation's precision."""
    logits, targets = inputs(64, dtype=dtype)
    loss = LOSSES.get(name)(logits, targets)
    exact = LOSSES.get(name)(logits.double(), targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_takes_any_integer_targets(name: str, dtype: torch.dtype) -> None:
    """Class indices in other integer types mean the same."""
    logits, targets = inputs(6)
    assert torch.equal(LOSSES.get(name)(logits, targets.to(dtype)), LOSSES.get(name)(logits, targets))


@every_loss
def test_ignored_examples_are_exact_zeros_in_value_and_gradient(name: str) -> None:
    """Even when their logits are NaN or infinite."""
    logits, targets = inputs(6)
    logits[1], logits[4] = float("nan"), float("inf")
    targets[1] = targets[4] = -100
    logits.requires_grad_()
    loss = LOSSES.get(name)(logits, targets)
    assert loss[1] == 0
    assert loss[4] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(gradient[[1, 4]], torch.zeros(2, CLASSES, dtype=torch.float64))
    assert torch.isfinite(gradient).all()
    keep = [0, 2, 3, 5]
    torch.testing.assert_close(loss[keep], LOSSES.get(name)(logits[keep], targets[keep]), rtol=1e-14, atol=1e-14)


@every_loss
def test_a_batch_that_is_all_ignored_is_zero(name: str) -> None:
    """Value and gradient."""
    logits, _ = inputs(3)
    logits.requires_grad_()
    loss = LOSSES.get(name)(logits, torch.full((3,), -100))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not loss.any()
    assert not gradient.any()


@every_loss
def test_another_ignore_index_is_respected(name: str) -> None:
    """Convention: keyword ``ignore_index``."""
    logits, targets = inputs(4)
    targets[2] = 1
    assert LOSSES.get(name)(logits, targets, ignore_index=1)[2] == 0


@every_loss
def test_strides_do_not_matter(name: str) -> None:
    """Transposed, expanded and sliced inputs."""
    logits, targets = inputs(4, 6)
    loss = LOSSES.get(name)
    wide = torch.stack([logits, logits + 1], dim=-1)
    assert torch.equal(loss(wide[..., 0], targets), loss(logits, targets))
    assert torch.equal(loss(logits.transpose(0, 1), targets.T), loss(logits, targets).T)
    assert torch.equal(
        loss(logits[:, :1].expand(4, 3, CLASSES), targets[:, :3]),
        loss(logits[:, :1].repeat(1, 3, 1), targets[:, :3]),
    )


@every_loss
def test_examples_do_not_influence_each_other(name: str) -> None:
    """The gradient of one example's loss is zero in all the others' logits."""
    logits, targets = inputs(5)
    jacobian = torch.autograd.functional.jacobian(lambda x: LOSSES.get(name)(x, targets), logits)
    off = jacobian[~torch.eye(5, dtype=torch.bool)]
    assert not off.any()


@every_loss
def test_first_and_second_derivatives_are_those_of_the_value(name: str) -> None:
    """Against finite differences in float64."""
    logits, targets = inputs(4)
    targets[1] = -100
    logits.requires_grad_()
    loss = functools.partial(LOSSES.get(name), targets=targets)
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(name: str, size: float, dtype: torch.dtype) -> None:
    """Logits of ±1e4 on the target, and on another class."""
    logits = torch.zeros(2, CLASSES, dtype=dtype)
    logits[0, 2] = logits[1, 3] = size
    logits.requires_grad_()
    loss = LOSSES.get(name)(logits, torch.tensor([2, 2]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@every_loss
def test_a_class_at_minus_infinity_is_ruled_out(name: str) -> None:
    """Loss and gradient are those of the other classes; infinite where a target is ruled out (unless ``bounded``)."""
    logits, targets = inputs(3)
    targets[:] = torch.tensor([0, 1, 2])
    cut = logits.clone()
    cut[:, 5] = -float("inf")
    cut.requires_grad_()
    loss = LOSSES.get(name)(cut, targets)
    keep = [0, 1, 2, 3, 4, 6]
    torch.testing.assert_close(loss, LOSSES.get(name)(logits[:, keep], targets), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), cut)
    assert not gradient[:, 5].any()
    assert torch.isfinite(gradient).all()
    cut = cut.detach()
    cut[0, 0] = -float("inf")
    ruled_out = LOSSES.get(name)(cut, targets)[0]
    if getattr(LOSSES.get(name), "bounded", False):
        assert torch.isfinite(ruled_out)
    else:
        assert ruled_out == float("inf")


@every_loss
def test_vmap_gives_the_same_values_and_gradients(name: str) -> None:
    """Over a leading dimension, with ``torch.func.grad`` inside."""
    logits, targets = inputs(3, 4)
    loss = LOSSES.get(name)
    torch.testing.assert_close(torch.vmap(loss)(logits, targets), loss(logits, targets), rtol=1e-13, atol=1e-13)
    gradients = torch.vmap(torch.func.grad(lambda x, t: loss(x, t).sum()))(logits, targets)
    leaf = logits.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf, targets).sum(), leaf)
    torch.testing.assert_close(gradients, plain, rtol=1e-12, atol=1e-12)


@every_loss
def test_compile_gives_the_same_values_and_gradients(name: str) -> None:
    """Traced whole (``fullgraph``) by ``torch.compile``, with the ``aot_eager`` backend: no compiler needed."""
    logits, targets = inputs(5)
    targets[2] = -100
    compiled = torch.compile(LOSSES.get(name), backend="aot_eager", fullgraph=True)
    results = []
    for function in (LOSSES.get(name), compiled):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@every_loss
def test_wrong_inputs_are_refused_in_one_sentence(name: str) -> None:
    """Shapes and dtypes, named."""
    logits, targets = inputs(4)
    loss = LOSSES.get(name)
    with pytest.raises(ValueError, match=r"targets must have the shape"):
        loss(logits, targets[:3])
    with pytest.raises(TypeError, match=r"targets must be integer"):
        loss(logits, targets.double())
    with pytest.raises(TypeError, match=r"logits must be floating point"):
        loss(logits.long(), targets)
    with pytest.raises(ValueError, match=r"at least one class"):
        loss(logits[:, :0], targets)


@every_loss
def test_the_docstring_has_a_formula_and_an_example(name: str) -> None:
    """What a reader needs."""
    text = LOSSES.get(name).__doc__ or ""
    assert ".. math::" in text
    assert ">>>" in text
