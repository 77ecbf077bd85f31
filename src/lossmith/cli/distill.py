"""``lossmith distill``: a small language model from a large one, on prompts with completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say


@app.command()
def distill(
    data: Annotated[
        str, typer.Argument(help="JSONL, CSV or Parquet with the columns prompt and completion; or a hub id.")
    ],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the large model.")],
    student: Annotated[str, typer.Option(help="Folder or hub id of the small model, of the same tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained student.")],
    evaluate: Annotated[
        str | None, typer.Option(help="File to judge on, before and after.", show_default=False)
    ] = None,
    loss: Annotated[
        str, typer.Option(help="adaptive (a clipped KL with a learned band), distillation_kl, reverse_kl, ...")
    ] = "adaptive",
    responses: Annotated[
        str, typer.Option(help="revised (written by the student, mended by the teacher), student or dataset.")
    ] = "revised",
    label_weight: Annotated[float, typer.Option(help="Weight of the completions' own loss.")] = 1.0,
    distillation_weight: Annotated[float, typer.Option(help="Weight of the token loss.")] = 1.0,
    span_weight: Annotated[float, typer.Option(help="Weight of the loss on phrases.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Corrections per response.")] = 1,
    replay: Annotated[
        float | None,
        typer.Option(
            help="Begin an off-policy schedule at this threshold, instead of writing in every step.", show_default=False
        ),
    ] = None,
    phrases: Annotated[str, typer.Option(help="auto, nltk or words.")] = "auto",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; falls along a cosine.")] = 5e-5,
    max_prompt: Annotated[int, typer.Option(help="Longest prompt in tokens; the end is kept.")] = 256,
    max_completion: Annotated[int, typer.Option(help="Longest completion and response in tokens.")] = 256,
    prompt_field: Annotated[str, typer.Option(help="Column of the prompts; a+b joins two.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="Column of the completions.")] = "completion",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of order and samples.", callback=checks.seed)] = 0,
) -> None:
    """Distil a language model on prompts with completions, and save it.

    `lossmith distill pairs.jsonl --teacher big/ --student small/ --out distilled/`
    """
    from lossmith.cli.quiet import without_bars
    from lossmith.data import read_completions
    from lossmith.errors import InputError, did_you_mean
    from lossmith.files import check_new_folder
    from lossmith.training.language_model_distillation import distill_language_model
    from lossmith.training.models import DTYPES

    check_new_folder(out)
    without_bars()
    if dtype not in DTYPES:
        raise InputError(f"unknown --dtype '{dtype}': {did_you_mean(dtype, DTYPES)}")
    fields = {"prompt_field": prompt_field, "completion_field": completion_field}
    pairs = read_completions(data, **fields)
    judged = read_completions(evaluate, **fields) if evaluate is not None else []
    made = distill_language_model(
        student,
        teacher,
        pairs,
        evaluate=judged,
        loss=None if loss == "adaptive" else loss,
        responses=responses,
        label_weight=label_weight,
        distillation_weight=distillation_weight,
        span_weight=span_weight,
        rounds=rounds,
        replay_threshold=replay,
        phrases=phrases,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_prompt=max_prompt,
        max_completion=max_completion,
        dtype=dtype,
        seed=seed,
        report=lambda line: say(line, err=True),
    )
    made.save_pretrained(out)
    say(f"{len(pairs)} completions, {made.steps} steps; saved in {out}")
    if made.before is not None and made.after is not None:
        say(f"loss of {len(judged)} completions: {made.before:.4f} before, {made.after:.4f} after")
    last = made.history[-1] if made.history else {}
    if "corrected" in last:
        say(f"mended {last['corrected']:.0%} of the last responses")
    if "kept" in last:
        say(f"band from {last['lower']:.3f} to {last['upper']:.3f}, which holds {last['kept']:.1%} of the mass")
