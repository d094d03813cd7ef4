"""Where blocks run: in this thread, in threads, or in processes. Same blocks, same function, same output.

An executor has one method, ``run(task, items)``: call ``task(item)`` for every item and yield the results as
they finish, never more than a few in flight. A task is picklable and knows volumes by path, so each worker
opens its own.
"""

from __future__ import annotations

import concurrent.futures as futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
ExecutorName = Literal["serial", "threads", "processes"]


class Executor(Protocol):
    """Runs one task over many items on ``n_workers`` workers."""

    n_workers: int

    @property
    def n_processes(self) -> int:
        """Processes that hold caches and models of their own: 1 unless workers are processes."""
        return 1

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``task(item)`` for every item, in the order of finishing."""
        ...


@dataclass(frozen=True)
class SerialExecutor(Executor):
    """One block after the other in the calling thread: for debugging and as the reference of the laws."""

    n_workers: int = 1

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``task(item)`` in order."""
        return map(task, items)


@dataclass(frozen=True)
class ThreadExecutor(Executor):
    """Threads of this process: models and caches are shared, and compiled kernels release the interpreter."""

    n_workers: int

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results as they finish."""
        with futures.ThreadPoolExecutor(self.n_workers, thread_name_prefix="voxclf") as pool:
            yield from _finish(pool, task, items, self.n_workers)


@dataclass(frozen=True)
class ProcessExecutor(Executor):
    """Processes: for steps that hold the interpreter; each worker has its own copy of the model."""

    n_workers: int

    @property
    def n_processes(self) -> int:
        """One per worker."""
        return self.n_workers

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results as they finish; the task is sent to each worker once, not with every item."""
        # spawn, not fork: tensorstore and OpenMP own threads that do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(
            self.n_workers, mp_context=context, initializer=_start_worker, initargs=(task,)
        ) as pool:
            yield from _finish(pool, _run_in_worker, items, self.n_workers)


_worker_task: Callable[[Any], Any]


def _start_worker(task: Callable[[Any], Any]) -> None:
    global _worker_task  # the task of this worker process, set once by the pool
    # One thread a worker: spin-waiting OpenMP threads cost 3-7x when workers fill the cores.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    _worker_task = task


def _run_in_worker(item: Any) -> Any:
    return _worker_task(item)


def _finish(
    pool: futures.Executor, task: Callable[[Item], Result], items: Iterable[Item], n_workers: int
) -> Iterator[Result]:
    """Keep the workers busy with a short queue; after a failure start nothing new, but keep what finished."""
    remaining = iter(items)
    running = {pool.submit(task, item) for item in islice(remaining, 2 * n_workers)}
    try:
        while running:
            done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            running |= {pool.submit(task, item) for item in islice(remaining, len(done))}
            failed = None
            for future in done:
                if future.exception() is None:
                    yield future.result()
                else:
                    failed = future
            if failed is not None:
                failed.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def make_executor(name: ExecutorName, n_workers: int | None = None) -> Executor:
    """Build an executor from its name; one worker per available core by default."""
    n_workers = n_workers or available_cores()
    if name == "serial" or (name == "threads" and n_workers == 1):
        return SerialExecutor()
    if name == "threads":
        return ThreadExecutor(n_workers)
    if name == "processes":
        return ProcessExecutor(n_workers)
    raise ValueError(f"executor {name!r} is unknown; use serial, threads or processes")


def available_cores() -> int:
    """Cores this process may use (affinity and containers respected, unlike ``os.cpu_count``)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
