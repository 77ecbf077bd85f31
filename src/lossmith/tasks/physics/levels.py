"""What a solver found: energies with error bars, wave functions, how they came about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from lossmith.errors import InputError
from lossmith.files import read_json, write_json
from lossmith.tasks.physics.grid import Grid, gauss
from lossmith.tasks.physics.potentials import Array, Potential, get_potential, table
from lossmith.tasks.physics.references import Reference, exact_levels, finite_differences
from lossmith.tasks.physics.trial import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAVED = 2001
# Lobes lower than this share of the highest are no evidence of a node: a tail's sign is rounding.
_LOBE = 1e-2


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the training log: energies and error bounds in the user's units."""

    step: int
    loss: float
    energies: tuple[float, ...]
    errors: tuple[float, ...]
    norms: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Levels beside those of a classical method.

    Attributes:
        method: which.
        energies: its levels.
        relative_errors: ``E / E_reference - 1``.
        overlaps: ``|∫ψ ψ_reference|``.
    """

    method: str
    energies: Array
    relative_errors: Array
    overlaps: Array


@dataclass(frozen=True)
class Levels:
    """Stationary states, lowest first.

    Attributes:
        potential: where; in units of ``kinetic``.
        trial: the network.
        kinetic: ``ħ²/2m`` in the user's units.
        energies: as found: the network's parameters where they were trained, Rayleigh quotients where not.
        errors: bounds of their errors from the residual (:func:`~lossmith.tasks.physics.projection.error_bounds`).
        rayleigh: Rayleigh quotients, ``∫(ψ'² + V ψ²) / ∫ψ²``.
        norms: ``∫ψ²`` before normalisation: 1, or the loss did not hold it.
        residuals: ``∫r²`` of the normalised states.
        nodes: changes of sign of each, between lobes of at least 1% of the highest.
        history: training log.
        warnings: what looks wrong.
        seconds: taken.
    """

    potential: Potential
    trial: Trial
    kinetic: float
    energies: Array
    errors: Array
    rayleigh: Array
    norms: Array
    residuals: Array
    nodes: tuple[int, ...]
    history: tuple[Step, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    _sizes: Array = field(default_factory=lambda: np.ones(0), repr=False)

    def wavefunctions(self, x: ArrayLike) -> Array:
        """``ψ_k(x)``, normalised, the first lobe positive; 0 outside the walls. Shape of ``x`` and ``(states,)``."""
        places = np.asarray(x, dtype=np.float64)
        a, b = self.potential.interval
        inside = np.clip(places.reshape(-1), a, b)
        with torch.no_grad():
            values = self.trial(torch.tensor(inside)).numpy() * self._sizes
        values[(places.reshape(-1) < a) | (places.reshape(-1) > b)] = 0
        return values.reshape(*places.shape, -1)

    def compare(self, *, points: int = 4001) -> Agreement:
        """Beside the classical solution: exact where ``V`` is constant in steps, finite differences elsewhere."""
        number = len(self.energies)
        reference = finite_differences(self.potential, number, points=points)
        method, energies = reference.method, reference.energies
        if self.potential.steps is not None:
            method, energies = "exact", exact_levels(self.potential, number)
        energies = self.kinetic * energies
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = self.energies / energies - 1
        return Agreement(method, energies, relative, self._overlaps(reference))

    def _overlaps(self, reference: Reference) -> Array:
        h = reference.points[1] - reference.points[0]
        return np.abs((self.wavefunctions(reference.points) * reference.states).sum(0)) * h

    def summary(self) -> str:
        """A table for people."""
        found = self.compare()
        lines = [
            f"{self.potential.name} on [{self.potential.interval[0]:.6g}, {self.potential.interval[1]:.6g}], "
            f"{self.seconds:.2f} s, {self.history[-1].step if self.history else 0} steps",
            f"{'n':>3} {'energy':>15} {'error at most':>13} {found.method:>20} {'difference':>10} {'overlap':>8}"
            f" {'nodes':>5}",
        ]
        for k, energy in enumerate(self.energies):
            lines.append(
                f"{k + 1:>3} {energy:>15.9g} {self.errors[k]:>13.2g} {found.energies[k]:>20.9g} "
                f"{found.relative_errors[k]:>10.1e} {found.overlaps[k]:>8.6f} {self.nodes[k]:>5}"
            )
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, as JSON has it."""
        found = self.compare()
        return {
            "potential": {"name": self.potential.name, "interval": list(self.potential.interval)}
            | {"options": self.potential.options},
            "kinetic": self.kinetic,
            "energies": self.energies.tolist(),
            "errors": self.errors.tolist(),
            "rayleigh": self.rayleigh.tolist(),
            "norms": self.norms.tolist(),
            "residuals": self.residuals.tolist(),
            "nodes": list(self.nodes),
            "reference": {"method": found.method, "energies": found.energies.tolist()}
            | {"relative_errors": found.relative_errors.tolist(), "overlaps": found.overlaps.tolist()},
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "history": [dataclasses.asdict(step) for step in self.history],
        }

    def plot(self) -> Figure:
        """Wave functions at their energies in the potential; beside them how the energies converged."""
        from lossmith.tasks.physics.plots import plot_levels

        return plot_levels(self)

    def save(self, folder: str | Path) -> None:
        """Write ``levels.json`` and ``model.safetensors``."""
        from safetensors.torch import save_file

        from lossmith.files import replacing

        folder = Path(folder)
        a, b = self.potential.interval
        x = np.linspace(a, b, _SAVED + 2)[1:-1]
        network = {
            "hidden": [layer.out_features for layer in self.trial.linear],
            "activation": self.trial.activation,
            "jumps": list(self.trial.jumps),
            "knots": list(self.trial.knots),
            "sizes": self._sizes.tolist(),
        }
        potential = {
            "x": x.tolist(),
            "v": self.potential(x).tolist(),
            "steps": self.potential.steps,
            "jumps": list(self.potential.jumps),
        }
        with replacing(folder / "model.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self.trial.state_dict().items()}, temporary)
        write_json(folder / "levels.json", {**self.to_dict(), "network": network, "sampled": potential})

    @classmethod
    def load(cls, folder: str | Path) -> Levels:
        """What :meth:`save` wrote. A potential that was a function comes back as straight lines between samples.

        Raises:
            InputError: no such folder, or not of this kind.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "levels.json").is_file():
            raise InputError(f"{folder} holds no levels.json: it was not saved by lossmith solve-well")
        saved = read_json(folder / "levels.json")
        network, sampled = saved["network"], saved["sampled"]
        a, b = saved["potential"]["interval"]
        if sampled["steps"] is not None:
            potential = get_potential("steps", edges=[a, *sampled["jumps"], b], values=sampled["steps"])
        else:
            x, v = sampled["x"], sampled["v"]
            points = [[a, v[0]], *zip(x, v, strict=True), [b, v[-1]]]
            potential = table(np.array(points))
        potential = dataclasses.replace(potential, name=saved["potential"]["name"])
        energies = np.array(saved["energies"])
        trial = Trial(
            (a, b), network["jumps"], knots=network["knots"], hidden=network["hidden"], states=len(energies),
            activation=network["activation"],
        )  # fmt: skip
        trial.load_state_dict(load_file(folder / "model.safetensors"))
        arrays = {name: np.array(saved[name]) for name in ("energies", "errors", "rayleigh", "norms", "residuals")}
        history = tuple(Step(**_tuples(s)) for s in saved["history"])
        return cls(
            potential,
            trial,
            saved["kinetic"],
            **arrays,
            nodes=tuple(saved["nodes"]),
            history=history,
            warnings=tuple(saved["warnings"]),
            seconds=saved["seconds"],
            _sizes=np.array(network["sizes"]),
        )


def _tuples(saved: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}


def judge(potential: Potential, trial: Trial, energies: Array | None, *, grid: Grid | None = None) -> dict[str, Any]:
    """Norms, Rayleigh quotients, residuals, error bounds and nodes of a trial function's states, lowest first.

    Args:
        potential: in units where ``ħ²/2m = 1``.
        trial: its states are sorted by their energies.
        energies: trained ones, or None for Rayleigh quotients.
        grid: of the integrals.
    """
    grid = grid if grid is not None else gauss(potential, 480)
    with torch.no_grad():
        jet = trial.jet(grid.x)
        norms = (grid.w[:, None] * jet.value**2).sum(0)
        safe = norms.clamp_min(1e-300)
        rayleigh = (grid.w[:, None] * (jet.first**2 + grid.v[:, None] * jet.value**2)).sum(0) / safe
        used = rayleigh if energies is None else torch.tensor(energies)
        order = used.argsort()
        trial.output.copy_(trial.output[order])
        value, second = jet.value[:, order], jet.second[:, order]
        norms, rayleigh, used, safe = norms[order], rayleigh[order], used[order], safe[order]
        residual = -second + (grid.v[:, None] - used) * value
        squared = ((grid.w[:, None] * residual**2).sum(0) / safe).numpy()
    a, b = potential.interval
    x = a + (b - a) * (np.arange(4001) + 0.5) / 4001
    with torch.no_grad():
        fine = trial(torch.tensor(x)).numpy()
    sizes = 1 / np.sqrt(safe.numpy())
    nodes = []
    for k in range(fine.shape[1]):
        lobes = fine[:, k][np.abs(fine[:, k]) > _LOBE * np.abs(fine[:, k]).max()]
        if len(lobes):
            sizes[k] *= np.sign(lobes[0])
        nodes.append(int((np.diff(np.sign(lobes)) != 0).sum()))
    return {
        "energies": used.numpy(),
        # Without neighbours' levels only: some level is as near as this.
        "errors": np.sqrt(squared),
        "rayleigh": rayleigh.numpy(),
        "norms": norms.numpy(),
        "residuals": squared,
        "nodes": tuple(nodes),
        "_sizes": sizes,
    }
