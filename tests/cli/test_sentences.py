"""What commands print: wrapped for a terminal, a line each in a pipe, and no paths of this machine in a card."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

from lossmith.cli.sentences import wrapped

POINTS = "params,tokens,loss\n" + "".join(
    f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}\n" for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)
)


def on_a_terminal(words: list[str], folder: Path, columns: int) -> str:
    """What a command prints where standard output is a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "lossmith", *words], cwd=folder, env=environment, stdout=theirs, stderr=subprocess.PIPE
    ) as done:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            parts.append(part)
    os.close(ours)
    assert done.returncode == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_terminal_gets_wrapped_lines_and_a_pipe_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "points.csv").write_text(POINTS)
    monkeypatch.chdir(tmp_path)
    whole = run("fit", "points.csv", "--bootstrap", 0)
    shown = on_a_terminal(["fit", "points.csv", "--bootstrap", "0"], tmp_path, 50)
    assert max(map(len, whole.splitlines())) > 50
    assert max(map(len, shown.splitlines())) <= 50
    assert shown.split() == whole.split()


def test_words_are_never_broken_and_further_lines_are_indented() -> None:
    assert wrapped("short", 5) == "short"
    assert wrapped("12. one two three", 10) == "12. one\n    two\n    three"
    assert wrapped("  note: a/long/path/that-is-whole and more", 20) == (
        "  note:\n    a/long/path/that-is-whole\n    and more"
    )


def test_trainings_and_schedules_are_ranked_within_80_columns() -> None:
    from lossmith.laws.alternatives import Alternative, Alternatives
    from lossmith.laws.schedule_plan import Candidate, SchedulePlan

    numbers = (2.1234, 2.1012, 2.1544)
    first = Alternative(1.23e9, 1.23e12, 1.23e21, *numbers, 0.0, 0.0, 0.0)
    second = Alternative(1.23e9, 1.23e12, 1.23e21, *numbers, 0.0123, 0.0111, 0.0222)
    text = Alternatives((first, second), 0.9).text()
    assert max(map(len, text.splitlines())) <= 80
    assert "+0.0123 [+0.0111, +0.0222]" in text
    names = "cosine(peak=0.0003, warmup=2000, steps=24000)", "wsd(peak=0.0003)"
    gaps = (0.0, 0.0, 0.0), (0.0123, 0.0111, 0.0222)
    candidates = tuple(Candidate(name, *numbers, *gap) for name, gap in zip(names, gaps, strict=True))
    lines = SchedulePlan(candidates, 24000, 0.9).text().splitlines()
    assert max(map(len, lines)) <= 80
    # A name that has no room beside the numbers stands above them.
    assert lines[1] == names[0]
    assert "best" in lines[2]
    short = SchedulePlan(candidates[1:], 24000, 0.9).text().splitlines()
    assert short[1].endswith("best  wsd(peak=0.0003)")


def test_a_card_names_itself_as_seen_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lossmith.cli.study import _from_here

    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert _from_here(tmp_path / "docs" / "card.md") == "docs/card.md"
    assert _from_here(Path("docs/../docs/card.md")) == "docs/card.md"
    monkeypatch.chdir(tmp_path / "docs")
    assert _from_here(tmp_path / "card.md") == str(tmp_path / "card.md")


def test_a_probe_says_that_it_takes_pythons_own_text(small_gpt2: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a loss and a weight of a model"}\n{"text": "and a law of a loss"}\n' * 20)
    shown = run("probe", small_gpt2, "--what", "geometry(samples=40, max_length=64)", "--json", with_stderr=True)
    assert "without --data geometry is measured on Python's own text" in shown
    words = ["probe", small_gpt2, "--what", "geometry(max_length=64, min_length=2)", "--data", texts]
    assert "Python's own" not in run(*words, with_stderr=True)
