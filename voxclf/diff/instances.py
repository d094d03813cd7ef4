"""Two instance volumes compared: objects are their ids, whatever the numbers are.

1. Count the voxels that each pair of ids shares (`SharedFold`).
2. Objects that are each other's largest partner are taken for the same; every other voxel that is an object on either
   side has changed (`ChangedFold`), and its connected pieces are the differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.components import BlockPieces, label_block
from voxclf.diff.objects import ObjectTable
from voxclf.geometry import Block, Zyx


@dataclass(frozen=True)
class SharedIds:
    """Voxels per pair of ids, block by block; pairs of several blocks are not yet summed.

    Parameters
    ----------
    ids : tuple of ndarray of uint64, each of shape (R, 2)
    counts : tuple of ndarray of int64, each of shape (R,)
    places : tuple of ndarray of int64, each of shape (R, 3)
        A voxel (z, y, x) of each pair.
    """

    ids: tuple[NDArray[np.uint64], ...] = ()
    counts: tuple[NDArray[np.int64], ...] = ()
    places: tuple[NDArray[np.int64], ...] = ()

    def __add__(self, other: SharedIds) -> SharedIds:
        return SharedIds(self.ids + other.ids, self.counts + other.counts, self.places + other.places)

    def join(self) -> SharedPairs:
        """Sum the blocks."""
        ids, first, number = np.unique(np.concatenate(self.ids), axis=0, return_index=True, return_inverse=True)
        counts = np.bincount(number.ravel(), weights=np.concatenate(self.counts)).astype(np.int64)
        return SharedPairs(ids, counts, np.concatenate(self.places)[first])


@dataclass(frozen=True)
class SharedPairs:
    """Every pair of ids that occurs, ascending, with its voxels: arrays as in `SharedIds`, joined."""

    ids: NDArray[np.uint64]
    counts: NDArray[np.int64]
    places: NDArray[np.int64]

    def objects(self, side: int) -> ObjectTable:
        """The objects of one side, ids ascending; 0 is background."""
        real = self.ids[:, side] > 0
        values, first, number = np.unique(self.ids[real, side], return_index=True, return_inverse=True)
        sizes = np.bincount(number, weights=self.counts[real], minlength=len(values)).astype(np.int64)
        return ObjectTable(values, sizes, self.places[real][first])

    def find_same(self) -> NDArray[np.bool_]:
        """Which pairs are each other's largest partner; background only matches background."""
        best = []
        for side in range(2):
            order = np.lexsort((-self.counts, self.ids[:, side]))
            _, leaders = np.unique(self.ids[order, side], return_index=True)
            chosen = np.zeros(len(self.ids), bool)
            chosen[order[leaders]] = True
            best.append(chosen)
        both = (self.ids > 0).all(axis=1)
        # An object's largest partner may be the background: then it has none.
        return (best[0] & best[1] & both) | (self.ids == 0).all(axis=1)


@dataclass(frozen=True)
class SharedFold:
    """Counts the pairs of ids of one block."""

    def __call__(self, block: Block, before: NDArray[Any], after: NDArray[Any]) -> SharedIds:
        """Arrays are (1, Z, Y, X)."""
        a, b = (np.unique(array[0], return_inverse=True) for array in (before, after))
        codes, first, counts = np.unique(a[1].ravel() * len(b[0]) + b[1].ravel(), return_index=True, return_counts=True)
        ids = np.stack([a[0][codes // len(b[0])], b[0][codes % len(b[0])]], axis=1).astype(np.uint64)
        places = np.stack(np.unravel_index(first, before.shape[1:]), axis=1) + np.array(block.core.start)
        return SharedIds((ids,), (counts,), (places,))


@dataclass(frozen=True)
class ChangedFold:
    """Labels the changed pieces of one block; the value of a piece is 1 + the row of its pair."""

    pairs: SharedPairs
    origin: Zyx

    def __call__(self, block: Block, before: NDArray[Any], after: NDArray[Any]) -> tuple[BlockPieces, ...]:
        """Arrays are (1, Z + 2, Y + 2, X + 2)."""
        same = self.pairs.find_same()
        a, b = (np.unique(array[0], return_inverse=True) for array in (before, after))
        codes, number = np.unique(a[1].ravel() * len(b[0]) + b[1].ravel(), return_inverse=True)
        here = np.stack([a[0][codes // len(b[0])], b[0][codes % len(b[0])]], axis=1).astype(np.uint64)
        # Pairs that occur only in the halo outside the region are in no table; they lie in no core either.
        row_of = {tuple(pair): row for row, pair in enumerate(self.pairs.ids.tolist())}
        rows = np.array([row_of.get(tuple(pair), -1) for pair in here.tolist()], np.int64)
        values = np.where((rows >= 0) & ~same[rows], rows + 1, 0).astype(np.uint64)
        return (label_block(values[number].reshape(before.shape[1:]), block, self.origin)[0],)
