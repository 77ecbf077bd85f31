"""Whether sparsity pays: size, memory, time and quality of a sparse model beside its dense one, in one process."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossmith.errors import InputError

Inputs = Tensor | Mapping[str, Any] | Callable[[nn.Module], object]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one model needs.

    Attributes:
        file_bytes: of its weights on disk.
        memory_bytes: weights, and the most that intermediate tensors hold at once in a pass.
        seconds: median time of a pass.
    """

    file_bytes: int
    memory_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class QualityChange:
    """Means over examples, and the 95% interval of their paired difference, from examples drawn with replacement."""

    dense: float
    sparse: float
    low: float
    high: float
    examples: int

    @property
    def change(self) -> float:
        """Sparse minus dense."""
        return self.sparse - self.dense


@dataclass(frozen=True, slots=True)
class AgainstDense:
    """A sparse model beside its dense one.

    Attributes:
        dense, sparse: what each needs.
        time_ratio: median of the sparse time over the dense one of passes taken in turn.
        time_range: quartiles of these ratios.
        quality: ``None`` where nothing was evaluated.
        name: of the sparse model.
        metric: that ``quality`` is of.
        lower_is_better: direction of the metric.
        machine: device and threads.
    """

    dense: Footprint
    sparse: Footprint
    time_ratio: float
    time_range: tuple[float, float]
    quality: QualityChange | None
    name: str
    metric: str
    lower_is_better: bool
    machine: str

    @property
    def file_ratio(self) -> float:
        """Size on disk, sparse over dense."""
        return self.sparse.file_bytes / self.dense.file_bytes

    @property
    def memory_ratio(self) -> float:
        """Peak memory, sparse over dense."""
        return self.sparse.memory_bytes / self.dense.memory_bytes

    @property
    def verdict(self) -> str:
        """In words: file, memory, time and quality. Less than 5 percent either way is no difference in time."""
        low, high = self.time_range
        words = [_less(self.file_ratio, "smaller on disk", "larger on disk", "as large on disk")]
        words.append(_less(self.memory_ratio, "smaller in memory", "larger in memory", "as large in memory"))
        words.append("faster" if high < 0.95 else "slower" if low > 1.05 else "not faster")
        if self.quality is not None:
            found = self.quality
            if found.low <= 0 <= found.high or not found.low <= found.high:
                words.append(f"{self.metric} not told apart")
            else:
                words.append(f"{self.metric} {'worse' if (found.change > 0) == self.lower_is_better else 'better'}")
        return ", ".join(words)

    def summary(self) -> str:
        """One line with the numbers, and what they say."""
        a, b = self.dense, self.sparse
        low, high = self.time_range
        parts = [
            f"file {_mib(a.file_bytes)} -> {_mib(b.file_bytes)} MiB ({self.file_ratio:.2f}x)",
            f"peak memory {_mib(a.memory_bytes)} -> {_mib(b.memory_bytes)} MiB ({self.memory_ratio:.2f}x)",
            f"time {self.time_ratio:.2f}x ({low:.2f} to {high:.2f})",
        ]
        if self.quality is not None:
            q = self.quality
            parts.append(
                f"{self.metric} {q.dense:.4f} -> {q.sparse:.4f} ({q.change:+.4f}, 95% interval {q.low:+.4f} to "
                f"{q.high:+.4f}, {q.examples} examples)"
            )
        return f"{self.name} against dense, here ({self.machine}): {'; '.join(parts)}: {self.verdict}"


def compare_with_dense(
    dense: nn.Module,
    sparse: nn.Module,
    inputs: Inputs,
    *,
    evaluate: Callable[[nn.Module], Any] | None = None,
    metric: str = "loss",
    lower_is_better: bool = True,
    files: tuple[int | str | Path | None, int | str | Path | None] = (None, None),
    repeats: int = 9,
    name: str = "sparse",
    seed: int = 0,
) -> AgainstDense:
    """Measure two models on this machine, pass by pass in turn.

    Args:
        dense, sparse: on the same device; put into evaluation mode for the time being.
        inputs: of one pass: a tensor, keyword arguments, or a function that is given the model. Nothing is kept for
            backward.
        evaluate: a value per example, or a pair (values, weights), such as
            :func:`~lossmith.sparsity.text_evaluation` makes.
        metric: what ``evaluate`` measures.
        lower_is_better: its direction.
        files: of the two: bytes, or a folder or file whose safetensors count. Default: what ``save_pretrained`` would
            write, without the header.
        repeats: pairs of passes, after one that does not count.
        name: of the sparse model, for the line.
        seed: of the interval.

    Peak memory is counted tensor by tensor: what an operation needs inside itself is seen on a GPU only.

    Raises:
        ValueError: no repeats, models on different devices, or values that do not pair.

    >>> dense, small = nn.Linear(256, 256), nn.Sequential(nn.Linear(256, 16, bias=False), nn.Linear(16, 256))
    >>> found = compare_with_dense(dense, small, torch.randn(8, 256), repeats=3, name="rank 16")
    >>> round(found.file_ratio, 3), found.dense.file_bytes
    (0.128, 263168)
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    devices = {p.device for model in (dense, sparse) for p in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        raise ValueError(f"both models must be on one device, got {', '.join(sorted(map(str, devices)))}")
    device = next(iter(devices), torch.device("cpu"))
    models = (dense, sparse)

    def run(model: nn.Module) -> None:
        if isinstance(inputs, Tensor):
            model(inputs)
        elif isinstance(inputs, Mapping):
            model(**inputs)
        else:
            inputs(model)

    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), _evaluating(models):
        memory = [_peak(model, run, device) for model in models]
        for number in range(repeats + 1):
            for model, own in zip(models, times, strict=True):
                started = _now(device)
                run(model)
                if number:
                    own.append(_now(device) - started)
        values = [evaluate(model) for model in models] if evaluate is not None else None
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, high = np.quantile(ratios, [0.25, 0.75])
    needs = [
        Footprint(_file_bytes(model, file), size, statistics.median(own))
        for model, file, size, own in zip(models, files, memory, times, strict=True)
    ]
    threads = torch.get_num_threads()
    return AgainstDense(
        needs[0],
        needs[1],
        statistics.median(ratios),
        (float(low), float(high)),
        None if values is None else _quality(*values, seed=seed),
        name,
        metric,
        lower_is_better,
        device.type if device.type != "cpu" else f"cpu, {threads} thread{'s' if threads > 1 else ''}",
    )


def file_bytes(path: str | Path) -> int:
    """Bytes of a safetensors file, or of those of a folder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path} holds no .safetensors")
    return sum(file.stat().st_size for file in files)


def _file_bytes(model: nn.Module, file: int | str | Path | None) -> int:
    if file is None:
        # Tied tensors are written once.
        tensors = {t.untyped_storage()._cdata: t for t in model.state_dict().values() if isinstance(t, Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())
    return file if isinstance(file, int) else file_bytes(file)


def _quality(dense: Any, sparse: Any, *, seed: int, resamples: int = 2000) -> QualityChange:
    rows, weights = [], None
    for found in (dense, sparse):
        values, own = found if isinstance(found, tuple) else (found, None)
        array = np.atleast_1d(np.asarray(values, dtype=np.float64))
        weights = np.ones(len(array)) if own is None else np.asarray(own, dtype=np.float64)
        rows.append(array)
    assert weights is not None
    if rows[0].ndim != 1 or rows[0].shape != rows[1].shape or weights.shape != rows[0].shape or not len(rows[0]):
        raise ValueError(f"evaluate gave {rows[0].shape} values for one model and {rows[1].shape} for the other")
    means = [float(np.average(row, weights=weights)) for row in rows]
    number = len(weights)
    low = high = float("nan")
    if number > 1 and np.isfinite(means).all():
        # How often each example is drawn, rather than which.
        drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples) * weights
        drawn = drawn[drawn.sum(axis=1) > 0]
        low, high = np.quantile(drawn @ (rows[1] - rows[0]) / drawn.sum(axis=1), [0.025, 0.975])
    return QualityChange(means[0], means[1], float(low), float(high), number)


def _peak(model: nn.Module, run: Callable[[nn.Module], None], device: torch.device) -> int:
    """Weights and the most that intermediate tensors hold at once; also the pass that warms up."""
    weights = {t.untyped_storage()._cdata: t for t in [*model.parameters(), *model.buffers()]}
    held = sum(t.untyped_storage().nbytes() for t in weights.values())
    if device.type == "cuda":
        run(model)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(model)
        return held + int(torch.cuda.max_memory_allocated(device)) - before
    with _Alive(weights) as alive:
        run(model)
    return held + alive.most


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live."""

    def __init__(self, known: Mapping[int, Any]):
        super().__init__()
        self.known, self.now, self.most = set(known), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Any:
    were = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was in zip(models, were, strict=True):
            model.train(was)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _less(ratio: float, less: str, more: str, equal: str) -> str:
    return less if ratio < 0.99 else more if ratio > 1.01 else equal


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"
