"""What to train and what to fit for a prediction to be trusted: published rules, checked on the user's own table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.chinchilla import Chinchilla
from lossmith.laws.estimation import (
    Estimate,
    Protocol,
    absolute_relative_error,
    estimate_all,
    read_family,
    split_family,
    steps_of_models,
)
from lossmith.laws.fitting import HUBER_LOG, SQUARES
from lossmith.laws.law import Law
from lossmith.laws.tables import Reading, Table
from lossmith.laws.tokens import BORROWED, TiedChinchilla, TokenLaw

# Choshen et al. 2024: differences between seeds reach 3.5 %, published interventions 4 to 50 %; predictions were still
# good 34 times above the largest fitted model; about five models are a sound minimum.
_USEFUL, _FARTHEST, _SOUND = 0.04, 34.0, 5
# A rule is set aside only where the table itself speaks clearly against it: one target is one draw.
_CLEARLY, _AT_LEAST = 2.0, 0.01


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One piece of advice.

    Attributes:
        do: what to do.
        because: why, with what was measured on the table where it can be.
        measured: the numbers behind it (absolute relative errors, unless the name says otherwise).
    """

    do: str
    because: str
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Advice:
    """Recommendations, and the protocol that follows from them.

    Attributes:
        recommendations: in the order to read.
        protocol: what to fit; ``estimate(df, advice.protocol)`` repeats the check below.
        check: the largest model predicted from the others by that protocol; ``None`` for one size.
    """

    recommendations: tuple[Recommendation, ...]
    protocol: Protocol
    check: Estimate | None

    def text(self) -> str:
        """For people."""
        lines = [f"{i}. {one.do}\n   {one.because}" for i, one in enumerate(self.recommendations, 1)]
        return "\n".join(lines)


def advise(
    source: Any, *, target_params: float | None = None, reading: Reading = Reading(), law: Law | None = None
) -> Advice:
    """Say how to estimate a law from a table of checkpoints, and how good the estimate can be expected to be.

    The largest model of the table is predicted from the others in several ways: that is the evidence. The rules are
    those of Choshen et al. 2024 (arXiv 2410.11840); where the table speaks clearly against one (the other
    way at least halves the error), the advice follows the table and says so.

    Args:
        source: checkpoints of one family of models, as for :func:`lossmith.laws.read_table`.
        target_params: size of the model that is to be predicted in the end, to judge how far that is.
        reading: units and headers.
        law: by default Chinchilla's with least squares.

    Raises:
        InputError: a table that cannot be read.

    >>> import numpy as np
    >>> n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(5e8, 3e11, 30)))
    >>> loss = 1.7 + 400 * n**-0.34 + 1500 * d**-0.33 + 3 * np.exp(-d / 2.5e9)
    >>> advice = advise({"params": n, "tokens": d, "loss": loss}, target_params=7e10)
    >>> advice.recommendations[0].do
    'Fit the whole curves, without the first 10 billion tokens.'
    """
    if target_params is not None and not (np.isfinite(target_params) and target_params > 0):
        raise InputError(f"target_params must be positive and finite, got {target_params:g}")
    table = read_family(source, reading)
    sizes = np.unique(table.columns["params"])
    if len(sizes) < 2:
        return _one_size(table, target_params)
    base = Protocol(law=law if law is not None else Chinchilla(objective=SQUARES))
    fitted_sizes = len(sizes) - 1
    if fitted_sizes < 3:
        base = dataclasses.replace(base, law=TiedChinchilla() if fitted_sizes == 2 else _borrowing())
    check = estimate_all(table, [base])[0]
    found = [_early_and_whole(table, base), _objective(table, base), _few_models(table, base)]
    chosen = base
    for _, better in found:
        chosen = better or chosen
    recommendations = [one for one, _ in found if one is not None]
    check = estimate_all(table, [chosen])[0]
    recommendations += [*_alternatives(table, check), _worth(check)]
    if target_params is not None:
        recommendations.append(_distance(sizes, check.scale_up, target_params))
    return Advice(tuple(recommendations), chosen, check)


def _borrowing() -> Law:
    return Chinchilla(objective=SQUARES, fixed=BORROWED)


def _percent(value: float) -> str:
    return "no fit" if np.isnan(value) else f"{100 * value:.2g}%"


def _clearly_better(other: float, than: float) -> bool:
    return bool(other * _CLEARLY < than and than - other > _AT_LEAST)


def _early_and_whole(table: Table, base: Protocol) -> tuple[Recommendation | None, Protocol | None]:
    """Rules 1 and 2: whole curves, without their beginning."""
    cut = base.cut(table)
    ways = {
        "whole curves without the beginning": base,
        "nothing left out": dataclasses.replace(base, min_tokens=0.0),
        "last tenth only": dataclasses.replace(base, last=0.1),
        "end points only": dataclasses.replace(base, last=0.0),
    }
    errors = _errors(table, ways)
    amount = f"{cut / 1e9:g} billion" if cut >= 1e9 else f"{cut:.3g}"
    told = "; ".join(f"{name} {_percent(error)}" for name, error in errors.items())
    usual = errors["whole curves without the beginning"]
    rest = {name: error for name, error in errors.items() if not np.isnan(error)}
    best = min(rest, key=rest.__getitem__) if rest else "whole curves without the beginning"
    reason = f"Error on the largest model, predicted from the others: {told}."
    if _curves(table) < 3:
        return (
            Recommendation(
                "Record the loss at many checkpoints of every run.",
                "This table has end points only; whole curves need no further training, and average the scatter of "
                f"checkpoints. {reason}",
                errors,
            ),
            None,
        )
    if rest and (np.isnan(usual) or _clearly_better(errors[best], usual)):
        better = dataclasses.replace(ways[best], min_tokens=ways[best].min_tokens)
        return (
            Recommendation(
                f"Fit: {best}.",
                f"The rule is to fit whole curves without the first {amount} tokens; this table speaks clearly against "
                f"it. {reason}",
                errors,
            ),
            better,
        )
    between = _share_between_runs(table, base)
    note = ""
    if between > 0.9:
        note = (
            f" Yet {100 * between:.0f}% of what is left over lies between runs, not between checkpoints: more "
            "checkpoints will not help, more models or seeds will."
        )
    return (
        Recommendation(
            f"Fit the whole curves, without the first {amount} tokens.",
            f"Early training follows no power law, and the scatter of checkpoints averages out. {reason}{note}",
            {**errors, "share of variance between runs": between},
        ),
        None,
    )


def _objective(table: Table, base: Protocol) -> tuple[Recommendation | None, Protocol | None]:
    """Squares of the loss, or Huber on logarithms."""
    if base.law.objective not in (SQUARES, HUBER_LOG):
        return None, None
    other = dataclasses.replace(base.law, objective=HUBER_LOG if base.law.objective == SQUARES else SQUARES)
    names = {repr(SQUARES): "least squares", repr(HUBER_LOG): "Huber loss on logarithms"}
    mine, theirs = names[repr(base.law.objective)], names[repr(other.objective)]
    errors = _errors(table, {mine: base, theirs: dataclasses.replace(base, law=other)})
    if not _clearly_better(errors[theirs], errors[mine]):
        return None, None
    return (
        Recommendation(
            f"Fit with the {theirs}.",
            f"On the largest model: {theirs} {_percent(errors[theirs])}, {mine} {_percent(errors[mine])}.",
            errors,
        ),
        dataclasses.replace(base, law=other),
    )


def _few_models(table: Table, base: Protocol) -> tuple[Recommendation, None]:
    """Rules 4 and 5: several small models."""
    available = len(np.unique(table.columns["params"])) - 1
    numbers = steps_of_models(available)
    ways = {f"{k} smallest": dataclasses.replace(base, models=k) for k in numbers}
    errors = _errors(table, ways)
    enough = {name: error for name, error in errors.items() if not np.isnan(error)}
    told = ", ".join(f"{name} {_percent(error)}" for name, error in enough.items()) or "no fit"
    if available < _SOUND:
        do = f"Train more small models: {_SOUND} are a sound minimum, here are {available} besides the largest."
        why = "Several small models beat one larger of the same cost."
    else:
        do = f"{available} models besides the largest are enough; a further one is better small than large."
        why = "Several small models beat one larger of the same cost, and the error is not monotone in their number."
    return Recommendation(do, f"{why} By models used: {told}.", errors), None


def _alternatives(table: Table, check: Estimate) -> list[Recommendation]:
    """Rules 6 and 7: borrowing, and the first part of the target itself."""
    found = []
    size, tokens = table.columns["params"], table.columns["tokens"]
    target = size == size.max()
    cut = Protocol().cut(table)
    limit = 0.3 * tokens[target].max()
    early = table.select(target & (tokens <= limit) & (tokens > cut))
    errors = {"small models": check.are}
    if len(early) >= 4:
        late = table.select(target & (tokens >= 0.7 * tokens[target].max()))
        fitted = TokenLaw(objective=SQUARES).fit_table(early, bootstrap=0)
        errors["30% of its own training"] = absolute_relative_error(
            late.columns["loss"], fitted.predict(tokens=late.columns["tokens"])
        )
    largest_alone = Protocol(law=_borrowing(), models=1, choose="largest")
    errors["one model with a borrowed size part"] = estimate_all(table, [largest_alone])[0].are
    told = ", ".join(f"{name} {_percent(error)}" for name, error in errors.items())
    found.append(
        Recommendation(
            "If the small models cannot be paid for: train the target itself to about 30%, or borrow alpha and A.",
            f"The end of the largest model, from: {told}. Borrowing worked for decoders only; never reuse all five "
            "parameters of another family.",
            errors,
        )
    )
    return found


def _worth(check: Estimate) -> Recommendation:
    """Rule 3, and what no law at all would say."""
    errors = {"law": check.are, "best loss seen": check.best_seen, "last losses seen": check.last_seen}
    told = f"law {_percent(check.are)}, best loss seen {_percent(check.best_seen)}"
    if not check.are < check.best_seen:
        return Recommendation(
            "Do not trust this law yet: it predicts no better than the best loss seen so far.",
            f"Errors: {told}.",
            errors,
        )
    if check.are <= _USEFUL:
        do = f"Expect errors of about {_percent(max(check.are, 0.001))}: enough to tell most changes apart."
    elif check.are <= 0.2:
        do = f"Expect errors of about {_percent(check.are)}: enough for large effects only."
    else:
        do = "Do not decide by this law: its error is larger than most effects of a change."
    return Recommendation(
        do,
        f"Errors: {told}. Seeds differ by up to 3.5%, published changes by 4% to 50%; below 4% is rarely real.",
        errors,
    )


def _distance(sizes: np.ndarray, checked: float, target_params: float) -> Recommendation:
    factor = float(target_params / sizes[-1])
    measured = {"scale-up wanted": factor, "scale-up checked": checked}
    reason = "In the paper, targets 34 times above the largest fitted model were still predicted well."
    if checked == checked:
        reason = f"The check above was {checked:.3g} times above the largest fitted model. {reason}"
    if factor <= 1:
        do = "The target is no larger than what was trained: this is no extrapolation."
    elif factor <= max(_FARTHEST, checked):
        do = f"A target {factor:.3g} times larger is within reach; closer is only mildly better."
    else:
        do = f"A target {factor:.3g} times larger is farther than has been checked; train a model in between."
    return Recommendation(do, reason, measured)


def _one_size(table: Table, target_params: float | None) -> Advice:
    size = float(table.columns["params"][0])
    first = Recommendation(
        f"Train more sizes: {_SOUND} small models are a sound minimum, here is one ({size:.3g} parameters).",
        "Without at least three sizes, what the size adds to the loss cannot be told.",
    )
    second = Recommendation(
        "Until then borrow A and alpha from a family of the same architecture: lossmith.laws.BORROWED, for decoders.",
        "With them one model is enough to fit E, B and beta. In the paper that gave under 1% for OLMo 7B from 1B, and "
        "15 to 37% for OPT-175B; it failed for T5.",
    )
    found = [first, second]
    if target_params is not None:
        found.append(_distance(np.array([size]), float("nan"), target_params))
    return Advice(tuple(found), Protocol(law=_borrowing(), models=1), None)


def _errors(table: Table, ways: Mapping[str, Protocol]) -> dict[str, float]:
    """ARE of each way; NaN where nothing can be fitted so."""
    found = estimate_all(table, list(ways.values()))
    return {name: one.are for name, one in zip(ways, found, strict=True)}


def _curves(table: Table) -> float:
    """Points per run, the median."""
    _, counts = np.unique(table.runs, return_counts=True)
    return float(np.median(counts))


def _share_between_runs(table: Table, base: Protocol) -> float:
    """How much of the residuals' variance lies between runs."""
    own, _ = split_family(table, base)
    fitted = estimate_all(table, [base])[0].fitted
    if fitted is None:
        return float("nan")
    _, codes, counts = np.unique(own.runs, return_inverse=True, return_counts=True)
    residuals = fitted.residuals - fitted.residuals.mean()
    means = np.bincount(codes, residuals) / counts
    whole = float((residuals**2).sum())
    return float((counts * means**2).sum() / whole) if whole > 0 else 0.0
