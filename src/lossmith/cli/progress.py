"""Progress of a grid of runs: a bar with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lossmith.studies.compare import Planned, Watcher

_LOG_SECONDS = 30.0


class ProgressDisplay:
    """Follows the run records of a grid; works for local and remote workers alike."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._planned: list[Planned] = []
        self._finished: dict[Path, int] = {}
        self._bar: Progress | None = None
        self._started = self._last = time.monotonic()
        self._done_before = 0

    def watcher(self) -> Watcher:
        """This display as a :class:`~lossmith.studies.compare.Watcher`."""
        return Watcher(self._message, self._start, self._tick, self._done, self._finish)

    def _message(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)

    def _start(self, planned: list[Planned]) -> None:
        self._planned = planned
        for p in planned:
            if (p.folder / "result.json").exists():
                self._finished[p.folder] = p.run.steps
        self._started = self._last = time.monotonic()
        self._done_before = self._steps_done()
        arms, seeds = {p.run.arm for p in planned}, {p.run.seed for p in planned}
        done = f", {len(self._finished)} finished already" if self._finished else ""
        steps = sorted({p.run.steps for p in planned})
        self._message(
            f"{len(planned)} runs: {len(arms)} arms x {len(seeds)} seeds, {'/'.join(map(str, steps))} steps each{done}"
        )
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=self._total(), left="", completed=self._steps_done())
            self._bar.start()

    def _tick(self) -> None:
        now = time.monotonic()
        if self._bar is not None and now - self._last > 0.5:
            self._last = now
            done = self._steps_done()
            self._bar.update(self._task, completed=done, left=self._left(done))
        elif self._bar is None and now - self._last > _LOG_SECONDS:
            self._last = now
            done = self._steps_done()
            print(
                f"{100 * done // max(self._total(), 1)}% done, {self._left(done) or 'time left not known yet'}",
                file=sys.stderr,
                flush=True,
            )

    def _done(self, planned: Planned, result: Mapping[str, Any] | None, error: str | None) -> None:
        self._finished[planned.folder] = planned.run.steps
        error = error or (result or {}).get("error")
        if error:
            text = error if planned.run.arm in error else f"arm '{planned.run.arm}', seed {planned.run.seed}: {error}"
            self.console.print(f"failed: {text}", style="red", highlight=False, markup=False)
        elif result is not None:
            loss, seconds = result["metrics"].get("eval/loss", float("nan")), result.get("wall_seconds", 0.0)
            line = f"{planned.run.arm}, seed {planned.run.seed}: eval/loss {loss:.4f}, {seconds:.0f} s"
            self.console.print(line, highlight=False, markup=False)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _total(self) -> int:
        return sum(p.run.steps for p in self._planned)

    def _steps_done(self) -> int:
        return sum(self._finished.get(p.folder) or _last_step(p.folder) for p in self._planned)

    def _left(self, done: int) -> str:
        fresh, passed = done - self._done_before, time.monotonic() - self._started
        if fresh <= 0 or passed < 2:
            return ""
        seconds = (self._total() - done) * passed / fresh
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


def _last_step(folder: Path) -> int:
    """The step of the last whole line of a metrics file, without reading all of it."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0
