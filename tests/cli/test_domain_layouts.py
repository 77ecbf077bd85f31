"""Arms by domain through the command line: the same numbers on several processes, the same bits after SIGKILL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS, BATCH, LENGTH = 6, 8, 32
ARMS = {
    "cooldown": "sampler=temperature(tau=5 -> 1, switch=3)",
    "upweight": "weighting=scalarization(tau=5 -> 1, switch=3)",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of different lengths, 1 in 8 of a small domain."""
    path = tmp_path_factory.mktemp("domains") / "text.jsonl"
    texts = [" ".join(f"{(i * 31 + k * k) % 211:x}" for k in range(3 + (i * 7) % 40)) for i in range(300)]
    rows = [{"text": text, "domain": "few" if i % 8 == 0 else "many"} for i, text in enumerate(texts)]
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for step in [resumed, None] if resumed is not None else [None]:
        program = [sys.executable, "-m", "lossmith"]
        if step is not None:
            # Dies without a chance to say goodbye, after the checkpoint of that step.
            program = [sys.executable, str(Path(__file__).with_name("mortal.py"))]
            environment["LOSSMITH_TEST_DIE_AT_STEP"] = str(step)
        done = subprocess.run(
            [*program, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == (step is None), done.stderr[-3000:]
        environment.pop("LOSSMITH_TEST_DIE_AT_STEP", None)
    lines = [json.loads(line) for line in (out / "runs/arm/seed-0/metrics.jsonl").read_text().splitlines()]
    return [(m["train/loss"], m["grad_norm"]) for m in lines if "train/loss" in m]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_runs_by_domain_do_not_depend_on_the_layout(corpus: Path, tmp_path: Path, arm: str) -> None:
    whole = run(corpus, tmp_path / "whole", arm, processes=1, micro=BATCH)
    assert len(whole) == STEPS
    split = run(corpus, tmp_path / "split", arm, processes=2, micro=2)
    for a, b in zip(split, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
    assert run(corpus, tmp_path / "killed", arm, processes=1, micro=BATCH, resumed=2) == whole
