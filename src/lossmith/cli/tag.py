"""``lossmith tag``: train, use and judge a token tagger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say

tag = typer.Typer(help="Token tagging (named entities) with any encoder and any loss.", no_args_is_help=True)
app.add_typer(tag, name="tag")


@tag.command()
def fit(
    train: Annotated[Path, typer.Argument(help="CoNLL file: a word per line, its tag in the last column.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained tagger.")],
    evaluate: Annotated[
        Path | None, typer.Option(help="CoNLL file to judge the tagger on.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: a small encoder from random weights.")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, weighted_cross_entropy, set_dice_loss(alpha=0.01), ...")
    ] = "cross_entropy",
    epochs: Annotated[float, typer.Option(help="Passes over the sentences.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Sentences per step.")] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Default: 1e-3 for the small encoder, 3e-5 for a given model.",
            show_default=False,
            callback=checks.above_zero,
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per window; longer sentences are cut.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.", callback=checks.seed)] = 0,
) -> None:
    """Train a tagger and save it.

    `lossmith tag fit train.conll --evaluate dev.conll --loss "set_dice_loss(alpha=0.01)" --out tagger`
    """
    from lossmith.cli.quiet import without_bars
    from lossmith.errors import InputError
    from lossmith.files import check_new_folder
    from lossmith.tasks.text import TokenTagger, read_conll

    check_new_folder(out)
    without_bars()
    if not epochs > 0 or batch_size < 1 or max_length < 4:
        raise InputError(
            f"--epochs must be > 0, --batch-size >= 1 and --max-length >= 4, got {epochs}, {batch_size}, {max_length}"
        )
    sentences = read_conll(train)
    judged = read_conll(evaluate) if evaluate is not None else None
    rate = learning_rate if learning_rate is not None else (3e-5 if model else 1e-3)
    tagger = TokenTagger(
        model,
        loss=loss,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate,
        max_length=max_length,
        seed=seed,
    ).fit(sentences)
    tagger.save_pretrained(out)
    say(f"{len(sentences)} sentences, {tagger.steps_} steps; saved in {out}")
    if judged is not None:
        say(tagger.evaluate(judged).summary())


@tag.command()
def predict(
    tagger: Annotated[str, typer.Argument(help="Folder or hub id of a trained tagger.")],
    text: Annotated[Path, typer.Argument(help="Text: a sentence per line, words separated by spaces.")],
    out: Annotated[Path | None, typer.Option(help="CoNLL file to write; default: print.", show_default=False)] = None,
) -> None:
    """Tag a text.

    `lossmith tag predict tagger sentences.txt --out tagged.conll`
    """
    from lossmith.errors import InputError
    from lossmith.files import check_file_place, read_utf8
    from lossmith.tasks.text import Sentence
    from lossmith.tasks.text.conll import write_conll

    lines = [line.split() for line in read_utf8(text).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{text} holds no sentences")
    if out is not None:
        check_file_place(out, text)
    tags = _load(tagger).predict(lines)  # type: ignore[attr-defined]
    result = [Sentence(tuple(words), tuple(chosen)) for words, chosen in zip(lines, tags, strict=True)]
    if out is not None:
        write_conll(out, result)
    else:
        for sentence in result:
            typer.echo("".join(f"{w}\t{t}\n" for w, t in zip(sentence.words, sentence.tags, strict=True)))


@tag.command()
def evaluate(
    tagger: Annotated[str, typer.Argument(help="Folder or hub id of a trained tagger.")],
    data: Annotated[Path, typer.Argument(help="CoNLL file.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Entity-level precision, recall and F1.

    `lossmith tag evaluate tagger test.conll --json`
    """
    import dataclasses
    import json

    from lossmith.tasks.text import read_conll

    scores = _load(tagger).evaluate(read_conll(data))  # type: ignore[attr-defined]
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(scores)))
    else:
        say(scores.summary())


def _load(tagger: str) -> object:
    from lossmith.cli.quiet import without_bars
    from lossmith.errors import InputError
    from lossmith.tasks.text import TokenTagger

    without_bars()
    try:
        return TokenTagger.from_pretrained(tagger)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{tagger} holds no token classifier: {str(error).splitlines()[0]}") from None
