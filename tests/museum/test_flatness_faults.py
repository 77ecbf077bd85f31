"""Public faults of measuring flatness: the faulty form fails what ours passes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.probes import hessian_trace, score_norms

X = torch.tensor([[1.0, 2.0], [-0.5, 1.5], [0.3, -1.0]], dtype=torch.float64)
Y = torch.tensor([0, 1, 0])


class WithUnused(nn.Module):
    """Three parameters of one shape; the middle one is not used, as a pooler is not by a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.4, -0.7], dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.last = nn.Parameter(torch.tensor([0.9, 0.2], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x * self.first)
        return torch.stack([torch.zeros(len(x), dtype=x.dtype), hidden @ self.last], -1)


def released(parameters: list[Tensor], loss: Tensor, vectors: list[Tensor]) -> float:
    """The released script's product: vectors for parameters with a gradient, paired with all parameters in order."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    dot: Any = 0
    for gradient, vector in zip(gradients, vectors, strict=False):
        if gradient is not None:
            dot = dot + (gradient * vector).sum()
    products = torch.autograd.grad(dot, parameters, allow_unused=True)
    return float(sum((v * p).sum() for v, p in zip(vectors, products, strict=False) if p is not None))


def test_an_unused_parameter_shifts_the_pairs_of_vectors_and_products() -> None:
    """All 16 sign vectors: the mean of v . H v is the trace. The released pairing loses the last parameter's part."""
    model = WithUnused()
    parameters = list(model.parameters())
    found = []
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        vectors = [torch.tensor(part, dtype=torch.float64) for part in (signs[:2], signs[2:])]
        found.append(released(parameters, nn.functional.cross_entropy(model(X), Y), vectors))
    ours = hessian_trace(model, [(X, Y)], estimator="exact")
    used = [parameters[0], parameters[2]]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(X), Y), used, create_graph=True)
    diagonal = [
        float(torch.autograd.grad(g[i], p, retain_graph=True)[0][i])
        for g, p in zip(gradients, used, strict=True)
        for i in range(2)
    ]
    assert abs(ours.trace - sum(diagonal)) < 1e-12
    assert abs(sum(found) / 16 - sum(diagonal[:2])) < 1e-12
    assert abs(sum(found) / 16 - ours.trace) > 0.1 * ours.trace


def test_the_square_of_a_batchs_mean_gradient_is_no_mean_of_squares() -> None:
    """Labels drawn from the model, exactly: gradients of a batch cancel, and the estimate falls with its size."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3, dtype=torch.float64)
    exact = hessian_trace(model, [(X, Y)], estimator="exact").trace
    p = model(X).softmax(-1).detach()
    of_means = 0.0
    for labels in itertools.product(range(3), repeat=3):
        chance = float(torch.stack([p[row, label] for row, label in enumerate(labels)]).prod())
        loss = nn.functional.cross_entropy(model(X), torch.tensor(labels))
        of_means += chance * sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
    norms, counts = score_norms(model, [(X, Y)], labels="exact")
    assert abs(float(norms.sum() / counts.sum()) - exact) < 1e-12
    # Independent with mean zero: the square of a mean of three is a third of the mean square.
    assert abs(of_means - exact / 3) < 1e-12
