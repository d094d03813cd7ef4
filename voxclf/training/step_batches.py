"""Batches of training steps, drawn as they are needed or a few steps ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class StepBatches:
    """The batches of some steps, as tensors; threads may draw them ahead."""

    def __init__(self, draw: Callable[[int], Any], steps: range, n_threads: int) -> None:
        self._draw, self._steps, self._n_threads = draw, steps, n_threads

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Any]:
        if self._n_threads == 0:
            yield from (as_tensors(self._draw(step)) for step in self._steps)
            return
        with ThreadPoolExecutor(self._n_threads) as pool:
            ahead: deque[Future[Any]] = deque()
            for step in self._steps:
                ahead.append(pool.submit(self._draw, step))
                if len(ahead) > 2 * self._n_threads:
                    yield as_tensors(ahead.popleft().result())
            while ahead:
                yield as_tensors(ahead.popleft().result())


class ReadBatches:
    """Batches that are read anew at each walk."""

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        return (as_tensors(batch) for batch in self._read())


def as_tensors(batch: Any) -> Any:
    """The arrays of a named tuple as tensors."""
    return type(batch)(*(torch.as_tensor(v) if hasattr(v, "__array__") else v for v in batch))
