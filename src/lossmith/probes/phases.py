"""Phases of training by the effective rank: warm-up, entropy-seeking, compression-seeking."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

WARMUP, ENTROPY, COMPRESSION, AGAIN = (
    "warmup",
    "entropy-seeking",
    "compression-seeking",
    "entropy-seeking (again)",
)


class Phase(NamedTuple):
    """A stretch of training.

    Attributes:
        name: of the phase.
        first, last: steps.
    """

    name: str
    first: float
    last: float


def label_phases(
    steps: Sequence[float], ranks: Sequence[float], *, rise: float = 0.2, drop: float = 0.05
) -> tuple[Phase, ...]:
    """Phases by a stated rule; the paper drew their borders by eye.

    Over the logarithm of the step, with the rank smoothed by a median of three: the peak is the largest rank after the
    first tenth of the range, the trough the least before it. Entropy-seeking, from trough to peak, is named only if the
    rank rises by more than ``rise``; warm-up is what comes before it, or all of a fall without a rise after it;
    compression-seeking, from the peak on, is named only if the rank falls by more than ``drop``; where it rises again
    by more than 10% above the trough after that, that is named, too. What is not named was not observed.

    Args:
        steps: rising; 0 counts as half the first step after it.
        ranks: at the steps.
        rise: relative, from trough to peak.
        drop: relative, from the peak.

    Raises:
        ValueError: fewer than 4 checkpoints, or steps that do not rise.

    >>> [p.name for p in label_phases([1, 10, 100, 1e3, 1e4, 1e5], [9, 3, 6, 20, 15, 12])]
    ['warmup', 'entropy-seeking', 'compression-seeking']
    """
    if len(steps) < 4 or len(steps) != len(ranks):
        raise ValueError(f"phases need at least 4 checkpoints with one rank each, got {len(steps)} and {len(ranks)}")
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)) or steps[0] < 0:
        raise ValueError("steps must rise")
    places = [math.log(step if step > 0 else steps[1] / 2) for step in steps]
    smooth = [statistics.median(ranks[max(0, i - 1) : i + 2]) for i in range(len(ranks))]
    # The ends have two neighbours only: they stay as they are.
    smooth[0], smooth[-1] = ranks[0], ranks[-1]
    late = [i for i, place in enumerate(places) if place >= places[0] + 0.1 * (places[-1] - places[0])]
    peak = max(late, key=lambda i: smooth[i])
    trough = min(range(peak + 1), key=lambda i: smooth[i])
    if smooth[peak] <= (1 + rise) * smooth[trough]:
        # Nothing rose: what fell is warm-up that has not ended, or none.
        lowest = min(range(len(smooth)), key=lambda i: smooth[i])
        fell = smooth[lowest] < (1 - drop) * smooth[0]
        return (Phase(WARMUP, steps[0], steps[lowest]),) if fell else ()
    found = []
    if trough:
        found.append(Phase(WARMUP, steps[0], steps[trough]))
    found.append(Phase(ENTROPY, steps[trough], steps[peak]))
    after = smooth[peak:]
    if min(after) < (1 - drop) * smooth[peak]:
        low = peak + after.index(min(after))
        again = any(rank > 1.1 * smooth[low] for rank in smooth[low:])
        found.append(Phase(COMPRESSION, steps[peak], steps[low] if again else steps[-1]))
        if again:
            found.append(Phase(AGAIN, steps[low], steps[-1]))
    return tuple(found)
