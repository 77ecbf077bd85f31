"""Colours and line styles of arms: told apart by the colour-blind, in print and on dark screens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lossmith.reporting.comparison import Comparison

Dash = Literal["solid", "dash", "dot"]

# Okabe and Ito (2008) without yellow (too faint on white) and black (the baseline is grey).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Dash, ...] = ("solid", "dash", "dot")
BASELINE = "#767676"  # contrast 4.5 on white and on black alike


@dataclass(frozen=True, slots=True)
class Stroke:
    """How an arm is drawn."""

    colour: str
    dash: Dash


def strokes(comparison: Comparison) -> dict[str, Stroke]:
    """A stroke for each arm, the baseline first; eighteen other arms before one repeats."""
    others = [name for name in comparison.arms if name != comparison.baseline]
    found = {comparison.baseline: Stroke(BASELINE, "solid")}
    for index, name in enumerate(others):
        cycle, position = divmod(index, len(_COLOURS))
        found[name] = Stroke(_COLOURS[position], _DASHES[cycle % len(_DASHES)])
    return found
