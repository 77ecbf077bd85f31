"""The curves behind the critical mixture ratio: losses over tokens, losses over the share, and the critical time.

All functions take batches of parameters. Time ``t`` is tokens over the budget that was measured, so that coefficients
are in nats and no unit of tokens matters.

Gu et al., "CMR Scaling Law: Predicting Critical Mixture Ratios for Continual Pre-training of Language Models", 2024,
arXiv 2407.17467, equations 5-8.
"""

from __future__ import annotations

import numpy as np

from lossmith.laws.fitting import SQUARES, fit_terms
from lossmith.laws.terms import Array, Exponent, Term, Terms

_FREE = -np.inf
# The engine's columns enter as column ** -exponent: its exponents are the negative of those in the equations.
_WIDE = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0)

#: Equation 6, domain loss: ``alpha1 t**s1 + beta1``.
DOMAIN_CURVE = Terms(
    (Term("alpha1", {"t": "s1"}, lower=_FREE), Term("beta1", lower=_FREE)),
    (Exponent("s1", -3.0, 3.0, _WIDE[2:]),),
)
#: Equation 6, general loss: ``alpha2 t**s2 + alpha3 t**s3 + beta2``; one power rises, the other falls.
GENERAL_CURVE = Terms(
    (Term("alpha2", {"t": "s2"}, lower=_FREE), Term("alpha3", {"t": "s3"}, lower=_FREE), Term("beta2", lower=_FREE)),
    (
        Exponent("s2", -1.5, -0.05, (-0.05, -0.15, -0.3, -0.5, -0.7, -0.9)),
        Exponent("s3", -1.5, -0.05, (-0.1, -0.2, -0.4, -0.6, -0.8, -1.0, -1.2, -1.5)),
    ),
)
# Equation 5 (loss over the share) and equation 8 (share over the critical time) have one shape.
_POWER = Terms(
    (Term("alpha", {"x": "s"}, lower=_FREE), Term("beta", lower=_FREE)),
    (Exponent("s", -8.0, 3.0, _WIDE),),
)
# With two points equation 8 is drawn nearly logarithmic: the mean of the four published exponents is -0.04.
_TWO_POINT_EXPONENT = 0.01


def in_order(parameters: Array) -> Array:
    """Parameters of :data:`GENERAL_CURVE` as the engine gives them, with the equation's signs and ``s2 <= s3``.

    >>> in_order(np.array([-0.02, 0.1, 0.0, -0.9, -0.5])).tolist()
    [0.1, -0.02, 0.0, 0.5, 0.9]
    """
    a2, a3, b, e2, e3 = np.moveaxis(np.asarray(parameters, dtype=np.float64), -1, 0)
    turned = e2 < e3
    return np.stack(
        [np.where(turned, a3, a2), np.where(turned, a2, a3), b, -np.maximum(e2, e3), -np.minimum(e2, e3)], -1
    )


def domain_change(parameters: Array, t: Array) -> Array:
    """``alpha1 t**s1 + beta1`` for parameters ``(..., 3)`` ``(alpha1, beta1, s1)`` and ``t`` that broadcasts."""
    a, b, s = np.moveaxis(parameters, -1, 0)
    return a * t**s + b


def general_change(parameters: Array, t: Array) -> Array:
    """``alpha2 t**s2 + alpha3 t**s3 + beta2`` for parameters ``(..., 5)`` ``(alpha2, alpha3, beta2, s2, s3)``."""
    a2, a3, b, s2, s3 = np.moveaxis(parameters, -1, 0)
    return a2 * t**s2 + a3 * t**s3 + b


def general_peak(parameters: Array) -> Array:
    r"""Where general loss turns from rising to falling.

    .. math:: t = \Bigl(-\frac{\alpha_2 s_2}{\alpha_3 s_3}\Bigr)^{1/(s_3 - s_2)}

    0 where it falls from the start, ``inf`` where it rises in the end.

    >>> round(float(general_peak(np.array([0.1, -0.02, 0.0, 0.5, 0.9]))), 6)
    12.860082
    """
    a2, a3, _, s2, s3 = np.moveaxis(np.asarray(parameters, dtype=np.float64), -1, 0)
    first, last = a2 * s2, a3 * s3
    with np.errstate(all="ignore"):
        peak = np.exp((np.log(first) - np.log(-last)) / (s3 - s2))
    equal = s3 == s2
    rises = np.where(equal, first + last > 0, (last > 0) | ((last == 0) & (first > 0)))
    peaked = (first > 0) & (last < 0) & ~equal
    return np.where(peaked, peak, np.where(rises, np.inf, 0.0))


def critical_time(
    general: Array, domain: Array, *, lagrange: float = np.inf, first: Array | float = 1e-6, scan: float = 1000.0
) -> Array:
    r"""The time after which ``F = L_dom + lambda (dL_gen - eps)`` falls for good: definition 4 and equation 7.

    .. math:: \alpha_1 s_1 t^{s_1 - 1} + \lambda(\alpha_2 s_2 t^{s_2 - 1} + \alpha_3 s_3 t^{s_3 - 1}) = 0

    :math:`F'` usually has two zeros: domain loss falls so steeply at first that :math:`F` does too, then :math:`F`
    rises, then it falls. The last change from rising to falling is meant; it is found by a scan and bisection,
    because iterating equation 7 may diverge or end in the wrong zero.

    Args:
        general: ``(..., 5)``, as for :func:`general_change`.
        domain: ``(..., 3)``, as for :func:`domain_change`.
        lagrange: how much general loss matters; ``inf`` gives its peak, which finite values approach from below.
        first: where the scan begins: nothing is known before the first measurement.
        scan: where it ends.

    Returns:
        ``(...)``: 0 where ``F`` falls from ``first`` on, ``inf`` where it still rises at ``scan``.

    >>> general, domain = np.array([0.1, -0.02, 0.0, 0.5, 0.9]), np.array([0.8, 0.0, -0.3])
    >>> [round(float(critical_time(general, domain, lagrange=x)), 6) for x in (10, 100, 1000)]
    [10.66074, 12.658494, 12.840067]
    """
    if not lagrange > 0:
        raise ValueError(f"lagrange must be positive, got {lagrange:g}")
    shape = np.broadcast_shapes(np.shape(general)[:-1], np.shape(domain)[:-1])
    start = np.broadcast_to(np.asarray(first, dtype=np.float64), shape)
    if np.isinf(lagrange):
        a2, a3, _, s2, s3 = np.moveaxis(np.asarray(general, dtype=np.float64), -1, 0)
        # What happens beyond the scan does not count: a power with a coefficient of rounding errors wins in the end.
        rising = np.broadcast_to(a2 * s2 * scan**s2 + a3 * s3 * scan**s3 > 0, shape)
        peak = np.broadcast_to(general_peak(general), shape)
        return np.where(rising, np.inf, np.where(np.isinf(peak) | (peak < start), 0.0, peak))
    wide = np.broadcast_to(general, (*shape, 5)).reshape(-1, 5)
    narrow = np.broadcast_to(domain, (*shape, 3)).reshape(-1, 3)
    found = np.array(
        [
            _last_turn(g, d, lagrange, float(lower), scan)
            for g, d, lower in zip(wide, narrow, start.reshape(-1), strict=True)
        ]
    )
    return found.reshape(shape)


def _last_turn(general: Array, domain: Array, lagrange: float, first: float, scan: float) -> float:
    a1, _, s1 = domain
    a2, a3, _, s2, s3 = general
    logs = np.linspace(np.log(first), np.log(scan), 2000)

    def slope(u: Array | float) -> Array:
        # t F'(t), with t = exp(u), has the zeros of F'; dividing by lambda keeps it finite.
        return np.asarray(
            a1 * s1 * np.exp(s1 * u) / lagrange + a2 * s2 * np.exp(s2 * u) + a3 * s3 * np.exp(s3 * u), dtype=np.float64
        )

    rising = slope(logs) > 0
    if rising[-1]:
        return float("inf")
    turns = np.flatnonzero(rising[:-1] & ~rising[1:])
    if not len(turns):
        return 0.0
    low, high = float(logs[turns[-1]]), float(logs[turns[-1] + 1])
    for _ in range(80):
        middle = 0.5 * (low + high)
        if slope(middle) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp(0.5 * (low + high)))


def power_law(x: Array, y: Array, weights: Array | None = None, *, exponent: float | None = None) -> Array:
    """Least squares of ``alpha x**s + beta``: equation 5 (loss over the share) and equation 8 (share over the time).

    Args:
        x: positive, ``(n,)`` or ``(B, n)``.
        y: ``(n,)`` or ``(B, n)``.
        weights: 0 leaves a point out.
        exponent: given, else between -3 and 8 (the paper's grid ends at 3, too flat for general loss near share 1).

    Returns:
        ``(B, 3)``: alpha, beta, s.

    >>> found = power_law(np.array([1, 0.75, 0.5, 1 / 3]), np.array([1.4628, 1.4844, 1.5122, 1.5387]))
    >>> found.round(3).tolist(), round(float(domain_change(found, np.array(0.25))[0]), 4)
    ([[-0.426, 1.889, 0.178]], 1.5561)
    """
    fixed = None if exponent is None else {"s": -exponent}
    found = fit_terms(_POWER, {"x": x}, y, weights=weights, objective=SQUARES, starts=4, fixed=fixed).parameters
    return found * np.array([1.0, 1.0, -1.0])


def share_reaching(law: Array, value: Array) -> Array:
    """The largest share in [0, 1] at which ``alpha R**s + beta`` does not exceed ``value``; parameters ``(..., 3)``."""
    a, b, s = np.moveaxis(law, -1, 0)
    with np.errstate(all="ignore"):
        share = ((value - b) / a) ** (1 / s)
    # Below the law's whole range there is no share; so it is for a law that falls and is still too high at share 1.
    share = np.where(np.isfinite(share) & (a * s > 0), np.clip(share, 0.0, 1.0), 0.0)
    return np.where(a + b <= value, 1.0, share)


def trend(times: Array, shares: Array) -> tuple[Array, np.ndarray]:
    """Equation 8 through the pairs of critical time and share, ``times`` being ``(B, K)``.

    Times of 0 and infinity are no points of the curve. Three pairs determine it; through two it is drawn with a fixed
    exponent near 0.

    Returns:
        ``(B, 3)`` (alpha4, beta3, s4), NaN where there are fewer than two pairs; and the number of pairs ``(B,)``.
    """
    usable = np.isfinite(times) & (times > 0)
    number = usable.sum(-1)
    law = np.full((len(times), 3), np.nan)
    x = np.where(usable, times, 1.0)
    for several, exponent in ((number >= 3, None), (number == 2, _TWO_POINT_EXPONENT)):
        rows = np.flatnonzero(several)
        if len(rows):
            y = np.broadcast_to(shares, times.shape)[rows]
            law[rows] = power_law(x[rows], y, usable[rows].astype(np.float64), exponent=exponent)
    return law, number


def trend_share(law: Array, times: Array, shares: Array, t: float) -> Array:
    """The critical share at ``t`` by equation 8, in [0, 1]; parameters ``(B, 3)`` from :func:`trend`.

    Where there are too few pairs for a curve it is the largest share of those tried that is past its critical time (0
    for none): no more is known.
    """
    with np.errstate(invalid="ignore"):
        curve = domain_change(law, np.full(len(law), t))
    tried = np.where(times <= t, shares, 0.0).max(-1)
    return np.clip(np.where(np.isfinite(curve), curve, tried), 0.0, 1.0)
