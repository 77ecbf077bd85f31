"""``lossmith select``: the part of a corpus that is worth training on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app
from lossmith.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from lossmith.data import Scores

METHODS = ("color-filter", "conditional-only", "ngram-importance", "random")


@app.command()
def select(
    corpus: Annotated[str, typer.Argument(help="The corpus that was scored: file, folder, hub id, or 'python'.")],
    out: Annotated[Path, typer.Option(help="A .jsonl or .jsonl.gz file.")],
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "color-filter",
    scores: Annotated[Path | None, typer.Option(help="Table of `lossmith score`.", show_default=False)] = None,
    keep: Annotated[str | None, typer.Option(help="Share to keep, such as 10% or 0.1.", show_default=False)] = None,
    tau: Annotated[
        float | None, typer.Option(help="Keep one document of so many, instead.", show_default=False)
    ] = None,
    number: Annotated[int | None, typer.Option(help="Keep so many documents, instead.", show_default=False)] = None,
    batch: Annotated[
        int | None, typer.Option(help="Choose among each so many consecutive documents.", show_default=False)
    ] = None,
    marginal: Annotated[
        str | None, typer.Option(help="Name of the generic model in the table.", show_default="the first")
    ] = None,
    conditional: Annotated[
        str | None, typer.Option(help="Name of the model of the target.", show_default="the last")
    ] = None,
    normalize: Annotated[str, typer.Option(help="token or sum; sum favours long texts.")] = "token",
    target: Annotated[
        str | None, typer.Option(help="Sample of the target, for ngram-importance.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    domain_field: Annotated[str | None, typer.Option(help="Column that names the domain.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of random and ngram-importance.")] = 0,
) -> None:
    """Select a part of a corpus.

    **Examples**

    `lossmith select corpus.jsonl.gz --scores scores.parquet --keep 10% --out selected.jsonl.gz`

    `lossmith select corpus/ --method ngram-importance --target target.jsonl --tau 16 --out selected.jsonl`
    """
    import numpy as np

    from lossmith.data import read_scores, select_lowest, write_selection

    if method not in METHODS:
        raise InputError(f"unknown --method '{method}': {did_you_mean(method, METHODS)}")
    share = _share(keep)
    if sum(option is not None for option in (share, tau, number)) != 1:
        raise InputError("give exactly one of --keep, --tau and --number")
    fields: dict[str, Any] = {"text_field": text_field, "domain_field": domain_field}
    hashes = None
    if method in ("color-filter", "conditional-only"):
        if scores is None:
            raise InputError(f"--method {method} needs --scores, a table written by lossmith score")
        table = read_scores(scores)
        values, hashes = _loss_scores(table, method, marginal, conditional, normalize), table.column("hash")
    else:
        values = _other_scores(corpus, fields, method, target, seed)
    usable = np.flatnonzero(np.isfinite(values))
    try:
        chosen = usable[select_lowest(values[usable], number=number, keep=share, tau=tau, batch=batch)]
    except ValueError as error:
        raise InputError(str(error)) from None
    done = write_selection(corpus, chosen, out, scores=values, hashes=hashes, **fields)
    typer.echo(f"kept {done.kept} of {done.candidates} documents; highest score kept: {values[chosen].max():.4f}")
    if len(usable) < len(values):
        typer.echo(f"{len(values) - len(usable)} documents have no finite score and were not considered")
    quantiles = ", ".join(f"{q:.4f}" for q in np.quantile(values[usable], [0, 0.25, 0.5, 0.75, 1]))
    typer.echo(f"scores of all, from least to most by quarters: {quantiles}")
    if len(done.domains) > 1:
        for name, (kept, there) in done.domains.items():
            typer.echo(f"  {name or '(no domain)'}: {kept} of {there}")
    typer.echo(f"documents: {out}")


def _loss_scores(
    table: Scores, method: str, marginal: str | None, conditional: str | None, normalize: str
) -> np.ndarray:
    import numpy as np

    from lossmith.data import color_filter_scores

    last = conditional or table.models[-1]
    nats, tokens = table.column(f"{last}/nats"), table.column(f"{last}/tokens")
    if method == "conditional-only":
        zeros = np.zeros(len(table))
        return _scored(color_filter_scores, zeros, nats, tokens, normalize)
    first = marginal or table.models[0]
    if first == last:
        raise InputError(
            f"{table.path} holds {len(table.models)} model(s), and color-filter needs two that differ; score "
            "the corpus with --model prior/ --model conditional/"
        )
    if not np.array_equal(table.column(f"{first}/tokens"), tokens):
        raise InputError(
            f"{table.path}: models {first} and {last} cut the texts into different tokens; use one tokenizer"
        )
    return _scored(color_filter_scores, table.column(f"{first}/nats"), nats, tokens, normalize)


def _scored(function: Any, marginal: Any, nats: Any, tokens: Any, normalize: str) -> np.ndarray:
    import numpy as np

    try:
        # A document without a token has no loss either, and is not considered.
        values: np.ndarray = function(marginal, nats, np.maximum(tokens, 1), normalize=normalize)
        return values
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _other_scores(corpus: str, fields: dict[str, Any], method: str, target: str | None, seed: int) -> np.ndarray:
    import numpy as np

    from lossmith.data import NgramImportance, read_corpus, resampling_scores

    def texts(source: str) -> Iterator[str]:
        return (document.text for document in read_corpus(source, **fields))

    if method == "random":
        return np.random.default_rng(seed).random(sum(1 for _ in texts(corpus)))
    if target is None:
        raise InputError("--method ngram-importance needs --target, a sample of the target")
    target_texts = (document.text for document in read_corpus(target, text_field=fields["text_field"]))
    importance = NgramImportance.fit(target_texts, texts(corpus))
    weights = np.concatenate([importance.log_weights([text]) for text in texts(corpus)])
    return resampling_scores(weights, seed=seed)


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / 100 if percent else float(number)
    except ValueError:
        value = -1.0
    if rest or not 0 < value <= 1:
        raise InputError(f"--keep must be a share above 0 and at most 1 (10% or 0.1), got '{text}'")
    return value
