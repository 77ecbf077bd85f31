"""Fixtures of several studies."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A user's own text file."""
    words = ["loss", "weight", "model", "data", "step", "token", "batch", "head", "law", "probe"]
    lines = (" ".join(words[(i * k + k * k) % 10] for k in range(1, 12)) for i in range(200))
    (tmp_path / "mine.txt").write_text("\n".join(lines) + " é\n")
    return tmp_path / "mine.txt"
