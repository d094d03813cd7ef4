"""Connected pieces of a volume that is never in memory at once: label blocks, compare where they meet, unite.

1. Every block labels its own voxels and one layer of its neighbours below (lower z, y, x), so that each pair of
   touching voxels, also across an edge or a corner of a block, lies inside some block (`label_block`).
2. It hands on what was measured of its pieces, the piece numbers on its upper faces, and those that it gave to its
   neighbours' voxels on the lower ones.
3. `PieceForest` takes blocks as they come: where two blocks numbered one voxel, their pieces are one (union-find).

Pieces that touch through a face, an edge or a corner are one, as everywhere in voxclf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from voxclf.geometry import ORIGIN, Block, Zyx

MEASURED = ("values", "sizes", "low", "high", "first")
HALO: Zyx = (1, 1, 1)
"""What a block must read around its core; only the lower side is used."""


@dataclass(frozen=True)
class BlockPieces:
    """The pieces of one block, numbered from 1 within it.

    Parameters
    ----------
    start, stop : (z, y, x)
        The block's core.
    values : ndarray of uint64, shape (P,)
        What the voxels of each piece hold.
    sizes : ndarray of int64, shape (P,)
        Voxels within the core.
    low, high : ndarray of int64, shape (P, 3)
        Bounding box within the core, half-open; meaningless where the size is 0.
    first : ndarray of int64, shape (P, 3)
        A voxel of the piece within the core.
    upper : three ndarrays of int
        Piece numbers on the core's last layer along z, y, x.
    lower : three ndarrays of int
        Piece numbers in the layer before the core, the edges that lie before it along two or three axes included.
    margin : (z, y, x)
        1 along axes where the block read a layer before its core, 0 at the region's border.
    """

    start: Zyx
    stop: Zyx
    values: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    first: NDArray[np.int64]
    upper: tuple[NDArray[np.uint32], ...]
    lower: tuple[NDArray[np.uint32], ...]
    margin: Zyx


def label_block(
    values: NDArray[np.integer], block: Block, origin: Zyx = ORIGIN
) -> tuple[BlockPieces, NDArray[np.uint32]]:
    """Label the pieces of equal value in one block; 0 is background.

    Parameters
    ----------
    values : ndarray of unsigned int, shape (Z + 2, Y + 2, X + 2)
        As read with a halo of 1.
    origin : (z, y, x)
        Where the region begins; voxels before it are no neighbours.

    Returns
    -------
    BlockPieces
    ndarray of uint32, shape (Z, Y, X)
        Piece number of each voxel of the core.
    """
    import cc3d

    z, y, x = (int(start > first) for start, first in zip(block.core.start, origin, strict=True))
    margin = (z, y, x)
    seen = values[1 - z : -1, 1 - y : -1, 1 - x : -1]
    pieces = cc3d.connected_components(np.ascontiguousarray(seen), connectivity=26, out_dtype=np.uint32)
    n = int(pieces.max())
    core = pieces[z:, y:, x:]
    upper = tuple(core.take(-1, axis=axis) for axis in range(3))
    empty = np.zeros((0, 0), np.uint32)
    lower = tuple(pieces.take(0, axis=axis) if margin[axis] else empty for axis in range(3))
    value_of = np.zeros(n + 1, np.uint64)
    value_of[pieces.ravel()] = seen.ravel()
    sizes, low, high, first = _measure(core, n, np.array(block.core.start))
    start, stop = block.core.start, block.core.stop
    return BlockPieces(start, stop, value_of[1:], sizes, low, high, first, upper, lower, margin), core


def _measure(
    core: NDArray[np.uint32], n: int, start: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sizes, bounding boxes and a voxel of every piece, within the core."""
    flat = core.ravel()
    inside = np.flatnonzero(flat)
    numbers = flat[inside].astype(np.int64) - 1
    sizes = np.bincount(numbers, minlength=n)
    places = np.stack(np.unravel_index(inside, core.shape), axis=1) + start
    low, high = np.full((n, 3), np.iinfo(np.int64).max), np.zeros((n, 3), np.int64)
    first = np.zeros((n, 3), np.int64)
    for axis in range(3):
        np.minimum.at(low[:, axis], numbers, places[:, axis])
        np.maximum.at(high[:, axis], numbers, places[:, axis] + 1)
    # Assigned backwards, so that the first voxel of each piece stays.
    first[numbers[::-1]] = places[::-1]
    return sizes, low, high, first


@dataclass
class PieceForest:
    """Pieces of the blocks of one grid, united where they meet.

    Blocks come in the grid's order, z slowest; faces are kept of two layers of blocks across z.
    """

    parent: list[int] = field(default_factory=list)
    _tables: list[tuple[NDArray, ...]] = field(default_factory=list)
    _blocks: dict[Zyx, tuple[BlockPieces, int]] = field(default_factory=dict)
    _start_before: tuple[dict[int, int], ...] = field(default_factory=lambda: ({}, {}, {}))

    def add(self, pieces: BlockPieces) -> int:
        """Take in a block; returns what to add to its piece numbers - 1 to get numbers in this forest."""
        offset = len(self.parent)
        self.parent.extend(range(offset, offset + len(pieces.values)))
        self._tables.append(tuple(getattr(pieces, name) for name in MEASURED))
        for is_before in product((False, True), repeat=3):
            neighbour = self._neighbour(pieces.start, is_before) if any(is_before) else None
            if neighbour is not None:
                self._meet(pieces, offset, *neighbour)
        self._forget_below(pieces.start[0])
        self._blocks[pieces.start] = pieces, offset
        for axis in range(3):
            self._start_before[axis][pieces.stop[axis]] = pieces.start[axis]
        return offset

    def _neighbour(self, start: Zyx, is_before: tuple[bool, ...]) -> tuple[BlockPieces, int] | None:
        """The block that lies before ``start`` along some axes, and beside it along the others."""
        z, y, x = (
            self._start_before[axis].get(first, -1) if before else first
            for axis, (first, before) in enumerate(zip(start, is_before, strict=True))
        )
        return self._blocks.get((z, y, x))

    def _forget_below(self, z: int) -> None:
        """Drop the faces of blocks that no later block can meet."""
        last_layer = self._start_before[0].get(z, z)
        for start in [start for start in self._blocks if start[0] < last_layer]:
            del self._blocks[start]

    def _meet(self, pieces: BlockPieces, offset: int, other: BlockPieces, other_offset: int) -> None:
        """Unite with a block that lies before this one along some axes."""
        axis = next(a for a in range(3) if other.stop[a] == pieces.start[a])
        mine, theirs = pieces.lower[axis], other.upper[axis]
        mine_index, theirs_index = [], []
        for side in (a for a in range(3) if a != axis):
            if other.stop[side] == pieces.start[side]:
                mine_index.append(slice(0, 1))
                theirs_index.append(slice(-1, None))
            else:
                mine_index.append(slice(pieces.margin[side], None))
                theirs_index.append(slice(None))
        a, b = mine[tuple(mine_index)].ravel(), theirs[tuple(theirs_index)].ravel()
        both = (a > 0) & (b > 0)
        pairs = np.unique(np.stack([a[both], b[both]]), axis=1)
        for i, j in pairs.T.tolist():
            self._unite(offset + i - 1, other_offset + j - 1)

    def _find(self, piece: int) -> int:
        parent = self.parent
        while parent[piece] != piece:
            parent[piece] = parent[parent[piece]]
            piece = parent[piece]
        return piece

    def _unite(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        self.parent[max(a, b)] = min(a, b)

    def roots(self) -> tuple[NDArray[np.int64], Pieces]:
        """Number the united pieces from 0: the number of every block's piece, and the pieces themselves."""
        found = np.array([self._find(i) for i in range(len(self.parent))], np.int64)
        values, sizes, low, high, first = (np.concatenate(column) for column in zip(*self._tables, strict=True))
        total = np.bincount(found, weights=sizes, minlength=len(found)).astype(np.int64)
        # A piece of the layer before a block may touch nothing in it, and its owner counts it.
        kept = np.flatnonzero((found == np.arange(len(found))) & (total > 0))
        number = np.full(len(found), -1, np.int64)
        number[kept] = np.arange(len(kept))
        number = number[found]
        real = (sizes > 0) & (number >= 0)
        lowest = np.full((len(kept), 3), np.iinfo(np.int64).max)
        highest, one = np.zeros((len(kept), 3), np.int64), np.zeros((len(kept), 3), np.int64)
        for axis in range(3):
            np.minimum.at(lowest[:, axis], number[real], low[real, axis])
            np.maximum.at(highest[:, axis], number[real], high[real, axis])
        # The largest part gives the voxel to point at.
        order = np.argsort(sizes[real], kind="stable")
        one[number[real][order]] = first[real][order]
        return number, Pieces(values[kept], total[kept], lowest, highest, one)


@dataclass(frozen=True)
class Pieces:
    """Connected pieces of a whole volume; arrays as in `BlockPieces`."""

    values: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.values)

    def largest(self, n: int) -> Iterator[int]:
        """Numbers of the n largest pieces, largest first."""
        return iter(np.argsort(-self.sizes, kind="stable")[:n].tolist())
