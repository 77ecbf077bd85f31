"""Where measured losses come from: tables, files, run records, and what Trainer, TensorBoard and W&B leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.files import read_json, read_utf8

if TYPE_CHECKING:
    import pandas as pd

# A chart exported from W&B: "run - metric", with the extremes of grouped runs beside it.
_WANDB = re.compile(r"(?P<run>.+) - (?P<metric>[^ ]+?)(?P<extreme>__MIN|__MAX)?")
_TENSORBOARD_CSV = {"walltime", "step", "value"}


def read_frame(source: Any) -> tuple[str, pd.DataFrame]:
    """A name for messages, and the rows as they are: no units, no checks.

    Args:
        source: a DataFrame, a mapping of columns, a list of rows; a CSV, TSV, JSON, JSONL or Parquet file (among them
            charts exported from W&B or TensorBoard, and ``trainer_state.json``); or a folder of run records, of
            TensorBoard events, of Trainer outputs, or of such files.

    Raises:
        InputError: nothing there, or nothing that can be read.
    """
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return "the table", source.reset_index(drop=True)
    if not isinstance(source, Mapping | Sequence | Path):
        found = type(source).__name__
        raise TypeError(f"measurements must be a DataFrame, a mapping of columns, rows or a path, got {found}")
    if isinstance(source, Mapping):
        lengths = {name: np.size(value) for name, value in source.items()}
        if len({n for n in lengths.values() if n != 1}) > 1:
            raise InputError(f"the columns differ in length: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
        if wide := [str(name) for name, value in source.items() if np.ndim(value) > 1]:
            raise InputError(f"column {wide[0]} must have one dimension, got {np.ndim(source[wide[0]])}")
        return "the table", pd.DataFrame({name: np.asarray(value) for name, value in source.items()})
    if isinstance(source, Sequence) and not isinstance(source, str):
        return "the table", pd.DataFrame(list(source))
    path = Path(source)
    if path.is_dir():
        return str(path), _folder(path)
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}")
    return str(path), _file(path)


def _file(path: Path) -> pd.DataFrame:
    import pandas as pd

    if path.name == "trainer_state.json":
        return pd.DataFrame(_trainer_rows(path, path.parent.name))
    if path.name.startswith("events.out.tfevents"):
        return pd.DataFrame(_event_rows(path.parent, path.parent.name))
    readers: dict[str, Any] = {
        ".csv": pd.read_csv,
        ".tsv": lambda p: pd.read_csv(p, sep="\t"),
        ".jsonl": lambda p: pd.read_json(p, lines=True),
        ".json": pd.read_json,
        ".parquet": pd.read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"cannot read {path}: the name must end in {', '.join(readers)}, or be a folder of run records"
        )
    try:
        frame = reader(path)
    except Exception as error:
        if path.suffix.lower() == ".jsonl":
            _check_lines(path)
        raise InputError(
            f"cannot read {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return _long(frame.reset_index(drop=True), path.stem)


def _check_lines(path: Path) -> None:
    """Name the first line that is not JSON: pandas counts characters."""
    for number, line in enumerate(read_utf8(path).splitlines(), 1):
        try:
            json.loads(line or "null")
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from None


def _long(frame: pd.DataFrame, stem: str) -> pd.DataFrame:
    """Exported charts as one row per measurement; other tables as they are."""
    import pandas as pd

    headers = [str(header) for header in frame.columns]
    if {re.sub(r"[^a-z]", "", header.lower()) for header in headers} == _TENSORBOARD_CSV:
        return frame.set_axis([{"Step": "step", "Value": "loss"}.get(h, h) for h in headers], axis=1).assign(run=stem)
    matches = [_WANDB.fullmatch(header) for header in headers[1:]]
    if len(headers) < 2 or not all(matches) or " - " in headers[0]:
        return frame
    parts: dict[str, list[pd.DataFrame]] = {}
    for header, match in zip(headers[1:], matches, strict=True):
        assert match is not None
        if match["extreme"] or match["metric"] == "_step":
            continue
        part = pd.DataFrame({headers[0]: frame[headers[0]], "run": match["run"], match["metric"]: frame[header]})
        parts.setdefault(match["run"], []).append(part.dropna(subset=[match["metric"]]))
    joined = []
    for own in parts.values():
        whole = own[0]
        for other in own[1:]:
            whole = whole.merge(other, on=[headers[0], "run"], how="outer")
        joined.append(whole)
    return pd.concat(joined, ignore_index=True)


def _folder(folder: Path) -> pd.DataFrame:
    """Whatever kind of records the folder holds; the first kind that is found."""
    import pandas as pd

    kinds: tuple[tuple[str, Callable[[Path], Iterable[dict[str, Any]]]], ...] = (
        ("metrics.jsonl", _record_rows),
        ("events.out.tfevents*", lambda found: _event_rows(found, str(found.relative_to(folder)))),
        ("trainer_state.json", lambda found: _trainer_rows(found / "trainer_state.json", _run_of(found, folder))),
    )
    for pattern, reader in kinds:
        places = sorted({path.parent for path in folder.rglob(pattern)})
        if pattern == "trainer_state.json":
            places = _last_checkpoints(places)
        if not places:
            continue
        if pattern == "metrics.jsonl":
            return _run_records(folder, places)
        return pd.DataFrame([row for place in places for row in reader(place)])
    files = sorted(path for suffix in ("csv", "tsv", "jsonl", "parquet") for path in folder.glob(f"*.{suffix}"))
    if not files:
        raise InputError(
            f"{folder} holds no run records (metrics.jsonl), TensorBoard events, trainer_state.json or tables"
        )
    frames = [_file(path) for path in files]
    return pd.concat(
        [f if "run" in f.columns else f.assign(run=p.stem) for f, p in zip(frames, files, strict=True)],
        ignore_index=True,
    )


def _run_records(folder: Path, places: list[Path]) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    skipped = 0
    for place in places:
        own = list(_record_rows(place))
        skipped += not own
        label = str(place.relative_to(folder))
        rows += [{"run": label, **row} for row in own]
    if not rows:
        raise InputError(f"{folder} holds no finished run records with evaluations (metrics.jsonl and result.json)")
    frame = pd.DataFrame(rows)
    if skipped:
        frame.attrs["notes"] = [
            f"{skipped} of {len(places)} run records left out: not finished, or without evaluations"
        ]
    return frame


def _record_rows(place: Path) -> Iterable[dict[str, Any]]:
    """Evaluations of one run: its size as recorded, else from its FLOPs (6 per parameter and token)."""
    result_file, config_file = place / "result.json", place / "config.json"
    if not result_file.exists():
        return
    result = read_json(result_file)
    cost, parameters = result.get("cost", {}), result.get("parameters") or {}
    size = parameters.get("final")
    if size is None and cost.get("tokens") and cost.get("flops"):
        size = cost["flops"] / (6 * cost["tokens"])
    if size is None:
        return
    settings = read_json(config_file) if config_file.exists() else {}
    for logged in _lines(place / "metrics.jsonl"):
        if logged.get("eval/loss") is None or not logged.get("tokens"):
            continue
        yield {
            "params": size,
            "average_params": parameters.get("average", size),
            "tokens": logged["tokens"],
            "loss": logged["eval/loss"],
            "step": logged.get("step"),
            "arm": settings.get("arm"),
            "seed": settings.get("seed"),
        }


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            # The last line of a run that was killed.
            continue


def _trainer_rows(path: Path, run: str) -> list[dict[str, Any]]:
    """``log_history`` of the Hugging Face Trainer; tokens where it counted them (``include_num_input_tokens_seen``)."""
    try:
        history = read_json(path)["log_history"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a Trainer's state (JSON with log_history)") from None
    names = {"num_input_tokens_seen": "tokens"}
    steps: dict[Any, dict[str, Any]] = {}
    for entry in history:
        row = steps.setdefault(entry.get("step"), {"run": run})
        row.update({names.get(name, name): value for name, value in entry.items()})
    return list(steps.values())


def _last_checkpoints(places: list[Path]) -> list[Path]:
    """Of ``run/checkpoint-10``, ``run/checkpoint-20``, ``run`` the last: its history holds the others'."""
    last: dict[Path, tuple[float, Path]] = {}
    for place in places:
        found = re.fullmatch(r"checkpoint-(\d+)", place.name)
        run, step = (place.parent, float(found[1])) if found else (place, float("inf"))
        last[run] = max(last.get(run, (-1.0, place)), (step, place))
    return [place for _, place in last.values()]


def _run_of(place: Path, folder: Path) -> str:
    own = place.parent if re.fullmatch(r"checkpoint-\d+", place.name) else place
    return str(own.relative_to(folder)) if own != folder else folder.name


def _event_rows(place: Path, run: str) -> list[dict[str, Any]]:
    """Scalars of TensorBoard events, one row per step."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise InputError(
            f"{place} holds TensorBoard events; reading them needs: pip install 'lossmith[tensorboard]'"
        ) from None
    events = EventAccumulator(str(place), size_guidance={"scalars": 0})
    events.Reload()
    steps: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            steps.setdefault(event.step, {"run": run, "step": event.step})[tag] = event.value
    if not steps:
        raise InputError(f"the TensorBoard events in {place} hold no scalars")
    return [steps[step] for step in sorted(steps)]
