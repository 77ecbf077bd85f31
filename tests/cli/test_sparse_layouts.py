"""Sparse pre-training through the command line: the same numbers on several processes, the same bits after SIGKILL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import die, finish, step_lines, uneven_texts
from safetensors.torch import load_file

STEPS, BATCH, LENGTH = 6, 8, 32
ARM = "arm: weights=sparse_pretraining(final=0.7, start=0.2, end=0.8, interval=1), weighting=linupper(r=0.3)"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths."""
    path = tmp_path_factory.mktemp("sparse") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in uneven_texts()))
    return path


def run(corpus: Path, out: Path, processes: int, micro: int, resumed: int | None = None) -> dict[str, Any]:
    arguments = [
        "compare", "--data", corpus, "--out", out, "--model", "nano", "--vocab-size", 300, "--sequence-length", LENGTH,
        "--packing", "none", "--batch-size", BATCH, "--tokens", STEPS * BATCH * LENGTH, "--seeds", 1,
        "--dtype", "float64", "--arm", ARM, "--micro-batch-size", micro, "--device", "cpu", "--threads", 1,
        "--set", "evaluations=0", "--set", "save_steps=1", "--processes", processes,
        "--set", "model_overrides={'tie_word_embeddings': False}",
    ]  # fmt: skip
    if resumed is not None:
        die(arguments, resumed)
    finish(arguments)
    folder = out / "runs/arm/seed-0"
    lines = step_lines(folder)
    result = json.loads((folder / "result.json").read_text())
    return {
        "steps": [(m["train/loss"], m["grad_norm"]) for m in lines],
        "parameters": (result["parameters"], [m["parameters"] for m in lines]),
        "flops": result["cost"]["flops"],
        "weights": load_file(folder / "model" / "model.safetensors"),
    }


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole batch at once on one process."""
    found = run(corpus, tmp_path_factory.mktemp("reference") / "out", 1, BATCH)
    active = found["parameters"][1]
    assert active[0] > active[-1] == found["parameters"][0]["final"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro, resumed", [(2, 4, None), (2, 2, 2), (4, 1, None), (1, 2, 3)])
def test_the_layout_changes_no_number_and_no_mask(
    corpus: Path, tmp_path: Path, reference: dict[str, Any], processes: int, micro: int, resumed: int | None
) -> None:
    found = run(corpus, tmp_path / "out", processes, micro, resumed)
    for a, b in zip(found["steps"], reference["steps"], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
    assert found["parameters"] == reference["parameters"]
    for name, weight in reference["weights"].items():
        assert ((weight == 0) == (found["weights"][name] == 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [1, 2, 4])
def test_a_run_killed_while_pruning_continues_to_the_same_bits(
    corpus: Path, tmp_path: Path, reference: dict[str, Any], resumed: int
) -> None:
    found = run(corpus, tmp_path / "out", 1, BATCH, resumed)
    assert found["steps"] == reference["steps"]
    assert found["parameters"] == reference["parameters"]
    assert found["flops"] == reference["flops"]
    for name, weight in reference["weights"].items():
        assert weight.numpy().tobytes() == found["weights"][name].numpy().tobytes()
