"""The annealing law: do two finished runs tell the loss curve under every other learning-rate schedule?

Tissue, Wang and Wang, "Scaling Law with Learning Rate Annealing", 2024, arXiv 2408.11029.

A language model is trained under six schedules of one peak rate. Every arm is a law; it is fitted to the runs with a
constant rate and a cosine and predicts the other four. ``--data`` takes a folder of loss curves instead (``step, lr,
loss``), or a folder of such folders, one for each seed; ``smoke`` makes curves from a known law.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.files import read_json
from lossmith.laws import LossCurve, LRAnnealing, areas, read_curves, schedule
from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study

ARMS = {
    "law": "L0 + A S1^-alpha - C S2, fitted to a constant rate and a cosine",
    "no-annealing": "the same without the annealing term, C = 0",
    "power-law": "a power law in steps, blind to the learning rate",
    "one-curve": "the law, fitted to the cosine alone",
    "real-warm-up": "the law, with the warm-up as it was instead of as if at the peak",
    "chosen-decay": "the law, its decay chosen by the fit",
}

CLAIMS = (
    Claim("The annealing term at least halves the error on unseen schedules", "law", "error", ratio=0.5),
    Claim("The law beats a power law in steps on unseen schedules", "law", "error", against="power-law"),
    Claim("The annealing term at least halves the error of the last loss", "law", "end_error", ratio=0.5),
    Claim("A second schedule is worth its run", "law", "error", against="one-curve"),
    Claim(
        "The schedule that the law picks is at most 0.005 nats worse than that picked without annealing",
        "law",
        "regret",
        margin=-0.005,
    ),
)

# Hugging Face's schedules by the runs' names; lengths are shares of the run, rates of the peak.
SCHEDULES: dict[str, tuple[str, dict[str, float]]] = {
    "constant": ("constant_with_warmup", {}),
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "wsd": ("warmup_stable_decay", {"num_decay_steps": 0.2, "min_lr_ratio": 0.1}),
    "linear": ("linear", {}),
    "restarts": ("cosine_with_restarts", {"num_cycles": 2}),
    "inverse-sqrt": ("inverse_sqrt", {}),
}
WARMUP = 0.05


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One law, fitted to the first curves and judged on the others."""
    curves, costs = _curves(options, seed, folder.parents[2])
    fitting = [_named(name.strip(), curves) for name in str(options["fit"]).split(",")]
    unseen = [curve for name, curve in curves.items() if name not in fitting]
    if not unseen:
        raise InputError("every curve is fitted (option fit), none is left to predict")
    if arm == "one-curve":
        fitting = fitting[-1:]
    law, seen = _law(arm, curves[fitting[0]], options), [_as_seen(arm, curves[name]) for name in fitting]
    # Refits only where their intervals are judged.
    fitted = law.fit(seen, bootstrap=100 if arm == "law" else 0)
    errors, ends, lasts, held = [], [], [], []
    for curve in unseen:
        shown = _as_seen(arm, curve)
        begun = np.searchsorted(shown.steps, fitted.table.columns["step"].min())
        at, measured = shown.steps[begun:], shown.losses[begun:]
        predicted = fitted.predict(schedule=shown.rates, at=at)
        errors.append(100 * float(np.abs(predicted / measured - 1).mean()))
        ends.append(100 * abs(float(predicted[-1] / measured[-1] - 1)))
        lasts.append((float(predicted[-1]), float(measured[-1])))
        if arm == "law":
            held.append(float(fitted.interval(0.9, schedule=shown.rates, at=at).covers(measured).mean()))
    picked = min(lasts)[1]
    metrics = {
        "error": float(np.mean(errors)),
        "worst_error": max(errors),
        "end_error": float(np.mean(ends)),
        "regret": picked - min(measured for _, measured in lasts),
        **({"held": float(np.mean(held))} if held else {}),
    }
    return Experiment(metrics, _total([costs[name] for name in fitting if name in costs]))


def _named(name: str, curves: Mapping[str, LossCurve]) -> str:
    """The curve of that name, else the shortest whose name begins so (``cosine`` for ``cosine_24000``)."""
    found = [other for other in curves if other == name or other.startswith(name)]
    if not found:
        raise InputError(f"there is no curve '{name}' to fit: {did_you_mean(name, curves)}")
    return min(found, key=lambda other: (other != name, int(curves[other].steps[-1]), other))


def _law(arm: str, curve: LossCurve, options: Mapping[str, Any]) -> LRAnnealing:
    decay = 1 - 1 / max(2.0, float(options["memory"]) * int(curve.steps[-1]))
    law = LRAnnealing(decay=decay, exclude=float(options["exclude"]), one_schedule=arm in ("one-curve", "power-law"))
    if arm in ("no-annealing", "power-law"):
        return dataclasses.replace(law, fixed={"C": 0.0})
    if arm == "real-warm-up":
        return dataclasses.replace(law, warmup="actual")
    return dataclasses.replace(law, decay=None) if arm == "chosen-decay" else law


def _as_seen(arm: str, curve: LossCurve) -> LossCurve:
    return dataclasses.replace(curve, rates=np.ones(len(curve.rates))) if arm == "power-law" else curve


def _curves(
    options: Mapping[str, Any], seed: int, out: Path
) -> tuple[dict[str, LossCurve], dict[str, Mapping[str, Any]]]:
    """The runs of a seed by name, and what their training cost."""
    if options.get("data"):
        return _given(Path(options["data"]), seed), {}
    if options["model"] == "synthetic":
        return {name: _synthetic(name, seed, int(options["steps"])) for name in SCHEDULES}, {}
    folder = out / "curves" / f"seed-{seed}"
    _train(options, seed, folder)
    curves = {curve.name: curve for curve in read_curves(folder)}
    return curves, {name: read_json(folder / name / "result.json")["cost"] for name in curves}


def _given(path: Path, seed: int) -> dict[str, LossCurve]:
    """Curves of the user: of the ``seed``-th folder, where there are several."""
    folders = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    if folders and seed >= len(folders):
        raise InputError(f"{path} has {len(folders)} folders of curves, one for each seed: say --seeds {len(folders)}")
    if not folders and seed > 0:
        raise InputError(f"{path} has the curves of one seed: say --seeds 1")
    return {curve.name: curve for curve in read_curves(folders[seed] if folders else path)}


def _synthetic(name: str, seed: int, steps: int) -> LossCurve:
    """A known law under 0.3 percent of noise."""
    texts = {
        "constant": "constant(peak=1e-3)",
        "cosine": "cosine(peak=1e-3, floor=1e-4)",
        "wsd": "wsd(peak=1e-3, decay=0.2, floor=1e-4)",
        "linear": "linear(peak=1e-3)",
        "restarts": "cyclic(peak=1e-3, cycles=2)",
        "inverse-sqrt": "inverse_sqrt(peak=1e-3, timescale=100)",
    }
    rates = schedule(texts[name]).values(steps)
    at = np.arange(steps // 10, steps + 1, max(1, steps // 100))
    first, second = (area[at - 1] for area in areas(rates, 1 - 1 / (0.04 * steps)))
    rng = np.random.default_rng([seed, list(texts).index(name)])
    # The sizes of the terms are those of a 100M-parameter model: annealing is worth 4 percent of the loss.
    loss = 2.6 + 0.5 * (first * 4000 / steps) ** -0.6 - 0.12 * second / (0.04 * steps * 1e-3)
    return LossCurve.of(name, at, loss * np.exp(0.003 * rng.standard_normal(len(at))), rates)


def _train(options: Mapping[str, Any], seed: int, folder: Path) -> None:
    """Train under every schedule; several processes share the work, a run at a time."""
    from lossmith.training.language_model import LanguageModelRun, run_language_model
    from lossmith.training.record import locked

    steps = int(options["steps"])
    left = list(SCHEDULES)
    while left:
        waiting = []
        for name in left:
            if (folder / name / "result.json").exists():
                continue
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(folder / f".{name}", wait_seconds=0))
                except InputError:
                    waiting.append(name)
                    continue
                kind, settings = SCHEDULES[name]
                extra = {k: round(v * steps) if k.endswith("_steps") else v for k, v in settings.items()}
                run = LanguageModelRun(
                    arm=name,
                    seed=seed,
                    corpus=str(options["corpus_fingerprint"]),
                    steps=steps,
                    model=str(options["model"]),
                    random_weights=bool(options["random_weights"]),
                    sequence_length=int(options["sequence_length"]),
                    batch_size=int(options["batch_size"]),
                    micro_batch_size=options["micro_batch_size"],
                    eval_rows=int(options["eval_rows"]),
                    evaluations=int(options["evaluations"]),
                    checkpoints=1,
                    training={
                        "learning_rate": float(options["learning_rate"]),
                        "warmup_steps": round(WARMUP * steps),
                        "lr_scheduler_type": kind,
                        "lr_scheduler_kwargs": extra,
                        "logging_steps": max(1, steps // 200),
                    },
                )
                result = run_language_model(run, folder / name, str(options["corpus_folder"]))
                if result["status"] != "finished":
                    raise RuntimeError(result["error"])
        left = waiting
        time.sleep(0.2 if waiting else 0.0)


def prepare(options: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The corpus to train on, where something is trained."""
    if options.get("data") or options["model"] == "synthetic":
        return {}
    from lossmith.data import prepare as prepare_corpus
    from lossmith.training.models import PRESETS

    model = str(options["model"])
    corpus = prepare_corpus(
        str(options["corpus"]),
        tokenizer=None if model in PRESETS else model,
        vocab_size=int(options["vocab_size"]),
        sequence_length=int(options["sequence_length"]),
    )
    needed = int(options["steps"]) * int(options["batch_size"])
    if needed > len(corpus.train):
        raise InputError(f"{options['corpus']} has {len(corpus.train)} training sequences; {needed} are needed")
    return {"corpus_folder": str(corpus.folder), "corpus_fingerprint": corpus.fingerprint}


def _total(costs: Sequence[Mapping[str, Any]]) -> Cost:
    """What the fitted runs cost: the price of the prediction."""
    if not costs:
        return Cost()
    names = ("tokens", "steps", "seconds", "flops")
    return Cost(**{name: sum(cost[name] for cost in costs) for name in names})


_SHARED = {"fit": "constant,cosine", "memory": 0.04, "exclude": 0.1}
_NANO = {
    **_SHARED,
    "model": "nano",
    "random_weights": False,
    "corpus": "python",
    "vocab_size": 512,
    "sequence_length": 64,
    "batch_size": 16,
    "micro_batch_size": None,
    "steps": 480,
    "learning_rate": 8e-3,
    "evaluations": 40,
    "eval_rows": 64,
}

STUDY = Study(
    slug="lr-annealing-law",
    family="laws",
    question="Do two finished runs tell the loss curve under every other learning-rate schedule?",
    paper=Paper("Scaling Law with Learning Rate Annealing", 2024, "2408.11029"),
    arms=ARMS,
    baseline="no-annealing",
    metric="error",
    metrics=("error", "worst_error", "end_error", "regret", "held"),
    better={"worst_error": "lower", "end_error": "lower", "regret": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 3, "quick": 3, "full": 3},
    options={
        "smoke": {**_SHARED, "model": "synthetic", "steps": 2000},
        "quick": _NANO,
        "full": {
            **_NANO,
            "model": "HuggingFaceTB/SmolLM2-135M",
            "random_weights": True,
            "corpus": "HuggingFaceFW/fineweb:sample-10BT:train",
            "sequence_length": 1024,
            "batch_size": 256,
            "micro_batch_size": 16,
            "steps": 20_000,
            "learning_rate": 1e-3,
            "evaluations": 200,
            "eval_rows": 1024,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a folder of loss curves (step, lr, loss), or of such folders, one for each seed",
    notes=(
        "error, worst_error, end_error: mean over the schedules that were not fitted, the worst of them, and at their "
        "ends, in percent of the loss. regret: the measured last loss of the schedule that the law ranks first, above "
        "the best of those schedules, in nats. held: share of the losses inside the law's 90% intervals.",
        "Cost is that of training the runs that are fitted; fitting takes a fraction of a second.",
    ),
)
