"""A volume that remembers what was read of it, for training, which reads around the same labels again and again."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.formats.decode_cache import DecodeCache
from voxclf.formats.source import SourceInfo
from voxclf.geometry import Zyx, round_up
from voxclf.sampling import SURVEY_CORE
from voxclf.volume import Volume

LARGE_CHUNK = 2
"""Chunks up to so many times the survey's blocks are kept whole; of larger ones (pages of a TIFF) only parts."""


class RememberedSource:
    """Reads a volume cell by cell and keeps the cells used last; safe for several threads.

    Parameters
    ----------
    volume : Volume
        What is read.
    limit_bytes : int
        Most that is kept.
    """

    def __init__(self, volume: Volume, limit_bytes: int) -> None:
        self._volume = volume
        self._cell = cell_shape(volume.chunk_shape)
        self._kept = DecodeCache(limit_bytes)

    @property
    def info(self) -> SourceInfo:
        """As of the volume."""
        return self._volume.info

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as a new (C, z, y, x) array, put together from cells."""
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        box = np.empty((self._volume.n_channels, *shape), self._volume.dtype)
        ranges = [range(a // c, -(-b // c)) for a, b, c in zip(start, stop, self._cell, strict=True)]
        for position in itertools.product(*ranges):
            cell_start = tuple(p * c for p, c in zip(position, self._cell, strict=True))
            cell = self._kept.get(position, functools.partial(self._read_cell, cell_start))
            into, out_of = [], []
            for a, b, first, n in zip(start, stop, cell_start, cell.shape[1:], strict=True):
                low, high = max(a, first), min(b, first + n)
                into.append(slice(low - a, high - a))
                out_of.append(slice(low - first, high - first))
            box[(slice(None), *into)] = cell[(slice(None), *out_of)]
        return box

    def _read_cell(self, start: tuple[int, ...]) -> NDArray[Any]:
        z, y, x = start
        z1, y1, x1 = (min(a + c, n) for a, c, n in zip(start, self._cell, self._volume.shape, strict=True))
        return self._volume.read((z, y, x), (z1, y1, x1))


def cell_shape(chunk_shape: Zyx) -> Zyx:
    """What is read at once: whole chunks where they are small, else boxes as those of the label survey."""
    z, y, x = (
        round_up(side, chunk) if chunk <= LARGE_CHUNK * side else side
        for side, chunk in zip(SURVEY_CORE, chunk_shape, strict=True)
    )
    return z, y, x


def remember(volume: Volume, limit_bytes: int) -> Volume:
    """Return the same volume, of which up to ``limit_bytes`` that were read stay in memory.

    Nothing is read yet; sent to another process, the volume arrives with nothing remembered.
    """
    return replace(volume, opener=functools.partial(RememberedSource, volume, limit_bytes))
