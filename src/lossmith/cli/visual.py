"""``lossmith visual``: models that answer questions about images by unmasking, and the visual tokens they can spare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say
from lossmith.errors import InputError

if TYPE_CHECKING:
    from lossmith.data import ImageQuestion
    from lossmith.probes import RedundancyReport
    from lossmith.tasks.multimodal import ImageAnswerer

visual = typer.Typer(
    help="Answer questions about images by unmasking, with as few visual tokens as it takes.", no_args_is_help=True
)
app.add_typer(visual, name="visual")

Questions = Annotated[
    str,
    typer.Argument(help="Table with image, prompt, completion; a folder with metadata.jsonl; or shapes, digits."),
]
Model = Annotated[str, typer.Argument(help="Folder of a model that `lossmith visual fit` wrote.")]


@visual.command()
def fit(
    questions: Questions,
    out: Annotated[Path, typer.Option(help="New folder for the trained model.")],
    kind: Annotated[
        str, typer.Option(help="scratch: diffusion from the first step; adapted: autoregressive first.")
    ] = "scratch",
    vision: Annotated[
        str | None, typer.Option(help="Folder or hub id of a vision encoder; default: patches.", show_default=False)
    ] = None,
    trunk: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a Llama-type language model; default: a small one.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Questions per step.")] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 2e-3, or 1e-4 for a given trunk.", show_default=False)
    ] = None,
    image_size: Annotated[
        int,
        typer.Option(
            help="Pixels a side, to which the default encoder has images scaled.", callback=checks.at_least(1)
        ),
    ] = 32,
    patch_size: Annotated[
        int,
        typer.Option(
            help="Pixels a side, of the default encoder; each patch is a visual token.", callback=checks.at_least(1)
        ),
    ] = 4,
    width: Annotated[int, typer.Option(help="Of the small trunk.")] = 64,
    layers: Annotated[int, typer.Option(help="Of the small trunk.")] = 3,
    seed: Annotated[int, typer.Option(help="Of weights, order and masks.", callback=checks.seed)] = 0,
) -> None:
    """Train a model on questions about images, and save it.

    `lossmith visual fit photos/ --out model/`
    """
    from lossmith.files import check_new_folder
    from lossmith.tasks.multimodal import ImageAnswerer

    check_new_folder(out)
    if width < 16 or width % 16 or layers < 1:
        raise InputError(f"--width must be a multiple of 16 and --layers at least 1, got {width} and {layers}")
    answerer = ImageAnswerer(
        kind,  # type: ignore[arg-type]
        vision=vision,
        trunk=trunk,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate if learning_rate is not None else (1e-4 if trunk else 2e-3),
        width=width,
        layers=layers,
        image_size=image_size,
        patch_size=patch_size,
        seed=seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    rows = _drawn_for_training(questions, steps * batch_size) or _read(questions)
    answerer.fit(rows).save_pretrained(out)
    say(f"{len(rows)} questions, {answerer.steps_} steps; saved in {out}")


@visual.command()
def answer(
    model: Model,
    questions: Questions,
    prune: Annotated[
        str | None,
        typer.Option(help="Schedule, or none; default: what the model was saved with.", show_default=False),
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="There are no right answers: do not judge.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSONL file of the answers.", show_default=False)] = None,
) -> None:
    """Answer questions, and judge the answers.

    `lossmith visual answer model/ held_out.jsonl --prune "answer_attention(step=mid, keep=0.5)"`
    """
    import json

    from lossmith.data import read_image_questions
    from lossmith.files import write_text

    rows = read_image_questions(questions, completion_field=None) if unlabelled else _read(questions)
    answerer = _load(model)
    schedule = "default" if prune is None else prune
    said = answerer.predict(rows, prune=schedule)
    lines = []
    for row, text in zip(rows, said, strict=True):
        image = {"image": str(row.image)} if isinstance(row.image, Path) else {}
        right = {} if unlabelled else {"completion": row.completion}
        lines.append({**image, "prompt": row.prompt, **right, "answer": text})
    if out is not None:
        write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        for line in lines[:20]:
            say(f"{line['prompt']} -> {line['answer']}")
    if not unlabelled:
        say(answerer.evaluate(rows, prune=schedule).summary())


@visual.command()
def redundancy(
    model: Model,
    questions: Questions,
    selectors: Annotated[
        str, typer.Option(help="random, divprune, one_nn, fastv, sparsevlm, answer_attention, answer_logits, vtw.")
    ] = "random,divprune,fastv,answer_attention,vtw",
    keeps: Annotated[str, typer.Option(help="Shares of the visual tokens that stay.")] = "0.5,0.25",
    steps: Annotated[
        str, typer.Option(help="After which step: a number, input, mid, late, progressive.")
    ] = "input,mid,late,progressive",
    schedule: Annotated[
        list[str] | None, typer.Option(help="A further schedule; can be repeated.", show_default=False)
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Inside which fastv and vtw drop; default: the middle.", show_default=False)
    ] = None,
    keep_positions: Annotated[bool, typer.Option(help="Kept tokens keep their position numbers.")] = False,
    tolerance: Annotated[float, typer.Option(help="Fall of the accuracy that counts as none.")] = 0.02,
    out: Annotated[Path | None, typer.Option(help="JSON or CSV file.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file.", show_default=False)] = None,
) -> None:
    """Measure what dropping visual tokens saves and what it costs, schedule by schedule.

    `lossmith visual redundancy model/ held_out.jsonl --keeps 0.5,0.25 --plot curve.png`
    """
    from lossmith.files import write_text

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot} must end in .png, .svg or .pdf")
    if out is not None and out.suffix.lower() not in (".json", ".csv"):
        raise InputError(f"--out {out} must end in .json or .csv")
    shares = [_number(text, "--keeps") for text in _listed(keeps)]
    places = [int(text) if text.lstrip("-").isdigit() else text for text in _listed(steps)]
    if not schedule and not (_listed(selectors) and shares and places):
        raise InputError("no schedule to measure: name --selectors with --keeps and --steps, or --schedule")
    answerer, rows = _load(model), _read(questions)
    report = _with_progress(
        answerer,
        rows,
        selectors=_listed(selectors),
        keeps=shares,
        steps=places,
        schedules=schedule or [],
        layer=layer,
        keep_positions=keep_positions,
        tolerance=tolerance,
    )
    say(report.summary())
    if out is not None:
        if out.suffix.lower() == ".csv":
            write_text(out, report.to_frame().to_csv(index=False))
        else:
            report.to_json(out)
        say(f"report: {out}")
    if plot is not None:
        report.plot(plot)
        say(f"plot: {plot}")


@visual.command()
def prune(
    model: Model,
    schedule: Annotated[str, typer.Option(help="selector(option=value, ...), or none.")],
    out: Annotated[Path, typer.Option(help="New folder for the model with its schedule.")],
    data: Annotated[
        str | None, typer.Option("--eval", help="Questions on which to measure what is lost.", show_default=False)
    ] = None,
) -> None:
    """Save a model that drops visual tokens whenever it answers; its weights stay as they are.

    What it saves and loses is measured beside the full model, in this process.

    `lossmith visual prune model/ --schedule "vtw(layer=1, every_step=true)" --eval held_out.jsonl --out cheaper/`
    """
    from lossmith.files import check_new_folder
    from lossmith.sparsity import prune_visual_tokens, visual_flops

    check_new_folder(out)
    answerer, rows = _load(model), _read(data) if data is not None else []
    chosen = prune_visual_tokens(answerer, schedule)
    length, shape = answerer.answer_length_, answerer.model_.shape
    size = {"text": 1, "visual": answerer.model_.vision.tokens, "answer": length, "steps": length}
    try:
        ratio = visual_flops(shape, **size, prune=chosen) / visual_flops(shape, **size)
    except ValueError as error:
        raise InputError(f"--schedule {schedule}: {error} (answers of {length} tokens)") from None
    answerer.save_pretrained(out)
    say(f"{chosen or 'no pruning'}: {ratio:.3f} of the multiply-adds of the longest answer; saved in {out}")
    if chosen is None:
        return
    times = answerer.time_ratio(chosen)
    slower = ": slower than the full model" if times > 1 else ""
    say(f"measured here: files 1.00x (the weights stay), time of one answer {times:.2f}x{slower}")
    if rows and (points := (report := answerer.redundancy(rows, selectors=(), schedules=[chosen])).points):
        point = points[0]
        say(
            f"right tokens {report.accuracy:.3f} -> {point.accuracy:.3f}, change {point.change:+.3f} "
            f"[{point.low:+.3f}, {point.high:+.3f}] over {report.questions} questions"
        )


def _drawn_for_training(questions: str, examples: int) -> list[ImageQuestion] | None:
    """Drawn pictures are other ones for training than for judging, and as many as are seen, up to 8,192."""
    from lossmith.data import digit_questions, shape_questions

    drawn = {"digits": digit_questions, "shapes": shape_questions}.get(questions)
    return drawn(max(1, min(8192, examples))) if drawn is not None else None


def _read(questions: str) -> list[ImageQuestion]:
    from lossmith.data import read_image_questions

    return read_image_questions(questions)


def _load(model: str) -> ImageAnswerer:
    from transformers.utils import logging

    from lossmith.tasks.multimodal import ImageAnswerer

    logging.set_verbosity_error()
    return ImageAnswerer.from_pretrained(model)


def _with_progress(answerer: ImageAnswerer, rows: list[ImageQuestion], **options: Any) -> RedundancyReport:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("schedules", total=None)
        return answerer.redundancy(
            rows, progress=lambda done, total: progress.update(task, completed=done, total=total), **options
        )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: '{text}' is no number") from None
