"""The command line as a user would type it: in this process, or in one of its own that may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lossmith.cli import app


def run(*words: Any, with_stderr: bool = False) -> str:
    """What a command prints; a user's mistake is raised."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output if with_stderr else done.stdout


def finish(words: Sequence[Any]) -> None:
    """Run a command in a new process."""
    done = _in_a_process([sys.executable, "-m", "lossmith"], words)
    assert done.returncode == 0, done.stderr[-3000:]


def die(words: Sequence[Any], step: int) -> None:
    """The same, but the process dies after the checkpoint of that step, without a chance to say goodbye."""
    mortal = Path(__file__).with_name("mortal.py")
    done = _in_a_process([sys.executable, str(mortal)], words, LOSSMITH_TEST_DIE_AT_STEP=str(step))
    assert done.returncode != 0, done.stderr[-3000:]


def _in_a_process(program: list[str], words: Sequence[Any], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([*program, *map(str, words)], env=environment, capture_output=True, text=True, check=False)


def uneven_texts() -> list[str]:
    """Documents of very different lengths, so that padding and packing differ."""
    return [" ".join(f"{(i * 31 + k * k) % 211:x}" for k in range(3 + (i * 7) % 40)) for i in range(300)]


def step_lines(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that tell of a step of training."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]
