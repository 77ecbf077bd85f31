"""Sampling networks from their posterior by stochastic gradient Langevin dynamics, and predicting with the samples.

Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", 2011; used as the approximate mixture of
"The Universality Lens", 2025, arXiv 2506.07661.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer


class SGLD(Optimizer):
    """``θ ← θ - (ε/2) ∇U(θ) + N(0, ε I)``, ``U = -ln prior - Σ ln P(y | x, θ)``.

    Gradients are expected of the *mean* loss over the batch; they are scaled to the sum over ``n_data`` examples.

    Args:
        params: sampled.
        lr: ``ε``, the variance of the noise of a step; a schedule such as ``a (b + t)^-γ`` makes the samples exact.
        n_data: examples in the whole data set.
        prior_std: ``τ`` of the prior ``N(0, τ² I)``; infinite for none. Weight decay ``λ`` of mean-loss SGD is
            ``τ² = 1 / (n λ)``.
        seed: of the noise; default: torch's generator.

    Raises:
        ValueError: sizes that are not positive; at a step, parameters that are no longer finite (the step is named).

    >>> weight = nn.Parameter(torch.zeros(3))
    >>> optimizer = SGLD([weight], lr=1e-3, n_data=100, prior_std=1.0, seed=0)
    >>> (weight**2).mean().backward(); optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        *,
        prior_std: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not (lr > 0 and n_data >= 1 and prior_std > 0):
            raise ValueError(f"lr, n_data and prior_std must be positive, got {lr}, {n_data} and {prior_std}")
        super().__init__(params, {"lr": lr, "n_data": n_data, "prior_std": prior_std})
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One draw from the chain."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            size, precision = group["lr"], 1 / group["prior_std"] ** 2
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                slope = group["n_data"] * parameter.grad + precision * parameter
                noise = torch.randn(parameter.shape, generator=self._generator, dtype=parameter.dtype)
                parameter.add_(slope, alpha=-size / 2).add_(noise.to(parameter.device), alpha=math.sqrt(size))
                if not bool(torch.isfinite(parameter).all()):
                    raise ValueError(f"parameters are not finite after step {self.steps}: lr {size:g} is too large")
        return loss


def stationary_variance(variance: float, lr: float) -> float:
    """Of unadjusted Langevin steps on ``U = θ² / 2s²``: ``s² / (1 - ε / 4s²)``, exactly.

    >>> round(stationary_variance(1.0, 0.1), 10)
    1.0256410256
    """
    if not 0 < lr < 4 * variance:
        raise ValueError(f"lr must lie between 0 and {4 * variance:g}, where the chain is stable, got {lr}")
    return variance / (1 - lr / (4 * variance))


class PosteriorEnsemble:
    """The mixture of some samples of a network: probabilities are averaged, not logits.

    Args:
        model: what the samples are parameters of.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.samples: list[dict[str, Tensor]] = []

    def keep(self, model: nn.Module) -> None:
        """Add the present parameters of ``model``."""
        self.samples.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    @torch.no_grad()
    def log_probabilities(self, x: Tensor) -> Float[Tensor, "samples examples classes"]:
        """Of every sample."""
        if not self.samples:
            raise ValueError("the ensemble is empty: keep(model) adds a sample")
        return torch.stack([torch.func.functional_call(self.model, s, (x,)).log_softmax(-1) for s in self.samples])

    def predict_proba(self, x: Tensor) -> Float[Tensor, "examples classes"]:
        """``(1/T) Σ P_θ(y | x)``."""
        each = self.log_probabilities(x)
        return (torch.logsumexp(each, 0) - math.log(len(each))).exp()

    def negative_log_likelihood(self, x: Tensor, y: Int[Tensor, " examples"]) -> tuple[float, float]:
        """Of the mixture, and the mean over its members; the first is never larger (Jensen)."""
        each = self.log_probabilities(x)[:, torch.arange(len(y)), y]
        mixture = torch.logsumexp(each, 0) - math.log(len(each))
        return -float(mixture.mean()), -float(each.mean())


def sample_posterior(
    model: nn.Module,
    x: Tensor,
    y: Int[Tensor, " examples"],
    *,
    steps: int = 6000,
    lr: float = 2e-3,
    prior_std: float = 0.55,
    burn_in: int | None = None,
    every: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
) -> PosteriorEnsemble:
    """Run SGLD on a classifier (in place) and keep some of its states.

    Args:
        model: logits from ``x``; no dropout or batch normalisation, which have no posterior.
        x: inputs.
        y: classes.
        steps: of the chain.
        lr: ``ε``.
        prior_std: ``τ``.
        burn_in: steps before the first sample; default a third.
        every: steps between samples.
        batch_size: default: all examples at every step.
        seed: of noise and batches.
    """
    start = steps // 3 if burn_in is None else burn_in
    if not 0 <= start < steps or every < 1:
        raise ValueError(f"burn_in must lie from 0 to {steps - 1} and every be at least 1, got {start} and {every}")
    optimizer = SGLD(model.parameters(), lr, len(x), prior_std=prior_std, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    ensemble = PosteriorEnsemble(model)
    for step in range(steps):
        rows = slice(None) if batch_size is None else torch.randint(len(x), (batch_size,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if step >= start and (step - start) % every == 0:
            ensemble.keep(model)
    return ensemble


def distill_ensemble(
    ensemble: PosteriorEnsemble, student: nn.Module, x: Tensor, *, steps: int = 500, lr: float = 1e-2
) -> nn.Module:
    """Fit one network to the mixture: ``min E_x KL(Q(. | x) || P_student(. | x))``, temperature 1, by Adam."""
    with torch.no_grad():
        target = ensemble.predict_proba(x)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(student(x), target).backward()
        optimizer.step()
    return student
