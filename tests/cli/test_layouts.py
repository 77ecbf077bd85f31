"""The same numbers in every layout, through the command line.

Micro-batch size x gradient accumulation x 1, 2 or 4 gloo processes x chunk size x padded or packed x resumed: one
trajectory, loss and gradient norm per step, float64 to 1e-9 and float32 to 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import die, finish, step_lines, uneven_texts

STEPS, BATCH, LENGTH = 5, 8, 32

# (processes, micro-batch, layout, chunk size, resumed at step)
FAST = [(1, 2, "packed", 5, None), (2, 2, "padded", None, None)]
MEMBERS = [
    (1, 4, "padded", None, None),
    (1, 1, "padded", None, None),
    (1, 8, "packed", None, None),
    (1, 8, "padded", 16, None),
    (1, 2, "padded", None, 2),
    (1, 4, "packed", 7, 4),
    (2, 4, "padded", None, None),
    (2, 1, "packed", 9, None),
    (2, 2, "padded", None, 2),
    (4, 2, "padded", None, None),
    (4, 1, "packed", 11, None),
    (4, 1, "padded", None, 4),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths, so that padding and packing differ."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in uneven_texts()))
    return folder / "text.jsonl"


def trajectory(
    corpus: Path,
    out: Path,
    weighting: str,
    dtype: str,
    processes: int,
    micro: int,
    layout: str,
    chunk: int | None,
    resumed: int | None,
) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of one member."""
    arguments = [
        "compare", "--data", corpus, "--out", out, "--model", "nano", "--vocab-size", 300, "--sequence-length", LENGTH,
        "--packing", "none", "--batch-size", BATCH, "--tokens", STEPS * BATCH * LENGTH, "--seeds", 1, "--dtype", dtype,
        "--arm", f"arm: weighting={weighting}", "--micro-batch-size", micro, "--layout", layout, "--device", "cpu",
        "--threads", 1, "--set", "evaluations=0", "--set", "save_steps=2", "--processes", processes,
    ]  # fmt: skip
    if chunk is not None:
        arguments += ["--chunk-size", chunk]
    if resumed is not None:
        die(arguments, resumed)
        checkpoints = sorted(p.name for p in out.glob("runs/*/*/checkpoint-*"))
        assert checkpoints == [f"checkpoint-{resumed}"]
    finish(arguments)
    steps = step_lines(out / "runs/arm/seed-0")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    return [(line["train/loss"], line["grad_norm"]) for line in steps]


_references: dict[tuple[str, str], list[tuple[float, float]]] = {}


def reference(corpus: Path, folder: Path, weighting: str, dtype: str) -> list[tuple[float, float]]:
    """The whole batch at once on one process, computed once per weighting and dtype."""
    key = (weighting, dtype)
    if key not in _references:
        _references[key] = trajectory(corpus, folder / "reference", weighting, dtype, 1, BATCH, "padded", None, None)
    return _references[key]


def check(corpus: Path, folder: Path, weighting: str, dtype: str, member: tuple) -> None:
    expected = reference(corpus, folder, weighting, dtype)
    found = trajectory(corpus, folder / "member", weighting, dtype, *member)
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("member", FAST + MEMBERS, ids=str)
def test_reweighted_runs_do_not_depend_on_the_layout(corpus: Path, tmp_path: Path, member: tuple, dtype: str) -> None:
    check(corpus, tmp_path, "linupper(r=0.3)", dtype, member)


@pytest.mark.slow
@pytest.mark.parametrize("member", FAST, ids=str)
def test_uniform_runs_do_not_depend_on_the_layout(corpus: Path, tmp_path: Path, member: tuple) -> None:
    check(corpus, tmp_path, "uniform", "float64", member)
