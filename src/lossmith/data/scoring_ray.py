"""Scoring on a Ray cluster: blocks go out to actors that hold the models, their losses come back."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .scoring import BlockScores, score_block
from .scoring_model import Scorer

# Blocks that wait at each actor, so that none is idle while a finished one travels.
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class RayScoring:
    """What :func:`~lossmith.data.score_corpus` takes as ``backend`` to score on the machines of a Ray cluster.

    The caller reads the corpus and writes the table; only the caller needs their folders. Blocks keep the cuts that
    they have on one machine, so that the table has the same bytes wherever it was made (with as many threads, on like
    processors). That is why blocks go to a pool of actors rather than through a Ray dataset, which joins and splits
    them by their size.

    Attributes:
        load: makes the scorers, in each actor; what it closes over travels there.
        workers: actors.
        threads: of each, for torch; also the processors that it asks the cluster for.
        gpus: GPUs that each asks for; a fraction is allowed.
        address: of the cluster; ``"auto"`` for the one that this machine belongs to, ``None`` to start Ray here.

    An actor that dies (its machine too) is started again, elsewhere if need be, and its blocks are repeated.

    Raises:
        InputError: the extra ``ray`` is missing, or the cluster cannot be reached, or can never place a worker.

    >>> backend = RayScoring(load_my_scorers, workers=16, address="auto")  # doctest: +SKIP
    >>> score_corpus("corpus.jsonl.gz", load_my_scorers(), "scores.parquet", backend=backend)  # doctest: +SKIP
    """

    load: Callable[[], Mapping[str, Scorer]]
    workers: int = 1
    threads: int = 1
    gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.gpus >= 0:
            raise InputError(f"gpus must be at least 0, got {self.gpus}")

    def __call__(
        self, blocks: Iterator[tuple[int, Sequence[str]]], batch_tokens: int
    ) -> Iterator[tuple[int, BlockScores]]:
        """Scores of each block, in the order in which they are done; blocks are read as they are needed."""
        try:
            import ray
        except ImportError:
            raise InputError("scoring on Ray needs the extra 'ray': pip install 'lossmith[ray]'") from None

        # Nothing to score needs no cluster.
        first = next(blocks, None)
        if first is None:
            return
        blocks = itertools.chain([first], blocks)
        started_here = not ray.is_initialized()
        if started_here:
            self._connect(ray)
        try:
            yield from self._score(ray, blocks, batch_tokens)
        finally:
            if started_here:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            # A machine may have fewer processors than it is asked to pretend: workers then take turns.
            ray.init(num_cpus=self.workers * self.threads, include_dashboard=False, **quiet)
            return
        try:
            ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"no Ray cluster at address '{self.address}': {str(error).splitlines()[0]}") from None

    def _score(
        self, ray: Any, blocks: Iterator[tuple[int, Sequence[str]]], batch_tokens: int
    ) -> Iterator[tuple[int, BlockScores]]:
        _check_place(ray, self.threads, self.gpus)
        options = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_restarts": -1, "max_task_retries": 3}
        environment = {"env_vars": {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}}
        actor = ray.remote(_Worker).options(runtime_env=environment, **options)
        workers = [actor.remote(self.load, self.threads) for _ in range(self.workers)]
        running: dict[Any, tuple[int, Any]] = {}

        def give(worker: Any) -> None:
            following = next(blocks, None)
            if following is not None:
                number, texts = following
                running[worker.score.remote(list(texts), batch_tokens)] = number, worker

        for _ in range(_AHEAD):
            for worker in workers:
                give(worker)
        while running:
            done, _ = ray.wait(list(running))
            for reference in done:
                number, worker = running.pop(reference)
                try:
                    scores = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except ray.exceptions.RayActorError as error:
                    raise InputError(f"a Ray worker died again and again (out of memory?): {error}") from None
                yield number, scores
                give(worker)


class _Worker:
    """Holds the models of one actor."""

    def __init__(self, load: Callable[[], Mapping[str, Scorer]], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.scorers = load()

    def score(self, texts: Sequence[str], batch_tokens: int) -> BlockScores:
        return score_block(texts, self.scorers, batch_tokens)


def _check_place(ray: Any, threads: int, gpus: float) -> None:
    """A worker that no machine can ever hold would be waited for without end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpus for node in nodes):
        largest = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise InputError(f"no machine of the Ray cluster has {threads} CPUs and {gpus:g} GPUs; there are: {largest}")
