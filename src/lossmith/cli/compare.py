"""``lossmith compare`` and ``lossmith report``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lossmith.cli import app
from lossmith.errors import InputError

_DATA, _MODEL, _BUDGET, _OUTPUT, _LAYOUT = (
    "Data",
    "Model",
    "Arms and budget",
    "Output",
    "Layout (changes no result)",
)


def _in(panel: str, text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **options)


@app.command()
def compare(
    context: typer.Context,
    data: Annotated[
        str | None,
        _in(_DATA, "File, folder, hub id, or 'python' (default): the standard library's own text."),
    ] = None,
    text_field: Annotated[str | None, _in(_DATA, "Column that holds the text [text].")] = None,
    domain_field: Annotated[
        str | None, _in(_DATA, "Column that names a document's domain; losses are shown per domain.")
    ] = None,
    tokenizer: Annotated[
        str | None, _in(_DATA, "Folder or hub id; default: the model's own, or byte-level BPE trained here.")
    ] = None,
    vocab_size: Annotated[str | None, _in(_DATA, "Size of the tokenizer trained here [1024].")] = None,
    packing: Annotated[str | None, _in(_DATA, "isolated (default), concatenated or none.")] = None,
    sequence_length: Annotated[int | None, _in(_DATA, "Tokens per sequence [64 for nano and tiny, else 256].")] = None,
    eval_tokens: Annotated[str | None, _in(_DATA, "Validation tokens used at most [50k].")] = None,
    model: Annotated[str | None, _in(_MODEL, "Preset (nano, tiny, small, base), folder or hub id [tiny].")] = None,
    random_weights: Annotated[
        bool, _in(_MODEL, "Start a folder's or hub model from random weights.", "--random-weights")
    ] = False,
    dtype: Annotated[str | None, _in(_MODEL, "float32 (default), float64, bfloat16 or float16.")] = None,
    arm: Annotated[
        list[str] | None,
        _in(
            _BUDGET,
            "An arm: 'name' or 'name: option=value, ...' with loss, weighting, sampler, weights, model, batch_size, "
            "tokens or any TrainingArguments name. Repeat for each arm.",
        ),
    ] = None,
    baseline: Annotated[str | None, _in(_BUDGET, "Arm to compare with; default 'baseline', else the first.")] = None,
    tokens: Annotated[str | None, _in(_BUDGET, "Training tokens per run, such as 300k or 2M [250k].")] = None,
    max_epochs: Annotated[float | None, _in(_BUDGET, "How often the corpus may be repeated [1].")] = None,
    seeds: Annotated[str | None, _in(_BUDGET, "Number of seeds, or a list such as 0,1,2 [3].")] = None,
    batch_size: Annotated[int | None, _in(_BUDGET, "Sequences per optimiser step, over all processes [16].")] = None,
    level: Annotated[float | None, _in(_BUDGET, "Confidence level of the intervals [0.95].")] = None,
    set_: Annotated[
        list[str] | None, _in(_BUDGET, "Any setting or TrainingArguments name as key=value. Repeat.", "--set")
    ] = None,
    config: Annotated[
        Path | None,
        _in(_OUTPUT, "YAML file with these settings (names with underscores); options given here win."),
    ] = None,
    out: Annotated[
        Path | None,
        _in(_OUTPUT, "Folder for records and report; default runs/compare-<hash of the settings>."),
    ] = None,
    cache: Annotated[Path | None, _in(_OUTPUT, "Folder for prepared corpora [~/.cache/lossmith].")] = None,
    dry_run: Annotated[
        bool, _in(_OUTPUT, "Check everything, print the plan and its cost, train nothing.", "--dry-run")
    ] = False,
    jobs: Annotated[int | None, _in(_LAYOUT, "Runs side by side; default: as many as cores allow.")] = None,
    threads: Annotated[int | None, _in(_LAYOUT, "Threads per run; default: 1 for small models.")] = None,
    processes: Annotated[int | None, _in(_LAYOUT, "Processes per run (as torchrun --nproc-per-node).")] = None,
    micro_batch_size: Annotated[
        int | None, _in(_LAYOUT, "Sequences at a time per process; the rest is gradient accumulation.")
    ] = None,
    layout: Annotated[str | None, _in(_LAYOUT, "padded (default) or packed: one long row without padding.")] = None,
    chunk_size: Annotated[int | None, _in(_LAYOUT, "Rows of logits held at once.")] = None,
    device: Annotated[str | None, _in(_LAYOUT, "auto (default) or cpu.")] = None,
    backend: Annotated[str, _in(_LAYOUT, "local (default) or ray.")] = "local",
) -> None:
    """Train arms under an equal budget over several seeds, and say what each is worth.

    Without options: four arms of a tiny Llama-style model on the text of Python's own standard library, in about three
    minutes. The same command again continues an interrupted comparison.

    **Examples**

    `lossmith compare --data my_corpus/ --tokens 2M --arm baseline --arm "reweighted: weighting=linupper(r=0.5)"`

    `lossmith compare --arm baseline --arm "hot: learning_rate=8e-3" --seeds 5`

    `lossmith compare --config compare.yaml --model path/or/hub-id --out runs/my-comparison`
    """
    if backend not in ("local", "ray"):
        raise InputError(f"--backend must be local or ray, got '{backend}'")
    from lossmith.studies.settings import Execution, make_settings

    given = {
        name: value
        for name, value in context.params.items()
        if value is not None
        and value is not False
        and name not in ("arm", "set_", "config", "out", "cache", "dry_run", "jobs", "threads", "processes", "backend")
    }
    if arm:
        given["arms"] = list(arm)
    values = _read_config(config) if config is not None else {}
    execution = {name: values.pop(name, None) for name in ("out", "jobs", "threads", "cache")}
    own = {"out": out, "jobs": jobs, "threads": threads, "cache": cache}
    execution = {name: own[name] if own[name] is not None else value for name, value in execution.items()}
    for name in ("out", "cache"):
        execution[name] = Path(execution[name]) if execution[name] is not None else None
    settings = make_settings(_merge(_merge(values, given), overrides(set_ or [])))
    chosen = Execution(backend=backend, **execution)  # type: ignore[arg-type]
    if processes is not None:
        if processes < 1:
            raise InputError(f"--processes must be at least 1, got {processes}")
        if processes > 1 and "WORLD_SIZE" not in os.environ and not dry_run:
            _launch(processes, settings, chosen)
    _run(settings, chosen, dry_run)


def _run(settings: Any, execution: Any, dry_run: bool) -> None:
    from rich.console import Console

    from lossmith.cli.progress import ProgressDisplay
    from lossmith.studies.compare import run_compare

    console = Console()
    display = ProgressDisplay(Console(stderr=True))
    if dry_run:
        _print_plan(settings, execution, console, display)
        return
    out = execution.out if execution.out is not None else settings.default_folder()
    comparison = run_compare(settings, execution, watcher=display.watcher())
    if int(os.environ.get("RANK", "0")) == 0:
        finish_report(comparison, out, console)


def finish_report(comparison: Any, out: Path, console: Any) -> None:
    """Print the table, write the report, and end with code 2 when a run failed."""
    from lossmith.files import write_json
    from lossmith.reporting import comparison_to_json, print_table, write_all
    from lossmith.studies.sparse_arms import measured_lines

    write_json(out / "comparison.json", comparison_to_json(comparison))
    written = write_all(comparison, out)
    print_table(comparison, console)
    for line in measured_lines(out):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {written['report.html']}", highlight=False, soft_wrap=True)
    if failed := [run for run in comparison.runs if run.error]:
        for run in failed:
            text = run.error if run.arm in str(run.error) else f"arm '{run.arm}', seed {run.seed}: {run.error}"
            print(f"lossmith: {text}", file=sys.stderr)
        raise typer.Exit(2)


def _print_plan(settings: Any, execution: Any, console: Any, display: Any) -> None:
    import tempfile

    from lossmith.studies.compare import prepare_runs

    with tempfile.TemporaryDirectory() as folder:
        _, planned = prepare_runs(settings, execution, Path(folder), display.watcher())
    for p in planned:
        if p.run.seed == settings.seeds[0]:
            run = p.run
            tokens = run.steps * run.batch_size * run.sequence_length
            console.print(
                f"{run.arm}: {run.model}, {run.steps} steps of {run.batch_size} x {run.sequence_length} tokens "
                f"({tokens:,}), loss {run.loss}, weighting {run.weighting}, sampler {run.sampler}",
                highlight=False,
                markup=False,
            )
    console.print(f"{len(planned)} runs, {planned[0].run.threads} thread(s) each", highlight=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or study.")],
) -> None:
    """Print the table of a finished (or interrupted) comparison again and rewrite its report.

    Writes `report.html` and its plots into FOLDER.

    `lossmith report runs/my-comparison`
    """
    from rich.console import Console

    from lossmith.files import read_json
    from lossmith.reporting import comparison_from_json

    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    path = folder / "comparison.json"
    if not path.exists():
        raise InputError(f"{folder} holds no comparison.json; give the --out folder of lossmith compare or study")
    try:
        comparison = comparison_from_json(read_json(path))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a comparison written by lossmith") from None
    finish_report(comparison, folder, Console())


def _launch(processes: int, settings: Any, execution: Any) -> None:
    """Start the same command on several processes, after all checks: the launcher would bury a message in its own."""
    from lossmith.studies.compare import check_identity, prepare_runs
    from lossmith.training.language_model import micro_batch

    out = execution.out if execution.out is not None else settings.default_folder()
    check_identity(settings, out)
    for arm in settings.arms:
        micro_batch(int(arm.options.get("batch_size", settings.batch_size)), settings.micro_batch_size, processes)
    prepare_runs(settings, execution, out)
    arguments, skip = [], False
    for word in sys.argv[1:]:
        if skip or word == "--processes":
            skip = not skip
        elif not word.startswith("--processes="):
            arguments.append(word)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([*launcher, "-m", "lossmith", *arguments], env=environment, check=False)
    raise typer.Exit(0 if done.returncode == 0 else 2)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"--config {path} is not YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must hold 'setting: value' lines")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _merge(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    training = {**(values.get("training") or {}), **(more.get("training") or {})}
    return {**values, **more, **({"training": training} if training else {})}


def overrides(texts: list[str]) -> dict[str, Any]:
    """``--set``: settings by their names, everything else belongs to ``training``."""
    from lossmith.registry import parse_assignments
    from lossmith.studies.settings import CompareSettings

    values: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for text in texts:
        for key, value in parse_assignments(text).items():
            if key in CompareSettings.model_fields:
                values[key] = value
            else:
                training[key.removeprefix("training.")] = value
    return {**values, **({"training": training} if training else {})}
