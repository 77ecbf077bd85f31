"""The main job: train arms under an equal budget over several seeds, and say what each is worth."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.files import read_json, write_json
from lossmith.reporting import Claim, Comparison, Cost, Curve, Forecast, Run, smallest_detectable
from lossmith.studies.arms import Arm, slug
from lossmith.studies.domain_draws import draw_notes, rise_notes
from lossmith.studies.grid import Job, plan, run_jobs
from lossmith.studies.settings import DEFAULT_TOKENS, CompareSettings, Execution
from lossmith.studies.sparse_arms import measure_sparse_arms, measured_lines
from lossmith.training.language_model import LanguageModelRun, run_language_model, training_arguments
from lossmith.training.record import differences, environment, locked, read_json_lines

_METRICS = ("eval/loss", "eval/bits_per_byte", "eval/accuracy")


@dataclass(frozen=True, slots=True)
class Heading:
    """What a report says besides the measurements; ``claims`` are judged in it."""

    title: str = "Comparison"
    question: str = "Which arm reaches the lowest validation loss for the same budget?"
    claims: tuple[Claim, ...] = ()
    paper: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of the grid: what it is and where its record is."""

    run: LanguageModelRun
    folder: Path


@dataclass(slots=True)
class Watcher:
    """What a progress display is told. All methods may be left as they are."""

    message: Callable[[str], None] = lambda text: None
    start: Callable[[list[Planned]], None] = lambda planned: None
    tick: Callable[[], None] = lambda: None
    done: Callable[[Planned, Mapping[str, Any] | None, str | None], None] = lambda planned, result, error: None
    finish: Callable[[], None] = field(default=lambda: None)


def run_compare(
    settings: CompareSettings,
    execution: Execution = Execution(),
    *,
    watcher: Watcher | None = None,
    heading: Heading | None = None,
) -> Comparison:
    """Run (or continue) a comparison and return what it measured; the report is written by the caller.

    Args:
        settings: what decides the numbers.
        execution: where and how it is computed. The same settings and folder continue an interrupted comparison:
            finished runs are not run again, interrupted ones resume from their last checkpoint.
        watcher: told of progress.
        heading: title, question, claims and paper of the report.

    Under ``torchrun`` or ``accelerate launch`` every run uses all processes, one run after another, and only the
    first process writes.

    Raises:
        InputError: anything wrong in the settings, the data or the output folder, before the first run starts.
    """
    watcher, heading = watcher or Watcher(), heading or Heading()
    out = Path(execution.out) if execution.out is not None else settings.default_folder()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_distributed(settings, execution, out, watcher, heading)
    check_identity(settings, out)
    corpus, planned = prepare_runs(settings, execution, out, watcher)
    with locked(out):
        _declare(settings, out)
        return _run_planned(settings, execution, out, corpus, planned, watcher, heading)


def prepare_runs(
    settings: CompareSettings, execution: Execution, out: Path, watcher: Watcher | None = None
) -> tuple[Any, list[Planned]]:
    """Prepare the corpus, check everything that can be checked, and list the runs; writes nothing into ``out``."""
    from lossmith.data import prepare

    watcher = watcher or Watcher()
    check_model(settings)
    watcher.message(f"reading {settings.data}")
    corpus = prepare(
        settings.data,
        text_field=settings.text_field,
        domain_field=settings.domain_field,
        tokenizer=_tokenizer(settings),
        vocab_size=settings.vocab_size,
        sequence_length=settings.sequence_length,
        packing=settings.packing,
        validation_fraction=settings.validation_fraction,
        cache_dir=execution.cache,
    )
    domains = f" in {len(corpus.domains)} domains ({', '.join(corpus.domains)})" if len(corpus.domains) > 1 else ""
    watcher.message(
        f"{corpus.documents:,} documents{domains}, {corpus.duplicates:,} duplicates dropped; "
        f"{corpus.train_tokens:,} training and {corpus.validation_tokens:,} validation tokens"
    )
    check_model(settings, len(corpus.tokenizer))
    small = all(str(arm.options.get("model", settings.model)) in ("nano", "tiny", "small") for arm in settings.arms)
    number = len(settings.arms) * len(settings.seeds)
    _, threads = plan(number, jobs=execution.jobs, threads=execution.threads, small=small)
    runs = [planned_run(settings, arm, seed, corpus, threads) for seed in settings.seeds for arm in settings.arms]
    planned = [Planned(run, out / "runs" / slug(run.arm) / f"seed-{run.seed}") for run in runs]
    for run in runs[: len(settings.arms)]:
        training_arguments(run, out)
    for note in draw_notes(runs[: len(settings.arms)], corpus):
        watcher.message(note)
    watcher.message(_power(settings))
    return corpus, planned


def _power(settings: CompareSettings) -> str:
    """What the number of seeds can show, before anything is spent."""
    seeds, others = len(settings.seeds), max(len(settings.arms) - 1, 1)
    if seeds < 2:
        return "one seed gives no interval: nothing will be told apart; use --seeds 3 or more"
    smallest = smallest_detectable(1.0, seeds, level=settings.level, comparisons=others)
    return (
        f"{seeds} seeds, {others} comparison{'s' if others > 1 else ''}: a true difference of {smallest:.1f} standard "
        "deviations of the paired differences will be told apart with 80% chance"
    )


def planned_run(settings: CompareSettings, arm: Arm, seed: int, corpus: Any, threads: int) -> LanguageModelRun:
    """The configuration of one run; its number of steps follows from the budget."""
    batch_size = int(arm.options.get("batch_size", settings.batch_size))
    per_step = batch_size * settings.sequence_length
    available = int(corpus.train_tokens * settings.max_epochs)
    tokens = arm.options.get("tokens", settings.tokens)
    if tokens is None:
        tokens = min(DEFAULT_TOKENS, available)
    steps = max(1, round(int(tokens) / per_step))
    rows = len(corpus.train)
    if steps * batch_size > rows * settings.max_epochs:
        needed = steps * batch_size / rows
        raise InputError(
            f"the corpus is too small for the budget: {settings.data} has {rows} training sequences of at most "
            f"{settings.sequence_length} tokens, --tokens {tokens} needs {steps * batch_size}; lower --tokens, "
            f"or allow repetition with --max-epochs {-(-needed // 1):.0f}"
        )
    eval_rows = None
    if settings.eval_tokens is not None:
        mean_length = corpus.validation_tokens / max(len(corpus.validation), 1)
        eval_rows = max(1, int(settings.eval_tokens / max(mean_length, 1)))
    return LanguageModelRun(
        arm=arm.name,
        seed=seed,
        corpus=corpus.fingerprint,
        steps=steps,
        model=str(arm.options.get("model", settings.model)),
        loss=str(arm.options.get("loss", "cross_entropy")),
        weighting=str(arm.options.get("weighting", "uniform")),
        sampler=str(arm.options.get("sampler", "shuffled")),
        weights=str(arm.options.get("weights", "dense")),
        sequence_length=settings.sequence_length,
        batch_size=batch_size,
        micro_batch_size=settings.micro_batch_size,
        layout=settings.layout,
        chunk_size=settings.chunk_size,
        dtype=settings.dtype,
        attention=settings.attention,
        random_weights=settings.random_weights,
        model_overrides={**settings.model_overrides, **arm.options.get("model_overrides", {})},
        device=settings.device,
        eval_rows=eval_rows,
        evaluations=settings.evaluations,
        checkpoints=settings.checkpoints,
        keep_checkpoints=settings.keep_checkpoints,
        threads=threads,
        training={**settings.training, **arm.training},
    )


def check_model(settings: CompareSettings, tokens: int | None = None) -> None:
    """Everything about the models that can be known without loading their weights.

    Raises:
        InputError: see :func:`lossmith.training.models.check_model`.
    """
    from lossmith.training.models import check_model as check

    for name in {str(arm.options.get("model", settings.model)) for arm in settings.arms}:
        check(
            name,
            vocab_size=tokens,
            sequence_length=settings.sequence_length,
            random_weights=settings.random_weights,
        )


def _tokenizer(settings: CompareSettings) -> str | None:
    """The tokenizer given, else that of the model if it is not a preset."""
    from lossmith.training.models import PRESETS

    if settings.tokenizer is not None or settings.model in PRESETS:
        return settings.tokenizer
    return settings.model


def check_identity(settings: CompareSettings, out: Path) -> None:
    """Refuse a folder that holds another comparison.

    Raises:
        InputError: names what differs.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    path = out / "compare.json"
    if not path.exists():
        return
    try:
        there = read_json(path)
    except ValueError:
        raise InputError(f"{path} is not JSON; choose another --out folder") from None
    identity = json.loads(json.dumps(settings.identity()))
    if changed := differences(there, identity):
        raise InputError(
            f"--out {out} holds another comparison, which differs in {'; '.join(changed[:3])}; choose another folder"
        )


def _declare(settings: CompareSettings, out: Path) -> None:
    """Make ``out`` the folder of this comparison."""
    check_identity(settings, out)
    if not (out / "compare.json").exists():
        write_json(out / "compare.json", settings.identity())
    write_json(out / "environment.json", environment())


def _run_planned(
    settings: CompareSettings,
    execution: Execution,
    out: Path,
    corpus: Any,
    planned: list[Planned],
    watcher: Watcher,
    heading: Heading,
) -> Comparison:
    by_name = {f"{p.run.arm}, seed {p.run.seed}": p for p in planned}
    unfinished = [name for name, p in by_name.items() if not (p.folder / "result.json").exists()]
    workers, threads = plan(len(unfinished) or 1, jobs=execution.jobs, threads=planned[0].run.threads)
    watcher.start(planned)
    jobs = [
        Job(name, run_language_model, (by_name[name].run, by_name[name].folder, corpus.folder)) for name in unfinished
    ]
    errors: dict[str, str] = {}
    try:
        for outcome in run_jobs(jobs, workers=workers, threads=threads, backend=execution.backend, tick=watcher.tick):
            if isinstance(outcome.error, InputError):
                raise outcome.error
            if outcome.error is not None:
                errors[outcome.job.name] = _sentence(outcome.error)
                _keep_traceback(by_name[outcome.job.name].folder, outcome.error)
            watcher.done(by_name[outcome.job.name], outcome.value, errors.get(outcome.job.name))
    finally:
        watcher.finish()
    measure_sparse_arms(settings, planned, out)
    return collect(settings, out, planned, errors, corpus, heading)


def _run_distributed(
    settings: CompareSettings,
    execution: Execution,
    out: Path,
    watcher: Watcher,
    heading: Heading,
) -> Comparison:
    """Every run on all processes of ``torchrun``, one after another."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=settings.device == "cpu" or not torch.cuda.is_available())
    check_identity(settings, out)
    with state.main_process_first():
        corpus, planned = prepare_runs(settings, execution, out, watcher if state.is_main_process else Watcher())
    if state.is_main_process:
        _declare(settings, out)
        watcher.start(planned)
    state.wait_for_everyone()
    for p in planned:
        # Every process asks before any may have finished the run and written its result.
        finished = (p.folder / "result.json").exists()
        state.wait_for_everyone()
        if finished:
            continue
        result = run_language_model(p.run, p.folder, corpus.folder)
        state.wait_for_everyone()
        if state.is_main_process:
            watcher.done(p, result, None)
    if state.is_main_process:
        watcher.finish()
        measure_sparse_arms(settings, planned, out)
    return collect(settings, out, planned, {}, corpus, heading)


def collect(
    settings: CompareSettings,
    out: Path,
    planned: list[Planned],
    errors: Mapping[str, str],
    corpus: Any,
    heading: Heading,
) -> Comparison:
    """Read the run records back into a :class:`~lossmith.reporting.Comparison`."""
    runs = tuple(
        read_run(p.folder, p.run.arm, p.run.seed, errors.get(f"{p.run.arm}, seed {p.run.seed}")) for p in planned
    )
    domain_metrics = [f"eval/{name}/loss" for name in corpus.domains] if len(corpus.domains) > 1 else []
    configuration = {
        **settings.identity(),
        "corpus": {
            "documents": corpus.documents,
            "duplicates": corpus.duplicates,
            "domains": list(corpus.domains),
            "train_tokens": corpus.train_tokens,
            "validation_tokens": corpus.validation_tokens,
            "fingerprint": corpus.fingerprint,
        },
        "steps": {p.run.arm: p.run.steps for p in planned},
    }
    return Comparison(
        title=heading.title,
        question=heading.question,
        arms={arm.name: ", ".join(f"{k}={v}" for k, v in arm.options.items()) for arm in settings.arms},
        baseline=settings.baseline_arm(),
        metric="eval/loss",
        metrics=(*_METRICS, *domain_metrics),
        better={"eval/bits_per_byte": "lower", "eval/accuracy": "higher", **dict.fromkeys(domain_metrics, "lower")},
        runs=runs,
        claims=heading.claims,
        level=settings.level,
        configuration=configuration,
        environment=read_json(out / "environment.json"),
        notes=(
            *_notes(settings, corpus),
            *draw_notes([p.run for p in planned[: len(settings.arms)]], corpus),
            *rise_notes(_logged(planned), corpus.domains if len(corpus.domains) > 1 else ()),
            *_weights_notes(settings, planned),
            *measured_lines(out),
        ),
        paper=heading.paper,
        forecasts=_forecasts(settings, planned, runs),
    )


def _logged(planned: list[Planned]) -> dict[str, list[list[dict[str, Any]]]]:
    """What every run logged, by arm."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for p in planned:
        found.setdefault(p.run.arm, []).append(read_json_lines(p.folder / "metrics.jsonl"))
    return found


def _forecasts(settings: CompareSettings, planned: list[Planned], runs: tuple[Run, ...]) -> tuple[Forecast, ...]:
    """What the annealing law says of every arm at larger budgets; nothing where all runs are too short for it."""
    from lossmith.registry import SPARSITIES
    from lossmith.studies.further_out import forecast

    found = []
    for arm in settings.arms:
        if hasattr(SPARSITIES.build(str(arm.options.get("weights", "dense"))), "before_step"):
            reason = "the number of its weights changes while it trains, of which the annealing law knows nothing"
            found.append(Forecast(arm.name, reason=reason))
            continue
        pairs = zip(planned, runs, strict=True)
        folders = [p.folder for p, run in pairs if run.arm == arm.name and run.error is None]
        loss = str(arm.options.get("loss", "cross_entropy")).partition("(")[0]
        found.append(forecast(arm.name, folders, comparable=loss == "cross_entropy"))
    return tuple(found)


def read_run(folder: Path, arm: str, seed: int, error: str | None = None) -> Run:
    """A run record as the report's :class:`~lossmith.reporting.Run`; tolerant of what is missing."""
    lines = read_json_lines(folder / "metrics.jsonl")
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
    error = error or result.get("error") or (None if result else "not finished")
    return Run(
        arm=arm,
        seed=seed,
        metrics={k: v for k, v in result.get("metrics", {}).items() if v is not None},
        cost=Cost(**result.get("cost", {})),
        train=_curve(lines, "train/loss_unweighted", "train/loss"),
        evaluation=_curve(lines, "eval/loss"),
        error=error,
    )


def _curve(lines: list[dict[str, Any]], *names: str) -> Curve:
    points: dict[int, tuple[int, float, float]] = {}
    for line in lines:
        value = next((line[n] for n in names if line.get(n) is not None), None)
        if value is not None and line.get("tokens") is not None and line.get("seconds") is not None:
            points[int(line["step"])] = (int(line["tokens"]), float(line["seconds"]), float(value))
    rows = sorted(points.items())
    return Curve(
        steps=tuple(step for step, _ in rows),
        tokens=tuple(p[0] for _, p in rows),
        seconds=tuple(p[1] for _, p in rows),
        values=tuple(p[2] for _, p in rows),
    )


def _notes(settings: CompareSettings, corpus: Any) -> tuple[str, ...]:
    notes = [
        "eval/loss is the plain cross entropy in nats per token on held-out documents, whatever an arm trains on; "
        "eval/bits_per_byte is the same per byte of text, comparable across tokenizers.",
        "The same seed gives every arm the same initial weights and the same order of examples.",
    ]
    if any(str(arm.options.get("loss", "")).startswith("z_loss") for arm in settings.arms):
        notes.append(
            "z_loss is unchanged by scaling the logits, so that its model gives no probabilities: compare it by "
            "accuracy, not by eval/loss."
        )
    if any(
        str(arm.options.get("weighting", "")).startswith(("linupper", "quadratic", "extremes")) for arm in settings.arms
    ):
        notes.append("Training curves show the unweighted mean loss, so that reweighted arms can be compared.")
    if any("sampler" in arm.options for arm in settings.arms):
        notes.append(
            "Arms with another sampler see other examples, each domain's in the same order; their training losses are "
            "of other mixtures: compare eval/loss and the domains' own. Sizes of domains count training sequences."
        )
    return tuple(notes)


def _weights_notes(settings: CompareSettings, planned: list[Planned]) -> list[str]:
    """How many weights the arms with ``weights=`` had: they are compared at that number."""
    notes = []
    for arm in settings.arms:
        paths = [p.folder / "result.json" for p in planned if p.run.arm == arm.name]
        counts = next((read_json(path).get("parameters") for path in paths if path.exists()), None)
        if "weights" in arm.options and counts is not None:
            start, average, end = (f"{counts[part]:,.0f}" for part in ("initial", "average", "final"))
            notes.append(
                f"{arm.name}: {start} matrix parameters at the start, {average} on average, {end} in the end; FLOPs "
                "are those of the active ones."
            )
    return notes


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _keep_traceback(folder: Path, error: BaseException) -> None:
    """A developer wants the whole story of an unexpected error; the terminal shows one line of it."""
    import traceback

    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(traceback.format_exception(error))
    (folder / "error.txt").write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}", encoding="utf-8")
