"""Arms by domain through the command line: the same numbers on several processes, the same bits after SIGKILL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import die, finish, step_lines, uneven_texts

STEPS, BATCH, LENGTH = 6, 8, 32
ARMS = {
    "cooldown": "sampler=temperature(tau=5 -> 1, switch=3)",
    "upweight": "weighting=scalarization(tau=5 -> 1, switch=3)",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of different lengths, 1 in 8 of a small domain."""
    path = tmp_path_factory.mktemp("domains") / "text.jsonl"
    rows = [{"text": text, "domain": "few" if i % 8 == 0 else "many"} for i, text in enumerate(uneven_texts())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    corpus: Path, out: Path, arm: str, *, processes: int, micro: int, resumed: int | None = None
) -> list[tuple[float, float]]:
    arguments = [
        "compare", "--data", corpus, "--domain-field", "domain", "--out", out, "--model", "nano", "--vocab-size", 300,
        "--sequence-length", LENGTH, "--packing", "none", "--batch-size", BATCH, "--tokens", STEPS * BATCH * LENGTH,
        "--seeds", 1, "--dtype", "float64", "--arm", f"arm: {ARMS[arm]}", "--micro-batch-size", micro,
        "--device", "cpu", "--threads", 1, "--set", "evaluations=0", "--set", "save_steps=1",
        "--processes", processes,
    ]  # fmt: skip
    if resumed is not None:
        die(arguments, resumed)
    finish(arguments)
    return [(m["train/loss"], m["grad_norm"]) for m in step_lines(out / "runs/arm/seed-0")]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_runs_by_domain_do_not_depend_on_the_layout(corpus: Path, tmp_path: Path, arm: str) -> None:
    whole = run(corpus, tmp_path / "whole", arm, processes=1, micro=BATCH)
    assert len(whole) == STEPS
    split = run(corpus, tmp_path / "split", arm, processes=2, micro=2)
    for a, b in zip(split, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
    assert run(corpus, tmp_path / "killed", arm, processes=1, micro=BATCH, resumed=2) == whole
