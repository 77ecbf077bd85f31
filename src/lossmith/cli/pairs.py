"""``lossmith pairs``: train, use and judge a classifier of pairs of texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say

pairs = typer.Typer(
    help="Pairs of texts (paraphrases, entailment) with any encoder and any loss.", no_args_is_help=True
)
app.add_typer(pairs, name="pairs")

First = Annotated[str | None, typer.Option(help="Column of the first text.", show_default="as in known corpora")]
Second = Annotated[str | None, typer.Option(help="Column of the second text.", show_default="as in known corpora")]
Label = Annotated[str | None, typer.Option(help="Column of the label.", show_default="as in known corpora")]


@pairs.command()
def fit(
    train: Annotated[Path, typer.Argument(help="Table with a header: .tsv, .txt (tabs), .csv or .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained classifier.")],
    evaluate: Annotated[Path | None, typer.Option(help="Table to judge it on.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; default: a small encoder from random weights.", show_default=False),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, weighted_cross_entropy, set_dice_loss(alpha=0.01), ...")
    ] = "cross_entropy",
    positive: Annotated[
        str | None, typer.Option(help="Label whose F1 is meant; default: the last.", show_default=False)
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Pairs per step.")] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Default: 1e-3 for the small encoder, 3e-5 for a given model.",
            show_default=False,
            callback=checks.above_zero,
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a pair; the longer text is cut first.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.", callback=checks.seed)] = 0,
    first: First = None,
    second: Second = None,
    label: Label = None,
) -> None:
    """Train a classifier and save it.

    `lossmith pairs fit train.tsv --evaluate test.tsv --loss "set_dice_loss(alpha=0.01)" --out classifier`
    """
    from lossmith.cli.quiet import without_bars
    from lossmith.errors import InputError
    from lossmith.files import check_new_folder
    from lossmith.tasks.text import PairClassifier, read_pairs

    check_new_folder(out)
    without_bars()
    if not epochs > 0 or batch_size < 1 or max_length < 4:
        raise InputError(
            f"--epochs must be > 0, --batch-size >= 1 and --max-length >= 4, got {epochs}, {batch_size}, {max_length}"
        )
    columns = {"first": first, "second": second, "label": label}
    rows = read_pairs(train, **columns)
    judged = read_pairs(evaluate, **columns) if evaluate is not None else None
    rate = learning_rate if learning_rate is not None else (3e-5 if model else 1e-3)
    classifier = PairClassifier(
        model,
        loss=loss,
        positive=positive,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate,
        max_length=max_length,
        seed=seed,
    ).fit(rows)
    classifier.save_pretrained(out)
    say(f"{len(rows)} pairs, {classifier.steps_} steps; saved in {out}")
    if judged is not None:
        say(classifier.evaluate(judged).summary())


@pairs.command()
def predict(
    classifier: Annotated[str, typer.Argument(help="Folder or hub id of a trained classifier.")],
    text: Annotated[Path, typer.Argument(help="A pair per line, the two texts separated by a tab.")],
) -> None:
    """Print the label of each pair.

    `lossmith pairs predict classifier pairs.txt`
    """
    from lossmith.errors import InputError
    from lossmith.files import read_utf8

    whole = read_utf8(text, encoding="utf-8-sig")
    lines = [line.rstrip("\r") for line in whole.split("\n") if line.strip()]
    rows = [tuple(line.split("\t")) for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise InputError(f"{text}, pair {number}: {len(row)} columns; a pair is two texts separated by a tab")
    if not rows:
        raise InputError(f"{text} holds no pairs")
    for chosen in _load(classifier).predict(rows):  # type: ignore[attr-defined]
        typer.echo(chosen)


@pairs.command()
def evaluate(
    classifier: Annotated[str, typer.Argument(help="Folder or hub id of a trained classifier.")],
    data: Annotated[Path, typer.Argument(help="Table of pairs.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    first: First = None,
    second: Second = None,
    label: Label = None,
) -> None:
    """Accuracy, and precision, recall and F1 of the positive label.

    `lossmith pairs evaluate classifier test.tsv --first text_a --second text_b --label same`
    """
    from lossmith.tasks.text import read_pairs

    rows = read_pairs(data, first=first, second=second, label=label)
    scores = _load(classifier).evaluate(rows)  # type: ignore[attr-defined]
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(scores)))
    else:
        say(scores.summary())


def _load(classifier: str) -> object:
    from lossmith.cli.quiet import without_bars
    from lossmith.errors import InputError
    from lossmith.tasks.text import PairClassifier

    without_bars()
    try:
        return PairClassifier.from_pretrained(classifier)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{classifier} holds no classifier of pairs: {str(error).splitlines()[0]}") from None
