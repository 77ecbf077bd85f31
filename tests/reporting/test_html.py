from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
from reporting_example import comparison

from lossmith.errors import InputError
from lossmith.files import write_bytes
from lossmith.reporting import Curve, write_html
from lossmith.reporting.html import render_html

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'&<img src=x onerror=alert(2)>",
    "</script><b>",
    "%{y} <a href='http://x'>",
)


class Page(HTMLParser):
    """Collects tags with their attributes, the text, and the content of every script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[1])


def hostile():
    given = comparison(arms=HOSTILE)
    return dataclasses.replace(
        given,
        title="<h1>t</h1>",
        question="</title><script>q</script>",
        notes=("<script>n</script>",),
        configuration={"<script>": "</script>", "p": "</pre>\x00\u2028"},
        environment={"user": "\ud800<script>"},
        paper="<i>",
        runs=(dataclasses.replace(given.runs[0], error="</td><script>e</script>"), *given.runs[1:]),
    )


def test_the_same_comparison_gives_the_same_bytes(tmp_path):
    one, two = write_html(comparison(), tmp_path / "1.html"), write_html(comparison(), tmp_path / "2.html")
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) < 6_000_000


def test_nothing_from_outside_is_asked_for():
    page = Page(render_html(comparison()))
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "data", "poster"} & attributes.keys()
    assert not any(tag in ("link", "iframe", "object", "embed", "base", "img", "form") for tag, _ in page.tags)
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert (policies[0] or "").startswith("default-src 'none'")
    styles = re.findall(r"<style>(.*?)</style>", render_html(comparison()), re.S)
    assert not any("url(" in style or "@import" in style for style in styles)


def test_hostile_names_stay_text(tmp_path):
    page = Page(render_html(hostile()))
    assert len(page.scripts) == 3  # plotly, the data, the page's own
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert not any(tag in ("img", "b", "i", "a") for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    for name in HOSTILE:
        assert name in page.text
    assert "<" not in page.scripts[1]
    assert "\x00" not in page.text
    write_html(hostile(), tmp_path / "report.html")  # half of a surrogate pair can be written


def test_plotly_gets_names_that_it_shows_as_they_were_written():
    ticks = Page(render_html(hostile())).data["charts"]["chart-differences"]["layout"]["yaxis"]["ticktext"]
    assert ticks[1] == "&lt;/script&gt;&lt;b&gt;"


def test_the_charts_carry_the_numbers_of_the_comparison():
    given = comparison(arms=("base", "new"), seeds=3)
    charts = Page(render_html(given)).data["charts"]
    assert list(charts) == [
        "chart-differences", "chart-evaluation-tokens", "chart-evaluation-seconds", "chart-train-tokens",
        "chart-train-seconds",
    ]  # fmt: skip
    traces = charts["chart-evaluation-tokens"]["data"]
    assert len(traces) == 2 * (1 + 3 + 1)  # for each arm: band, seeds, mean
    values = [run.evaluation.values for run in given.runs if run.arm == "new"]
    expected = [sum(at) / 3 for at in zip(*values, strict=True)]
    assert traces[-1]["y"] == pytest.approx(expected, rel=1e-6)
    assert traces[-1]["name"] == "new"


def test_every_part_of_the_report_is_there():
    page = Page(render_html(comparison()))
    for heading in (
        "What was found", "Result", "Loss curves", "Also measured", "Cost", "Claims", "How to read this",
        "Runs", "Arms", "Notes", "Configuration", "Environment",
    ):  # fmt: skip
        assert heading in page.text
    for words in (
        "reweighted is better than baseline",
        "supported",
        "model: tiny",
        "torch: 2.13.0",
        "Bonferroni",
    ):
        assert words in page.text


def test_tables_have_captions_scopes_and_charts_have_words():
    tags = Page(render_html(comparison())).tags
    assert sum(tag == "table" for tag, _ in tags) == sum(tag == "caption" for tag, _ in tags) == 5
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")
    charts = [attributes for tag, attributes in tags if attributes.get("class") == "chart"]
    assert len(charts) == 5
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 30 for chart in charts)
    assert ("html", {"lang": "en"}) in tags


@pytest.mark.parametrize("seeds", [0, 1])
def test_no_run_and_one_seed_make_a_page(seeds):
    given = comparison(seeds=seeds)
    page = Page(render_html(given))
    assert ("No run finished" in page.text) == (seeds == 0)


def test_without_curves_and_intervals_no_library_is_put_in():
    given = comparison()
    runs = tuple(dataclasses.replace(r, train=Curve(), evaluation=Curve(), error="x") for r in given.runs)
    text = render_html(dataclasses.replace(given, runs=runs))
    assert len(text) < 50_000
    assert "No run recorded a curve" in text


def test_curves_with_non_finite_points_still_make_json():
    given = comparison(arms=("base", "new"), seeds=2)
    bad = Curve((1, 2, 3), (1, 2, 3), (math.nan, 1.0, 2.0), (math.nan, math.inf, 3.0))
    runs = (dataclasses.replace(given.runs[0], evaluation=bad), *given.runs[1:])
    Page(render_html(dataclasses.replace(given, runs=runs))).data["charts"]["chart-evaluation-tokens"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "report.html", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_html(comparison(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_html(comparison(), tmp_path / "file" / "report.html")
    with pytest.raises(InputError, match="a folder has that name"):
        write_html(comparison(), tmp_path)
