"""Many runs side by side: local worker processes, or a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from lossmith.errors import InputError
from lossmith.training.record import available_cores


@dataclass(frozen=True, slots=True)
class Job:
    """One call ``function(*arguments)`` in a worker; ``name`` is for messages."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job returned, or the error that it raised."""

    job: Job
    value: Any = None
    error: BaseException | None = None


def plan(number: int, *, jobs: int | None = None, threads: int | None = None, small: bool = True) -> tuple[int, int]:
    """How many jobs at a time, with how many threads each.

    Small models run with one thread each, one per core (contention costs more than threads give); large ones one at a
    time with all cores.

    >>> plan(12, jobs=2, threads=1)
    (2, 1)
    """
    cores = available_cores()
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if threads is None:
        threads = max(1, cores // jobs) if jobs and not small else (1 if small else cores)
    if jobs is None:
        jobs = max(1, cores // threads)
    return max(1, min(jobs, number)), threads


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    threads: int,
    backend: str = "local",
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Run all jobs, yielding outcomes as they come; ``tick`` is called a few times a second meanwhile.

    An error in one job does not stop the others. A worker that dies (killed, out of memory) fails the jobs that were
    running; the rest go on in new workers.
    """
    if backend == "ray":
        yield from _run_with_ray(jobs, threads, tick)
    elif len(jobs) == 1:
        # One run needs no worker, which would take seconds to start.
        yield _run_here(jobs[0], threads)
    else:
        yield from _run_locally(list(jobs), workers, threads, tick)


def _run_here(job: Job, threads: int) -> Outcome:
    import torch

    torch.set_num_threads(threads)
    try:
        return Outcome(job, job.function(*job.arguments))
    except Exception as error:
        return Outcome(job, error=error)


def _run_locally(jobs: list[Job], workers: int, threads: int, tick: Callable[[], None]) -> Iterator[Outcome]:
    deaths: dict[str, int] = {}
    while jobs:
        remaining: list[Job] = []
        with _pool(min(workers, len(jobs)), threads) as pool:
            futures = {pool.submit(job.function, *job.arguments): job for job in jobs}
            try:
                for future in _as_they_come(futures, tick):
                    job, error = futures[future], future.exception()
                    if isinstance(error, BrokenProcessPool):
                        remaining.append(job)
                    else:
                        yield Outcome(job, None if error else future.result(), error)
            except BaseException:
                _kill(pool)
                raise
        # The pool cannot say which of its jobs killed the worker: those that were first in line are suspects.
        for job in remaining[:workers]:
            deaths[job.name] = deaths.get(job.name, 0) + 1
        for job in [j for j in remaining if deaths.get(j.name, 0) >= 2]:
            remaining.remove(job)
            yield Outcome(job, error=RuntimeError("its process died twice (killed, or out of memory)"))
        if remaining:
            workers = 1
        jobs = remaining


def _pool(workers: int, threads: int) -> ProcessPoolExecutor:
    # "spawn": a fork of a process in which torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for number in range(workers):
        devices.put(number)
    return ProcessPoolExecutor(workers, context, _start_worker, (threads, os.getpid(), devices))


def _start_worker(threads: int, parent: int, devices: Any) -> None:
    """Runs first in every worker: threads, one GPU each where there are several, and an end with the parent."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    number = devices.get()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _end_with(parent: int) -> None:
    """A worker whose parent was killed must not go on writing to folders that a restarted parent uses."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _as_they_come(futures: Iterable[Future], tick: Callable[[], None]) -> Iterator[Future]:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
        tick()
        yield from done


def _run_with_ray(jobs: Sequence[Job], threads: int, tick: Callable[[], None]) -> Iterator[Outcome]:
    """The same jobs as Ray tasks; record folders must be on a file system that all machines share."""
    try:
        import ray
    except ImportError:
        raise InputError("--backend ray needs the extra 'ray': pip install 'lossmith[ray]'") from None

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}}
        pending = {}
        for job in jobs:
            task = ray.remote(num_cpus=threads, max_retries=1, runtime_env=environment)(job.function)
            pending[task.remote(*job.arguments)] = job
        while pending:
            done, _ = ray.wait(list(pending), timeout=0.3)
            tick()
            for reference in done:
                job = pending.pop(reference)
                try:
                    yield Outcome(job, ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    yield Outcome(job, error=error.cause if isinstance(error.cause, BaseException) else error)
                except ray.exceptions.RayError as error:
                    yield Outcome(job, error=error)
    finally:
        if started_here:
            ray.shutdown()
