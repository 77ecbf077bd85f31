"""Names with options."""

from __future__ import annotations

import math

import pytest
import torch

from lossmith.errors import InputError
from lossmith.registry import LOSSES, WEIGHTINGS, Spec, parse_assignments, parse_spec, parse_value


def test_a_spec_is_read_back_from_its_text() -> None:
    for text in (
        "uniform",
        "linupper(r=0.5)",
        "linupper(r=warmup(0.4, steps=10), variant='released')",
        "f(x=-1.5, y=[1, 2])",
    ):
        assert str(parse_spec(text)) == text
        assert parse_spec(str(parse_spec(text))) == parse_spec(text)


def test_values_are_literals_words_paths_or_specs() -> None:
    assert parse_value("1e-3") == 1e-3
    assert parse_value("true") is True
    assert parse_value("cosine") == "cosine"
    assert parse_value("path/to/model-1.5") == "path/to/model-1.5"
    assert math.isinf(parse_value("inf"))
    assert parse_value("linupper(r=1)") == Spec("linupper", (), {"r": 1})


def test_assignments_split_at_commas_outside_brackets() -> None:
    assert parse_assignments("loss=focal_loss(gamma=1.0, ignore_index=-1), learning_rate=1e-3") == {
        "loss": Spec("focal_loss", (), {"gamma": 1.0, "ignore_index": -1}),
        "learning_rate": 1e-3,
    }


@pytest.mark.parametrize("text", ["linupper(r=", "1+1", "a b", "", "f(**x)", "import os", "f(x=__import__('os'))(1)"])
def test_what_is_not_a_spec_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_spec(text)


@pytest.mark.parametrize("text", ["weighting", "weighting=", "=1", "a=1, a=2", "a b=1"])
def test_what_is_not_an_assignment_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_assignments(text)


def test_unknown_names_and_options_name_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown weighting 'linuper': did you mean 'linupper'"):
        WEIGHTINGS.build("linuper")
    with pytest.raises(InputError, match="weighting 'linupper' has no option 'rr': did you mean 'r'"):
        WEIGHTINGS.build("linupper(rr=1)")
    with pytest.raises(InputError, match="loss 'focal_loss' has no option 'gama': did you mean 'gamma'"):
        LOSSES.bind("focal_loss(gama=1)")
    with pytest.raises(InputError, match=r"weighting 'linupper\(r=-1\)': r must be > 0, got -1"):
        WEIGHTINGS.build("linupper(r=-1)")
    with pytest.raises(InputError, match="r must be > 0"):
        WEIGHTINGS.build("linupper(r=warmup(-1))")


def test_schedules_nest_and_positions_bind() -> None:
    weighting = WEIGHTINGS.build("linupper(warmup(0.4, steps=3))")
    assert [weighting.temperature(s) for s in (2, 3)] == [100.0, 0.4]


def test_ones_own_loss_is_found_by_name() -> None:
    def hinge(logits: torch.Tensor, targets: torch.Tensor, *, margin: float = 1.0) -> torch.Tensor:
        return margin - logits.gather(-1, targets[..., None])[..., 0]

    LOSSES.register("test_hinge", hinge)
    try:
        assert LOSSES.bind("test_hinge(margin=2.0)")(torch.zeros(1, 2), torch.tensor([1])).item() == 2.0
        with pytest.raises(ValueError, match="registered already"):
            LOSSES.register("test_hinge", len)
    finally:
        LOSSES._own.clear()
