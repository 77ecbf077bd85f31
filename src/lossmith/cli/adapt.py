"""``lossmith adapt`` and ``lossmith questions``: a language model for a domain, and the questions to judge it by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say

if TYPE_CHECKING:
    from lossmith.data.questions import Question


@app.command()
def adapt(
    data: Annotated[str, typer.Argument(help="Text of the domain: a corpus of lossmith curate, file, folder, hub id.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the model, or a preset.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapted model and adaptation.json.")],
    general: Annotated[
        str | None, typer.Option(help="General text: what must not be forgotten.", show_default=False)
    ] = None,
    replay: Annotated[
        float, typer.Option(help="Share of general text in training; 0.1 to 0.3 prevent forgetting.")
    ] = 0,
    method: Annotated[str, typer.Option(help="full, or lora.")] = "full",
    rank: Annotated[int, typer.Option(help="Of LoRA: columns of the two factors of each change.")] = 16,
    questions: Annotated[
        Path | None, typer.Option(help="Questions to judge the model by, before and after.", show_default=False)
    ] = None,
    number: Annotated[int, typer.Option(help="Questions to ask, drawn by --seed.", callback=checks.at_least(1))] = 1000,
    judge: Annotated[
        str | None,
        typer.Option(help="module:function from a prompt to yes or no, as a further metric.", show_default=False),
    ] = None,
    category_field: Annotated[
        str | None, typer.Option(help="Column that names parts of the domain, shown one by one.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column of the domain's text.")] = "text",
    epochs: Annotated[float, typer.Option(help="Passes over the domain.")] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps instead.", show_default=False, callback=checks.at_least(1)),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Peak; LoRA takes 3 to 10 times as much.", callback=checks.above_zero)
    ] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", callback=checks.at_least(1))] = 16,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Rows in memory at a time.", show_default=False, callback=checks.at_least(1)),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; the weights stay in float32.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order and the adapters.", callback=checks.seed)] = 0,
) -> None:
    """Continue pre-training a language model on a domain, and measure what it learned and what it forgot.

    `lossmith adapt corpus.jsonl --model my_model/ --general wiki.jsonl --replay 0.1 --out adapted/`

    `lossmith adapt corpus.jsonl --model my_model/ --method lora --learning-rate 5e-4 --questions exam.jsonl --out it/`
    """
    import dataclasses
    import tempfile

    from lossmith.cli.functions import function_named
    from lossmith.cli.quiet import without_bars
    from lossmith.data.questions import read_questions
    from lossmith.errors import InputError, did_you_mean
    from lossmith.files import check_new_folder, write_json
    from lossmith.tasks.text.question_answering import evaluate_questions
    from lossmith.training.adaptation import METHODS, adapt_language_model

    check_new_folder(out)
    without_bars()
    if method not in METHODS:
        raise InputError(f"unknown --method '{method}': {did_you_mean(method, METHODS)}")
    if replay and general is None:
        raise InputError("--replay needs --general, the text to replay")
    asked: list[Question] = list(read_questions(questions).questions) if questions else []
    judged: dict[str, Any] = {"metrics": ("perplexity", "exact", "f1"), "number": number, "seed": seed}
    if judge is not None:
        if questions is None:
            raise InputError("--judge needs --questions")
        judged |= {"metrics": (*judged["metrics"], "judge"), "judge": function_named(judge, "--judge")}
    adapted, corpus = _prepared(data, general, model, text_field, category_field, sequence_length, seed)
    before = evaluate_questions(adapted, corpus.tokenizer, asked, **judged) if asked else None
    with tempfile.TemporaryDirectory() as folder:
        adapted, found = adapt_language_model(
            adapted,
            corpus,
            folder=folder,
            replay_fraction=replay,
            method=method,  # type: ignore[arg-type]
            rank=rank,
            adapter=out / "adapter" if method == "lora" else None,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            learning_rate=learning_rate,
            bf16=bf16,
        )
    after = evaluate_questions(adapted, corpus.tokenizer, asked, **judged) if asked else None
    adapted.save_pretrained(out)  # type: ignore[operator]
    corpus.tokenizer.save_pretrained(str(out))
    report = {**dataclasses.asdict(found), "model": model, "data": data, "general_data": general, "replay": replay}
    say(found.summary())
    say(f"{found.steps} steps, {found.tokens:,} tokens, {found.trainable:,} parameters trained")
    if before is not None and after is not None:
        say(after.summary(before))
        shown = {m: {"before": before.score(m), "after": after.score(m)} for m in after.values}
        report["questions"] = {m: {**v, "difference": after.interval(m, before)} for m, v in shown.items()}
    write_json(out / "adaptation.json", report)
    say(f"model: {out}")


def _prepared(
    data: str,
    general: str | None,
    model: str,
    text_field: str,
    category_field: str | None,
    sequence_length: int,
    seed: int,
) -> tuple[Any, Any]:
    """The model, and both texts prepared for it."""
    import tempfile

    import transformers

    from lossmith.data import prepare
    from lossmith.training.adaptation import combine_sources
    from lossmith.training.models import PRESETS, build_model, check_model

    preset = model in PRESETS
    check_model(model, vocab_size=None, sequence_length=sequence_length)
    with tempfile.TemporaryDirectory() as folder:
        both = combine_sources(
            data, general, Path(folder) / "both.jsonl", text_field=text_field, category_field=category_field
        )
        corpus = prepare(
            both,
            domain_field="domain",
            tokenizer=None if preset else model,
            sequence_length=sequence_length,
            packing="concatenated",
        )
    transformers.set_seed(seed)
    built = build_model(model, vocab_size=len(corpus.tokenizer), sequence_length=sequence_length)
    return built, corpus


@app.command()
def questions(
    data: Annotated[str, typer.Argument(help="Documents: a corpus of lossmith curate, file, folder, hub id.")],
    out: Annotated[Path, typer.Option(help="JSONL file; the rejected ones go to OUT.rejected.jsonl.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model that writes them.", show_default=False)
    ] = None,
    generate: Annotated[
        str | None, typer.Option(help="module:function from a prompt to a reply, instead.", show_default=False)
    ] = None,
    per_document: Annotated[int, typer.Option(help="Questions to ask for.", callback=checks.at_least(1))] = 3,
    limit: Annotated[
        int | None,
        typer.Option(help="Stop after so many questions.", show_default=False, callback=checks.at_least(1)),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    category_field: Annotated[str | None, typer.Option(help="Column of the category.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest reply of the model, in tokens.", callback=checks.at_least(1))
    ] = 400,
) -> None:
    """Have a model write evaluation questions from documents, and check each of them.

    `lossmith questions corpus.jsonl --model my_instruct_model/ --limit 1000 --out exam.jsonl`
    """
    from lossmith.cli.functions import function_named
    from lossmith.cli.quiet import without_bars
    from lossmith.data.questions import documents_to_ask_about, generate_questions
    from lossmith.errors import InputError
    from lossmith.files import check_file_place

    if (model is None) == (generate is None):
        raise InputError("give one of --model and --generate")
    check_file_place(out, data)
    without_bars()
    write = _writer(model, max_new_tokens) if model else function_named(str(generate), "--generate")
    documents = documents_to_ask_about(data, text_field=text_field, category_field=category_field)

    def watch(seen: int, kept: int) -> None:
        if seen % 10 == 0:
            say(f"{seen} documents, {kept} questions", err=True)

    found = generate_questions(documents, write, per_document=per_document, limit=limit, watch=watch)
    found.write(out)
    say(found.summary())
    say(f"questions: {out}")


def _writer(model: str, max_new_tokens: int) -> Any:
    from transformers import AutoModelForCausalLM

    from lossmith.data import load_tokenizer
    from lossmith.training.models import check_model
    from lossmith.training.text_sampling import generate_texts

    check_model(model, vocab_size=None, sequence_length=1)
    tokenizer = load_tokenizer(model)
    writer = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    limit = int(getattr(writer.config, "max_position_embeddings", 0) or 4096)

    def write(prompt: str) -> str:
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        room = max(1, limit - max_new_tokens)
        return generate_texts(writer, tokenizer, [prompt], max_new_tokens=max_new_tokens, max_length=room)[0][0]

    return write
