"""``lossmith rationale``: from a teacher's samples to a small student that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say

if TYPE_CHECKING:
    from lossmith.tasks.text import RationaleStudent

rationale = typer.Typer(
    help="Rationale distillation: sample, vote, train a student, use it and judge it.", no_args_is_help=True
)
app.add_typer(rationale, name="rationale")

Samples = Annotated[Path, typer.Argument(help="JSONL file with question, label and samples.")]
Labels = Annotated[str, typer.Option(help="gold, or teacher: its majority answers are the labels.")]


@rationale.command()
def sample(
    questions: Annotated[Path, typer.Argument(help="JSONL file with question, and label where it is known.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of a causal or sequence-to-sequence model.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; its .part keeps what was answered already.")],
    samples: Annotated[int, typer.Option(help="Per question.")] = 5,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 0.7,
    examples: Annotated[
        Path | None, typer.Option(help="JSONL file of questions with rationale and label to show first.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest output, in tokens.", callback=checks.at_least(1))] = 256,
    seed: Annotated[int, typer.Option(help="Of sampling.", callback=checks.seed)] = 0,
) -> None:
    """Ask a local model for rationales; the same command continues where it was interrupted.

    `lossmith rationale sample questions.jsonl --teacher my_model --out train.jsonl`
    """
    from lossmith.cli.quiet import without_bars
    from lossmith.data import read_rationales, sample_rationales, write_rationales
    from lossmith.files import check_file_place

    check_file_place(out, questions, examples)
    without_bars()
    rows = _questions(questions)
    shown = read_rationales(examples) if examples is not None else []
    pairs = [
        (r.question, f"<Explanation>: {r.reference} <Answer>: {r.label}") for r in shown if r.reference and r.label
    ]
    model = _teacher(teacher, pairs, max_new_tokens, seed)
    part = out.with_name(out.name + ".part")

    def watch(done: int, number: int) -> None:
        say(f"{done}/{number} questions", err=True)

    answered = sample_rationales(model, rows, samples=samples, temperature=temperature, cache=part, watch=watch)
    write_rationales(out, answered)
    part.unlink(missing_ok=True)
    say(f"{sum(len(r.samples) for r in answered)} rationales for {len(answered)} questions; saved in {out}")


@rationale.command()
def vote(
    train: Samples,
    labels: Labels = "gold",
    out: Annotated[
        Path | None, typer.Option(help="JSONL file for good and bad rationales of each question.", show_default=False)
    ] = None,
) -> None:
    """Show what self-consistency makes of the samples.

    `lossmith rationale vote train.jsonl --out voted.jsonl`
    """
    import dataclasses

    from lossmith.data import build_contrastive_rationales, read_rationales
    from lossmith.files import check_file_place, write_text

    if out is not None:
        check_file_place(out, train)
    built = build_contrastive_rationales(read_rationales(train), labels=labels)  # type: ignore[arg-type]
    if out is not None:
        lines = (json.dumps(dataclasses.asdict(e), ensure_ascii=False) + "\n" for e in built.examples)
        write_text(out, "".join(lines))
    say(built.summary())


@rationale.command()
def fit(
    train: Samples,
    out: Annotated[Path, typer.Option(help="Folder for the trained student.")],
    method: Annotated[
        str, typer.Option(help="finetune, step-by-step, positives, contrast or qcrd: each one thing more.")
    ] = "qcrd",
    student: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: a small T5 from random weights.", show_default=False)
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="JSONL file to judge the student on.", show_default=False)
    ] = None,
    labels: Labels = "gold",
    beta: Annotated[float | None, typer.Option(help="Weight of moving away.", show_default=False)] = None,
    margin: Annotated[float | None, typer.Option(help="How far to move away (nats).", show_default=False)] = None,
    scheme: Annotated[
        str | None, typer.Option(help="minmax, maxmin, sampling, mean or weighted_mean.", show_default=False)
    ] = None,
    negative_lag: Annotated[int, typer.Option(help="Iterations to the past student.")] = 5,
    negative_temperature: Annotated[float, typer.Option(help="Of the past student.")] = 1.5,
    epochs: Annotated[float, typer.Option(help="Passes over the questions.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Questions per step.")] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 2e-3 for the small T5, 5e-5 for a given student.")
    ] = None,
    max_input_length: Annotated[int, typer.Option(help="Longest question in tokens.")] = 256,
    max_target_length: Annotated[int, typer.Option(help="Longest answer or rationale in tokens.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, order and sampling.", callback=checks.seed)] = 0,
) -> None:
    """Train a student and save it.

    `lossmith rationale fit train.jsonl --method qcrd --evaluate test.jsonl --out student`
    """
    from lossmith.cli.quiet import without_bars
    from lossmith.data import read_rationales
    from lossmith.errors import InputError
    from lossmith.files import check_new_folder
    from lossmith.tasks.text import RationaleStudent

    check_new_folder(out)
    rows = read_rationales(train)
    judged = read_rationales(evaluate) if evaluate is not None else None
    chosen = {"beta": beta, "margin": margin, "scheme": scheme}
    options = {name: value for name, value in chosen.items() if value is not None}
    rate = learning_rate if learning_rate is not None else (5e-5 if student else 2e-3)
    without_bars()
    try:
        made = RationaleStudent(
            student,
            method=method,
            labels=labels,  # type: ignore[arg-type]
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=rate,
            max_input_length=max_input_length,
            max_target_length=max_target_length,
            seed=seed,
            options=options,
            schedule={"negative_lag": negative_lag, "negative_temperature": negative_temperature},
        ).fit(rows)
    except ValueError as error:
        # Options out of range are the user's mistake here.
        raise InputError(str(error)) from None
    made.save_pretrained(out)
    say(f"{made.rationales_.summary()}; {made.steps_} steps; saved in {out}")
    if judged is not None:
        say(made.evaluate(judged).summary())


@rationale.command()
def predict(
    student: Annotated[str, typer.Argument(help="Folder of a trained student.")],
    questions: Annotated[Path, typer.Argument(help="JSONL file with question.")],
    out: Annotated[Path | None, typer.Option(help="JSONL file to write; default: print.", show_default=False)] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Write rationales, too.")] = False,
) -> None:
    """Answer questions.

    `lossmith rationale predict student questions.jsonl --out answers.jsonl`
    """
    from lossmith.files import check_file_place, write_text

    if out is not None:
        check_file_place(out, questions)
    asked = [row.question for row in _questions(questions)]
    made = _load(student)
    columns: dict[str, list[str]] = {"question": asked, "answer": made.predict(asked)}
    if explain:
        columns["rationale"] = made.explain(asked)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is not None:
        write_text(out, text)
    else:
        typer.echo(text, nl=False)


@rationale.command()
def evaluate(
    student: Annotated[str, typer.Argument(help="Folder of a trained student.")],
    test: Annotated[Path, typer.Argument(help="JSONL file with question and label, and rationale where it is known.")],
    answers: Annotated[str, typer.Option(help="text, or arithmetic: expressions compared by value.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Share of right answers, and of rationales that equal the known ones.

    `lossmith rationale evaluate student test.jsonl --answers arithmetic`
    """
    import dataclasses

    scores = _load(student).evaluate(_questions(test), answers=answers)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(scores)))
    else:
        say(scores.summary())


def _questions(path: Path) -> Any:
    from lossmith.data.rationales import read_rationales

    return read_rationales(path, need_samples=False)


def _teacher(name: str, examples: list[tuple[str, str]], max_new_tokens: int, seed: int) -> Any:
    import transformers

    from lossmith.data import load_tokenizer
    from lossmith.errors import InputError
    from lossmith.training import ModelTeacher

    transformers.utils.logging.set_verbosity_error()
    tokenizer = load_tokenizer(name)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(name)
        kind: Any = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
        model = kind.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--teacher {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    return ModelTeacher(model, tokenizer, examples=examples, max_new_tokens=max_new_tokens, seed=seed)


def _load(student: str) -> RationaleStudent:
    from lossmith.cli.quiet import without_bars
    from lossmith.errors import InputError
    from lossmith.tasks.text import RationaleStudent

    without_bars()
    try:
        return RationaleStudent.from_pretrained(student)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{student} holds no student: {str(error).splitlines()[0]}") from None
