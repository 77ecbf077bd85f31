"""Sums of small changes: exact in the long run, and the same after they have been saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lossmith.heads.summed import Summed


def start(size: int = 5) -> torch.Tensor:
    return torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [False, True])
def test_ten_thousand_small_changes_keep_the_digits_that_float32_loses(symmetric: bool) -> None:
    """Changes a millionth of the size, all of one sign: plain float32 is wrong in the third digit of their sum."""
    generator = torch.Generator().manual_seed(1)
    total = Summed(start(), torch.float32, symmetric=symmetric)
    exact, plain = start(), start().float()
    for number in range(10_000):
        change = 1e-6 * torch.rand(5, 5, generator=generator)
        total.recent.add_(change)
        exact += change
        plain += change
        if number % 64 == 0:
            total.settle()
            assert not total.recent.any()
    grown = exact - start()
    wanted = start() + grown + grown.T if symmetric else exact
    torch.testing.assert_close(total.value, wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(total.narrow(), wanted.float(), rtol=1e-6, atol=1e-6)
    assert (plain.double() - exact).abs().max() > 1e-6


def test_every_way_to_change_it_reaches_what_is_read() -> None:
    total = Summed(start(), torch.float32)
    total.narrow()
    total.recent[-1] += 1
    total.set(torch.zeros(2, 5, dtype=torch.float64), slice(2))
    assert not total.narrow()[:2].any()
    assert torch.equal(total.value[-1], start()[-1] + 1)
    assert torch.equal(total.narrow()[2:4], start()[2:4].float())
    total.scale(0.5)
    torch.testing.assert_close(total.narrow(), total.value.float())
    assert torch.equal(total.value[-1], (start()[-1] + 1) / 2)


def test_saved_and_copied_with_its_latest_changes(tmp_path: Path) -> None:
    total = Summed(start(), torch.float32)
    total.recent.add_(0.25)
    save_file(total.state_dict(), tmp_path / "sum.safetensors")
    again = Summed(torch.zeros(5, 5, dtype=torch.float64), torch.float32)
    again.narrow()
    again.load_state_dict(load_file(tmp_path / "sum.safetensors"))
    assert torch.equal(again.exact, total.exact)
    assert torch.equal(again.narrow(), total.narrow())
    assert torch.equal(copy.deepcopy(total).narrow(), total.narrow())


@pytest.mark.parametrize(("convert", "kept"), [("half", True), ("bfloat16", True), ("float", True), ("double", False)])
def test_no_conversion_costs_digits(convert: str, kept: bool) -> None:
    total = Summed(start(), torch.float32)
    total.recent.add_(1 / 3)
    before = total.value
    getattr(total, convert)()
    assert total.exact.dtype == torch.float64
    assert total.recent.dtype == (torch.float32 if kept else torch.float64)
    assert torch.equal(total.value, before)
