"""Loss curves: losses along a run, with the learning rate of every optimiser step.

Read from CSV, TSV, JSON, JSONL or Parquet (``step, lr, loss``; exports of W&B), Hugging Face's ``trainer_state.json``,
Lossmith's run records, TensorBoard event files, and folders of any of these.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.schedules import Schedule, schedule
from lossmith.laws.tables import Reading
from lossmith.laws.terms import Array

if TYPE_CHECKING:
    import pandas as pd

# In the order of preference: validation before training, unweighted before weighted.
_LOSSES = (
    ("eval/loss", "eval_loss", "val_loss", "validation_loss", "val/loss", "valid_loss", "test_loss"),
    ("loss", "L", "cross_entropy"),
    ("train/loss_unweighted", "loss_unweighted", "train/loss", "train_loss"),
)
# Validations of a run below this number cannot carry a law of four parameters.
_FEW = 8
_STEPS = ("step", "_step", "steps", "global_step", "train/global_step", "iteration", "iter", "trainer/global_step")
_RATES = ("lr", "learning_rate", "train/learning_rate", "train/lr", "optimizer/lr", "lr-AdamW")
_RUNS = ("run", "run_name", "run_id", "name")
_PARAMS = ("params", "N", "num_params", "n_params", "parameters", "model_size", "non_embedding_params")
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_AMOUNT = re.compile(r"([0-9.]+)([kmb])", re.IGNORECASE)
_UNIT = {"k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True, slots=True)
class LossCurve:
    """One run.

    Attributes:
        name: of the run.
        steps: optimiser steps, from 1, after which the loss was measured: ``(n,)``, rising.
        losses: nats per token ``(n,)``.
        rates: the learning rate used at each step ``1..T``: ``(T,)``, ``T >= steps[-1]``.
        params: number of parameters, where it is known.
        notes: what reading did, one sentence each.

    >>> curve = LossCurve.of("a", [10, 20], [3.0, 2.5], "cosine(peak=1e-3, steps=20)")
    >>> len(curve.rates)
    20
    """

    name: str
    steps: np.ndarray
    losses: Array
    rates: Array
    params: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        steps: Sequence[float] | np.ndarray,
        losses: Sequence[float] | Array,
        schedule_or_rates: Schedule | str | Sequence[float] | Array,
        *,
        params: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> LossCurve:
        """A curve from numbers and a schedule (or the rate of every step).

        Raises:
            InputError: losses that are not positive, steps that do not rise or have no learning rate.
        """
        at, values = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        if at.ndim != 1 or at.shape != values.shape or len(at) == 0:
            raise InputError(f"{name}: steps {at.shape} and losses {values.shape} must be lists of one length")
        if not np.isfinite(at).all() or (at != np.round(at)).any() or at[0] < 1:
            raise InputError(
                f"{name}: steps must be whole numbers from 1, got {at[~(np.round(at) == at) | (at < 1)][:1]}"
            )
        if (np.diff(at) <= 0).any():
            where = int(np.flatnonzero(np.diff(at) <= 0)[0])
            raise InputError(f"{name}: steps must rise, but {at[where + 1]:g} follows {at[where]:g}")
        if not np.isfinite(values).all() or (values <= 0).any():
            bad = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
            raise InputError(
                f"{name}: the loss at step {at[bad]:g} is {values[bad]:g}; losses must be positive and finite"
            )
        last = int(at[-1])
        made = schedule(schedule_or_rates)
        rates = made.values(max(last, made.length or 0))
        if isinstance(schedule_or_rates, list | tuple | np.ndarray) and len(schedule_or_rates) < last:
            raise InputError(
                f"{name}: a learning rate is needed for every step: {len(schedule_or_rates)} of {last} given"
            )
        return cls(name, at.astype(np.int64), values, rates, params, notes)

    def first(self, share: float) -> LossCurve:
        """What was measured in the first ``share`` of the steps; the schedule stays whole."""
        keep = self.steps <= share * self.steps[-1]
        return dataclasses.replace(self, steps=self.steps[keep], losses=self.losses[keep])

    def averaged(self, points: int) -> LossCurve:
        """Means over ``points`` windows of neighbouring measurements: for noisy training losses."""
        if len(self.steps) <= points:
            return self
        parts = np.array_split(np.arange(len(self.steps)), points)
        steps = np.array([round(self.steps[p].mean()) for p in parts])
        return dataclasses.replace(self, steps=steps, losses=np.array([self.losses[p].mean() for p in parts]))


def every_step(steps: np.ndarray, rates: Array, total: int) -> Array:
    """The learning rate of every step ``1..total`` from those that were logged.

    Between two logged steps the rate is interpolated, unless it was constant before and after: then it jumped, half
    way. Before the first logged step it is the first rate (or, where it rises from there, on the same straight line),
    after the last one the last.

    >>> every_step(np.array([2, 4, 6, 8]), np.array([4.0, 4.0, 1.0, 1.0]), 8).tolist()
    [4.0, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0]
    """
    wanted = np.arange(1, total + 1)
    filled = np.interp(wanted, steps, rates)
    if len(rates) > 1 and rates[1] > rates[0]:
        # Logged within the warm-up.
        early = wanted < steps[0]
        line = rates[0] - (rates[1] - rates[0]) / (steps[1] - steps[0]) * (steps[0] - wanted[early])
        filled[early] = np.maximum(line, 0.0)
    change = np.diff(rates) != 0
    for k in np.flatnonzero(change[1:-1] & ~change[:-2] & ~change[2:]) + 1:
        inside = (wanted > steps[k]) & (wanted < steps[k + 1])
        filled[inside] = np.where(wanted[inside] <= (steps[k] + steps[k + 1]) / 2, rates[k], rates[k + 1])
    return filled


def read_curves(
    source: Any, reading: Reading = Reading(), *, schedules: Mapping[str, Any] | None = None
) -> tuple[LossCurve, ...]:
    """Read one or several curves.

    Args:
        source: a curve or several, a DataFrame, a mapping of columns, a file, or a folder.
        reading: headers of ``step``, ``lr``, ``loss``, ``params``, of the run, and the loss's unit.
        schedules: run's name -> schedule, where no learning rate was logged; ``"*"`` for all others.

    Returns:
        The curves, by name.

    Raises:
        InputError: nothing to read, no learning rate and no schedule, losses that are not positive, and so on.
    """
    if isinstance(source, LossCurve):
        return (source,)
    if isinstance(source, Sequence) and not isinstance(source, str) and any(isinstance(s, LossCurve) for s in source):
        if odd := [type(s).__name__ for s in source if not isinstance(s, LossCurve)]:
            raise TypeError(f"among the curves there is a {odd[0]}; all must be LossCurve")
        return tuple(source)
    found: list[LossCurve] = []
    for name, frame, params in _frames(source):
        for label, rows in _by_run(name, frame, reading):
            curve = _curve(label, rows, reading, schedules or {}, params)
            if curve is not None:
                found.append(curve)
    if not found:
        raise InputError(f"{source} holds no loss curve: a curve has a step, a learning rate and a loss")
    return tuple(found)


def read_rates(path: str | Path) -> Array:
    """The learning rate of every step in a file with columns ``step`` and ``lr``."""
    name, frame, _ = next(iter(_frames(path)))
    step, rate = (_header(frame, what, names, Reading(), name) for what, names in (("step", _STEPS), ("lr", _RATES)))
    steps, rates = _logged(frame, step, rate, name)
    return every_step(steps, rates, int(steps[-1]))


def _frames(source: Any) -> Iterable[tuple[str, pd.DataFrame, float | None]]:
    """Tables with their names, and the number of parameters that a folder's name says."""
    from lossmith.laws.sources import read_frame

    if not isinstance(source, str | Path):
        yield "the table", read_frame(source)[1], None
        return
    path = Path(source)
    if not path.is_dir():
        yield path.stem, _read_file(path), _amount(path.parent.name)
        return
    for file in sorted(p for p in path.rglob("*") if p.is_file() and _is_curve(p) and not _is_report(p, path)):
        place = file.parent
        if place.name.startswith("checkpoint-"):
            place = place.parent
        label = str((place if _is_log(file) else file.with_suffix("")).relative_to(path))
        yield label if label != "." else path.name, _read_file(file), _amount(place.name)


def _is_log(path: Path) -> bool:
    """Whether the file is of one run, which its folder is named after."""
    return path.name in ("metrics.jsonl", "trainer_state.json") or "tfevents" in path.name


def _is_report(path: Path, root: Path) -> bool:
    """Whether the file is a table or setting of `lossmith compare` or `study`, whose curves are the logs of runs."""
    folders = [folder for folder in path.parents if folder.is_relative_to(root)]
    told = any((folder / name).exists() for folder in folders for name in ("compare.json", "study.json"))
    return told and not _is_log(path)


def _is_curve(path: Path) -> bool:
    if path.name in ("config.json", "result.json", "environment.json", "complete.json") or path.name.startswith("."):
        return False
    # A folder of runs holds checkpoints and models too; only the last of a run's states is the whole curve.
    if path.parent.name.startswith("checkpoint-"):
        return path.name == "trainer_state.json" and path == _last_state(path.parent.parent)
    if any((folder / "metrics.jsonl").exists() for folder in (path.parent, path.parent.parent)):
        return path.name == "metrics.jsonl"
    return _is_log(path) or path.suffix.lower() in _SUFFIXES


def _last_state(run: Path) -> Path | None:
    """The newest checkpoint's ``trainer_state.json``, where the run has none of its own."""
    if (run / "trainer_state.json").exists() or (run / "metrics.jsonl").exists():
        return None
    found = [p for p in run.glob("checkpoint-*/trainer_state.json") if p.parent.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda p: int(p.parent.name.rpartition("-")[2]), default=None)


def _read_file(path: Path) -> pd.DataFrame:
    from lossmith.laws.sources import read_frame

    frame = read_frame(path)[1]
    # The names of runs are those of their folders.
    return frame.drop(columns="run", errors="ignore") if _is_log(path) else frame


def _by_run(name: str, frame: pd.DataFrame, reading: Reading) -> Iterable[tuple[str, pd.DataFrame]]:
    for header, value in reading.where.items():
        if header not in frame.columns:
            raise InputError(f"{name} has no column '{header}'; its columns are: {', '.join(map(str, frame.columns))}")
        frame = frame[frame[header].astype(str) == str(value)]
    said = reading.run
    if said is not None and said not in frame.columns:
        raise InputError(
            f"{name} has no column '{said}' for runs; its columns are: {', '.join(map(str, frame.columns))}"
        )
    column = said or _found(frame, _RUNS)
    if column is None:
        return [(name, frame)]
    return [(str(label), rows) for label, rows in frame.groupby(column, sort=False)]


def _curve(
    name: str, frame: pd.DataFrame, reading: Reading, schedules: Mapping[str, Any], params: float | None
) -> LossCurve | None:
    step = _header(frame, "step", _STEPS, reading, name)
    rate = reading.columns.get("lr") or _found(frame, _RATES)
    notes: list[str] = []
    loss = reading.columns.get("loss") or _loss(frame, name, notes)
    if loss is None:
        raise InputError(f"{name} has no column for the loss; its columns are: {', '.join(map(str, frame.columns))}")
    if loss not in frame.columns:
        raise InputError(f"{name} has no column '{loss}'; its columns are: {', '.join(map(str, frame.columns))}")
    rows = frame[[step, loss]].apply(lambda column: _numeric(column, name))
    measured = rows[rows[loss].notna() & rows[step].notna()]
    # Learning rate and validation loss are often logged in different rows: each is taken from its own.
    if not len(measured):
        raise InputError(f"{name}: no row has both a step ('{step}') and a loss ('{loss}')")
    together = rate in frame.columns and frame.loc[measured.index, rate].notna().all()
    if together and (holes := int((frame[rate].notna() & rows[loss].isna()).sum())):
        notes.append(f"{name}: {holes} of {len(rows)} rows dropped: the loss is missing or NaN")
    measured = measured.sort_values(step, kind="stable")
    repeated = measured.duplicated(step, keep="last")
    if repeated.any():
        notes.append(f"{name}: {int(repeated.sum())} steps were logged twice; the later losses count")
        measured = measured[~repeated]
    at, losses = measured[step].to_numpy(np.float64), measured[loss].to_numpy(np.float64)
    if at[0] == 0:
        # Before the first step there is no learning rate.
        at, losses = at[1:], losses[1:]
    if not len(at):
        return None
    losses = _in_nats(losses, str(loss), reading.unit, name)
    size = _size(frame, reading, name, params)
    given = schedules.get(name, schedules.get("*"))
    if given is not None:
        return LossCurve.of(name, at, losses, schedule(given).values(int(at[-1])), params=size, notes=tuple(notes))
    if rate is None:
        raise InputError(
            f"{name} has no learning rate, which is needed for every step: its columns are "
            f"{', '.join(map(str, frame.columns))}; name one with lr=HEADER, or give a schedule"
        )
    steps, rates = _logged(frame, step, rate, name)
    if at[-1] > steps[-1]:
        beyond = int((at > steps[-1]).sum())
        if beyond > 1:
            notes.append(f"{name}: {beyond} losses lie beyond the last logged learning rate, which is kept for them")
    return LossCurve.of(name, at, losses, every_step(steps, rates, int(at[-1])), params=size, notes=tuple(notes))


def _loss(frame: pd.DataFrame, name: str, notes: list[str]) -> str | None:
    """The header of the loss: the validation loss, unless it was measured too seldom and the training loss often."""
    found = [header for names in _LOSSES if (header := _found(frame, names))]
    counts = [int(frame[header].notna().sum()) for header in found]
    chosen = next((h for h, n in zip(found, counts, strict=True) if n >= _FEW), None)
    if chosen is None:
        return max(zip(counts, found, strict=True), default=(0, None), key=lambda pair: pair[0])[1]
    if chosen != found[0]:
        notes.append(f"{name}: '{chosen}' is read, because '{found[0]}' was measured only {counts[0]} times")
    return chosen


def _logged(frame: pd.DataFrame, step: str, rate: Any, name: str) -> tuple[np.ndarray, Array]:
    if rate not in frame.columns:
        raise InputError(f"{name} has no column '{rate}'; its columns are: {', '.join(map(str, frame.columns))}")
    rows = frame[[step, rate]].apply(lambda column: _numeric(column, name)).dropna()
    rows = rows.sort_values(step, kind="stable").drop_duplicates(step, keep="last")
    if not len(rows):
        raise InputError(f"{name}: no row has both a step ('{step}') and a learning rate ('{rate}')")
    steps, rates = rows[step].to_numpy(np.float64), rows[rate].to_numpy(np.float64)
    if not np.isfinite(rates).all() or (rates < 0).any() or not (rates > 0).any():
        raise InputError(f"{name}: learning rates in '{rate}' must be finite and not negative, and not all 0")
    return steps, rates


def _numeric(column: pd.Series[Any], name: str) -> pd.Series[Any]:
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    words = column.notna() & numbers.isna() & (column.astype(str).str.lower() != "nan")
    if words.any():
        raise InputError(f"{name}: '{column[words].iloc[0]}' in column '{column.name}' is not a number")
    return numbers


def _in_nats(losses: Array, header: str, unit: str | None, name: str) -> Array:
    if unit is None and np.nanmax(losses) > 20:
        raise InputError(
            f"{name}: '{header}' reaches {np.nanmax(losses):g}, too much for a loss in nats: is it a perplexity? "
            "Then say unit perplexity; else unit nats"
        )
    if unit not in (None, "nats", "bits", "perplexity"):
        raise InputError(f"unit must be nats, bits or perplexity, got '{unit}'")
    if unit == "perplexity":
        if (losses <= 1).any():
            raise InputError(f"{name}: '{header}' is said to be a perplexity, but holds {losses.min():g}, not above 1")
        return np.asarray(np.log(losses))
    return losses * np.log(2) if unit == "bits" else losses


def _size(frame: pd.DataFrame, reading: Reading, name: str, params: float | None) -> float | None:
    said = reading.columns.get("params")
    if said is not None:
        try:
            return float(said)
        except ValueError:
            if said not in frame.columns:
                raise InputError(f"{name} has no column '{said}'") from None
    column = said or _found(frame, _PARAMS)
    if column is None:
        return params
    values = frame[column].dropna().unique()
    if len(values) != 1:
        raise InputError(f"{name} has {len(values)} different numbers of parameters in '{column}'; a curve has one")
    return _amount(str(values[0])) or float(values[0])


def _amount(text: str) -> float | None:
    match = _AMOUNT.fullmatch(text)
    return float(match[1]) * _UNIT[match[2].lower()] if match else None


def _header(frame: pd.DataFrame, what: str, names: Sequence[str], reading: Reading, name: str) -> str:
    said = reading.columns.get(what)
    header = str(said) if said is not None else _found(frame, names)
    if header is None or header not in frame.columns:
        there = ", ".join(map(str, frame.columns))
        raise InputError(
            f"{name} has no column {f'{header!r}' if header else f'for the {what}'}; its columns are: {there}"
        )
    return header


def _found(frame: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of ``names`` among the headers, without case; W&B puts ``RUN - `` before them."""
    plain: dict[str, str] = {}
    for header in frame.columns:
        text = str(header)
        if not text.endswith(("__MIN", "__MAX")):
            plain.setdefault(text.rpartition(" - ")[2].strip().lower(), text)
    return next((plain[n.lower()] for n in names if n.lower() in plain), None)
