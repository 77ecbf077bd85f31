"""Where measurements go in a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from lossmith.errors import InputError
from lossmith.reporting.card import check_card, write_measured

CARD = """# A system

<!-- measured:begin -->
old
<!-- measured:end -->

## Elsewhere

<!-- measured:begin posts -->
<!-- measured:end -->

The end.
"""


def test_measurements_on_a_users_data_have_a_place_of_their_own_if_the_card_gives_one(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text(CARD)
    write_measured(path, "# First\n\n1")
    write_measured(path, "# Second\n\n2", "corpora/posts")
    write_measured(path, "# Again\n\n3", "posts.conll")
    text = path.read_text()
    default, own = text.split("## Elsewhere")
    assert "### First" in default
    assert "old" not in text
    assert "### Again" in own
    assert "Second" not in text
    assert own.endswith("<!-- measured:end -->\n\nThe end.\n")
    write_measured(path, "4", "other")
    assert "\n4\n" in path.read_text().split("## Elsewhere")[0]


def test_a_card_without_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        check_card(tmp_path / "none.md")
    (tmp_path / "plain.md").write_text("# Plain\n")
    with pytest.raises(InputError, match="has no lines <!-- measured:begin --> and"):
        check_card(tmp_path / "plain.md", "posts")
