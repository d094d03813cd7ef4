"""Coarser scales of a volume, made box by box from the next finer one.

A viewer opens the coarse levels first. Each level is computed like any other output: blocks of a downsampled
view are copied into the level's array, so memory stays that of one block (times eight, for the finer voxels).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxclf.formats.source import SourceInfo
from voxclf.geometry import Zyx
from voxclf.volume import Volume

Reduction = Literal["mean", "most frequent"]


def downsampled_view(finer: Volume, factors: Zyx, reduction: Reduction) -> Volume:
    """Return a read-only volume that is the finer one, reduced as it is read.

    Parameters
    ----------
    finer : Volume
        The next finer level.
    factors : (z, y, x)
        Each 1 or 2: voxels of the finer volume per voxel of the view.
    reduction : {"mean", "most frequent"}
        For images and probabilities, or for labels.

    Notes
    -----
    A last odd voxel along an axis stands alone: the view has ``ceil(n / factor)`` voxels there.
    """
    if any(f not in (1, 2) for f in factors):
        raise ValueError(f"factors were {factors}; each must be 1 or 2: make coarser levels from the next finer one")
    opener = functools.partial(DownsampledSource, finer, factors, reduction)
    z, y, x = (v * f for v, f in zip(finer.voxel_size_nm, factors, strict=True))
    return Volume(f"{finer.path} reduced by {factors}", opener().info, (z, y, x), opener)


@dataclass(frozen=True)
class DownsampledSource:
    """Reads the finer volume and reduces it; nothing is kept between reads."""

    finer: Volume
    factors: Zyx
    reduction: Reduction

    @property
    def info(self) -> SourceInfo:
        """The finer volume's facts, with the shapes divided."""
        sizes = zip(self.finer.shape, self.finer.chunk_shape, self.factors, strict=True)
        (z, cz), (y, cy), (x, cx) = ((-(-n // f), max(1, c // f)) for n, c, f in sizes)
        return SourceInfo(
            shape=(self.finer.n_channels, z, y, x),
            dtype=self.finer.dtype,
            chunk_shape=(cz, cy, cx),
            metadata=self.finer.metadata,
            channel_names=self.finer.channel_names,
        )

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box of the view as (C, z, y, x)."""
        z0, y0, x0 = (s * f for s, f in zip(start, self.factors, strict=True))
        z1, y1, x1 = (min(s * f, n) for s, f, n in zip(stop, self.factors, self.finer.shape, strict=True))
        reduce = _REDUCE[self.reduction]
        return reduce(self.finer.read((z0, y0, x0), (z1, y1, x1)), self.factors)


def average(array: NDArray[Any], factors: Zyx) -> NDArray[Any]:
    """Average boxes of ``factors`` voxels; integers are rounded to the nearest, halves upwards.

    Parameters
    ----------
    array : ndarray, shape (C, z, y, x)
        Any integer or float type.
    factors : (z, y, x)
        Each 1 or 2.

    Returns
    -------
    ndarray of the same type, shape (C, ceil(z / factor), …)

    Examples
    --------
    >>> average(np.array([[[[1, 2, 9]]]], np.uint8), (1, 1, 2))
    array([[[[2, 9]]]], dtype=uint8)
    """
    members = _box_members(array, factors)
    # 64-bit integers have no wider type; float64 is exact up to 2**53, far beyond any grey value.
    is_small_integer = array.dtype.kind in "iu" and array.dtype.itemsize < 8
    total = np.zeros(members[0].shape, np.int64 if is_small_integer else np.float64)
    for member in members:
        total += member
    n = len(members)
    if is_small_integer:
        return ((total + n // 2) // n).astype(array.dtype)
    mean = total / n
    return (np.floor(mean + 0.5) if array.dtype.kind in "iu" else mean).astype(array.dtype)


def most_frequent(array: NDArray[Any], factors: Zyx) -> NDArray[Any]:
    """Take the most frequent value of each box of ``factors`` voxels; of equally frequent ones the smallest.

    Parameters
    ----------
    array : ndarray of integers, shape (C, z, y, x)
        Class or object ids.
    factors : (z, y, x)
        Each 1 or 2.

    Returns
    -------
    ndarray of the same type, shape (C, ceil(z / factor), …)

    Examples
    --------
    >>> most_frequent(np.array([[[[5, 3], [3, 5]]]], np.uint8), (1, 2, 2))
    array([[[[3]]]], dtype=uint8)
    """
    ordered = np.sort(np.stack(_box_members(array, factors)), axis=0)
    best, best_run = ordered[0].copy(), np.ones(ordered.shape[1:], np.uint8)
    run = best_run.copy()
    for previous, value in itertools.pairwise(ordered):
        run = np.where(value == previous, run + 1, 1).astype(np.uint8)
        # Values come in ascending order, so only a strictly longer run may replace a smaller id.
        is_longer = run > best_run
        best[is_longer], best_run[is_longer] = value[is_longer], run[is_longer]
    return best


def _box_members(array: NDArray[Any], factors: Zyx) -> list[NDArray[Any]]:
    """Split (C, z, y, x) into the first, second, … voxel of every box, each of the reduced shape."""
    # With factors of at most 2, repeating a last odd voxel gives it every vote of its box: the same result
    # as counting it alone.
    pad = [(0, 0), *((0, -n % f) for n, f in zip(array.shape[1:], factors, strict=True))]
    even = np.pad(array, pad, mode="edge") if any(after for _, after in pad) else array
    offsets = itertools.product(*(range(f) for f in factors))
    fz, fy, fx = factors
    return [even[:, dz::fz, dy::fy, dx::fx] for dz, dy, dx in offsets]


_REDUCE: dict[Reduction, Callable[[NDArray[Any], Zyx], NDArray[Any]]] = {
    "mean": average,
    "most frequent": most_frequent,
}
