"""Sparse beside dense: memory that is known by arithmetic, times that are known by sleeping, intervals, words."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity.lost_layer import LOSTLinear
from lossmith.sparsity.magnitude import apply_masks, one_shot_masks
from lossmith.sparsity.measured import compare_with_dense, file_bytes


class Wait(nn.Linear):
    """A linear layer that takes its time."""

    def __init__(self, seconds: float):
        super().__init__(4, 4)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


def test_peak_memory_is_the_weights_and_the_tensors_that_live_at_once() -> None:
    """Of a chain at most two neighbours live, of a wide step its own width."""
    chain = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(5)])
    wide = nn.Sequential(nn.Linear(64, 640, bias=False), nn.ReLU(), nn.Linear(640, 64, bias=False))
    x = torch.randn(10, 64)
    found = compare_with_dense(chain, wide, x, repeats=1)
    weights, row = 5 * 64 * 64 * 4, 10 * 64 * 4
    assert found.dense.memory_bytes == weights + 2 * row
    assert found.sparse.memory_bytes == 2 * 64 * 640 * 4 + 2 * 10 * row
    assert found.dense.file_bytes == weights


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    found = compare_with_dense(model, model, torch.randn(1, 8), repeats=1)
    assert found.dense.file_bytes == 256
    assert found.dense.memory_bytes == 256 + 2 * 32
    assert found.verdict.startswith("as large on disk, as large in memory")


@pytest.mark.parametrize(("seconds", "word"), [(0.002, "faster"), (0.03, "slower")])
def test_time_is_a_ratio_of_passes_in_turn(seconds: float, word: str) -> None:
    found = compare_with_dense(Wait(0.01), Wait(seconds), torch.randn(1, 4), repeats=5)
    assert found.time_ratio == pytest.approx(seconds / 0.01, rel=0.4)
    assert word in found.verdict
    assert "loss" not in found.summary()


def test_unstructured_zeros_are_as_large_and_not_faster_and_the_line_says_so() -> None:
    torch.manual_seed(0)
    dense, pruned = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    pruned.load_state_dict(dense.state_dict())
    apply_masks(pruned, one_shot_masks(pruned, 0.5, targets="all"))
    x = torch.randn(200, 64)

    def evaluate(model: nn.Module) -> Any:
        return (model(x) - dense(x)).square().mean(1)

    found = compare_with_dense(dense, pruned, x, evaluate=evaluate, metric="error", name="half")
    assert "as large on disk, as large in memory" in found.verdict
    assert "error worse" in found.verdict
    assert found.summary().startswith("half against dense, here (cpu, ")
    assert "200 examples" in found.summary()
    assert found.quality is not None
    assert found.quality.dense == 0
    assert 0 < found.quality.low < found.quality.change < found.quality.high


def test_the_interval_is_of_the_weighted_paired_difference() -> None:
    """Against the normal approximation of a ratio of sums; nearly all of the noise is common to both models."""
    rng = np.random.default_rng(0)
    common, effect, weights = rng.normal(0, 10, 400), rng.normal(0.3, 1, 400), rng.uniform(1, 3, 400)
    given = iter([(common, weights), (common + effect, weights)])
    layer = nn.Linear(2, 2)
    found = compare_with_dense(layer, layer, torch.randn(1, 2), evaluate=lambda m: next(given), repeats=1)
    quality = found.quality
    assert quality is not None
    mean = np.average(effect, weights=weights)
    error = np.sqrt((np.square(weights * (effect - mean))).sum()) / weights.sum()
    assert quality.change == pytest.approx(mean, abs=1e-12)
    assert (quality.low, quality.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert "loss worse" in found.verdict


def test_directions_and_what_cannot_be_told() -> None:
    layer = nn.Linear(2, 2)

    def words(a: Any, b: Any, **options: Any) -> str:
        given = iter([a, b])
        return compare_with_dense(
            layer, layer, torch.randn(1, 2), evaluate=lambda m: next(given), repeats=1, metric="score", **options
        ).verdict

    low, high = np.zeros(5), np.ones(5)
    assert words(low, high).endswith("score worse")
    assert words(low, high, lower_is_better=False).endswith("score better")
    assert words(low, low).endswith("score not told apart")
    assert words(0.0, 1.0).endswith("score not told apart")
    assert words(low, np.full(5, np.nan)).endswith("score not told apart")
    with pytest.raises(ValueError, match=r"\(5,\) values for one model and \(4,\)"):
        words(low, high[:4])


def test_a_low_rank_layer_is_smaller_and_modes_come_back() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(256, 256, bias=False).train()
    layer = LOSTLinear.from_linear(dense, 0.125, 0.01).eval()
    found = compare_with_dense(dense, layer, lambda m: m(torch.ones(4, 256)))
    assert found.file_ratio == pytest.approx((2 * 256 * 32 + 2 * 256 + 4) / 256**2, rel=1e-3)
    assert found.memory_ratio < 0.35
    assert dense.training
    assert not layer.training


def test_files_are_counted_where_they_are_given(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    layer = nn.Linear(2, 2)
    found = compare_with_dense(layer, layer, torch.randn(1, 2), files=(2 * size, tmp_path), repeats=1)
    assert found.file_ratio == 0.5
    assert file_bytes(tmp_path / "model.safetensors") == size
    with pytest.raises(InputError, match=r"holds no \.safetensors"):
        file_bytes(tmp_path / "nowhere")


def test_wrong_input_is_named() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        compare_with_dense(layer, layer, torch.randn(1, 2), repeats=0)
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        compare_with_dense(layer, nn.Linear(2, 2, device="meta"), torch.randn(1, 2))
