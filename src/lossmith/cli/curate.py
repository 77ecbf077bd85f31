"""``lossmith curate``: a corpus of one domain from files and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lossmith.cli import app
from lossmith.cli.sentences import say


@app.command()
def curate(
    sources: Annotated[
        list[str], typer.Argument(help="Files and folders: LaTeX, Markdown, HTML, PDF, text, JSONL ...")
    ],
    out: Annotated[Path, typer.Option(help="A .jsonl or .jsonl.gz file.")],
    domain: Annotated[
        str | None,
        typer.Option(help="YAML file, or a built-in configuration: telecom.", show_default="any text of quality"),
    ] = None,
    relevance: Annotated[
        str | None,
        typer.Option(
            help="module:function from a text to a score from 0 to 1, instead of the classifier.", show_default=False
        ),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Column of the text in tables, instead of the domain's.", show_default=False)
    ] = None,
    category_field: Annotated[
        str | None, typer.Option(help="Column of the category in tables.", show_default=False)
    ] = None,
    questions: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluation questions: documents that hold one are left out.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that read side by side.")] = 1,
) -> None:
    """Clean, filter and de-duplicate documents into a corpus, and say what became of each.

    Writes OUT, OUT.rejected.jsonl with the reason of everything that is not in it, OUT.report.json and a data
    card, OUT.md.

    **Examples**

    `lossmith curate arxiv_sources/ wiki/ --domain telecom --out corpus.jsonl`

    `lossmith curate docs/ --domain mine.yaml --questions exam.jsonl --out corpus.jsonl.gz`
    """
    from lossmith.cli.functions import function_named
    from lossmith.data.curation import curate as curate_sources
    from lossmith.data.curation import load_domain

    settings = load_domain(domain)
    changes = {"text": text_field, "category": category_field}
    records = settings.records.model_copy(update={k: v for k, v in changes.items() if v is not None})
    contamination = settings.contamination.model_copy(
        update={"questions": (*settings.contamination.questions, *(questions or ()))}
    )
    settings = settings.model_copy(update={"records": records, "contamination": contamination})

    def watch(read: int, kept: int) -> None:
        say(f"{read} documents read, {kept} kept", err=True)

    report = curate_sources(
        sources,
        out,
        settings,
        relevance=function_named(relevance, "--relevance") if relevance else None,
        jobs=jobs,
        watch=watch,
    )
    say(report.summary())
    say(f"corpus: {out}; the others: {out}.rejected.jsonl; data card: {out}.md")
