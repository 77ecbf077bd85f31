"""``lossmith select``: the part of a corpus that is worth training on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say
from lossmith.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from lossmith.data import Scores

METHODS = ("color-filter", "conditional-only", "ngram-importance", "preselect", "random")


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
        str | None,
        typer.Option(
            "--target",
            "--targets",
            help="Sample of the target, for ngram-importance; for preselect, texts by whose loss models are ranked.",
            show_default=False,
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="For preselect: folders or hub ids, m1,m2,..., of models of different ability.", show_default=False
        ),
    ] = None,
    model_scores: Annotated[
        str | None,
        typer.Option(
            help="For preselect: how able they are, 31.2,40.5,..., or a JSON or YAML file; instead of --targets.",
            show_default=False,
        ),
    ] = None,
    seed_documents: Annotated[
        int,
        typer.Option(
            help="For preselect: so many are drawn for the models (at most a tenth of a domain), and not selected."
        ),
    ] = 10_000,
    seed_corpus: Annotated[
        str | None,
        typer.Option(
            help="For preselect: seed documents of your own, instead; --scores are theirs.", show_default=False
        ),
    ] = None,
    positives: Annotated[
        str, typer.Option(help="For preselect: perfect (documents that rank all models rightly) or quantile.")
    ] = "perfect",
    epochs: Annotated[
        int, typer.Option(help="For preselect: passes of the classifier; more where seed documents are few.")
    ] = 5,
    classifier: Annotated[
        Path | None,
        typer.Option(
            help="For preselect: a fastText classifier (.bin) of labels 1 and 0 that is there already.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="For preselect: processes that classify side by side.")] = 1,
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    domain_field: Annotated[str | None, typer.Option(help="Column that names the domain.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of random, ngram-importance and preselect.", callback=checks.seed)] = 0,
) -> None:
    """Select a part of a corpus.

    **Examples**

    `lossmith select corpus.jsonl.gz --scores scores.parquet --keep 10% --out selected.jsonl.gz`

    `lossmith select corpus/ --method ngram-importance --target target.jsonl --tau 16 --out selected.jsonl`

    `lossmith select corpus/ --method preselect --models m1,m2,m3 --targets eval.jsonl --keep 10% --out out.jsonl`

    `--keep` is a share of the documents; with preselect, of their characters.
    """
    import numpy as np

    from lossmith.data import read_scores, write_selection
    from lossmith.files import check_file_place

    if method not in METHODS:
        raise InputError(f"unknown --method '{method}': {did_you_mean(method, METHODS)}")
    check_file_place(out, corpus, scores, target, seed_corpus)
    share = _share(keep)
    if sum(option is not None for option in (share, tau, number)) != 1:
        raise InputError("give exactly one of --keep, --tau and --number")
    fields: dict[str, Any] = {"text_field": text_field, "domain_field": domain_field}
    hashes = characters = None
    if method in ("color-filter", "conditional-only"):
        if scores is None:
            raise InputError(f"--method {method} needs --scores, a table written by lossmith score")
        table = read_scores(scores)
        values, hashes = _loss_scores(table, method, marginal, conditional, normalize), table.column("hash")
    elif method == "preselect":
        from lossmith.cli.preselect import PreselectOptions, preselect_scores

        options = PreselectOptions(
            models=models,
            model_scores=model_scores,
            targets=target,
            seed_documents=seed_documents,
            seed_corpus=seed_corpus,
            scores=scores,
            classifier=classifier,
            positives=positives,
            epochs=epochs,
            jobs=jobs,
            seed=seed,
        )
        log_odds, characters = preselect_scores(corpus, fields, out, options)
        values = -log_odds
    else:
        values = _other_scores(corpus, fields, method, target, seed)
    usable = np.flatnonzero(np.isfinite(values))
    lengths = None if characters is None else characters[usable]
    chosen = usable[_lowest(values[usable], lengths, number, share, tau, batch)]
    done = write_selection(corpus, chosen, out, scores=values, hashes=hashes, **fields)
    say(f"kept {done.kept} of {done.candidates} documents; highest score kept: {values[chosen].max():.4f}")
    if len(usable) < len(values):
        say(f"{len(values) - len(usable)} documents have no finite score, or were held out, and were not considered")
    quantiles = ", ".join(f"{q:.4f}" for q in np.quantile(values[usable], [0, 0.25, 0.5, 0.75, 1]))
    say(f"scores of all, from least to most by quarters: {quantiles}")
    if len(done.domains) > 1:
        for name, (kept, there) in done.domains.items():
            say(f"  {name or '(no domain)'}: {kept} of {there}")
    say(f"documents: {out}")


def _lowest(
    values: np.ndarray,
    characters: np.ndarray | None,
    number: int | None,
    keep: float | None,
    tau: float | None,
    batch: int | None,
) -> np.ndarray:
    import numpy as np

    from lossmith.data import character_threshold, select_lowest

    try:
        if characters is None or keep is None or batch is not None:
            return select_lowest(values, number=number, keep=keep, tau=tau, batch=batch)
        return np.flatnonzero(-values >= character_threshold(-values, characters, keep))
    except ValueError as error:
        raise InputError(str(error)) from None


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
        raise InputError(str(error)) from None


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
