"""Critical mixture ratio: how much domain data can continual pre-training take, and can a few cheap runs tell?

Gu et al., "CMR Scaling Law: Predicting Critical Mixture Ratios for Continual Pre-training of Language Models", 2024,
arXiv 2407.17467.

A small model is pre-trained on English documentation and trained further on code, with documentation replayed beside
it, at several shares of code. The law, fitted without the share of 25 %, predicts what happens there, and gives the
critical share; runs 10 points below and above it show whether it is one. ``--data`` takes the user's own domains;
``full`` is an open model on web text and scientific papers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.mixture_runs import base_model, first_part, mixture_log, prepare_corpus, write_logs
from lossmith.studies.study import Experiment, Paper, Study

if TYPE_CHECKING:
    from lossmith.laws import CriticalRatio, FittedMixture
    from lossmith.training.continual import MixtureLog

HELD_OUT, STEP = "25%", 0.1
SHARES = {"0%": 0.0, "12.5%": 1 / 8, "25%": 1 / 4, "33.3%": 1 / 3, "50%": 1 / 2, "75%": 3 / 4, "100%": 1.0}

ARMS = {
    "base": "the model before continual pre-training",
    "0%": "replay alone",
    "12.5%": "one token in eight from the domain",
    "25%": "one in four: held out from the law",
    "33.3%": "one in three",
    "50%": "one in two",
    "75%": "three in four",
    "100%": "no replay",
    "law": "no training: 25 % predicted from the larger shares; critical ratio from all shares but 25 %",
    "line": "no training: 25 % predicted by a straight line through 33.3 % and 50 %",
    "half": "no training: the law fitted to the first half of the budget; 25 % extrapolated to its end",
    "below": "10 points below the law's critical ratio",
    "above": "10 points above it",
}

CLAIMS = (
    Claim("More domain data raise general loss (50 % against 25 %)", "50%", "general/loss", "higher", "25%"),
    Claim("More domain data lower domain loss (50 % against 25 %)", "50%", "domain/loss", "lower", "25%"),
    Claim("General loss rises and falls again at 33 %, not without replay", "33.3%", "general/fall", "higher", "100%"),
    Claim("25 % is feasible: general loss ends within 0.05 nats", "25%", "general/loss", "lower", margin=-0.05),
    Claim("The share law predicts domain loss at 25 % within 1 %", "law", "held_out/percent", "equal", "25%", 1.0),
    Claim("The share law predicts it better than a straight line", "law", "held_out/error", "lower", "line"),
    Claim("Half of the budget has a lower critical ratio", "half", "critical/ratio", "lower", "law"),
    Claim("10 points below the critical ratio the tolerance is kept", "below", "general/loss", "lower", margin=-0.05),
    Claim("10 points above it the tolerance is broken", "above", "general/loss", "higher", margin=0.05),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One arm: a share's run, or what the law makes of the runs of the others."""
    if arm in SHARES or arm == "base":
        log = mixture_log(seed, SHARES.get(arm, 0.0), options)
        return _measured(arm, log, seed, options)
    fitted_on = [mixture_log(seed, ratio, options) for name, ratio in SHARES.items() if name != HELD_OUT]
    held_out = mixture_log(seed, SHARES[HELD_OUT], options)
    if arm == "line":
        logs = [log for log in fitted_on if log.ratio in (SHARES["33.3%"], SHARES["50%"])]
        return Experiment(_by_line(logs, held_out), _cost(logs, seed, options))
    if arm == "law":
        write_logs(options)
        return Experiment(_by_law(fitted_on, held_out), _cost(fitted_on, seed, options))
    if arm == "half":
        halves = first_part(fitted_on, 0.5)
        return Experiment(_by_first_half(halves, held_out), _cost(halves, seed, options))
    critical = _critical(fit_mixture(fitted_on))
    ratio = critical.ratio + (STEP if arm == "above" else -STEP)
    # To a thousandth: runs are kept by their share.
    log = mixture_log(seed, round(min(max(ratio, 0.0), 1.0), 3), options)
    write_logs(options)
    return _measured(arm, log, seed, options)


def fit_mixture(logs: Sequence[MixtureLog]) -> FittedMixture:
    """The law fitted to one seed's runs."""
    from lossmith.laws import CriticalMixture, FittedMixture

    fitted = CriticalMixture().fit([row for log in logs for row in log.rows()], bootstrap=0)
    assert isinstance(fitted, FittedMixture)
    return fitted


def _critical(fitted: FittedMixture) -> CriticalRatio:
    return fitted.critical_ratio()


def _measured(arm: str, log: MixtureLog, seed: int, options: Mapping[str, Any]) -> Experiment:
    if arm == "base":
        return Experiment({"general/loss": log.base_general, "domain/loss": log.base_domain}, _cost([], seed, options))
    metrics = {
        "general/loss": log.general_loss[-1],
        "domain/loss": log.domain_loss[-1],
        "general/fall": max(log.general_loss) - log.general_loss[-1],
        "share": log.ratio,
    }
    if arm == HELD_OUT:
        metrics |= {"held_out/percent": 100.0, "held_out/error": 0.0}
    curve = Curve(
        steps=tuple(round(log.steps * (i + 1) / len(log.tokens)) for i in range(len(log.tokens))),
        tokens=log.tokens,
        seconds=tuple(log.seconds * (i + 1) / len(log.tokens) for i in range(len(log.tokens))),
        values=log.general_loss,
    )
    return Experiment(metrics, _cost([log], seed, options), evaluation=curve)


def _by_law(logs: Sequence[MixtureLog], held_out: MixtureLog) -> dict[str, float]:
    """As in the paper's table 2: equation 5 through the final losses of the larger shares."""
    import numpy as np

    from lossmith.laws.mixture_curves import domain_change, power_law

    larger = [log for log in logs if log.ratio > held_out.ratio]
    predicted = []
    # As in the law, general loss without any replay is no part of the curve.
    for part, used in (("general", [log for log in larger if log.ratio < 1]), ("domain", larger)):
        losses = np.array([getattr(log, f"{part}_loss")[-1] for log in used])
        law = power_law(np.array([log.ratio for log in used]), losses)
        predicted.append(float(domain_change(law, np.array(held_out.ratio))[0]))
    return _predicted(predicted[0], predicted[1], held_out) | _ratios(_critical(fit_mixture(logs)))


def _by_line(logs: Sequence[MixtureLog], held_out: MixtureLog) -> dict[str, float]:
    first, second = logs
    way = (held_out.ratio - first.ratio) / (second.ratio - first.ratio)
    general = first.general_loss[-1] + way * (second.general_loss[-1] - first.general_loss[-1])
    domain = first.domain_loss[-1] + way * (second.domain_loss[-1] - first.domain_loss[-1])
    return _predicted(general, domain, held_out)


def _by_first_half(logs: Sequence[MixtureLog], held_out: MixtureLog) -> dict[str, float]:
    """The law of the first half: its critical ratio there, and what it says of the held-out share at the end."""
    fitted = fit_mixture(logs)
    end = {"ratio": held_out.ratio, "tokens": held_out.tokens[-1]}
    general, domain = (float(fitted.predict(part=part, **end)) for part in ("general", "domain"))
    return _predicted(general, domain, held_out) | _ratios(_critical(fitted))


def _predicted(general: float, domain: float, held_out: MixtureLog) -> dict[str, float]:
    percent = 100 * domain / held_out.domain_loss[-1]
    return {
        "general/loss": general,
        "domain/loss": domain,
        "held_out/percent": percent,
        "held_out/error": abs(percent - 100),
    }


def _ratios(found: CriticalRatio) -> dict[str, float]:
    return {
        "critical/ratio": found.ratio,
        "critical/trend": found.trend,
        "critical/tolerance": found.within_tolerance,
    }


def _cost(logs: Sequence[MixtureLog], seed: int, options: Mapping[str, Any]) -> Cost:
    """Pre-training, which all arms share, and the runs that the arm needs."""
    _, _, before = base_model(seed, options)
    return Cost(
        tokens=int(before["tokens"]) + sum(log.tokens[-1] for log in logs),
        steps=int(before["steps"]) + sum(log.steps for log in logs),
        seconds=before["seconds"] + sum(log.seconds for log in logs),
        flops=before["flops"] + sum(log.flops for log in logs),
    )


EMBEDDED = {
    "data": "python",
    "text_field": "text",
    "domain_field": None,
    "general": "docs",
    "domain": "code",
    "model": "nano",
    "vocab_size": 512,
    "sequence_length": 64,
    "batch_size": 16,
    "micro_batch_size": None,
    "pretrain_learning_rate": 8e-3,
    "learning_rate": 1e-3,
    "eval_batch_size": 60,
}

STUDY = Study(
    slug="critical-mixture-ratio",
    family="laws",
    question="How much domain data can continual pre-training take before the model forgets, and can a law tell?",
    paper=Paper(
        "CMR Scaling Law: Predicting Critical Mixture Ratios for Continual Pre-training of Language Models",
        2024,
        "2407.17467",
    ),
    arms=ARMS,
    baseline="base",
    metric="general/loss",
    metrics=(
        "general/loss",
        "domain/loss",
        "general/fall",
        "held_out/percent",
        "held_out/error",
        "critical/ratio",
        "critical/trend",
    ),
    better={"domain/loss": "lower", "held_out/error": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            **EMBEDDED,
            "characters": 200_000,
            "eval_rows": 10,
            "pretrain_steps": 30,
            "steps": 16,
            "evaluations": 16,
        },
        "quick": {
            **EMBEDDED,
            "characters": 1_700_000,
            "eval_rows": 120,
            "pretrain_steps": 600,
            "steps": 300,
            "evaluations": 20,
        },
        "full": {
            **EMBEDDED,
            "data": "DKYoon/SlimPajama-6B",
            "domain_field": "meta.redpajama_set_name",
            "general": "RedPajamaC4",
            "domain": "RedPajamaArXiv",
            "model": "EleutherAI/pythia-410m",
            "vocab_size": 50_304,
            "characters": 0,
            "sequence_length": 2048,
            "batch_size": 128,
            "micro_batch_size": 8,
            "learning_rate": 3e-5,
            "eval_rows": 500,
            "eval_batch_size": 8,
            "pretrain_steps": 0,
            "steps": 4000,
            "evaluations": 20,
        },
    },
    experiment=experiment,
    prepare=prepare_corpus,
    data="a folder with one sub-folder per domain, or any corpus with a field that names the domain",
    notes=(
        "general/loss and domain/loss: nats per token on held-out text; general/fall: how far general loss has come "
        "down from its highest point; held_out/percent: domain loss at the share of 25 %, in percent of the measured "
        "one; critical/ratio: the law's critical share at a tolerance of 0.05 nats, critical/trend: the one that the "
        "turns alone would allow.",
        "law, line and half train no model: their losses are predictions of those at 25 %, their cost that of the runs "
        "they are made from.",
    ),
)
