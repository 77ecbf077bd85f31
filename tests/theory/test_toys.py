"""Trained toys of superposition: gradients, independence of the grid, the two regimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lossmith.theory import (
    SignedDecayAdamW,
    Toys,
    ToyTraining,
    feature_frequencies,
    toy_loss,
    train_toys,
    truncation_loss,
)
from lossmith.theory.toy_steps import Batch, Stream, loss_and_gradients, side_by_side

SHORT = ToyTraining(steps=30, batch_size=16, averaged=5)


def dense(batch: Batch, rows: int, features: int) -> torch.Tensor:
    x = torch.zeros(rows, features, dtype=batch.values.dtype)
    x[batch.rows, batch.vectors] = batch.values
    return x


def test_written_out_gradients_are_those_of_autograd_for_every_run() -> None:
    torch.manual_seed(0)
    runs, rows, features, width = 3, 16, 9, 4
    streams = [Stream(feature_frequencies("power", features, active=2.0), seed, SHORT) for seed in range(runs)]
    parts = [next(stream.batches("cpu", torch.float64)) for stream in streams]
    weight = torch.randn(runs, features, width, dtype=torch.float64, requires_grad=True)
    bias = (0.3 * torch.randn(runs, features, dtype=torch.float64)).requires_grad_()
    x = torch.stack([dense(part, rows, features) for part in parts])
    expected = toy_loss(x, weight, bias).mean(-1)
    by_weight, by_bias = torch.autograd.grad(expected.sum(), (weight, bias))
    for block in (1, 2, 3):
        for here, batch in side_by_side(parts, rows, features, block):
            found = loss_and_gradients(weight[here].detach(), bias[here].detach(), batch, rows)
            for a, b in zip(found, (expected[here], by_weight[here], by_bias[here]), strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-13)


def test_a_step_without_any_active_feature_has_no_error_but_that_of_the_bias() -> None:
    empty = Batch(*(torch.zeros(0, dtype=torch.long) for _ in range(3)), torch.zeros(0))
    weight, bias = torch.randn(1, 5, 2), torch.tensor([[0.5, -1.0, 0.0, 2.0, -0.1]])
    loss, by_weight, by_bias = loss_and_gradients(weight, bias, empty, 4)
    assert loss.item() == pytest.approx(0.5**2 + 2.0**2)
    assert by_weight.count_nonzero() == 0
    torch.testing.assert_close(by_bias, torch.tensor([[1.0, 0.0, 0.0, 4.0, 0.0]]))


def test_training_is_that_of_the_obvious_loop() -> None:
    """Dense examples, autograd, one toy at a time: the same losses and weights in float64."""
    p, width, decay = feature_frequencies("power", 12), 5, -0.7
    toys = train_toys(p, [3, width], weight_decays=(0.5, decay), seeds=(0, 4), training=SHORT, dtype=torch.float64)
    from lossmith.theory.toy_steps import _start

    weight, bias = (torch.nn.Parameter(part) for part in _start(12, width, 4))
    optimizer = SignedDecayAdamW([{"params": [weight], "weight_decay": decay}, {"params": [bias]}])
    losses = []
    for step, batch in zip(range(SHORT.steps), Stream(p, 4, SHORT).batches("cpu", torch.float64), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = SHORT.learning_rate * SHORT.schedule(step)
        loss = toy_loss(dense(batch, SHORT.batch_size, 12), weight, bias).mean()
        optimizer.zero_grad()
        (loss / 12).backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(toys.curves[1, 1, 1], torch.tensor(losses), rtol=1e-6, atol=0)
    assert toys.losses[1, 1, 1].item() == pytest.approx(sum(losses[-5:]) / 5, rel=1e-12)
    torch.testing.assert_close(toys.weights[1][1, 1], weight.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(toys.biases[1][1, 1], bias.detach(), rtol=0, atol=1e-11)


def test_a_toy_does_not_depend_on_the_rest_of_the_grid() -> None:
    tables = torch.stack([feature_frequencies("power", 30), feature_frequencies("linear", 30)])
    grid = train_toys(tables, [2, 5, 8], weight_decays=(-1.0, 0.0, 1.0), seeds=(0, 1, 2), training=SHORT)
    alone = train_toys(tables[1], [5], weight_decays=(-1.0,), seeds=(2,), training=SHORT)
    # Sums over a batch of runs may be ordered otherwise.
    torch.testing.assert_close(grid[1].curves[0, 2, 1], alone.curves[0, 0, 0], rtol=1e-4, atol=1e-5)
    again = train_toys(tables[1], [5], weight_decays=(-1.0,), seeds=(2,), training=SHORT)
    assert torch.equal(alone.weights[0], again.weights[0])
    assert grid.losses.shape == (2, 3, 3, 3)


def test_the_schedule_warms_up_and_ends_at_the_floor() -> None:
    training = ToyTraining(steps=100, warmup=0.1)
    rates = [training.schedule(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.05 + 0.95 * 0.5)
    assert 0.05 < rates[-1] < 0.052
    assert ToyTraining.large().rates(128) == pytest.approx((0.02 * (8 / 128) ** 0.25, 2 / 128))


@pytest.fixture(scope="module")
def trained() -> Toys:
    training = ToyTraining(steps=1200, batch_size=128, averaged=60)
    return train_toys(
        feature_frequencies("power", 100), [5, 10, 20], weight_decays=(-1.0, 1.0), seeds=(0, 1), training=training
    )


def test_growing_norms_make_for_superposition_and_a_lower_loss(trained: Toys) -> None:
    """The sign of the decay, end to end: an inverted sign or a decay of the bias would not pass."""
    shares, across = trained.represented(), torch.tensor(trained.widths)
    assert (shares[0] > 0.95).all()
    assert (shares[1] < 0.35).all()
    assert (trained.losses[0, :, 1:] < trained.losses[1, :, 1:]).all()
    overlaps = (trained.overlaps() * across)[0]
    assert (overlaps >= 0.999 * (100 - across) / 99).all()
    assert (overlaps < 1.7).all()
    exponents = trained.slopes().exponent.mean(-1)
    assert 0.8 < exponents[0] < 1.5
    assert exponents[1] < 0.6
    # Better than as many features as there are dimensions, stored perfectly: that is the point of superposition.
    assert trained.losses[0, :, -1].mean() < truncation_loss(trained.probabilities, 20, bias="optimal")


def test_results_are_summarised_fitted_and_drawn(trained: Toys, tmp_path: Path) -> None:
    text = trained.summary()
    assert "100 features, widths 5, 10, 20; 2 seeds" in text
    assert "weight decay -1: exponent " in text
    fitted = trained.fit(-1.0, bootstrap=40)
    # Ordinary least squares over all seeds: the mean of the seeds' slopes, since they share their widths.
    assert fitted.parameters["alpha"] == pytest.approx(trained.slopes().exponent[0].mean().item(), rel=1e-8)
    low, high = fitted.parameter_intervals()["alpha"]
    assert low <= fitted.parameters["alpha"] <= high
    trained.plot(tmp_path / "toys.png")
    assert (tmp_path / "toys.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"must be one of -1, 1, got 0\.5"):
        trained.table(0.5)


def test_one_width_is_summarised_without_a_slope(tmp_path: Path) -> None:
    toys = train_toys(feature_frequencies("power", 10), [3], training=SHORT)
    assert "exponent" not in toys.summary()
    assert "represented" in toys.summary()
    toys.plot(tmp_path / "one.png")
    with pytest.raises(ValueError, match="at least 3 different widths"):
        toys.slopes()


def test_wrong_input_is_named() -> None:
    p = feature_frequencies("power", 10)
    for problem, message in (
        ({"widths": [10]}, "between 1 and 9, below the 10 features; got 10"),
        ({"widths": []}, "widths must be different and at least one"),
        ({"widths": [2], "seeds": (1, 1)}, "seeds must be different"),
        ({"widths": [2], "weight_decays": (float("nan"),)}, "weight_decays must be finite"),
        ({"widths": [2], "dtype": torch.float16}, "float32 or float64"),
    ):
        with pytest.raises(ValueError, match=message):
            train_toys(p, training=SHORT, **problem)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="averaged must be at most the 10 steps"):
        ToyTraining(steps=10)
    with pytest.raises(ValueError, match="warmup must lie in"):
        ToyTraining(warmup=2.0)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        ToyTraining(learning_rate=0.0)
    with pytest.raises(ValueError, match="choose one"):
        train_toys(torch.stack([p, p]), [2, 3, 4], training=SHORT).summary()
    with pytest.raises(ValueError, match="not finite at step"):
        train_toys(p, [2], training=ToyTraining(steps=30, batch_size=16, averaged=5, learning_rate=1e30))


@pytest.mark.slow
@pytest.mark.parametrize("alpha, weak_limit", [(0.0, 0.35), (1.0, 0.35)])
def test_the_digests_small_sweep_has_both_regimes(alpha: float, weak_limit: float) -> None:
    """200 features, 2,000 steps: strong exponents within 0.9 to 1.5, all features represented; weak ones lower."""
    training = ToyTraining(steps=2000, batch_size=256, averaged=40)
    widths = [6, 10, 16, 26, 40]
    toys = train_toys(
        feature_frequencies("power", 200, exponent=alpha), widths, weight_decays=(-1.0, 1.0), training=training
    )
    strong, weak = toys.slopes().exponent[:, 0].tolist()
    assert 0.9 < strong < 1.5
    assert weak < weak_limit
    assert (toys.represented()[0] > 0.95).all()
    overlaps = toys.overlaps()[0, 0] * torch.tensor(widths)
    assert (overlaps > 0.999 * (200 - torch.tensor(widths)) / 199).all()
    assert (overlaps < 1.7).all()
    assert (toys.losses[0, 0, 1:] < toys.losses[1, 0, 1:]).all()
