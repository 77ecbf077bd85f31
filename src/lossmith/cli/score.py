"""``lossmith score``: the loss of every document of a corpus under one or several models."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lossmith.cli import app
from lossmith.cli.sentences import say
from lossmith.errors import InputError, did_you_mean
from lossmith.files import check_file_place

if TYPE_CHECKING:
    from lossmith.data import Scorer, ScoreSummary


@app.command()
def score(
    corpus: Annotated[str, typer.Argument(help="File, folder, hub id, or 'python'.")],
    model: Annotated[
        list[str], typer.Option(help="Folder or hub id, or NAME=folder; repeat for several models in one pass.")
    ],
    out: Annotated[Path, typer.Option(help="Table: a .parquet or .jsonl file.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Sample of a target: fine-tune the first model on it and score with that too, as 'conditional'.",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of that fine-tuning, one epoch.")] = 1e-3,
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    domain_field: Annotated[str | None, typer.Option(help="Column that names the domain.", show_default=False)] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens; longer texts are cut into windows.", show_default="1024")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Positions per batch, padding included.")] = 16_384,
    block_documents: Annotated[int, typer.Option(help="Documents per block: what a kill can cost.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="auto takes a GPU where there is one; or cpu.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Processes side by side on this machine.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Score with --jobs actors on a Ray cluster: its address, auto, or local to start one here.",
            show_default=False,
        ),
    ] = None,
    gpus_per_job: Annotated[float, typer.Option(help="With --ray: GPUs that each actor asks for.")] = 0.0,
    shard: Annotated[
        str | None, typer.Option(help="K/N: only every N-th block, the K-th; all N name the same --out.")
    ] = None,
) -> None:
    """Score a corpus: nats per document and per token, and bits per byte, under every model.

    Continues where it was after any interruption, and ends with the same bytes.

    **Examples**

    `lossmith score corpus.jsonl.gz --model prior/ --model conditional/ --out scores.parquet`

    `lossmith score corpus.jsonl --model prior/ --target books.jsonl --out scores.parquet`

    `lossmith score corpus/ --model prior=gpt2 --shard 3/7 --out /shared/scores.parquet`

    `lossmith score corpus/ --model prior=gpt2 --ray auto --jobs 32 --out scores.parquet`
    """
    models = named_models(model)
    check_file_place(out, corpus, target)
    if jobs < 1 or (jobs > 1 and shard is not None):
        raise InputError(f"--jobs must be at least 1, and 1 where --shard is given, got {jobs}")
    if ray is None and gpus_per_job:
        raise InputError("--gpus-per-job belongs to --ray")
    if ray is not None and shard is not None:
        raise InputError("--ray divides the corpus itself; leave --shard out")
    if device not in ("auto", "cpu"):
        raise InputError(f"unknown --device '{device}': {did_you_mean(device, ('auto', 'cpu'))}")
    options: dict[str, Any] = {
        "text_field": text_field,
        "domain_field": domain_field,
        "batch_tokens": batch_tokens,
        "block_documents": block_documents,
    }
    loading = {"dtype": dtype, "device": device, "max_length": max_length}
    if target is not None:
        if "conditional" in models:
            raise InputError("--target makes a model called 'conditional', and a --model has that name; rename it")
        models["conditional"] = str(
            _fine_tuned(next(iter(models.values())), target, out, text_field, learning_rate, dtype)
        )
    started = time.monotonic()
    if ray is not None:
        done = _score_on_ray(corpus, models, out, options, loading, ray, jobs, gpus_per_job)
        scored = done.scored
    elif jobs == 1:
        done = _score(corpus, models, out, options, loading, _shard(shard))
        scored = done.scored
    else:
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            waiting = [
                pool.submit(_score, corpus, models, out, options, loading, (k, jobs), threads) for k in range(jobs)
            ]
            finished = [future.result() for future in waiting]
        done, scored = max(finished, key=lambda one: one.complete), sum(one.scored for one in finished)
    seconds = time.monotonic() - started
    say(f"{done.documents} documents, {scored} scored now in {seconds:.1f} s")
    if done.rejected:
        say(f"{done.rejected} without a finite loss: {out}.rejected.jsonl")
    say(f"table: {out}" if done.complete else f"the table is written when all shards are done: {out}.partial")


def _score(
    corpus: str,
    models: dict[str, str],
    out: Path,
    options: dict[str, Any],
    loading: dict[str, Any],
    shard: tuple[int, int],
    threads: int | None = None,
) -> ScoreSummary:
    import torch

    from lossmith.data import score_corpus

    if threads is not None:
        torch.set_num_threads(threads)
    progress = None if shard[0] != 0 else ScoreProgress()
    return score_corpus(corpus, load_scorers(models, loading), out, shard=shard, progress=progress, **options)


def _score_on_ray(
    corpus: str,
    models: dict[str, str],
    out: Path,
    options: dict[str, Any],
    loading: dict[str, Any],
    address: str,
    jobs: int,
    gpus: float,
) -> ScoreSummary:
    from lossmith.data import RayScoring, score_corpus

    # A folder that every machine has; a hub id is no path.
    models = {name: str(Path(path).resolve()) if Path(path).exists() else path for name, path in models.items()}
    backend = RayScoring(
        functools.partial(load_scorers, models, loading),
        workers=jobs,
        gpus=gpus,
        address=None if address == "local" else address,
    )
    # Here the models only tell what is computed.
    scorers = load_scorers(models, {**loading, "device": "cpu"})
    return score_corpus(corpus, scorers, out, backend=backend, progress=ScoreProgress(), **options)


def load_scorers(models: dict[str, str], loading: dict[str, Any]) -> dict[str, Scorer]:
    """Scorers from folders or hub ids by name; ``loading`` has ``dtype``, ``device`` and ``max_length``."""
    import torch
    import transformers

    from lossmith.data import language_model_scorer, load_tokenizer
    from lossmith.training.models import DTYPES, build_model

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if loading["dtype"] not in DTYPES:
        raise InputError(f"unknown --dtype '{loading['dtype']}': {did_you_mean(loading['dtype'], DTYPES)}")
    scorers = {}
    for name, path in models.items():
        tokenizer = load_tokenizer(path)
        built = build_model(
            path,
            vocab_size=len(tokenizer),
            sequence_length=loading["max_length"] or 2,
            dtype=loading["dtype"],
            length_option="--max-length",
        )
        if loading["device"] == "auto" and torch.cuda.is_available():
            built = built.cuda()
        scorers[name] = language_model_scorer(built, tokenizer, max_length=loading["max_length"])
    return scorers


def _fine_tuned(model: str, target: str, out: Path, text_field: str, learning_rate: float, dtype: str) -> Path:
    """The folder of the model after one epoch on the target: made once, whole or not at all."""
    import transformers

    from lossmith.data import load_tokenizer, read_corpus
    from lossmith.data.corpus import content_key
    from lossmith.files import read_json, write_json
    from lossmith.training.models import DTYPES, build_model
    from lossmith.training.record import locked, removed_if_bare
    from lossmith.training.text_training import train_on_texts

    if dtype not in DTYPES:
        raise InputError(f"unknown --dtype '{dtype}': {did_you_mean(dtype, DTYPES)}")
    if not 0 < learning_rate < float("inf"):
        raise InputError(f"--learning-rate must be above 0, got {learning_rate}")
    folder = out.with_name(out.name + ".conditional")
    made = {"model": model, "target": content_key(target) or target, "learning_rate": learning_rate}
    with removed_if_bare(folder), locked(folder, wait_seconds=24 * 3600.0):
        # Written last: it says that the folder is whole.
        if (folder / "fine_tuning.json").exists():
            if read_json(folder / "fine_tuning.json") != made:
                raise InputError(
                    f"{folder} was fine-tuned from or on something else; remove it or choose another --out"
                )
            return folder
        texts = [document.text for document in read_corpus(target, text_field=text_field)]
        tokenizer = load_tokenizer(model)
        transformers.set_seed(0)
        built: Any = build_model(model, vocab_size=len(tokenizer), sequence_length=2)
        longest = min(512, getattr(built.config, "max_position_embeddings", None) or 512)
        with tempfile.TemporaryDirectory() as scratch:
            train_on_texts(built, tokenizer, texts, folder=scratch, max_length=longest, learning_rate=learning_rate)
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "fine_tuning.json", made)
    return folder


class ScoreProgress:
    """A line now and then; on a terminal, one that is overwritten."""

    def __init__(self) -> None:
        self.last = self.started = time.monotonic()

    def __call__(self, documents: int, tokens: int) -> None:
        """Told the documents done, and the tokens scored (0 where there are no tokens)."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self.last < (0.5 if terminal else 30.0):
            return
        self.last = now
        amount, unit = (tokens, "tokens") if tokens else (documents, "documents")
        text = f"{documents} documents, {amount / (now - self.started):,.0f} {unit}/s"
        print(f"\r{text}  " if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)


def named_models(given: list[str]) -> dict[str, str]:
    """Folders or hub ids by name, from ``NAME=folder`` or ``folder``."""
    models: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            name, path = Path(text).name or text, text
        if not name or not path:
            raise InputError(f"--model must be a folder, a hub id or NAME=folder, got '{text}'")
        if name in models:
            raise InputError(f"two models are called '{name}'; name them: --model NAME={path}")
        models[name] = path
    return models


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard must be K/N with 1 <= K <= N, such as 3/7, got '{text}'")
    return int(match[1]) - 1, int(match[2])
