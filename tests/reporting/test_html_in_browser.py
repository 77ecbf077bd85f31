"""The report as a browser shows it; skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reporting_example import comparison

from lossmith.reporting import write_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console, errors among it."""
    assert BROWSER
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        "--v=0", "--disable-dev-shm-usage", "--window-size=1200,2400", "--virtual-time-budget=10000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    arms = ("baseline", "</script><script>alert(1)</script>", "z & <b>loss</b>")
    page = write_html(comparison(arms=arms), folder / "report.html")
    return browse(page, folder / "profile")


def test_every_chart_is_drawn_and_the_console_is_silent(shown):
    document, console = shown
    assert console == []
    charts = re.split(r'<div id="chart-', document)[1:]
    assert [chart.split('"')[0] for chart in charts] == [
        "differences", "evaluation-tokens", "evaluation-seconds", "train-tokens", "train-seconds",
    ]  # fmt: skip
    for chart in charts:
        assert "main-svg" in chart
    for chart in charts[1:]:
        assert len(re.findall(r'class="js-line"', chart)) == 3 * (1 + 3 + 1)  # arms x (band, seeds, mean)
        assert len(re.findall(r'class="js-fill"', chart)) == 3
    assert len(re.findall(r'class="xerror"', charts[0])) == 2


def test_names_are_shown_as_they_were_written(shown):
    document, _ = shown
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in re.split(r'<div id="chart-', document)[1]
    assert document.count("<script") == 3


def test_the_console_of_a_broken_page_is_not_silent(tmp_path):
    """The check above would see an error, and a request to the network, if there were one."""
    page = write_html(comparison(arms=("a", "b"), seeds=2), tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(
        text.replace("</body>", '<script>noSuchThing()</script><img src="http://example.org/x.png"></body>'),
        encoding="utf-8",
    )
    _, console = browse(broken, tmp_path / "profile")
    assert any("noSuchThing" in line for line in console)
    assert any("example.org" in line for line in console)


def test_a_legend_button_hides_its_arm_in_every_chart(tmp_path):
    page = write_html(comparison(arms=("a", "b"), seeds=2), tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    press = "document.querySelector('[data-arm=\"1\"]').click()"
    click = f"<script>setTimeout(function () {{ {press}; }}, 3000);</script>"
    page.write_text(text.replace("</body>", click + "</body>"), encoding="utf-8")
    document, console = browse(page, tmp_path / "profile")
    assert console == []
    assert 'aria-pressed="false" data-arm="1"' in document
    for chart in re.split(r'<div id="chart-', document)[2:]:
        assert len(re.findall(r'class="js-line"', chart)) == 1 + 2 + 1  # of one arm: band, seeds, mean
