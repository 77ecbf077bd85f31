"""Pictures of flatness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lossmith.files import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.probes.flatness import FlatnessReport


def plot_flatness(report: FlatnessReport, path: str | Path | None = None) -> Figure:
    """The modules with the largest parts of the trace; for several checkpoints loss and trace along training."""
    from matplotlib.figure import Figure

    points = report.checkpoints
    shares = sorted(report.trace.by_module.items(), key=lambda item: -abs(item[1]))[:12][::-1]
    panels = (len(points) > 1) + bool(shares) or 1
    figure = Figure(figsize=(6.5 * panels, 4.4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if len(points) > 1 or not shares:
        left = axes[0]
        steps = [number if point.step is None else point.step for number, point in enumerate(points)]
        traces, errors = zip(*((p.trace.trace, p.trace.stderr) for p in points), strict=True)
        left.errorbar(steps, traces, yerr=errors, marker="o", capsize=3, color="C0")
        left.set_xlabel("step")
        left.set_ylabel("trace of the Hessian (± s.e.)", color="C0")
        twin = left.twinx()
        twin.plot(steps, [point.trace.loss for point in points], marker="s", color="C1")
        twin.set_ylabel("loss, nats", color="C1")
        left.set_title(report.model, fontsize=9)
        left.grid(alpha=0.3)
    if shares:
        right = axes[-1]
        right.barh([name for name, _ in shares], [value for _, value in shares], color="C0")
        right.tick_params(axis="y", labelsize=7)
        right.set_xlabel("part of the trace")
        right.set_title(f"{points[-1].name}: {report.trace.trace:.4g} ± {report.trace.stderr:.2g}", fontsize=9)
        right.grid(axis="x", alpha=0.3)
    if path is not None:
        write_picture(figure, path)
    return figure
