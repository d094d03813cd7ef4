"""What became of each object between two segmentations: kept, born, lost, split or merged.

Two objects are related if they share at least a given part of the smaller one. An object of the second without a
relative in the first was born, one of the first without a relative in the second is lost; one that has several
relatives was split into them, or merged from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Fate = Literal["born", "lost", "split", "merged"]


@dataclass(frozen=True)
class ObjectTable:
    """Objects of one segmentation.

    Parameters
    ----------
    values : ndarray of uint64, shape (M,)
        Class (as 1 + index) of pieces of labels; id of instances.
    sizes : ndarray of int64, shape (M,)
        Voxels.
    places : ndarray of int64, shape (M, 3)
        A voxel (z, y, x) of each.
    """

    values: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    places: NDArray[np.int64]


@dataclass(frozen=True)
class ObjectChanges:
    """Relations between two sets of objects, and what follows from them.

    Parameters
    ----------
    before, after : ObjectTable
    pairs : ndarray of int64, shape (R, 2)
        Related objects: row of ``before``, row of ``after``.
    """

    before: ObjectTable
    after: ObjectTable
    pairs: NDArray[np.int64]

    @property
    def relatives_before(self) -> NDArray[np.int64]:
        """How many relatives each object of ``before`` has."""
        return np.bincount(self.pairs[:, 0], minlength=len(self.before.sizes))

    @property
    def relatives_after(self) -> NDArray[np.int64]:
        """How many relatives each object of ``after`` has."""
        return np.bincount(self.pairs[:, 1], minlength=len(self.after.sizes))

    def find(self, fate: Fate) -> NDArray[np.intp]:
        """Rows of the objects with a fate: of ``after`` for born and merged, of ``before`` for lost and split."""
        relatives = self.relatives_after if fate in ("born", "merged") else self.relatives_before
        return np.flatnonzero(relatives == 0 if fate in ("born", "lost") else relatives > 1)

    def table_of(self, fate: Fate) -> ObjectTable:
        """The side that `find` speaks of."""
        return self.after if fate in ("born", "merged") else self.before


def relate(
    before: ObjectTable,
    after: ObjectTable,
    shared: NDArray[np.int64],
    counts: NDArray[np.int64],
    least_overlap: float,
) -> ObjectChanges:
    """Relate objects that share enough voxels.

    Parameters
    ----------
    shared : ndarray of int64, shape (R, 2)
        Rows of objects that share voxels; a pair may occur more than once.
    counts : ndarray of int64, shape (R,)
        How many voxels.
    least_overlap : float
        Share of the smaller object; 0 relates objects that share one voxel.
    """
    if not len(shared):
        return ObjectChanges(before, after, np.zeros((0, 2), np.int64))
    unique, number = np.unique(shared, axis=0, return_inverse=True)
    total = np.bincount(number.ravel(), weights=counts)
    smaller = np.minimum(before.sizes[unique[:, 0]], after.sizes[unique[:, 1]])
    return ObjectChanges(before, after, unique[total >= least_overlap * smaller])
