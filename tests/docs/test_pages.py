"""Links, navigation, completeness and the built site."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
import settings_table
import yaml

ROOT = pages.ROOT
ALL_PAGES = [*pages.PAGES, ROOT / "CHANGELOG.md"]
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.*)$", pages.prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", word) for word in words}


@pytest.mark.parametrize("page", ALL_PAGES, ids=pages.name)
def test_every_internal_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(pages.prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{pages.name(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{pages.name(page)} links to {link}"


def test_the_navigation_names_every_page_and_only_pages() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [file for part in parts for file in files(part)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(files(navigation)) == there


@pytest.mark.parametrize("room", ["losses", "heads", "data", "data.weighting", "sparsity", "training"])
def test_every_public_name_is_in_the_documentation(room: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    missing = [n for n in importlib.import_module(f"lossmith.{room}").__all__ if not re.search(rf"\b{n}\b", text)]
    assert missing == []


def test_the_tables_of_settings_and_presets_are_those_of_the_code() -> None:
    page = settings_table.PAGE.read_text(encoding="utf-8")
    assert settings_table.with_tables(page) == page, "run python tests/docs/settings_table.py"
    for name in settings_table.CompareSettings.model_fields:
        assert f"`{name}`" in page


def test_the_museum_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "museum-of-faults.md").read_text(encoding="utf-8")))
    defined: dict[str, Path] = {}
    for folder in (ROOT / "tests", ROOT / "src" / "lossmith" / "testing"):
        for path in folder.rglob("test_*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            defined |= {node.name: path for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert named - defined.keys() == set()
    exhibits = {name for name, path in defined.items() if name.startswith("test_") and path.parent.name == "museum"}
    assert exhibits - named == set(), "exhibits without a row on the page"


def test_every_study_has_a_card_with_room_for_its_measured_table() -> None:
    from lossmith.reporting.card import check_card
    from lossmith.studies.study import studies

    index = (ROOT / "docs" / "paper-index.md").read_text(encoding="utf-8")
    for slug in studies():
        check_card(ROOT / "docs" / "systems" / f"{slug}.md")
        assert f"systems/{slug}.md" in index


def test_the_site_builds_without_warnings_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'lossmith[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    requests = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?(https?:)?//[^>]*>")
    for page in (tmp_path / "site").rglob("*.html"):
        assert [m[0] for m in requests.finditer(page.read_text(encoding="utf-8"))] == []
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8"))
