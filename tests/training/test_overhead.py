"""What a training pays beside its steps."""

from __future__ import annotations

import gc

import pytest

from lossmith.training.overhead import garbage_frozen


def test_garbage_is_collected_again_after_a_training_that_fails() -> None:
    frozen = []

    def fail() -> None:
        with garbage_frozen():
            frozen.append(gc.get_freeze_count())
            raise RuntimeError("the training failed")

    with pytest.raises(RuntimeError, match="the training failed"):
        fail()
    assert frozen[0] > 0
    assert gc.get_freeze_count() == 0
