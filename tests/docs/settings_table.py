"""The tables of settings and presets in docs/compare.md, made from the code.

Run as a script it rewrites the page; the tests check that the page is up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

import typer

from lossmith.cli import app
from lossmith.studies.settings import CompareSettings
from lossmith.training.models import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "compare.md"
WITHOUT_EFFECT = {"micro_batch_size", "layout", "chunk_size", "device"}


def settings_table() -> str:
    """One row per field of ``CompareSettings``; what the field does not say, the command line's help does."""
    options = {p.name: p for p in typer.main.get_command(app).commands["compare"].params}  # type: ignore[attr-defined]
    lines = ["| setting | option | default | meaning |", "|---|---|---|---|"]
    for name, field in CompareSettings.model_fields.items():
        option = options.get(name) or options.get(name.removesuffix("s"))
        meaning = field.description or re.sub(r" \[[^]]*\]\.?$|\.$", "", getattr(option, "help", None) or "")
        if name in WITHOUT_EFFECT:
            meaning += " (layout: changes no result)"
        flag = f"`{option.opts[0]}`" if option is not None else "`--set`"
        lines.append(f"| `{name}` | {flag} | {_default(name, field)} | {_cell(meaning)} |")
    return "\n".join(lines)


def presets_table() -> str:
    """The presets' shapes."""
    lines = ["| preset | width | layers | heads | width of the MLP |", "|---|---:|---:|---:|---:|"]
    for name, p in PRESETS.items():
        columns = (f"`{name}`", p.hidden_size, p.num_hidden_layers, p.num_attention_heads, p.intermediate_size)
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """``page`` with both tables between their markers."""
    for name, table in (("settings", settings_table()), ("presets", presets_table())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


def _default(name: str, field: object) -> str:
    value = CompareSettings.model_fields[name].get_default(call_default_factory=True)
    if name == "arms":
        return f"{len(value)} arms"
    if name == "seeds":
        return ", ".join(map(str, value))
    return "" if value is None or value == {} else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
