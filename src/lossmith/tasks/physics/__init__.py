"""Physics as training loss: stationary states of one-dimensional quantum wells."""

from lossmith.tasks.physics.grid import Grid, gauss, midpoints
from lossmith.tasks.physics.levels import Agreement, Levels, Step
from lossmith.tasks.physics.potentials import (
    Potential,
    barrier,
    finite_well,
    formula,
    from_function,
    infinite_well,
    steps,
    table,
)
from lossmith.tasks.physics.references import Reference, exact_levels, finite_differences
from lossmith.tasks.physics.residual import ResidualParts, schrodinger_residual_loss
from lossmith.tasks.physics.solver import solve_schrodinger
from lossmith.tasks.physics.trial import Jet, Trial

__all__ = [
    "Agreement",
    "Grid",
    "Jet",
    "Levels",
    "Potential",
    "Reference",
    "ResidualParts",
    "Step",
    "Trial",
    "barrier",
    "exact_levels",
    "finite_differences",
    "finite_well",
    "formula",
    "from_function",
    "gauss",
    "infinite_well",
    "midpoints",
    "schrodinger_residual_loss",
    "solve_schrodinger",
    "steps",
    "table",
]
