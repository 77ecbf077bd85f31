"""Faults of fits to loss curves: the check passes with our form and fails with the faulty one."""

from __future__ import annotations

import numpy as np

from lossmith.laws import areas, every_step, schedule

EVERY = 50
DECAY = 0.999


def test_annealing_summed_over_logged_rows_is_another_area() -> None:
    """The decay is per optimiser step: a log of every 50th step must be filled in first."""
    rates = schedule("wsd(peak=3e-4, decay=0.2, floor=3e-5)").values(10_000)
    logged = np.arange(EVERY, 10_001, EVERY)
    truth = areas(rates, DECAY)[1][logged - 1]
    ours = areas(every_step(logged, rates[logged - 1], 10_000), DECAY)[1][logged - 1]
    assert np.abs(ours / truth.max() - truth / truth.max()).max() < 0.02
    rows = areas(rates[logged - 1], DECAY)[1]
    for scaled in (rows, EVERY * rows):
        assert np.abs(scaled[-1] / truth[-1] - 1) > 0.3
