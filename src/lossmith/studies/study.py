"""The study engine: a question with arms, a metric and claims, run over seeds at a scale."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from lossmith.errors import InputError, did_you_mean, is_disk_full
from lossmith.files import read_json, write_json
from lossmith.reporting.comparison import Claim, Comparison, Cost, Curve, Run
from lossmith.studies.arms import slug
from lossmith.studies.compare import Heading, Watcher, run_compare
from lossmith.studies.grid import Job, plan, run_jobs
from lossmith.studies.settings import CompareSettings, Execution
from lossmith.training.record import RunRecord, differences, environment, locked

SCALES = ("smoke", "quick", "full")


@dataclass(frozen=True, slots=True)
class Paper:
    """Where an idea comes from."""

    title: str
    year: int
    arxiv: str | None = None

    def __str__(self) -> str:
        return f"{self.title} ({self.year}{f', arXiv {self.arxiv}' if self.arxiv else ''})"


@dataclass(frozen=True, slots=True)
class Experiment:
    """What one arm measured under one seed in a study's own experiment."""

    metrics: Mapping[str, float]
    cost: Cost = field(default_factory=Cost)
    train: Curve = field(default_factory=Curve)
    evaluation: Curve = field(default_factory=Curve)


@dataclass(frozen=True, slots=True)
class Study:
    """A runnable comparison of a published idea.

    A study has its own ``experiment(arm, seed, options, folder)``, for the scales in ``options``, or is a comparison
    of language models, ``comparison(scale, data)``, for user's data and for scales without options; or both.
    ``prepare(options, folder)`` runs once before the experiments and returns further options (paths of what it has
    downloaded or built). User's data reach an experiment as ``options["data"]`` where the study says with ``data``
    what they are to be.

    Attributes:
        slug: its name on the command line.
        family: the room that its parts live in.
        question: one line.
        paper: source.
        arms: name -> one-line description; in the order to show.
        baseline: the arm to compare with.
        metric: name of the primary metric.
        metrics: all metrics to show, the primary first.
        claims: judged from the measurements.
        seeds: number of seeds by scale.
        options: options of the experiment by scale.
        experiment: see above.
        prepare: see above.
        comparison: settings and claims for language models.
        notes: shown in the report.
        better: direction (``lower`` or ``higher``) of secondary metrics that have one.
        lower_is_better: direction of the primary metric.
        data: what ``--data`` is to the experiment (``a CoNLL file``); empty where it takes none.
    """

    slug: str
    family: str
    question: str
    paper: Paper
    arms: Mapping[str, str]
    baseline: str
    metric: str
    metrics: tuple[str, ...]
    claims: tuple[Claim, ...]
    seeds: Mapping[str, int]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experiment: Callable[[str, int, Mapping[str, Any], Path], Experiment] | None = None
    prepare: Callable[[Mapping[str, Any], Path], Mapping[str, Any]] | None = None
    comparison: Callable[[str, str | None], tuple[CompareSettings, tuple[Claim, ...]]] | None = None
    notes: tuple[str, ...] = ()
    better: Mapping[str, Literal["lower", "higher"]] = field(default_factory=dict)
    lower_is_better: bool = True
    data: str = ""


def studies() -> dict[str, Study]:
    """Every study by its slug: those in this package (modules with a ``STUDY``) and those of installed packages."""
    import lossmith.studies as package

    found: dict[str, Study] = {}
    for module in pkgutil.iter_modules(package.__path__):
        study = getattr(importlib.import_module(f"lossmith.studies.{module.name}"), "STUDY", None)
        if isinstance(study, Study):
            found[study.slug] = study
    for point in entry_points(group="lossmith.studies"):
        study = point.load()
        found.setdefault(study.slug, study)
    return dict(sorted(found.items()))


def get_study(name: str) -> Study:
    """The study called ``name`` (with dashes or underscores).

    Raises:
        InputError: names the nearest one.
    """
    dashed = name.replace("_", "-")
    # The one that is asked for, without the others: a worker runs one, and another may be half written.
    module = f"lossmith.studies.{name.replace('-', '_')}"
    if name.isascii() and name.replace("-", "_").isidentifier() and importlib.util.find_spec(module) is not None:
        study = getattr(importlib.import_module(module), "STUDY", None)
        if isinstance(study, Study) and study.slug == dashed:
            return study
    every = studies()
    if dashed not in every:
        raise InputError(f"unknown study '{name}': {did_you_mean(dashed, every)}")
    return every[dashed]


def run_study(
    study: Study,
    scale: str = "quick",
    *,
    seeds: int | None = None,
    data: str | None = None,
    execution: Execution = Execution(),
    overrides: Mapping[str, Any] | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Run (or continue) a study.

    Args:
        study: what to run.
        scale: ``smoke`` (seconds), ``quick`` (about two minutes on two cores, no download) or ``full`` (real models
            and data).
        seeds: number of seeds, instead of the scale's.
        data: the user's own data: what the study says, else text on which the arms are compared as language models.
        execution: where and how.
        overrides: options of the experiment, or settings of the language-model comparison, to change (``model``, ...).
        watcher: told of progress.

    Raises:
        InputError: an unknown scale, or one that the study does not have.
    """
    if scale not in SCALES:
        raise InputError(f"unknown scale '{scale}': {did_you_mean(scale, SCALES)}")
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    out = execution.out if execution.out is not None else default_folder(study, scale, data)
    execution = dataclasses.replace(execution, out=out)
    if scale not in study.options or (data is not None and not study.data):
        return _compare_language_models(study, scale, seeds, data, execution, overrides or {}, watcher)
    options = _changed(study, scale, overrides or {})
    if data is not None:
        # A hub id is no path here.
        options["data"] = str(Path(data).resolve()) if Path(data).exists() else data
    return _run_experiments(study, scale, options, seeds or study.seeds[scale], execution, watcher or Watcher())


def _changed(study: Study, scale: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a scale, with those of the user."""
    options = dict(study.options[scale])
    changes = {k: v for k, v in overrides.items() if k != "training"} | dict(overrides.get("training") or {})
    for name, value in changes.items():
        if name not in options:
            hint = did_you_mean(name, options)
            raise InputError(f"study {study.slug} has no option '{name}' at scale {scale}: {hint}")
        options[name] = value
    return options


def default_folder(study: Study, scale: str, data: str | None = None) -> Path:
    """``runs/SLUG-SCALE``, and the name of the user's data where there is one."""
    return Path("runs") / "-".join([study.slug, scale, *([slug(Path(data).name)] if data else [])])


def run_experiment(name: str, arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One arm under one seed, from its record if it is finished (a worker's entry point)."""
    study = get_study(name)
    assert study.experiment is not None
    record = RunRecord(folder, {"study": name, "arm": arm, "seed": seed, "options": dict(options)})
    with record.lock():
        if (result := record.result()) is None:
            try:
                measured = study.experiment(arm, seed, options, folder)
            except Exception as error:
                if is_disk_full(error):
                    raise InputError(
                        f"the disk that holds {folder} is full; free some space and run the same command again"
                    ) from None
                raise
            result = {
                "arm": arm,
                "seed": seed,
                "status": "finished",
                **json.loads(json.dumps(dataclasses.asdict(measured))),
            }
            record.finish(result)
    return result


def _run_experiments(
    study: Study, scale: str, options: dict[str, Any], seeds: int, execution: Execution, watcher: Watcher
) -> Comparison:
    assert execution.out is not None
    out = execution.out
    identity = {
        "study": study.slug,
        "scale": scale,
        "options": json.loads(json.dumps(options)),
    }
    path = out / "study.json"
    if path.exists() and (changed := differences(read_json(path), identity)):
        raise InputError(
            f"--out {out} holds another study, which differs in {'; '.join(changed[:3])}; choose another folder"
        )
    with locked(out):
        write_json(path, identity)
        write_json(out / "environment.json", environment())
        given = dict(options)
        if study.prepare is not None:
            options |= study.prepare(options, out)
        jobs = []
        for seed in range(seeds):
            for arm in study.arms:
                folder = out / "runs" / arm / f"seed-{seed}"
                jobs.append(Job(f"{arm}, seed {seed}", run_experiment, (study.slug, arm, seed, options, folder)))
        workers, threads = plan(len(jobs), jobs=execution.jobs, threads=execution.threads)
        watcher.message(f"{len(jobs)} runs: {len(study.arms)} arms x {seeds} seeds, {workers} at a time")
        runs: dict[str, Run] = {}
        # Inside this process when there is nothing to gain from others: saves their start.
        outcomes = run_jobs(jobs, workers=workers, threads=threads, backend=execution.backend, tick=watcher.tick)
        for number, outcome in enumerate(outcomes, 1):
            if isinstance(outcome.error, InputError):
                raise outcome.error
            _, arm, seed, *_ = outcome.job.arguments
            runs[outcome.job.name] = _as_run(arm, seed, outcome.value, outcome.error)
            watcher.message(
                f"{number}/{len(jobs)} {outcome.job.name}{': ' + str(outcome.error) if outcome.error else ''}"
            )
    return Comparison(
        title=f"{study.slug} ({scale})",
        question=study.question,
        arms=study.arms,
        baseline=study.baseline,
        metric=study.metric,
        metrics=study.metrics,
        lower_is_better=study.lower_is_better,
        better=study.better,
        runs=tuple(runs[job.name] for job in jobs),
        claims=study.claims,
        configuration={"study": study.slug, "scale": scale, "seeds": seeds, **given},
        environment=read_json(out / "environment.json"),
        notes=study.notes,
        paper=str(study.paper),
    )


def _as_run(arm: str, seed: int, result: Mapping[str, Any] | None, error: BaseException | None) -> Run:
    if result is None:
        return Run(arm=arm, seed=seed, error=f"{type(error).__name__}: {error}")
    return Run(
        arm=arm,
        seed=seed,
        metrics={k: v for k, v in result["metrics"].items() if v is not None},
        cost=Cost(**result["cost"]),
        train=Curve(**{k: tuple(v) for k, v in result["train"].items()}),
        evaluation=Curve(**{k: tuple(v) for k, v in result["evaluation"].items()}),
    )


def _compare_language_models(
    study: Study,
    scale: str,
    seeds: int | None,
    data: str | None,
    execution: Execution,
    overrides: Mapping[str, Any],
    watcher: Watcher | None,
) -> Comparison:
    if study.comparison is None:
        raise InputError(
            f"study {study.slug} has no scale '{scale}' for {'--data' if data else 'language models'}: "
            f"{did_you_mean(scale, study.options)}"
        )
    from lossmith.studies.settings import make_settings

    settings, claims = study.comparison(scale, data)
    plain = {name: getattr(settings, name) for name in settings.model_fields_set}
    plain["seeds"] = seeds if seeds is not None else study.seeds[scale]
    training = {**(plain.get("training") or {}), **(overrides.get("training") or {})}
    settings = make_settings({**plain, **overrides, "training": training})
    heading = Heading(
        title=f"{study.slug} ({scale}{f', {data}' if data else ''})",
        question=study.question,
        claims=claims,
        paper=str(study.paper),
    )
    return run_compare(settings, execution, watcher=watcher, heading=heading)
