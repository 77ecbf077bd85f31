"""The HTML report: one file that needs no network, readable without JavaScript but for the charts."""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from importlib.resources import files
from pathlib import Path

from lossmith.files import write_text
from lossmith.reporting import cells
from lossmith.reporting.charts import Chart, difference_chart, loss_charts
from lossmith.reporting.comparison import Comparison, Run
from lossmith.reporting.formatting import count, memory, number, one_line, outline, plural, seconds
from lossmith.reporting.palette import strokes
from lossmith.reporting.table import ComparisonTable, failure_reason, metric_names, summarise

# The browser itself enforces that nothing is fetched, whatever a name or a library contains.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_html(comparison: Comparison, path: str | Path) -> Path:
    """Write the report as one file with plotly.js inside (about 5 MB), whole or not at all.

    Everything that comes from the user is escaped; the same comparison gives the same bytes.
    """
    return write_text(path, render_html(comparison))


def render_html(comparison: Comparison) -> str:
    """The report as text."""
    table = summarise(comparison)
    curves = loss_charts(comparison)
    forest = difference_chart(table)
    title = one_line(comparison.title) or "Comparison"
    charts = [chart for chart in (forest, *curves) if chart is not None]
    sections = [
        _findings(table),
        *(_grid(grid) for grid in cells.grids(table) if grid.kind == "result"),
        _figure(forest, "forest") if forest else "",
        _curves(comparison, curves),
        *(_grid(grid) for grid in cells.grids(table) if grid.kind != "result"),
        _footnotes(table),
        _runs(comparison),
        _arms(comparison),
        _details("Configuration", outline(comparison.configuration) if comparison.configuration else ""),
        _details("Environment", outline(comparison.environment) if comparison.environment else ""),
    ]
    paper = f'<p class="paper">{escape(one_line(comparison.paper))}</p>' if comparison.paper else ""
    head = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="question">{escape(one_line(comparison.question))}</p>
{paper}
</header>
<main>
"""
    body = "\n".join(section for section in sections if section)
    scripts = ""
    if charts:
        data = {"charts": {chart.id: chart.figure for chart in charts}}
        scripts = f"""<script>{_plotly()}</script>
<script type="application/json" id="report-data">{_json(data)}</script>
<script>
{_asset("report.js")}</script>
"""
    return f"{head}{body}\n</main>\n<footer><p>Made by Lossmith.</p></footer>\n{scripts}</body>\n</html>\n"


def _findings(table: ComparisonTable) -> str:
    marks = {"better": "good", "worse": "bad", "failed": "bad"}
    items = []
    for index, sentence in enumerate(table.findings):
        aligned = len(table.findings) == len(table.arms) - 1
        standing = table.arms[index + 1].primary.standing or "" if aligned else ""
        items.append(f'<li class="{marks.get(standing, "open")}">{escape(sentence)}</li>')
    runs = sum(arm.n_runs for arm in table.arms)
    finished = sum(arm.n_finished for arm in table.arms)
    summary = f"{plural(len(table.arms), 'arm')}, {finished} of {plural(runs, 'run')} finished."
    verdicts = Counter(claim.verdict for claim in table.claims)
    if verdicts:
        summary += f" Claims: {', '.join(f'{n} {verdict}' for verdict, n in sorted(verdicts.items()))}."
    return f"""<section aria-labelledby="findings"><h2 id="findings">What was found</h2>
<ul class="findings">{"".join(items)}</ul>
<p class="note">{summary}</p></section>"""


def _grid(grid: cells.Grid) -> str:
    heads = "".join(f'<th scope="col"{_numeric(column.numeric)}>{escape(column.name)}</th>' for column in grid.columns)
    rows = []
    for row in grid.rows:
        first, *rest = row
        data = "".join(
            f"<td{_numeric(column.numeric)}>{_cell(cell, column)}</td>"
            for cell, column in zip(rest, grid.columns[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{data}</tr>')
    headings = {"result": "Result", "metric": "Also measured", "cost": "Cost", "forecast": "Further out"}
    heading = headings.get(grid.kind, "Claims")
    return f"""<section><h2>{heading}</h2>
<div class="scroll" tabindex="0" role="region" aria-label="{escape(grid.title)}"><table>
<caption>{escape(grid.title)}</caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{_join(rows)}
</tbody></table></div></section>"""


def _join(rows: list[str]) -> str:
    return "\n".join(rows)


def _cell(cell: str, column: cells.Column) -> str:
    word = cell.removesuffix(" †")
    marks = {
        "better": "good",
        "supported": "good",
        "worse": "bad",
        "not supported": "bad",
        "failed": "bad",
        "not told apart": "open",
        "inconclusive": "open",
        "no interval": "open",
        "unequal": "open",
    }
    if column.name in ("standing", "verdict", "cost") and word in marks:
        return f'<span class="mark {marks[word]}">{escape(cell)}</span>'
    return escape(cell)


def _numeric(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _curves(comparison: Comparison, charts: list[Chart]) -> str:
    if not charts:
        return '<section><h2>Loss curves</h2><p class="note">No run recorded a curve.</p></section>'
    buttons = []
    for index, (name, stroke) in enumerate(strokes(comparison).items()):
        dash = {"solid": "none", "dash": "7 4", "dot": "2 3"}[stroke.dash]
        line = (
            '<svg width="26" height="10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" '
            f'stroke-width="3" stroke="{stroke.colour}" stroke-dasharray="{dash}"/></svg>'
        )
        buttons.append(
            f'<button type="button" aria-pressed="true" data-arm="{index}">{line}{escape(cells.label(name))}</button>'
        )
    figures = "\n".join(_figure(chart) for chart in charts)
    return f"""<section aria-labelledby="curves"><h2 id="curves">Loss curves</h2>
<div class="legend" role="group" aria-label="Show or hide arms">{"".join(buttons)}</div>
<noscript><p class="note">The charts need JavaScript; the tables say the same in numbers.</p></noscript>
<div class="charts">
{figures}
</div></section>"""


def _figure(chart: Chart, kind: str = "curve") -> str:
    return f"""<figure class="{kind}"><h3>{escape(chart.heading)}</h3>
<div id="{chart.id}" class="chart" role="img" aria-label="{escape(chart.alternative)}"></div>
<figcaption>{escape(chart.caption)}</figcaption></figure>"""


def _footnotes(table: ComparisonTable) -> str:
    if not table.footnotes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in table.footnotes)
    return f'<section><h2>How to read this</h2><ul class="notes">{items}</ul></section>'


def _runs(comparison: Comparison) -> str:
    metrics = metric_names(comparison)
    names = ("arm", "seed", *metrics, "tokens", "steps", "compute", "time", "memory", "error")
    heads = "".join(f'<th scope="col"{_numeric(name not in ("arm", "error"))}>{escape(name)}</th>' for name in names)
    order = {name: index for index, name in enumerate(strokes(comparison))}
    runs = sorted(comparison.runs, key=lambda run: (order[run.arm], run.seed))
    rows = _join([_run(run, metrics, comparison.metric) for run in runs])
    if not rows:
        return '<section><h2>Runs</h2><p class="note">There is no run.</p></section>'
    return f"""<section><h2>Runs</h2>
<details{" open" if len(runs) <= 24 else ""}><summary>{plural(len(runs), "run")}</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Every run"><table>
<caption>Every run: one arm under one seed</caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div></details></section>"""


def _run(run: Run, metrics: tuple[str, ...], primary: str) -> str:
    values = [number(run.metrics.get(name, float("nan")), 1e-4) for name in metrics]
    spent = [count(run.cost.tokens), count(run.cost.steps), count(run.cost.flops, "FLOP")]
    spent += [seconds(run.cost.seconds), memory(run.cost.peak_memory_bytes)]
    numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in (str(run.seed), *values, *spent))
    error = failure_reason(run, primary) or ""
    shown = f'<span class="mark bad">failed</span> {escape(one_line(error, 600))}' if error else ""
    return f'<tr><th scope="row">{escape(cells.label(run.arm))}</th>{numbers}<td class="error">{shown}</td></tr>'


def _arms(comparison: Comparison) -> str:
    items = "".join(
        f"<dt>{escape(cells.label(name))}{' (baseline)' if name == comparison.baseline else ''}</dt>"
        f"<dd>{escape(one_line(description) or '-')}</dd>"
        for name, description in comparison.arms.items()
    )
    notes = "".join(f"<li>{escape(one_line(note))}</li>" for note in comparison.notes)
    listed = f'<h3>Notes</h3><ul class="notes">{notes}</ul>' if notes else ""
    return f"<section><h2>Arms</h2><dl>{items}</dl>{listed}</section>"


def _details(heading: str, content: str) -> str:
    if not content:
        return ""
    shown = "".join(c for c in content if c.isprintable() or c == "\n")
    return f'<section><h2>{heading}</h2><pre tabindex="0">{escape(shown)}</pre></section>'


def _json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    content = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only, so no line separators either
    return content.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return (files("lossmith.reporting") / name).read_text(encoding="utf-8")
