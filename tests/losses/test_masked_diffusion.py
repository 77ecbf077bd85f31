"""The masked-diffusion loss: its values, gradients, and that it is a bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lossmith.losses import masked_diffusion_loss


def test_it_is_the_sum_of_masked_losses_over_probability_and_length() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]], dtype=torch.float64)
    masked = torch.tensor([[True, False, True], [False, False, False]])
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert masked_diffusion_loss(losses, masked, t).tolist() == [pytest.approx(5 / 1.5), 0.0]
    counted = torch.tensor([[True, True, False], [True, True, True]])
    assert masked_diffusion_loss(losses, masked, t, counted=counted).tolist() == [1 / 1.0, 0.0]


def test_what_is_not_masked_has_no_influence_nan_neither() -> None:
    losses = torch.tensor([[math.nan, 2.0], [math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[False, True], [False, True]])
    value = masked_diffusion_loss(losses, masked, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert value.tolist() == [1.0, 1.0]
    (gradient,) = torch.autograd.grad(value.sum(), losses)
    assert gradient.tolist() == [[0.0, 0.5], [0.0, 1.0]]


def test_gradients_are_those_of_the_value() -> None:
    losses = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    t = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: masked_diffusion_loss(x, masked, t), losses)
    assert torch.autograd.gradgradcheck(lambda x: masked_diffusion_loss(x.square(), masked, t), losses)


def test_half_precision_is_added_up_in_float32_and_batches_may_be_empty() -> None:
    losses = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    value = masked_diffusion_loss(losses, torch.ones(1, 4096, dtype=torch.bool), torch.ones(1))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(losses[0, 0]), rel=1e-5)
    assert masked_diffusion_loss(torch.zeros(0, 3), torch.zeros(0, 3).bool(), torch.ones(0)).shape == (0,)
    assert masked_diffusion_loss(torch.zeros(2, 0), torch.zeros(2, 0).bool(), torch.ones(2)).tolist() == [0.0, 0.0]
    assert masked_diffusion_loss(torch.zeros(3), torch.ones(3).bool(), torch.tensor(0.5)).shape == ()
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    assert masked_diffusion_loss(torch.ones(1, 2), ~nobody, torch.ones(1), counted=nobody).tolist() == [0.0]


def test_it_works_under_vmap_and_compile() -> None:
    losses, masked, t = torch.rand(3, 2, 4), torch.rand(3, 2, 4) < 0.5, torch.rand(3, 2).clamp_min(0.1)
    plain = masked_diffusion_loss(losses, masked, t)
    torch.testing.assert_close(torch.vmap(masked_diffusion_loss)(losses, masked, t), plain)
    compiled = torch.compile(masked_diffusion_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(losses, masked, t), plain)


def test_its_mean_over_times_and_maskings_bounds_the_negative_log_likelihood() -> None:
    """Exactly, for two binary tokens whose true distribution the model knows: there the bound is reached."""
    joint = torch.tensor([[0.5, 0.1], [0.15, 0.25]], dtype=torch.float64)
    marginal = [joint.sum(1), joint.sum(0)]
    # Integral over t of w(t) P(masks | t): both masked t²/t, one alone t (1 - t)/t.
    both, alone = 0.5, 0.5
    expected = 0.0
    for a, b in itertools.product(range(2), range(2)):
        guessed = -(marginal[0][a].log() + marginal[1][b].log())
        told = -((joint[a, b] / marginal[1][b]).log() + (joint[a, b] / marginal[0][a]).log())
        expected += float(joint[a, b] * (both * guessed + alone * told)) / 2
    likelihood = float(-(joint * joint.log()).sum()) / 2
    assert expected == pytest.approx(likelihood, rel=1e-12)
    # The same by the function, on a grid of times with all maskings weighed by their probability.
    total = 0.0
    times = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    for t in times:
        for masks in itertools.product([True, False], repeat=2):
            weight = float(t) ** sum(masks) * (1 - float(t)) ** (2 - sum(masks))
            for a, b in itertools.product(range(2), range(2)):
                first = marginal[0][a] if masks[1] else joint[a, b] / marginal[1][b]
                second = marginal[1][b] if masks[0] else joint[a, b] / marginal[0][a]
                losses = -torch.stack([first, second]).log()
                value = masked_diffusion_loss(losses, torch.tensor(masks), t)
                total += weight * float(joint[a, b]) * float(value) / len(times)
    assert total == pytest.approx(likelihood, rel=1e-9)


@pytest.mark.parametrize("t", [0.0, 1.5, math.nan])
def test_a_probability_out_of_range_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\]"):
        masked_diffusion_loss(torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor([t]))


def test_wrong_shapes_and_types_are_refused() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        masked_diffusion_loss(good, good.bool(), torch.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        masked_diffusion_loss(good, good[:, :2].bool(), torch.ones(2))
    with pytest.raises(TypeError, match="masked bool"):
        masked_diffusion_loss(good, good, torch.ones(2))
    with pytest.raises(ValueError, match="counted must be bool"):
        masked_diffusion_loss(good, good.bool(), torch.ones(2), counted=good)
