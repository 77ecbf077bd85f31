"""How flat the minimum is that a language model sits in, of one model or along its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.files import finite_or_none, write_text
from lossmith.probes.flatness_enlarge import enlarge_width
from lossmith.probes.flatness_operator import Curvature
from lossmith.probes.flatness_trace import (
    ESTIMATORS,
    Estimator,
    TraceResult,
    hessian_trace,
    score_norms,
    top_eigenvalues,
)
from lossmith.probes.geometry import _checkpoints, _load, _long_enough, _tokenizer_near

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class FlatnessPoint:
    """Where training was, and the flatness there.

    Attributes:
        name, step: of the checkpoint.
        trace: of the Hessian.
        fisher: squared norm of the gradient under the model's own labels: the trace's value at saturation.
        eigenvalues: the largest of the Hessian, if asked for.
        eigenvalue_bounds: how far each may be off.
    """

    name: str
    step: int | None
    trace: TraceResult
    fisher: float
    eigenvalues: tuple[float, ...] = ()
    eigenvalue_bounds: tuple[float, ...] = ()

    @property
    def saturation(self) -> float:
        """Trace of the Hessian over that of the Fisher matrix: 1 where the model is the data's true distribution."""
        return self.trace.trace / self.fisher


@dataclass(frozen=True, slots=True)
class FlatnessReport:
    """What :func:`flatness` found: one point, or one for each checkpoint along training."""

    model: str
    checkpoints: tuple[FlatnessPoint, ...]

    @property
    def trace(self) -> TraceResult:
        """Of the last checkpoint."""
        return self.checkpoints[-1].trace

    @property
    def loss_gap(self) -> float:
        """Largest difference of the checkpoints' losses, nats: flatness says something only where it is small."""
        losses = [point.trace.loss for point in self.checkpoints]
        return max(losses) - min(losses)

    def rank_correlation(self, scores: Sequence[float], *, max_gap: float = 0.01) -> float:
        """Spearman's correlation of the traces with downstream scores of the checkpoints.

        Raises:
            ValueError: as many scores as checkpoints are needed, at least 3; and losses no further apart than
                ``max_gap`` nats, since between models of different loss flatness says nothing.
        """
        if len(scores) != len(self.checkpoints) or len(scores) < 3:
            raise ValueError(
                f"scores must be one for each of the {len(self.checkpoints)} checkpoints, at least 3; got {len(scores)}"
            )
        if self.loss_gap > max_gap:
            raise ValueError(
                f"the checkpoints' losses differ by {self.loss_gap:.3g} nats, more than max_gap = {max_gap:g}: not the "
                "same pre-training loss"
            )
        from scipy.stats import spearmanr

        return float(spearmanr([point.trace.trace for point in self.checkpoints], scores).statistic)

    def summary(self) -> str:
        """A few lines, for people."""
        last = self.trace
        lines = [
            f"{self.model}: trace of the Hessian by {last.estimator}, {last.parameters} parameters, "
            f"{last.positions} positions",
            f"{'step':>12} {'loss':>9} {'trace':>11} {'± s.e.':>9} {'Fisher':>11} {'ratio':>7}",
        ]
        for point in self.checkpoints:
            place = "-" if point.step is None else str(point.step)
            found = point.trace
            lines.append(
                f"{place:>12} {found.loss:>9.4f} {found.trace:>11.5g} {found.stderr:>9.2g} {point.fisher:>11.5g} "
                f"{point.saturation:>7.3f}"
            )
            if point.eigenvalues:
                lines.append(f"{'':>12} largest eigenvalues {', '.join(f'{value:.5g}' for value in point.eigenvalues)}")
        shares = sorted(last.by_module.items(), key=lambda item: -abs(item[1]))[:5]
        if shares and last.trace:
            lines += [f"  {100 * value / last.trace:5.1f}%  {name}" for name, value in shares]
        if len(self.checkpoints) > 1:
            lines.append(f"losses lie within {self.loss_gap:.3g} nats; traces compare at equal loss only")
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; written to ``path``, if given."""
        content = {
            "probe": "flatness",
            "model": self.model,
            "loss_gap": self.loss_gap,
            "checkpoints": [{**dataclasses.asdict(p), "saturation": p.saturation} for p in self.checkpoints],
        }
        text = json.dumps(finite_or_none(content), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Shares of the modules; along training also loss and trace; written to ``path``, if given."""
        from lossmith.probes.flatness_plot import plot_flatness

        return plot_flatness(self, path)


def flatness(
    model: Any,
    data: str | Iterable[str] = "python",
    *,
    tokenizer: Any = None,
    estimator: Estimator = "hutchinson",
    n_probes: int = 4,
    samples: int = 64,
    max_length: int = 128,
    min_length: int = 8,
    batch_size: int = 8,
    top: int = 0,
    exclude: str | Sequence[str] = (),
    enlarge: int = 1,
    layers: int | None = None,
    trajectory: bool | None = None,
    text_field: str = "text",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FlatnessReport:
    """Trace of the Hessian of a language model's loss on text, with its standard error.

    Causal models predict every next token; masked ones one token of each text, as in the paper, at a place drawn with
    ``seed``, the same for all checkpoints.

    Source: "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022,
    arXiv 2210.14199.

    Args:
        model: a Hugging Face model, its folder or hub id, or a folder of ``checkpoint-<step>`` folders.
        data: texts, or a corpus as :func:`lossmith.data.read_corpus` takes it.
        tokenizer: default: the model's own.
        estimator: see :func:`hessian_trace`.
        n_probes: random vectors per batch.
        samples: texts used.
        max_length: tokens of a text used.
        min_length: tokens that a text must have.
        batch_size: texts at a time.
        top: number of largest eigenvalues to find.
        exclude: patterns of parameters that do not count, such as ``*embed*``.
        enlarge: measure in the parameters of a model so many times as wide, with the same function: see
            :func:`lossmith.probes.enlarge_width`. So two sizes of one architecture compare.
        layers: of that model; default: as many as the model has.
        trajectory: whether ``model`` is a folder of checkpoints; by default it is if it holds some.
        text_field: of the corpus.
        seed: of everything random.
        progress: told ``(checkpoints done, checkpoints)``.

    Raises:
        InputError: no model, no text long enough, one checkpoint for a trajectory, options out of range, a model
            with an operation that has no second derivative.
    """
    from lossmith.data import read_corpus

    if estimator not in ESTIMATORS:
        raise InputError(f"estimator must be {', '.join(ESTIMATORS)}, got '{estimator}'")
    for name, value, least in (("samples", samples, 1), ("batch_size", batch_size, 1), ("top", top, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if not 2 <= min_length <= max_length:
        raise InputError(f"min_length must lie from 2 to max_length = {max_length}, got {min_length}")
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    found = _checkpoints(model, trajectory)
    texts = (document.text for document in read_corpus(data, text_field=text_field)) if isinstance(data, str) else data
    chosen = _long_enough(texts, samples, min_length)
    points = []
    for number, (name, step, source) in enumerate(found):
        loaded, words = _loaded(source, tokenizer if tokenizer is not None else _tokenizer_near(source))
        try:
            if enlarge != 1 or layers is not None:
                loaded = enlarge_width(loaded, enlarge, layers=layers)
            batches = _batches(loaded, words, chosen, samples, min_length, max_length, batch_size, seed)
            curvature = Curvature(loaded, batches, exclude=patterns)
            trace = hessian_trace(curvature, estimator=estimator, n_probes=n_probes, seed=seed)
            norms, positions = score_norms(curvature, seed=seed)
            eigenvalues: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
            if top:
                values, bounds, _ = top_eigenvalues(curvature, top, max_steps=max(50, 3 * top), tolerance=1e-3)
                eigenvalues = tuple(values.tolist()), tuple(bounds.tolist())
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        points.append(FlatnessPoint(name, step, trace, float(norms.sum() / positions.sum()), *eigenvalues))
        if progress is not None:
            progress(number + 1, len(found))
    title = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "") or type(model).__name__
    return FlatnessReport(str(title), tuple(points))


def _loaded(source: Any, tokenizer: Any) -> tuple[nn.Module, Any]:
    if isinstance(source, str) and Path(source).is_dir():
        from transformers import AutoConfig, AutoModelForMaskedLM

        try:
            architectures = AutoConfig.from_pretrained(source).architectures or []
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"model: cannot load {source!r} ({str(error).splitlines()[0]})") from None
        if any(name.endswith("ForMaskedLM") for name in architectures):
            from lossmith.data import load_tokenizer

            words = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
            return AutoModelForMaskedLM.from_pretrained(source).float(), words
    loaded, words = _load(source, tokenizer)
    if isinstance(source, str):
        # Second derivatives in half precision are noise.
        loaded = loaded.float()
    if loaded.get_output_embeddings() is None:
        raise InputError(f"model: {source} has no output layer over tokens, so no loss to be flat")
    return loaded, words


def _batches(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    samples: int,
    min_length: int,
    max_length: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    masked = type(model).__name__.endswith("ForMaskedLM")
    if masked and tokenizer.mask_token_id is None:
        raise InputError("a masked language model needs a tokenizer with a mask token")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        max_length = min(max_length, int(limit))
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
        if len(ids) >= min_length:
            rows.append(list(ids))
        if len(rows) == samples:
            break
    if not rows:
        raise InputError(f"no text has {min_length} tokens or more: lower min_length")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        shape = len(part), max(map(len, part))
        ids, labels = torch.full(shape, pad), torch.full(shape, -100)
        attention = torch.zeros(shape, dtype=torch.long)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
            if masked:
                place = int(torch.randint(len(tokens), (), generator=generator))
                labels[row, place], ids[row, place] = tokens[place], tokenizer.mask_token_id
            else:
                labels[row, : len(tokens)] = torch.tensor(tokens)
        batches.append({"input_ids": ids, "attention_mask": attention, "labels": labels})
    return batches
