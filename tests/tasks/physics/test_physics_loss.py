"""Trial functions, the residual loss, and what both must satisfy exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.tasks.physics import Trial, barrier, gauss, infinite_well, midpoints, schrodinger_residual_loss
from lossmith.tasks.physics.projection import energy_loss, project, squared_residuals
from lossmith.tasks.physics.trial import ACTIVATIONS

X = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000


def parabola(x: Tensor) -> Tensor:
    return math.sqrt(30) * x * (1 - x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (-2.0, 3.0), (0.1, 0.7)])
def test_trial_functions_are_exactly_zero_at_the_walls(interval: tuple[float, float], dtype: torch.dtype) -> None:
    trial = Trial(interval, (sum(interval) / 2,), knots=(interval[0] + 0.01,), states=3, dtype=dtype, seed=1)
    assert (trial(torch.tensor(interval, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_derivatives_equal_nested_autograd(activation: str) -> None:
    trial = Trial((-1.0, 2.0), (0.3, 0.9), knots=(0.5,), hidden=(7, 5), states=2, activation=activation, seed=2)
    x = torch.linspace(-0.97, 1.93, 41, dtype=torch.float64, requires_grad=True)
    jet = trial.jet(x)
    for k in range(2):
        value = trial(x)[:, k]
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(jet.first[:, k], first, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(jet.second[:, k], second, rtol=1e-11, atol=1e-11)


def test_second_derivative_jumps_where_the_potential_does() -> None:
    trial = Trial((0.0, 1.0), (0.4,), hidden=(6,))
    jet = trial.jet(torch.tensor([0.4 - 1e-9, 0.4 + 1e-9], dtype=torch.float64))
    assert abs(jet.first[0] - jet.first[1]) < 1e-6
    assert abs(jet.second[0] - jet.second[1]) > 1e-3


def test_gradients_of_the_loss() -> None:
    trial = Trial((0.0, 1.0), hidden=(3, 3), states=2, seed=3)
    grid = midpoints(barrier(20, 0.2), 20)
    names = [name for name, _ in trial.named_parameters()]

    def loss(energy: Tensor, *parameters: Tensor) -> Tensor:
        def jet(x: Tensor) -> Tensor:
            return torch.func.functional_call(
                _Jet(trial), {f"trial.{n}": p for n, p in zip(names, parameters, strict=True)}, (x,)
            )

        return schrodinger_residual_loss(jet, grid.x, grid.v, energy, norm_weight=3.0, overlap_weight=2.0)[0]

    energy = torch.tensor([9.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (energy, *(p.detach().requires_grad_() for p in trial.parameters())))


class _Jet(torch.nn.Module):
    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial

    def forward(self, x: Tensor) -> Tensor:
        return self.trial.jet(x)  # type: ignore[return-value]


def test_the_constant_network_on_the_unit_box() -> None:
    grid = gauss(infinite_well(), 60)
    loss, parts = schrodinger_residual_loss(parabola, grid.x, grid.v, math.pi**2, norm_weight=1.0, weights=grid.w)
    assert parts.norm.item() == pytest.approx(1, abs=1e-13)
    assert parts.pde.item() == pytest.approx(120 - 20 * math.pi**2 + math.pi**4, rel=1e-12)
    assert parts.pde.item() == pytest.approx(20.017003012215, rel=1e-12)
    assert loss.item() == pytest.approx(parts.pde.item(), rel=1e-12)
    best = schrodinger_residual_loss(parabola, grid.x, grid.v, 10.0, weights=grid.w)[1]
    assert best.pde.item() == pytest.approx(20, rel=1e-12)
    for other in (9.9, 10.1):
        assert float(schrodinger_residual_loss(parabola, grid.x, grid.v, other, weights=grid.w)[1].pde) > 20


def test_the_best_energy_of_any_function_is_its_rayleigh_quotient() -> None:
    trial = Trial((0.0, 1.0), hidden=(5, 5), seed=4)
    grid = midpoints(barrier(20, 0.2), 100)
    jet = trial.jet(grid.x)
    h_psi = -jet.second[:, 0] + grid.v * jet.value[:, 0]
    quotient = ((jet.value[:, 0] * h_psi).sum() / (jet.value[:, 0] ** 2).sum()).item()
    energy = torch.tensor([quotient], dtype=torch.float64, requires_grad=True)
    _, parts = schrodinger_residual_loss(trial.jet, grid.x, grid.v, energy)
    (slope,) = torch.autograd.grad(parts.pde.sum(), energy)
    assert abs(float(slope)) < 1e-9 * parts.pde.sum().item()
    other = torch.tensor([quotient + 1], dtype=torch.float64, requires_grad=True)
    _, parts = schrodinger_residual_loss(trial.jet, grid.x, grid.v, other)
    (slope,) = torch.autograd.grad(parts.pde.sum(), other)
    expected = -2 * (parts.residual[:, 0] * jet.value[:, 0]).mean()
    assert float(slope) == pytest.approx(expected.item(), rel=1e-10)


def test_the_norm_term() -> None:
    zero = schrodinger_residual_loss(lambda x: 0 * x, X, 0 * X, 1.0, norm_weight=7.0)
    assert float(zero[0]) == 7.0
    one = schrodinger_residual_loss(parabola, X, 0 * X, 1.0)[1].pde
    scaled = schrodinger_residual_loss(lambda x: 3 * parabola(x), X, 0 * X, 1.0)[1].pde
    assert float(scaled) == pytest.approx(9 * float(one), rel=1e-12)


@pytest.mark.parametrize(("weight", "norm"), [(1.0, 0.0), (100.0, 0.899915), (1000.0, 0.9899915)])
def test_the_size_that_a_fixed_shape_settles_at(weight: float, norm: float) -> None:
    """``max(0, 1 - ρ/2λ)``: a small ``λ`` lets it collapse."""
    grid = gauss(infinite_well(), 60)
    sizes = np.linspace(0, 1.2, 24001)
    rho = 20.017003012215
    losses = rho * sizes + weight * (sizes - 1) ** 2
    for size in (0.3, 1.1):
        loss, _ = schrodinger_residual_loss(
            lambda x, size=size: math.sqrt(size) * parabola(x),  # type: ignore[misc]
            grid.x, grid.v, math.pi**2, norm_weight=weight, weights=grid.w,
        )  # fmt: skip
        assert loss.item() == pytest.approx(rho * size + weight * (size - 1) ** 2, rel=1e-11)
    assert sizes[losses.argmin()] == pytest.approx(norm, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_eigenfunctions_leave_no_residual(n: int) -> None:
    def jet(x: Tensor) -> object:
        from lossmith.tasks.physics import Jet

        k = n * math.pi
        s, c = torch.sin(k * x), torch.cos(k * x)
        return Jet(*(math.sqrt(2) * part[:, None] for part in (s, k * c, -k * k * s)))

    loss, parts = schrodinger_residual_loss(jet, X, 0 * X, (n * math.pi) ** 2)  # type: ignore[arg-type]
    assert float(parts.residual.abs().max()) < 1e-10
    assert float(loss) < 1e-10


def test_what_does_not_change_the_loss() -> None:
    trial = Trial((0.0, 1.0), hidden=(5, 5), seed=5)
    grid = midpoints(barrier(20, 0.2), 50)
    loss, _ = schrodinger_residual_loss(trial.jet, grid.x, grid.v, 12.0)
    shifted, _ = schrodinger_residual_loss(trial.jet, grid.x, grid.v + 7, 19.0)
    turned, _ = schrodinger_residual_loss(lambda x: -trial(x), grid.x, grid.v, 12.0)
    assert float(shifted) == pytest.approx(float(loss), rel=1e-12)
    assert float(turned) == pytest.approx(float(loss), rel=1e-10)


def test_projection_gives_orthonormal_states_and_exact_gradients() -> None:
    potential = barrier(20, 0.2)
    grid = gauss(potential, 120)
    trial = Trial(potential.interval, hidden=(4,), states=3, seed=6)
    found = project(trial.features(grid.x), grid, 3)
    gram = (found.jet.value.T * grid.w) @ found.jet.value
    torch.testing.assert_close(gram.detach(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    loss = energy_loss(found, grid)
    loss.backward()
    assert loss.item() == pytest.approx(float(found.energies.sum()), rel=1e-7)
    parameter = trial.layers[0].weight
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.grad is not None
    for i in range(3):
        ends = []
        for change in (1e-4, -1e-4):
            with torch.no_grad():
                parameter[i] += change
            ends.append(float(project(trial.features(grid.x), grid, 3).energies.sum()))
            with torch.no_grad():
                parameter[i] -= change
        # Differences of eigenvalues of nearly dependent features keep few digits.
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float(parameter.grad[i]), rel=2e-3, abs=1e-3)
    assert (squared_residuals(found, grid) > 0).all()


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="relu has no second derivative"):
        Trial((0.0, 1.0), activation="relu")
    with pytest.raises(InputError, match="did you mean 'tanh'"):
        Trial((0.0, 1.0), activation="tan")
    with pytest.raises(ValueError, match="shape"):
        schrodinger_residual_loss(parabola, X, torch.zeros(3, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="n >= 2"):
        schrodinger_residual_loss(parabola, X[:1], X[:1], 1.0)
    with pytest.raises(InputError, match="at least 10"):
        midpoints(infinite_well(), 9)
