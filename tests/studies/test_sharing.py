"""What several arms need is made once, whoever asks first, and appears whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lossmith.studies.sharing import json_once


def _ask(path: Path, answer: int, started: Any, answers: Any) -> None:
    """One arm: says when it makes the file, takes its time, and tells what it was given."""

    def make() -> dict[str, int]:
        started.put(answer)
        time.sleep(0.4)
        return {"answer": answer}

    answers.put(json_once(path, make)["answer"])


def _die_half_way(path: Path) -> None:
    def make() -> dict[str, int]:
        (path.parent / "model").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    json_once(path, make)


def test_it_is_made_once_and_every_arm_reads_the_file(tmp_path: Path) -> None:
    path, made = tmp_path / "new" / "cost.json", []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"pair": (1, 2), "loss": float("nan")}

    for _ in range(3):
        # The first arm, too, gets what JSON has for a tuple and NaN.
        assert json_once(path, make) == {"pair": [1, 2], "loss": None}
    assert made == [1]
    assert json.loads(path.read_text()) == {"pair": [1, 2], "loss": None}


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started, answers = context.Queue(), context.Queue()
    arms = [context.Process(target=_ask, args=(tmp_path / "cost.json", i, started, answers)) for i in (1, 2)]
    for arm in arms:
        arm.start()
    given = [answers.get(timeout=30) for _ in arms]
    for arm in arms:
        arm.join(30)
    first = started.get(timeout=5)
    assert given == [first, first]
    assert started.empty()


def test_an_arm_killed_half_way_leaves_no_file_and_the_work_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    arm = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(path,))
    arm.start()
    arm.join(30)
    assert arm.exitcode == -signal.SIGKILL
    assert (tmp_path / "model").exists()
    assert not path.exists()
    assert json_once(path, lambda: {"answer": 2}) == {"answer": 2}


def test_an_arm_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        json_once(tmp_path / "cost.json", fail)
    assert not list(tmp_path.glob("*.json*"))
    assert json_once(tmp_path / "cost.json", lambda: 3) == 3
