"""Estimates of the trace of a Hessian, its largest eigenvalues, and the noise of each example's label."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.probes.flatness_operator import Curvature

Estimator = Literal["hutchinson", "hutch++", "ggn", "fisher", "exact"]
ESTIMATORS = ("hutchinson", "hutch++", "ggn", "fisher", "exact")
# Parameters up to which every unit vector is multiplied.
_DENSE = 20_000


@dataclass(frozen=True, slots=True)
class TraceResult:
    """An estimate with its errors.

    Attributes:
        estimator: how.
        trace: the estimate, of a mean loss: nats per position.
        stderr: its standard error as a number of the *population* of batches (of examples for ``fisher``); where there
            is one batch, ``probe_stderr``.
        probe_stderr: its standard error as a number of *these* data, from the random vectors alone; 0 for ``exact``,
            NaN for ``fisher``, whose examples carry both.
        loss: mean over the positions, nats.
        positions: predicted ones.
        products: vectors multiplied, over all batches.
        parameters: of the model, that count.
        by_module: the trace's parts; they sum to it. Empty for ``hutch++``, ``ggn`` and ``fisher``.
    """

    estimator: str
    trace: float
    stderr: float
    probe_stderr: float
    loss: float
    positions: int
    products: int
    parameters: int
    by_module: dict[str, float] = field(default_factory=dict)


class Eigenvalues(NamedTuple):
    """Largest eigenvalues, how far each may be from a true one, and the products that it took."""

    values: Tensor
    bounds: Tensor
    products: int


def hessian_trace(
    model: nn.Module | Curvature,
    batches: Iterable[Any] = (),
    *,
    estimator: Estimator = "hutchinson",
    n_probes: int = 8,
    distribution: Literal["rademacher", "normal"] = "rademacher",
    shift: bool | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> TraceResult:
    r"""The trace of the Hessian of a model's mean loss: how sharp the minimum is that it sits in.

    ==============  =============================================================================================
    estimator       what it is
    ==============  =============================================================================================
    ``hutchinson``  :math:`\mathbb{E}\, v^\top H v`, fresh random vectors for every batch
    ``hutch++``     the trace on a sketched subspace exactly, Hutchinson on the rest; the same vectors for all batches
    ``ggn``         Hutchinson on the Gauss-Newton part, :math:`\mathbb{E}\,\mathrm{Var}_{p}(J v)`: forward mode alone
    ``fisher``      squared norm of the gradient under labels drawn from the model (the paper's practical proxy)
    ``exact``       every diagonal element; up to 20,000 parameters
    ==============  =============================================================================================

    ``ggn`` and ``fisher`` have the trace of the Fisher matrix as their mean. It is that of the Hessian where the model
    is the data's true distribution, or its logits are piecewise linear in the parameters; elsewhere it is another
    number. The trace compares models of one parametrisation: scaling two layers against each other leaves a network's
    function and changes it.

    Args:
        model: as :class:`Curvature` takes it, or one.
        batches: see there.
        estimator: see above.
        n_probes: random vectors per batch; for ``hutch++`` products over all data (at least 3); draws of labels for
            ``fisher``.
        distribution: of the vectors; the paper's code has ``normal``, which has more variance.
        shift: see :class:`Curvature`.
        exclude: see there.
        seed: of everything random.

    Raises:
        ValueError: an unknown estimator or distribution, too few probes, too many parameters for ``exact``, an estimate
            that is not finite (with its batch).

    Source: "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022,
    arXiv 2210.14199; "Hutch++: Optimal Stochastic Trace Estimation", 2021, arXiv 2010.09649.

    >>> model = nn.Linear(3, 4).double()
    >>> x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 0])
    >>> exact = hessian_trace(model, [(x, y)], estimator="exact").trace
    >>> p = model(x).softmax(-1)
    >>> closed = ((1 - p.square().sum(-1)) * (x.square().sum(-1) + 1)).mean()
    >>> abs(exact - float(closed)) < 1e-12
    True
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be {', '.join(ESTIMATORS)}, got '{estimator}'")
    if distribution not in ("rademacher", "normal"):
        raise ValueError(f"distribution must be rademacher or normal, got '{distribution}'")
    least = 3 if estimator == "hutch++" else 1
    if n_probes < least:
        raise ValueError(f"n_probes must be at least {least} for {estimator}, got {n_probes}")
    curvature = model if isinstance(model, Curvature) else Curvature(model, batches, shift=shift, exclude=exclude)
    draw = _Draw(curvature, distribution, seed)
    if estimator == "exact":
        return _exact(curvature)
    if estimator == "hutch++":
        return _hutch_plus_plus(curvature, n_probes, draw)
    if estimator == "fisher":
        return _fisher(curvature, n_probes, seed)
    return _hutchinson(curvature, n_probes, draw, gauss_newton=estimator == "ggn")


class _Draw:
    def __init__(self, curvature: Curvature, distribution: str, seed: int):
        self.curvature, self.distribution = curvature, distribution
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, vectors: int) -> Tensor:
        shape, like = (vectors, self.curvature.size), self.curvature
        if self.distribution == "normal":
            drawn = torch.randn(shape, generator=self.generator, dtype=like.dtype)
        else:
            drawn = torch.randint(0, 2, shape, generator=self.generator, dtype=like.dtype).mul_(2).sub_(1)
        return drawn.to(like.device)


def _exact(curvature: Curvature) -> TraceResult:
    size = curvature.size
    if size > _DENSE:
        raise ValueError(f"exact takes up to {_DENSE} parameters, got {size}; take hutchinson or exclude some")
    sums = torch.zeros(len(curvature.batches), dtype=torch.float64)
    diagonal = torch.zeros(size, dtype=torch.float64)
    for number in range(len(sums)):
        multiply = curvature.batch_product(number)
        for first in range(0, size, 256):
            units = torch.zeros(min(256, size - first), size, dtype=curvature.dtype, device=curvature.device)
            units[range(len(units)), range(first, first + len(units))] = 1
            part = multiply(units)[range(len(units)), range(first, first + len(units))].double().cpu()
            diagonal[first : first + len(units)] += part
            sums[number] += part.sum()
        _check_finite(sums[number], number)
    return _result(curvature, "exact", sums, 0.0, size, curvature.by_module(diagonal / curvature.count))


def _hutchinson(curvature: Curvature, n_probes: int, draw: _Draw, *, gauss_newton: bool) -> TraceResult:
    sums = torch.zeros(len(curvature.batches), dtype=torch.float64)
    diagonal = torch.zeros(curvature.size, dtype=torch.float64)
    noise = 0.0
    for number in range(len(sums)):
        if gauss_newton:
            found = torch.cat([_variance(curvature, number, part) for part in _blocks(curvature, n_probes, draw)])
        else:
            multiply, parts = curvature.batch_product(number), []
            for vectors in _blocks(curvature, n_probes, draw):
                products = multiply(vectors).mul_(vectors)
                diagonal += products.sum(0).cpu()
                parts.append(products.sum(1, dtype=torch.float64).cpu())
            found = torch.cat(parts)
        sums[number] = found.mean()
        _check_finite(sums[number], number)
        noise += float(found.var()) / n_probes if n_probes > 1 else math.nan
    modules = {} if gauss_newton else curvature.by_module(diagonal / (n_probes * curvature.count))
    name = "ggn" if gauss_newton else "hutchinson"
    products_made = n_probes * len(sums)
    return _result(curvature, name, sums, math.sqrt(noise) / curvature.count, products_made, modules)


def _blocks(curvature: Curvature, vectors: int, draw: _Draw) -> Iterable[Tensor]:
    for first in range(0, vectors, curvature.block):
        yield draw(min(curvature.block, vectors - first))


def _variance(curvature: Curvature, number: int, vectors: Tensor) -> Tensor:
    """``v' G v`` of the batch's sum: the variance of ``J v`` under the model's own distribution, at each position."""

    def along(vector: dict[str, Tensor]) -> Tensor:
        logits, moved = torch.func.jvp(lambda p: curvature.logits(p, number), (curvature.parameters,), (vector,))[:2]
        p = logits.softmax(-1)
        centred = moved - (p * moved).sum(-1, keepdim=True)
        return (p * centred.square()).sum()

    with torch.no_grad(), curvature.quiet():
        return torch.func.vmap(along)(curvature.unflatten(vectors)).double().cpu()


def _hutch_plus_plus(curvature: Curvature, n_probes: int, draw: _Draw) -> TraceResult:
    third = n_probes // 3
    sketch = curvature.matmul(draw(third))
    basis = torch.linalg.qr(sketch.T).Q.T
    inside = float((basis * curvature.matmul(basis)).double().sum())
    rest = draw(n_probes - 2 * third)
    rest = rest - rest @ basis.T @ basis
    outside = (rest * curvature.matmul(rest)).double().sum(1).cpu()
    trace = inside + float(outside.mean())
    _check_finite(torch.tensor(trace), None)
    error = float(outside.std()) / math.sqrt(len(outside)) if len(outside) > 1 else math.nan
    return TraceResult("hutch++", trace, error, error, curvature.loss, curvature.count, n_probes, curvature.size)


def _fisher(curvature: Curvature, n_probes: int, seed: int) -> TraceResult:
    norms, positions = zip(
        *(score_norms(curvature, labels="model", seed=seed * 1_000_003 + k) for k in range(n_probes)), strict=True
    )
    # Each example's sum, its noise of the drawn labels averaged away.
    sums, counts = torch.stack(norms).mean(0), positions[0].double()
    _check_finite(sums.sum(), None)
    trace = float(sums.sum() / counts.sum())
    n = len(sums)
    spread = (sums - trace * counts).square().sum() * n / (n - 1) if n > 1 else torch.tensor(math.nan)
    error = float(spread.sqrt() / counts.sum())
    products = n_probes * n
    return TraceResult("fisher", trace, error, math.nan, curvature.loss, curvature.count, products, curvature.size)


def score_norms(
    model: nn.Module | Curvature,
    batches: Iterable[Any] = (),
    *,
    labels: Literal["model", "data", "exact"] = "model",
    shift: bool | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Float[Tensor, " examples"], Float[Tensor, " examples"]]:
    r"""How strongly each example's label noise shakes the parameters, and each example's number of positions.

    .. math:: s_i = \sum_{t} \bigl\lVert \nabla_\theta \ln f_\theta(y_t \mid x_t) \bigr\rVert^2

    ``labels="model"`` draws ``y`` from the model. Scores at different positions are then uncorrelated with mean zero,
    so that the squared norm of an example's *summed* gradient is an unbiased estimate: one backward pass per example.
    ``labels="exact"`` sums over all classes with the model's probabilities. ``labels="data"`` takes the labels given
    (the empirical Fisher, which is something else away from saturation), position by position. ``s.sum() / n.sum()`` is
    the trace of the matrix in question.

    Raises:
        ValueError: unknown ``labels``.

    Source: arXiv 2210.14199, appendix B.1; the lemma that at a minimiser of the population loss the covariance of the
    one-sample gradient equals the Hessian.
    """
    if labels not in ("model", "data", "exact"):
        raise ValueError(f"labels must be model, data or exact, got '{labels}'")
    curvature = model if isinstance(model, Curvature) else Curvature(model, batches, shift=shift, exclude=exclude)
    generator = torch.Generator().manual_seed(seed)
    sums, counts = [], []
    for number, found in enumerate(curvature.predictions):
        places = found.examples
        if labels == "model":
            with torch.no_grad(), curvature.quiet():
                probabilities = curvature.logits(curvature.parameters, number).softmax(-1).double().cpu()
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(places.device)
            squares = _squared_gradients(curvature, number, drawn, places, found.size)
        elif labels == "data":
            each = torch.arange(len(places), device=places.device)
            squares = _gathered(_squared_gradients(curvature, number, found.targets, each, len(each)), found)
        else:
            squares = _gathered(_all_classes(curvature, number), found)
        sums.append(squares)
        counts.append(torch.bincount(places.cpu(), minlength=found.size).double())
    return torch.cat(sums), torch.cat(counts)


def _gathered(values: Tensor, found: Any) -> Tensor:
    return torch.zeros(found.size, dtype=torch.float64).index_add_(0, found.examples.cpu(), values)


def _squared_gradients(curvature: Curvature, number: int, targets: Tensor, groups: Tensor, size: int) -> Tensor:
    """Squared norm of the gradient of each group's summed loss."""

    def summed(parameters: dict[str, Tensor]) -> Tensor:
        losses = curvature.losses(parameters, number, targets)
        return torch.zeros(size, dtype=losses.dtype, device=losses.device).index_add(0, groups, losses)

    return _squared_rows(curvature, summed, size)


def _all_classes(curvature: Curvature, number: int) -> Tensor:
    def every(parameters: dict[str, Tensor]) -> Tensor:
        return curvature.logits(parameters, number).log_softmax(-1).flatten()

    with torch.no_grad(), curvature.quiet():
        p = curvature.logits(curvature.parameters, number).softmax(-1).double().cpu()
    return (p * _squared_rows(curvature, every, p.numel()).view_as(p)).sum(-1)


def _squared_rows(curvature: Curvature, function: Any, size: int) -> Tensor:
    """Squared norms of the rows of a Jacobian."""
    with curvature.quiet():
        pull = torch.func.vjp(function, curvature.parameters)[1]
        parts = []
        for rows in torch.arange(size, device=curvature.device).split(curvature.block):
            units = torch.nn.functional.one_hot(rows, size).to(curvature.dtype)
            gradients = torch.func.vmap(lambda unit: pull(unit)[0])(units)
            parts.append(sum(g.reshape(len(g), -1).double().square().sum(1) for g in gradients.values()))
    return torch.cat(parts).detach().cpu()  # type: ignore[arg-type]


def _result(
    curvature: Curvature, name: str, sums: Tensor, probe_error: float, products: int, modules: dict[str, float]
) -> TraceResult:
    counts = torch.tensor(curvature.counts, dtype=torch.float64)
    trace = float(sums.sum() / counts.sum())
    n, error = len(sums), probe_error
    if n > 1:
        # Of a ratio of sums: batches differ in their number of positions.
        error = float(((sums - trace * counts).square().sum() * n / (n - 1)).sqrt() / counts.sum())
    return TraceResult(
        name, trace, error, probe_error, curvature.loss, curvature.count, products, curvature.size, modules
    )


def _check_finite(value: Tensor, number: int | None) -> None:
    if not bool(torch.isfinite(value)):
        where = "" if number is None else f" in batch {number}"
        raise ValueError(f"the estimate of the trace is {float(value)}{where}: the second derivatives overflow")


def top_eigenvalues(
    curvature: Curvature, k: int = 1, *, max_steps: int = 100, tolerance: float = 1e-4, seed: int = 0
) -> Eigenvalues:
    """The ``k`` largest eigenvalues, by Lanczos' method with full reorthogonalisation.

    An eigenvalue that comes several times may be found once. Each value lies within its bound of a true eigenvalue.

    Args:
        curvature: the Hessian.
        k: how many.
        max_steps: products at most.
        tolerance: stop where every bound is below this share of the largest value.
        seed: of the first vector.

    Raises:
        ValueError: ``k`` out of range or fewer steps than ``k``.
    """
    if not 1 <= k <= curvature.size:
        raise ValueError(f"k must lie from 1 to {curvature.size}, got {k}")
    if max_steps < k:
        raise ValueError(f"max_steps must be at least k = {k}, got {max_steps}")
    generator = torch.Generator().manual_seed(seed)

    def fresh(basis: list[Tensor]) -> Tensor:
        vector = torch.randn(curvature.size, generator=generator, dtype=curvature.dtype).to(curvature.device)
        return _orthogonal(vector, basis)

    basis: list[Tensor] = []
    vector = fresh(basis)
    vector = vector / vector.norm()
    alphas: list[float] = []
    betas: list[float] = []
    scale = 0.0
    while True:
        basis.append(vector)
        product = curvature.matmul(vector[None])[0]
        alphas.append(float(vector @ product))
        rest = _orthogonal(product, basis)
        beta = float(rest.norm())
        scale = max(scale, abs(alphas[-1]) + beta)
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            side = torch.tensor(betas, dtype=torch.float64)
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        found = values.flip(0)[:k]
        bounds = (beta * vectors[-1]).abs().flip(0)[:k]
        steps = len(alphas)
        whole = steps == curvature.size
        closed = beta <= 10 * torch.finfo(curvature.dtype).eps * scale
        near = len(found) == k and bool((bounds <= tolerance * found.abs().max()).all())
        if whole or steps >= max_steps or (near and (not closed or steps > k)):
            return Eigenvalues(found, bounds, steps)
        if closed:
            # An invariant subspace: go on beside it.
            rest, beta = fresh(basis), 0.0
            vector = rest / rest.norm()
        else:
            vector = rest / beta
        betas.append(beta)


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    # Twice is enough.
    if basis:
        rows = torch.stack(basis)
        for _ in range(2):
            vector = vector - rows.T @ (rows @ vector)
    return vector
