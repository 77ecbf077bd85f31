"""Streamed distillation equals the plain computation on full logits."""

from __future__ import annotations

import pytest
import torch

from lossmith.heads import linear_distillation_loss
from lossmith.registry import DISTILLATION_LOSSES

OPTIONS = {"dist": {"gamma": 0.0, "temperature": 2.0}, "plackett_luce_distillation": {"top_k": 3}}


def parts(rows: int = 13, classes: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(classes, (rows,), generator=generator)
    targets[[2, 7]] = -100
    return {
        "hidden": normal(rows, 5),
        "weight": normal(classes, 5),
        "bias": normal(classes),
        "teacher_hidden": normal(rows, 8),
        "teacher_weight": normal(classes, 8),
        "teacher_bias": normal(classes),
        "targets": targets,
        "upstream": normal(rows),
    }


@pytest.mark.parametrize("name", DISTILLATION_LOSSES.names())
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
@pytest.mark.parametrize("known", [False, True])
def test_values_and_gradients_equal_those_of_full_logits(name: str, chunk_size: int | None, known: bool) -> None:
    p = parts()
    leaves = [p[key].requires_grad_() for key in ("hidden", "weight", "bias")]
    loss, options = DISTILLATION_LOSSES.get(name), OPTIONS.get(name, {})
    student = p["hidden"] @ p["weight"].T + p["bias"]
    teacher = p["teacher_hidden"] @ p["teacher_weight"].T + p["teacher_bias"]
    plain = loss(student, teacher, p["targets"], **options)
    expected = torch.autograd.grad((plain * p["upstream"]).sum(), leaves)
    streamed = linear_distillation_loss(
        name,
        p["hidden"],
        p["weight"],
        p["teacher_hidden"],
        p["teacher_weight"],
        p["targets"],
        bias=p["bias"],
        teacher_bias=p["teacher_bias"],
        chunk_size=chunk_size,
        row_weights=p["upstream"] if known else None,
        **options,
    )
    torch.testing.assert_close(streamed, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((streamed * p["upstream"]).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert streamed[[2, 7]].tolist() == [0, 0]


def test_a_batch_of_any_shape_and_other_ignore_index_work() -> None:
    p = parts(12)
    shaped = {k: p[k].reshape(3, 4, -1) for k in ("hidden", "teacher_hidden")}
    targets = p["targets"].reshape(3, 4)
    weights = (p["weight"], p["teacher_weight"])
    values = linear_distillation_loss(
        "distillation_kl", shaped["hidden"], weights[0], shaped["teacher_hidden"], weights[1], targets
    )
    assert values.shape == (3, 4)
    moved = targets.masked_fill(targets == -100, 3)
    again = linear_distillation_loss(
        "distillation_kl", shaped["hidden"], weights[0], shaped["teacher_hidden"], weights[1], moved, ignore_index=3
    )
    assert torch.equal(again == 0, moved == 3)


def test_a_nan_in_a_skipped_row_does_no_harm() -> None:
    p = parts()
    p["hidden"][2] = p["teacher_hidden"][2] = float("nan")
    p["weight"].requires_grad_()
    values = linear_distillation_loss(
        "reverse_kl", p["hidden"], p["weight"], p["teacher_hidden"], p["teacher_weight"], p["targets"]
    )
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(p["weight"].grad).all()


def test_the_teacher_gets_no_gradient() -> None:
    p = parts()
    for key in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        p[key].requires_grad_()
    linear_distillation_loss(
        "distillation_kl", p["hidden"], p["weight"], p["teacher_hidden"], p["teacher_weight"], p["targets"]
    ).sum().backward()
    assert p["teacher_hidden"].grad is None
    assert p["teacher_weight"].grad is None


def test_wrong_input_is_named() -> None:
    p = parts()
    arguments = [p["hidden"], p["weight"], p["teacher_hidden"], p["teacher_weight"], p["targets"]]
    with pytest.raises(ValueError, match="same classes, got 11 and 10"):
        linear_distillation_loss("reverse_kl", *arguments[:3], arguments[3][:10], arguments[4])
    with pytest.raises(ValueError, match=r"teacher_hidden must begin with the batch shape of hidden, \(13,\)"):
        linear_distillation_loss("reverse_kl", *arguments[:2], arguments[2][:10], *arguments[3:])
    with pytest.raises(ValueError, match="set gamma=0"):
        linear_distillation_loss("dist", *arguments)
    with pytest.raises(ValueError, match=r"unknown distillation loss 'reverse_lk'.*reverse_kl"):
        linear_distillation_loss("reverse_lk", *arguments)
