"""How long work reports that it goes on. The library never prints: a caller passes what shows progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps the results of a stage as they come; the CLI's draws a bar with rate and time left."""

    def __call__(self, stage: str, results: Iterable[Item], total: float, unit: str) -> Iterator[Item]:
        """Hand on ``results``, each of which counts its ``n_voxels`` (else 1) towards ``total``."""
        ...


def silent(stage: str, results: Iterable[Item], total: float, unit: str) -> Iterator[Item]:
    """Hand on results and show nothing."""
    return iter(results)


def last(results: Iterable[Item]) -> Item:
    """Run through an iterator and keep its last item.

    Raises
    ------
    ValueError
        If there is none.
    """
    kept = deque(results, maxlen=1)
    if not kept:
        raise ValueError("results was empty; at least one is needed")
    return kept[0]
