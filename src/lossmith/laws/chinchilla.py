"""Loss by parameters and tokens, and the best size for a budget.

Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, arXiv 2203.15556, equations 2-4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.alternatives import Alternatives, rank_trainings
from lossmith.laws.fitted import Fitted
from lossmith.laws.law import Law
from lossmith.laws.tables import LOSS, PARAMS, TOKENS, Column
from lossmith.laws.terms import Array, Exponent, Term, Terms

#: Hoffmann et al. 2022, approach 3, as printed.
HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
#: Besiroglu et al., "Chinchilla Scaling: A replication attempt", 2024, arXiv 2404.10102.
BESIROGLU = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A size and a number of tokens for a budget; limits are the bootstrap's at ``level``.

    Attributes:
        flops: training compute, ``6 params tokens``.
        params: parameters.
        tokens: training tokens.
        loss: predicted.
        level: of the limits.
        params_limits, tokens_limits, loss_limits: lower and upper; NaN without bootstrap refits.
        extrapolation: the plan's compute over the largest in the fitted data.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    level: float
    params_limits: tuple[float, float]
    tokens_limits: tuple[float, float]
    loss_limits: tuple[float, float]
    extrapolation: float

    @property
    def tokens_per_parameter(self) -> float:
        """The ratio that is 20 in Hoffmann et al.'s rule of thumb."""
        return self.tokens / self.params

    def text(self) -> str:
        """A few lines, for people."""

        def line(what: str, value: float, limits: tuple[float, float], form: str) -> str:
            span = (
                f"   {100 * self.level:g}% limits {limits[0]:{form}} to {limits[1]:{form}}"
                if limits[0] == limits[0]
                else ""
            )
            return f"  {what:20} {value:{form}}{span}"

        lines = [
            f"  {'training FLOPs':20} {self.flops:.3g}",
            line("parameters", self.params, self.params_limits, ".3g"),
            line("tokens", self.tokens, self.tokens_limits, ".3g"),
            f"  {'tokens per parameter':20} {self.tokens_per_parameter:.3g}",
            line("loss", self.loss, self.loss_limits, ".4f"),
        ]
        if self.extrapolation > 1:
            lines.append(f"  extrapolated: {self.extrapolation:.3g} times the compute of the largest fitted run")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chinchilla(Law):
    r"""``L = E + A / N**alpha + B / D**beta``.

    ``E`` is the loss that neither size nor data removes; ``A / N**alpha`` is what a finite model of ``N`` parameters
    adds, ``B / D**beta`` what ``D`` tokens add. All of them are in the loss's unit (nats per token).

    Source: Hoffmann et al. 2022 (arXiv 2203.15556), equation 2, fitted as in its equation 3 (Huber loss with threshold
    1e-3 on log residuals). Least squares on the raw loss, as Choshen et al. 2024 (arXiv 2410.11840) do:
    ``Chinchilla(objective=SQUARES)``.

    >>> import numpy as np
    >>> n, d = np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5))
    >>> loss = 1.7 + 400 * n.ravel() ** -0.34 + 1500 * d.ravel() ** -0.33
    >>> fitted = Chinchilla().fit({"params": n.ravel(), "tokens": d.ravel(), "loss": loss}, bootstrap=0)
    >>> round(fitted.parameters["alpha"], 6), round(float(fitted.predict(params=7e9, tokens=3e11)), 4)
    (0.34, 2.1245)
    """

    name: ClassVar[str] = "chinchilla"
    formula: ClassVar[str] = "loss = E + A / params^alpha + B / tokens^beta"
    needed: ClassVar[tuple[Column, ...]] = (PARAMS, TOKENS, LOSS)

    @property
    def terms(self) -> Terms:
        """Three terms, two exponents."""
        return Terms(
            (Term("E"), Term("A", {"params": "alpha"}), Term("B", {"tokens": "beta"})),
            (Exponent("alpha"), Exponent("beta")),
        )

    def plan(  # type: ignore[override]
        self,
        fitted: Fitted,
        *,
        flops: float | None = None,
        loss: float | None = None,
        params: float | None = None,
        tokens: float | None = None,
        level: float = 0.9,
        what_if: Sequence[str | Mapping[str, Any]] = (),
    ) -> Plan | Alternatives:
        r"""The best training for a budget of ``flops``, or the cheapest that reaches a ``loss``.

        With ``C = 6 N D`` the optimum is, by Hoffmann et al.'s equation 4,
        ``N = G (C/6)**(beta/(alpha+beta))``, ``D = (C/6)**(alpha/(alpha+beta)) / G``,
        ``G = (alpha A / (beta B))**(1/(alpha+beta))``.

        Args:
            fitted: the fit.
            flops: budget of training compute.
            loss: wanted loss, instead of a budget.
            params: a size that is given (then only tokens are planned).
            tokens: tokens that are given (then only the size is planned).
            level: of the limits.
            what_if: trainings to rank beside the best one for ``flops``; see
                :func:`lossmith.laws.alternatives.rank_trainings`.

        Returns:
            A :class:`Plan`; :class:`~lossmith.laws.Alternatives` where ``what_if`` asks for some.

        Raises:
            InputError: not exactly one of ``flops`` and ``loss``; a loss that the law never reaches.
        """
        if what_if:
            if loss is not None:
                raise InputError("what_if goes with flops (a budget) or alone, not with loss (a goal)")
            best = None
            if flops is not None:
                own = self.plan(fitted, flops=flops, params=params, tokens=tokens, level=level)
                assert isinstance(own, Plan)
                best = (own.params, own.tokens)
            return rank_trainings(fitted, what_if, flops=flops, level=level, optimum=best)
        if (flops is None) == (loss is None):
            raise InputError("plan needs flops (a budget) or loss (a goal), one of them")
        if params is not None and tokens is not None:
            raise InputError("plan takes params or tokens as given, not both: there would be nothing to choose")
        for name, value in (("flops", flops), ("loss", loss), ("params", params), ("tokens", tokens)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive and finite, got {value:g}")
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level:g}")
        every = np.concatenate([fitted.best[None], fitted.samples])
        size, data = _optimum(every, flops, loss, params, tokens)
        if not np.isfinite(size[0]) or not np.isfinite(data[0]) or size[0] <= 0 or data[0] <= 0:
            if loss is not None:
                given = "".join(
                    f" with {n} {v:g}" for n, v in (("params", params), ("tokens", tokens)) if v is not None
                )
                raise InputError(
                    f"the law does not reach a loss of {loss:g}{given}: what remains is "
                    f"{_floor(every[0], params, tokens):.4g}"
                )
            raise InputError("the fitted law has no best size for a budget: an exponent or a coefficient is 0")
        value = self.evaluate(every[0], {"params": size[:1], "tokens": data[:1]})[0]
        nan = (float("nan"), float("nan"))
        size_limits = data_limits = loss_limits = nan
        if len(fitted.samples):
            sure = np.isfinite(size[1:]) & np.isfinite(data[1:])
            size_limits, data_limits = (_limits(v[1:][sure], level) for v in (size, data))
            found = fitted.interval(level, params=size[0], tokens=data[0])
            loss_limits = (float(found.low), float(found.high))
        seen = 6 * fitted.table.columns["params"] * fitted.table.columns["tokens"]
        spent = 6 * float(size[0]) * float(data[0])
        return Plan(
            spent,
            float(size[0]),
            float(data[0]),
            float(value),
            level,
            size_limits,
            data_limits,
            loss_limits,
            spent / float(seen.max()),
        )


def _optimum(
    every: Array, flops: float | None, loss: float | None, params: float | None, tokens: float | None
) -> tuple[Array, Array]:
    e, a, b, alpha, beta = every.T
    with np.errstate(all="ignore"):
        if flops is not None:
            product = flops / 6
            if params is not None:
                return np.full(len(e), float(params)), np.full(len(e), product / params)
            if tokens is not None:
                return np.full(len(e), product / tokens), np.full(len(e), float(tokens))
            g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
            return g * product ** (beta / (alpha + beta)), product ** (alpha / (alpha + beta)) / g
        assert loss is not None
        rest = loss - e
        if params is not None:
            return np.full(len(e), float(params)), _inverse(b, rest - a * params**-alpha, beta)
        if tokens is not None:
            return _inverse(a, rest - b * tokens**-beta, alpha), np.full(len(e), float(tokens))
        # At the optimum alpha A N^-alpha = beta B D^-beta: the two terms share what is left in the ratio beta : alpha.
        return _inverse(a, rest * beta / (alpha + beta), alpha), _inverse(b, rest * alpha / (alpha + beta), beta)


def _inverse(coefficient: Array, value: Array, exponent: Array) -> Array:
    """``x`` with ``coefficient * x**-exponent == value``."""
    return np.where(value > 0, (coefficient / value) ** (1 / exponent), np.nan)


def _floor(best: Array, params: float | None, tokens: float | None) -> float:
    e, a, b, alpha, beta = best
    return float(e + (a * params**-alpha if params else 0) + (b * tokens**-beta if tokens else 0))


def _limits(values: Array, level: float) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
