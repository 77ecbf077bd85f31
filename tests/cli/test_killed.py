"""Killed by SIGKILL at any moment and started again with the same command, `compare` ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def command(text_folder: Path, out: Path) -> list[str]:
    arguments = [
        "compare", "--data", text_folder, "--out", out, "--model", "nano", "--vocab-size", 400, "--sequence-length", 32,
        "--batch-size", 8, "--tokens", 24 * 8 * 32, "--seeds", 1, "--max-epochs", 3, "--jobs", 2, "--arm", "baseline",
        "--arm", "reweighted: weighting=linupper(r=0.4)", "--set", "checkpoints=8", "--set", "evaluations=3",
    ]  # fmt: skip
    return [sys.executable, "-m", "lossmith", *map(str, arguments)]


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must be bit-identical: final metrics, every step's loss, the models' weights."""
    found: dict[str, Any] = {}
    for run in sorted(out.glob("runs/*/*")):
        name = str(run.relative_to(out))
        result = json.loads((run / "result.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = (
            result["metrics"],
            result["cost"]["tokens"],
            result["cost"]["flops"],
            [(line["step"], line["train/loss"], line["grad_norm"]) for line in lines if "train/loss" in line],
            [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line],
            (run / "model" / "model.safetensors").read_bytes(),
        )
    return found


@pytest.fixture(scope="module")
def uninterrupted(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(text_folder, out), check=True, capture_output=True)
    found = outcome(out)
    assert len(found) == 2
    return found


def kill_when(text_folder: Path, out: Path, steps: int, *, whole_group: bool) -> bool:
    """Start, and kill when so many steps are in the records; whether it was still running then."""
    process = subprocess.Popen(
        command(text_folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        logged = sum(path.read_bytes().count(b'train/loss"') for path in out.glob("runs/*/*/metrics.jsonl"))
        if logged >= steps:
            if whole_group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            return True
        time.sleep(random.Random(steps).uniform(0.001, 0.01))
    return False


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["all processes", "only the first"])
@pytest.mark.parametrize("steps", [0, 1, 9, 20, 40])
def test_a_killed_comparison_continues_to_the_same_bits(
    text_folder: Path, tmp_path: Path, uninterrupted: dict[str, Any], steps: int, whole_group: bool
) -> None:
    out = tmp_path / "out"
    killed = kill_when(text_folder, out, steps, whole_group=whole_group)
    if killed and steps < 40:
        # A second time, at once: the dead one's workers may still be alive.
        kill_when(text_folder, out, steps + 5, whole_group=whole_group)
    # Workers whose parent is gone end by themselves; what is added below must be the last thing written.
    time.sleep(1)
    for path in out.glob("runs/*/*/metrics.jsonl"):
        if not (path.parent / "result.json").exists():
            with path.open("ab") as file:
                file.write(b'{"step": 99, "train/lo')
    subprocess.run(command(text_folder, out), check=True, capture_output=True)
    assert outcome(out) == uninterrupted


@pytest.mark.slow
def test_a_finished_comparison_is_not_run_again(text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(command(text_folder, out), check=True, capture_output=True)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*") if path.name != ".lock"}
    done = subprocess.run(command(text_folder, out), check=True, capture_output=True, text=True)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*") if path.name != ".lock"} == before
    assert "2 finished already" in done.stderr
    assert (out / "report.html").exists()
