"""What a stage of a comparison costs: wall-clock time, and memory beyond what the process held before."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from voxclf.freed_memory import give_back_freed_memory

SAMPLING_S = 0.02
"""A fiftieth of a second: short enough to see a block's arrays come and go, and 0.1 % of one core."""


@dataclass(frozen=True)
class Cost:
    """Seconds, and the most bytes held at once beyond those held at the start, on the machine and on its GPU."""

    seconds: float
    peak_bytes: int
    gpu_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """One stage after the other: times add up, memory is that of the larger."""
        return Cost(
            self.seconds + other.seconds,
            max(self.peak_bytes, other.peak_bytes),
            max(self.gpu_bytes, other.gpu_bytes),
        )


class CostMeter:
    """Watches a ``with`` block; :attr:`cost` is known when it is left.

    Memory is the resident memory of this process and its children, sampled from a thread of its own. Libraries that
    are loaded for the first time within the block count; what an earlier block has loaded does not. What an earlier
    block has freed is given back to the system first, or this one could use it again uncounted.
    """

    cost: Cost

    def __enter__(self) -> Self:
        import psutil

        give_back_freed_memory()
        self._process = psutil.Process()
        self._before = self._peak = self._resident()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        cuda = _used_cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats()
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        self._is_over.set()
        self._thread.join()
        cuda = _used_cuda()
        gpu_bytes = 0 if cuda is None else int(cuda.max_memory_allocated())
        self.cost = Cost(seconds, max(0, self._peak - self._before), gpu_bytes)

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLING_S):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        import psutil

        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # it ended meanwhile
                continue
        return total


def _used_cuda() -> Any:
    """The GPU as torch sees it, where torch is loaded and uses one; trees must not load torch only to ask."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
