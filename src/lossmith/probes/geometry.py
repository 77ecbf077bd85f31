"""The geometry of a language model's representations, of one model or along its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError
from lossmith.files import finite_or_none, write_text
from lossmith.probes.hidden_states import Pooling, hidden_states
from lossmith.probes.phases import Phase, label_phases
from lossmith.probes.spectrum import SpectralMetrics, StreamingCovariance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Checkpoint:
    """Where training was, and the geometry there."""

    name: str
    step: int | None
    metrics: SpectralMetrics


@dataclass(frozen=True)
class GeometryReport:
    """What :func:`geometry` found.

    Attributes:
        model: name.
        layer: index of the hidden states.
        pooling: how tokens became rows.
        checkpoints: one, or all along training in their order.
        phases: along training, where there are four checkpoints or more.
    """

    model: str
    layer: int
    pooling: str
    checkpoints: tuple[Checkpoint, ...]
    phases: tuple[Phase, ...] = ()

    @property
    def metrics(self) -> SpectralMetrics:
        """Of the last checkpoint."""
        return self.checkpoints[-1].metrics

    def summary(self) -> str:
        """A few lines, for people."""
        last = self.metrics
        lines = [
            f"{self.model}: layer {self.layer}, {self.pooling} token{'s' if self.pooling == 'all' else ''}, "
            f"{last.samples} rows of {len(last.eigenvalues)} features",
            f"{'step':>12} {'RankMe':>10} {'alpha':>8} {'R2':>7}",
        ]
        for point in self.checkpoints:
            decay = point.metrics.decay
            shown = f"{decay.alpha:>8.3f} {decay.r2_fitted:>7.3f}" if decay is not None else f"{'-':>8} {'-':>7}"
            place = "-" if point.step is None else str(point.step)
            lines.append(f"{place:>12} {point.metrics.rankme:>10.2f} {shown}")
        if len(self.checkpoints) >= 4:
            lines += [f"{phase.name}: step {phase.first:g} to {phase.last:g}" for phase in self.phases]
            if not self.phases:
                lines.append("no phase observed")
        return "\n".join([*lines, *(f"warning: {line}" for line in last.warnings)])

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; written to ``path``, if given."""
        content = {
            "model": self.model,
            "layer": self.layer,
            "pooling": self.pooling,
            "checkpoints": [{"name": p.name, "step": p.step, **p.metrics.to_dict()} for p in self.checkpoints],
            "phases": [phase._asdict() for phase in self.phases],
        }
        text = json.dumps(finite_or_none(content), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Spectra, and the numbers along training; written to ``path``, if given."""
        from lossmith.probes.geometry_plot import plot_geometry

        return plot_geometry(self, path)


def geometry(
    model: Any,
    data: str | Iterable[str] = "python",
    *,
    tokenizer: Any = None,
    layer: int = -1,
    pooling: Pooling = "last",
    samples: int = 2000,
    max_length: int = 512,
    min_length: int = 33,
    batch_size: int = 16,
    trajectory: bool | None = None,
    eps: float = 0.0,
    max_components: int | None = None,
    text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> GeometryReport:
    """Effective rank (RankMe) and spectral decay (alpha-ReQ) of hidden states, in one pass.

    Source: "Tracing the Representation Geometry of Language Models from Pretraining to Post-training", NeurIPS 2025,
    arXiv 2509.23024.

    Args:
        model: a Hugging Face model, its folder or hub id, or a folder of ``checkpoint-<step>`` folders.
        data: texts, or a corpus as :func:`lossmith.data.read_corpus` takes it.
        tokenizer: default: the model's own.
        layer: index into the hidden states; -1: the last, after the final norm.
        pooling: ``last`` (the paper's), ``mean`` or ``all``.
        samples: texts used; the paper has 15,000, and ten times the features are needed.
        max_length: tokens of a text used.
        min_length: tokens that a text must have (the paper's code: more than 32).
        batch_size: texts at a time.
        trajectory: whether ``model`` is a folder of checkpoints; by default it is if it holds some.
        eps: see :func:`rankme`.
        max_components: leading eigenvalues that count; the paper's code: 2048.
        text_field: of the corpus.
        progress: told ``(checkpoints done, checkpoints)``.

    Raises:
        InputError: no model, no text long enough, one checkpoint for a trajectory, features that are not finite.
    """
    from lossmith.data import read_corpus

    if samples < 2:
        raise InputError(f"samples must be at least 2, got {samples}")
    found = _checkpoints(model, trajectory)
    texts = (document.text for document in read_corpus(data, text_field=text_field)) if isinstance(data, str) else data
    chosen = _long_enough(texts, samples, min_length)
    points = []
    for number, (name, step, source) in enumerate(found):
        loaded, words = _load(source, tokenizer if tokenizer is not None else _tokenizer_near(source))
        stream: StreamingCovariance | None = None
        try:
            for rows in hidden_states(
                loaded,
                words,
                chosen,
                layer=layer,
                pooling=pooling,
                max_length=max_length,
                min_length=min_length,
                samples=samples,
                batch_size=batch_size,
            ):
                stream = stream or StreamingCovariance(rows.shape[1], device=rows.device)
                stream.update(rows)
            if stream is None or stream.count < 2:
                raise InputError(f"fewer than 2 texts have {min_length} tokens or more: lower min_length")
            metrics = SpectralMetrics.from_covariance(stream, eps=eps, max_components=max_components)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        points.append(Checkpoint(name, step, metrics))
        if progress is not None:
            progress(number + 1, len(found))
    phases: tuple[Phase, ...] = ()
    if len(points) >= 4:
        phases = label_phases([p.step or 0 for p in points], [p.metrics.rankme for p in points])
    title = model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__
    return GeometryReport(str(title), layer, pooling, tuple(points), phases)


def _checkpoints(model: Any, trajectory: bool | None) -> list[tuple[str, int | None, Any]]:
    if not isinstance(model, str | Path):
        if trajectory:
            raise InputError("a trajectory needs a folder of checkpoint-<step> folders, not one model")
        return [(type(model).__name__, None, model)]
    folder = Path(model)
    steps = []
    if folder.is_dir():
        for child in folder.iterdir():
            matched = re.fullmatch(r"(?:checkpoint|step)[-_]?(\d+)", child.name)
            if child.is_dir() and matched and (child / "config.json").is_file():
                steps.append((int(matched[1]), child))
    if trajectory is None:
        # A run has a config.json of its own beside its checkpoints.
        trajectory = bool(steps) and not any(folder.glob("model*.safetensors"))
    if not trajectory:
        return [(str(model), None, str(model))]
    if len(steps) < 2:
        raise InputError(
            f"{model} holds {len(steps)} checkpoint{'s' * (len(steps) != 1)} (folders checkpoint-<step> with a model); "
            "a trajectory needs at least 2"
        )
    return [(child.name, step, str(child)) for step, child in sorted(steps)]


def _long_enough(texts: Iterable[str], samples: int, least_tokens: int) -> list[str]:
    """Texts that may have enough tokens; a few more than wanted, since only the tokeniser knows."""
    chosen = []
    for text in texts:
        # No tokeniser makes more tokens than bytes.
        if len(text.encode("utf-8", "replace")) >= least_tokens:
            chosen.append(text)
        if len(chosen) >= 4 * samples:
            break
    if not chosen:
        raise InputError(f"no text is long enough for {least_tokens} tokens")
    return chosen


def _tokenizer_near(source: Any) -> Any:
    """The tokeniser of a model, or, for a checkpoint without one, that in a folder beside it."""
    if not isinstance(source, str):
        raise InputError("a model in memory needs its tokenizer")
    folder = Path(source)
    for place in (folder, folder.parent, folder.parent / "model"):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return str(place)
    return source


def _load(source: Any, tokenizer: Any) -> tuple[Any, Any]:
    from lossmith.data import load_tokenizer

    words = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if not isinstance(source, str):
        return source, words
    from transformers import AutoModel, AutoModelForCausalLM

    from lossmith.data.hub import hub_is_reachable

    local = Path(source).exists()
    options: dict[str, Any] = {"local_files_only": local or not hub_is_reachable(), "dtype": "auto"}
    last: Exception | None = None
    for kind in (AutoModelForCausalLM, AutoModel):
        try:
            return kind.from_pretrained(source, **options), words
        except Exception as error:  # a different kind for every way in which a folder can be wrong
            last = error
    raise InputError(f"model: cannot load {source!r} ({str(last).splitlines()[0] if last else ''})")


def compare_geometry(before: GeometryReport, after: GeometryReport) -> dict[str, float]:
    """What fine-tuning did: ratio of the effective ranks and difference of the decays of the last checkpoints.

    Raises:
        ValueError: the reports have different numbers of features, between which the rank means nothing.
    """
    a, b = before.metrics, after.metrics
    if len(a.eigenvalues) != len(b.eigenvalues):
        raise ValueError(
            f"effective ranks compare within one model only: {len(a.eigenvalues)} and {len(b.eigenvalues)} features"
        )
    return {"rankme_ratio": b.rankme / a.rankme, "alpha_difference": b.alpha - a.alpha}
