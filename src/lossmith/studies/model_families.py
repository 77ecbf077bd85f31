"""Families of models that differ in size only: trained on the spot, read from tables, or made up."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.files import write_text
from lossmith.laws import Reading, Table, read_families, read_family
from lossmith.laws.sources import read_frame

CONTEXT, EMBEDDING = 8, 8
# The law of made-up families: sizes from 1e8 to 7e9, the target at 7e10, tokens up to 3e11.
TRUTH = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.33}
TRANSIENT, FADES_BY = 3.0, 2.5e9


def made_up_family(
    seed: int, *, sizes: int, checkpoints: int, run_noise: float, checkpoint_noise: float, transient: bool
) -> Table:
    """Curves that obey Chinchilla's law, with an early transient, an error of each run and one of each checkpoint.

    The largest model's curve has no errors: judged is the estimate, not the luck of one run.
    """
    rng = np.random.default_rng(seed)
    n, d = np.meshgrid([*np.geomspace(1e8, 7e9, sizes), 7e10], np.geomspace(5e8, 3e11, checkpoints), indexing="ij")
    loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
    if transient:
        loss = loss + TRANSIENT * np.exp(-d / FADES_BY)
    errors = run_noise * rng.standard_normal((len(n), 1)) + checkpoint_noise * rng.standard_normal(n.shape)
    errors[-1] = 0
    loss = loss * (1 + errors)
    return read_family({"params": n.ravel(), "tokens": d.ravel(), "loss": loss.ravel()})


def read_tables(path: str | Path, options: Mapping[str, Any]) -> dict[str, Table]:
    """The families of a table, or of every table of a folder.

    Families are told apart by ``options["by"]`` where a table has that column. Rows of repeated data (``epochs`` above
    1) follow another law, and are left out. Tokens that cannot be anything but logarithms are read as such.

    Raises:
        InputError: nothing to read, or no family of at least 3 sizes.
    """
    path = Path(path)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no tables (*.csv)")
    headers = {name: str(options[name]) for name in ("params", "tokens", "loss") if options.get(name)}
    found: dict[str, Table] = {}
    for file in files:
        _, frame = read_frame(file)
        if "epochs" in frame.columns:
            frame = frame[frame["epochs"] <= 1].reset_index(drop=True)
        own = {name: header for name, header in headers.items() if header in frame.columns}
        reading = Reading(columns=own, unit=options.get("unit"))
        try:
            families = _families(frame, reading, str(options["by"]), file.stem)
        except InputError as error:
            if "log10" not in str(error):
                raise InputError(f"{file}: {error}") from None
            families = _families(
                frame, Reading(columns=own, unit=options.get("unit"), log10=("tokens",)), str(options["by"]), file.stem
            )
        found |= {name: table for name, table in families.items() if len(np.unique(table.columns["params"])) >= 3}
    if not found:
        raise InputError(f"{path} holds no family of at least 3 sizes of model: two to fit, and one to predict")
    return found


def _families(frame: Any, reading: Reading, by: str, stem: str) -> dict[str, Table]:
    if by in frame.columns:
        return {f"{stem} {name}": table for name, table in read_families(frame, by, reading).items()}
    return {stem: read_family(frame, reading)}


def train_family(seed: int, options: Mapping[str, Any], folder: Path) -> Path:
    """Perceptrons of several widths that predict the next character of the embedded corpus, as a table of checkpoints.

    A constant learning rate, so that every checkpoint is a measurement of the same law; every character is seen once,
    in the same order by all widths.
    """
    path = folder / f"family-{seed}.csv"
    if path.exists():
        return path
    rows = []
    for width in options["widths"]:
        size, losses = _train_one(int(width), seed, options, folder)
        rows += [{"run": f"width {width}", "params": size, "tokens": tokens, "loss": loss} for tokens, loss in losses]
    lines = ["run,params,tokens,loss", *(",".join(map(str, row.values())) for row in rows)]
    return write_text(path, "\n".join(lines) + "\n")


def training_flops(path: Path) -> float:
    """``6 params tokens`` of all models in a table of :func:`train_family`."""
    with path.open(encoding="utf-8") as file:
        ends = {row["run"]: 6 * float(row["params"]) * float(row["tokens"]) for row in csv.DictReader(file)}
    return sum(ends.values())


def _train_one(width: int, seed: int, options: Mapping[str, Any], folder: Path) -> tuple[int, list[tuple[int, float]]]:
    import torch
    import transformers
    from torch import nn

    from lossmith.studies.tensor_training import train_on_tensors
    from lossmith.training import Classification

    steps, batch = int(options["steps"]), int(options["batch_size"])
    windows, vocabulary = _windows(steps * batch + int(options["held_out"]))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held_out, train = windows[order[: int(options["held_out"])]], windows[order[int(options["held_out"]) :]]
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Embedding(vocabulary, EMBEDDING),
        nn.Flatten(),
        nn.Linear(CONTEXT * EMBEDDING, width),
        nn.GELU(),
        nn.Linear(width, vocabulary),
    )
    model = _called_by_names(network)
    # Often at first, where the loss falls fast, and then at regular intervals, as runs are logged.
    number = int(options["checkpoints"])
    early, regular = np.geomspace(max(1, steps // 60), steps, number // 2), np.linspace(0, steps, number + 1)[1:]
    moments = {max(1, round(float(step))) for step in (*early, *regular)}
    losses: list[tuple[int, float]] = []

    class Measure(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in moments:
                with torch.no_grad():
                    logits = network(held_out[:, :-1])
                    loss = nn.functional.cross_entropy(logits, held_out[:, -1])
                losses.append((state.global_step * batch, float(loss)))

    train_on_tensors(
        model,
        {"contexts": train[:, :-1], "labels": train[:, -1]},
        Classification(),
        steps=steps,
        batch_size=batch,
        seed=seed,
        folder=folder / f"width-{width}-{seed}",
        learning_rate=float(options["learning_rate"]),
        callbacks=[Measure()],
    )
    return sum(p.numel() for p in network.parameters()), losses


def _called_by_names(network: Any) -> Any:
    """The network as a model that takes ``contexts`` and gives ``logits``."""
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, contexts: Any, labels: Any = None) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.network(contexts))

    return Classifier()


@functools.cache
def _windows(number: int) -> tuple[Any, int]:
    """Contexts with the character that follows, ``(number, CONTEXT + 1)``, from the embedded corpus's English."""
    import torch

    from lossmith.data import read_python_corpus

    texts, length = [], 0
    for document in read_python_corpus():
        if document.domain == "docs":
            texts.append(document.text)
            length += len(document.text) + 1
            if length > number + CONTEXT:
                break
    text = "\n".join(texts)
    if len(text) < number + CONTEXT:
        raise InputError(
            f"the embedded corpus has {len(text)} characters; steps x batch_size + held_out asks for {number}"
        )
    codes = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)[: number + CONTEXT]
    letters, ids = np.unique(codes, return_inverse=True)
    found = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), CONTEXT + 1).copy())
    return found[:number], len(letters)
