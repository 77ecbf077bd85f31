"""HMM complexity: how wide should the frozen model be whose head is tuned on few examples?

"Investigating the Impact of Model Complexity in Large Language Models", 2024, arXiv 2410.00699.

Arms are widths of the representation in units of the number of examples. Two worlds: hidden Markov states, where the
best head is known, and images of digits through random features, where it is not. ``--data`` takes your own features
and targets; ``full`` are last-token features of a frozen Pythia.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study

RATIOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.5, 5.0, 10.0)
ARMS = {f"{ratio:g}": f"width {ratio:g} times the number of examples" for ratio in RATIOS} | {
    "1-ridge": "width equal to the number of examples, ridge instead of least norm"
}

CLAIMS = (
    Claim(
        "The first descent is degenerate: the least excess risk is at the smallest width", "0.05", "excess", "higher"
    ),
    Claim("The excess risk rises with the width", "0.2", "excess", "higher", "0.05"),
    Claim("It rises up to the number of examples", "0.8", "excess", "higher", "0.2"),
    Claim("It peaks there", "1", "excess", "higher", "0.8"),
    Claim("It falls beyond", "1.5", "excess", "lower", "1.2"),
    Claim("It falls on", "5", "excess", "lower", "1.5"),
    Claim("The prediction risk does have a first descent", "0.2", "prediction", "lower", "0.01"),
    Claim("Wide models predict better than any narrow one", "5", "prediction", "lower", "0.2"),
    Claim("Ridge removes the peak", "1-ridge", "excess", "lower", "1", ratio=0.1),
    Claim("Real features peak at the number of examples, tenfold", "1", "features", "higher", "0.2", ratio=10),
    Claim("Real features are best far beyond", "10", "features", "lower", "0.2"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Excess and prediction risk on hidden Markov states; held-out error on features."""
    import warnings

    from lossmith.theory import complexity_sweep, complexity_sweep_features

    started = time.perf_counter()
    ratio, ridge = (1.0, float(options["ridge"])) if arm == "1-ridge" else (float(arm), 0.0)
    n = int(options["examples"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (point,) = complexity_sweep(
            [max(1, round(ratio * n))],
            n,
            d=int(options["states"]),
            rho=float(options["rho"]),
            feature_noise=float(options["feature_noise"]),
            repeats=int(options["repeats"]),
            ridge=ridge,
            seed=seed,
        )
    # At the peak the mean does not exist.
    metrics = {"excess": point.median, "prediction": point.best + point.median}
    if not ridge and math.isfinite(point.theory) and abs(ratio - 1) > 0.1:
        metrics["excess_over_theory"] = point.excess / point.theory
    features, targets = _features(options, seed)
    train = min(int(options["feature_examples"]), len(features) // 2)
    width = max(1, round(ratio * train))
    if width <= features.shape[1]:
        (found,) = complexity_sweep_features(
            features,
            targets,
            [width],
            train,
            splits=int(options["splits"]),
            ridge=float(options["feature_ridge"]) if ridge else 0.0,
            project="first" if options.get("data") is None and options["model"] is None else "random",
            seed=seed,
        )
        metrics["features"] = found.error
        if math.isfinite(found.accuracy):
            metrics["accuracy"] = found.accuracy
    return Experiment(metrics, Cost(seconds=time.perf_counter() - started))


def _features(options: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    import numpy as np

    if (data := options.get("data")) is not None and options["model"] is None:
        return read_features(Path(data))
    if options["model"] is not None:
        return _model_features(options)
    from sklearn.datasets import load_digits

    digits = load_digits()
    width = 10 * int(options["feature_examples"])
    g = np.random.default_rng([seed, 7]).standard_normal((64, width)) / 8
    return np.maximum(digits.data / 16 @ g, 0), digits.target


def read_features(path: Path) -> tuple[Any, Any]:
    """``features`` and ``targets`` of a safetensors file, or a CSV whose last column is the class.

    Raises:
        InputError: another kind of file, missing tensors, or cells that are no numbers.
    """
    import numpy as np

    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        found = load_file(path)
        if missing := {"features", "targets"} - set(found):
            raise InputError(f"{path} lacks {' and '.join(sorted(missing))}; it holds {', '.join(sorted(found))}")
        return found["features"], found["targets"]
    if path.suffix == ".csv":
        try:
            table = np.genfromtxt(path, delimiter=",", skip_header=1)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a table of numbers: {error}") from None
        if table.ndim != 2 or table.shape[1] < 2 or not np.isfinite(table).all():
            raise InputError(f"{path} must hold numbers in at least two columns, the last of them the class")
        return table[:, :-1], table[:, -1].astype(int)
    raise InputError(f"--data {path} must be a .safetensors file (features, targets) or a .csv file")


def _model_features(options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Last-token features of labelled texts (JSONL with ``text`` and ``label``, or a hub id) in a frozen model."""
    import datasets
    import numpy as np
    from transformers import AutoModel

    from lossmith.data import load_tokenizer
    from lossmith.probes import extract_last_token_features

    source = str(options.get("data") or options["texts"])
    rows = (
        datasets.load_dataset("json", data_files=source, split="train")
        if Path(source).exists()
        else datasets.load_dataset(source, split="train")
    )
    rows = rows.select(range(min(len(rows), int(options["rows"]))))
    model, tokenizer = AutoModel.from_pretrained(options["model"]), load_tokenizer(options["model"])
    features = extract_last_token_features(model, tokenizer, rows["text"], min_length=1, max_length=256)
    return features.double().numpy(), np.array(rows["label"])


SMALL = {
    "model": None,
    "examples": 100,
    "states": 20,
    "rho": 0.8,
    "feature_noise": 0.5,
    "ridge": 0.1,
    "feature_examples": 200,
    "feature_ridge": 1e-3,
}

STUDY = Study(
    slug="hmm-complexity",
    family="theory",
    question="How wide should a frozen model be whose head is tuned on few examples?",
    paper=Paper("Investigating the Impact of Model Complexity in Large Language Models", 2024, "2410.00699"),
    arms=ARMS,
    baseline="0.01",
    metric="excess",
    metrics=("excess", "prediction", "excess_over_theory", "features", "accuracy"),
    better={"prediction": "lower", "features": "lower", "accuracy": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 5},
    options={
        "smoke": {**SMALL, "examples": 20, "states": 4, "feature_examples": 20, "repeats": 4, "splits": 2},
        "quick": {**SMALL, "repeats": 10, "splits": 4},
        "full": {
            **SMALL,
            "model": "EleutherAI/pythia-1b",
            "texts": "fancyzhx/ag_news",
            "rows": 8192,
            "feature_examples": 512,
            "repeats": 100,
            "splits": 8,
        },
    },
    experiment=experiment,
    data="features and targets: .safetensors, or .csv with the class in the last column",
    notes=(
        "excess: what the tuned head risks beyond the best one, in closed form, median over repeats. prediction: with "
        "what no head can avoid. features: summed squared error on held-out images of the digits, one-hot targets, "
        "random rectified features (200 training images).",
    ),
)
