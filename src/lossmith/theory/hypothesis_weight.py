"""The weight of a hypothesis: prior mass of what is close to it, exactly, locally, or by sampling.

"The Universality Lens", 2025, arXiv 2506.07661; local forms after its second version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_ball_mass(fisher_eigenvalues: Float[Tensor, " k"], eps2: float, log_density: float = 0.0) -> float:
    """``ln w(Θ_ε)`` where the divergence is ``δᵀFδ / 2`` and the prior density flat around the truth.

    ``ln w0 + (k/2) ln π - lnΓ(k/2 + 1) + (k/2) ln(2ε²) - (1/2) ln det F``.

    >>> round(log_ball_mass(torch.tensor([1.0, 4.0, 9.0]), 0.1), 12)
    -2.773504379578
    """
    values = fisher_eigenvalues.double()
    if not bool((values > 0).all()) or not eps2 > 0:
        raise ValueError("eigenvalues and eps2 must be positive: flat directions have no finite ball")
    k = len(values)
    ball = k / 2 * math.log(math.pi) - math.lgamma(k / 2 + 1) + k / 2 * math.log(2 * eps2)
    return log_density + ball - 0.5 * float(values.log().sum())


class GaussianComplexity(NamedTuple):
    """What parameters cost.

    Attributes:
        nats: total regret, ``½ Σ ln(1 + n τ² λ)``.
        dimension: ``Σ n τ² λ / (1 + n τ² λ)``.
        directions: how many have ``n τ² λ > 1``.
    """

    nats: float
    dimension: float
    directions: int


def complexity_gaussian(fisher_eigenvalues: Float[Tensor, " k"], n: int, tau2: float) -> GaussianComplexity:
    """What parameters cost under the prior ``N(0, τ²I)`` after ``n`` examples: flat directions cost nothing.

    >>> complexity_gaussian(torch.tensor([1.0, 1e-9]), 99, 1.0).dimension
    0.990000099
    """
    scaled = n * tau2 * fisher_eigenvalues.double().clamp_min(0)
    if n < 1 or not tau2 > 0:
        raise ValueError(f"n must be at least 1 and tau2 positive, got {n} and {tau2}")
    share = scaled / (1 + scaled)
    return GaussianComplexity(
        0.5 * float(torch.log1p(scaled).sum()), round(float(share.sum()), 9), int((scaled > 1).sum())
    )


class BooleanPrior(NamedTuple):
    """Functions that random networks compute, and how often.

    Attributes:
        functions: outputs (0 or 1) on every input, one row per distinct function.
        counts: draws of each.
    """

    functions: Int[Tensor, "functions inputs"]
    counts: Int[Tensor, " functions"]

    @property
    def log_weights(self) -> Tensor:
        """``ln w`` of the functions."""
        return (self.counts.double() / self.counts.sum()).log()

    def log_weight(self, outputs: Int[Tensor, " inputs"]) -> float:
        """Of one function; -inf if it was never drawn (its weight is then below ``3 / draws`` with 95% confidence)."""
        same = (self.functions == outputs).all(-1)
        return float(self.log_weights[same][0]) if bool(same.any()) else -math.inf


def boolean_inputs(bits: int) -> Float[Tensor, "inputs bits"]:
    """All vectors of -1 and 1."""
    numbers = torch.arange(2**bits)
    return ((numbers[:, None] >> torch.arange(bits)) & 1).double() * 2 - 1


def sample_boolean_prior(width: int, *, bits: int = 4, draws: int = 40_000, seed: int = 0) -> BooleanPrior:
    """Signs of random one-hidden-layer ReLU networks on all inputs.

    Weights ``N(0, 1/bits)``, biases ``N(0, 1/bits)``, output weights ``N(0, 1/width)``, output bias ``N(0, 0.01)``.
    """
    if width < 1 or draws < 1 or not 1 <= bits <= 5:
        raise ValueError(f"width and draws must be at least 1 and bits from 1 to 5, got {width}, {draws} and {bits}")
    generator = torch.Generator().manual_seed(seed)
    x = boolean_inputs(bits)
    ids = []
    powers = 2 ** torch.arange(len(x))
    for start in range(0, draws, 4000):
        size = min(4000, draws - start)

        def normal(*shape: int, size: int = size) -> Tensor:
            return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

        hidden = torch.relu((x @ normal(bits, width) + normal(1, width)) / bits**0.5)
        out = (hidden @ normal(width, 1))[..., 0] / width**0.5 + 0.1 * normal(1)
        ids.append((out > 0).long() @ powers)
    found, counts = torch.cat(ids).unique(return_counts=True)
    return BooleanPrior((found[:, None] >> torch.arange(len(x))) & 1, counts)


def boolean_regret(
    prior: BooleanPrior,
    target: Int[Tensor, " inputs"],
    n: int,
    *,
    flip: float = 0.1,
    sequences: int = 40,
    seed: int = 0,
) -> Float[Tensor, " n"]:
    """Total online regret ``t R_o(t)`` in nats for ``t = 1..n``, mean over sequences of random inputs.

    Labels are the target's, flipped with probability ``flip``, which every hypothesis knows.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(len(target), (sequences, n), generator=generator)
    labels = target[inputs] ^ (torch.rand(sequences, n, generator=generator) < flip).long()
    right, wrong = math.log(1 - flip), math.log(flip)
    truth = torch.where(labels == target[inputs], right, wrong).cumsum(1)
    total = torch.zeros(n, dtype=torch.float64)
    for row in range(sequences):
        agree = prior.functions[:, inputs[row]] == labels[row]
        evidence = torch.where(agree, right, wrong).double().cumsum(1)
        total += truth[row] - torch.logsumexp(prior.log_weights[:, None] + evidence, 0)
    return total / sequences


class AnnealedEvidence(NamedTuple):
    """``log_evidence`` (a lower bound in expectation) with its standard error over chains, in nats; acceptance rate."""

    log_evidence: float
    error: float
    acceptance: float


def annealed_log_evidence(
    log_likelihood: Callable[[Float[Tensor, "chains k"]], Float[Tensor, " chains"]],
    dimension: int,
    *,
    prior_std: float = 1.0,
    chains: int = 64,
    temperatures: int = 200,
    moves: int = 2,
    step: float = 0.1,
    seed: int = 0,
) -> AnnealedEvidence:
    """``ln ∫ N(θ; 0, τ²I) P(data | θ) dθ`` by annealed importance sampling with Langevin moves.

    Chains begin at draws of the prior; the likelihood's power rises from 0 to 1 (quartically, slowly at first), each
    rise multiplies the chain's weight, and Metropolis-adjusted Langevin moves follow. Neal, "Annealed Importance
    Sampling", 2001.

    Args:
        log_likelihood: of all data, for each chain.
        dimension: ``k``.
        prior_std: ``τ``.
        chains: independent estimates.
        temperatures: rises of the power.
        moves: at each power.
        step: of the moves at the start, adapted to an acceptance of about 0.6.
        seed: of everything.

    Raises:
        ValueError: a log-likelihood that is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = prior_std * torch.randn(chains, dimension, generator=generator, dtype=torch.float64)
    powers = (torch.arange(temperatures + 1, dtype=torch.float64) / temperatures) ** 4

    def look(at: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
        place = at.detach().requires_grad_()
        fit = log_likelihood(place)
        if bool(torch.isnan(fit).any()):
            raise ValueError("the log-likelihood is NaN")
        target = power * fit - (place**2).sum(-1) / (2 * prior_std**2)
        (slope,) = torch.autograd.grad(target.sum(), place)
        return fit.detach(), target.detach(), slope

    weights = torch.zeros(chains, dtype=torch.float64)
    accepted, tried, size = 0.0, 0, step
    for before, power in zip(powers[:-1].tolist(), powers[1:].tolist(), strict=True):
        fit, target, slope = look(theta, power)
        weights += (power - before) * fit
        for _ in range(moves):
            noise = torch.randn(chains, dimension, generator=generator, dtype=torch.float64)
            proposal = theta + size / 2 * slope + math.sqrt(size) * noise
            _, new_target, new_slope = look(proposal, power)
            forth = -(noise**2).sum(-1) / 2
            back = -((theta - proposal - size / 2 * new_slope) ** 2).sum(-1) / (2 * size)
            draw = torch.rand(chains, generator=generator, dtype=torch.float64).log()
            taken = draw < new_target - target + back - forth
            theta = torch.where(taken[:, None], proposal, theta)
            target = torch.where(taken, new_target, target)
            slope = torch.where(taken[:, None], new_slope, slope)
            rate = float(taken.double().mean())
            accepted, tried = accepted + rate, tried + 1
            # One size for all chains, changed between moves only, keeps each move reversible.
            size *= 1.05 if rate > 0.6 else 0.95
    evidence = float(torch.logsumexp(weights, 0)) - math.log(chains)
    ratio = (weights - weights.max()).exp()
    error = float(ratio.std() / ratio.mean() / math.sqrt(chains))
    return AnnealedEvidence(evidence, error, accepted / tried)
