"""The pinned versions: that they are what is installed, and that every supported Python can install them."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]


def oldest_python() -> str:
    """The first release of the oldest Python that the package says it supports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"{project['requires-python'].removeprefix('>=')}.0"


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_every_pin_installs_on_the_oldest_python(pin: Requirement) -> None:
    """A Linux distribution's Python 3.11 is 3.11.2: a pin for 3.11.5 and later ends the installation there."""
    if pin.marker is not None and not pin.marker.evaluate():
        pytest.skip(f"{pin.name} is not for this Python")
    try:
        found = metadata(pin.name)
    except PackageNotFoundError:
        pytest.skip(f"{pin.name} is not installed")
    assert pin.specifier.contains(found["Version"].partition("+")[0]), "installed is another version"
    assert SpecifierSet(found.get("Requires-Python") or "").contains(oldest_python())
