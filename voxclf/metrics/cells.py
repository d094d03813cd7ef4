"""Tables kept apart per cell of a coarse grid: the units that a spatial bootstrap draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from voxclf.geometry import Region, Zyx, add
from voxclf.metrics.voxelwise import ScoreTables

CELLS_PER_AXIS = 8
"""At most 512 cells: enough draws for an interval, and few enough tables for any volume."""

LEAST_SIDE = 48
"""Shortest side of a cell, voxels: what goes well or ill goes on for about that long. With cells of 32, intervals of
accuracy held the truth of 62 to 80 % of phantoms, with 48 of 76 to 90 %; larger ones are too few."""


@dataclass(frozen=True)
class CellGrid:
    """Cells of equal size over a box; neighbouring voxels mostly share one, so cells are nearly independent."""

    start: Zyx
    side: Zyx
    counts: Zyx

    @classmethod
    def over(cls, region: Region, least_side: Zyx = (LEAST_SIDE,) * 3) -> CellGrid:
        """Cut a box evenly into at most 8 cells along each axis, none shorter than ``least_side``."""
        n_cells = [min(CELLS_PER_AXIS, max(1, n // least)) for n, least in zip(region.shape, least_side, strict=True)]
        side = [-(-n // cells) for n, cells in zip(region.shape, n_cells, strict=True)]
        z, y, x = (-(-n // s) for n, s in zip(region.shape, side, strict=True))
        return cls(region.start, (side[0], side[1], side[2]), (z, y, x))

    def split(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Cut a region where cells meet; yields each piece with the number of its cell."""
        ranges = [
            range((a - s) // n, -(-(b - s) // n))
            for a, b, s, n in zip(region.start, region.stop, self.start, self.side, strict=True)
        ]
        for position in itertools.product(*ranges):
            start = tuple(s + p * n for s, p, n in zip(self.start, position, self.side, strict=True))
            cell = Region(start, add(start, self.side))  # type: ignore[arg-type]
            yield int(np.ravel_multi_index(position, self.counts)), cell.intersect(region)

    def number(self, positions: np.ndarray) -> np.ndarray:
        """Number of the cell of each voxel; ``positions`` (N, 3) of z, y, x."""
        cell = (np.asarray(positions) - self.start) // self.side
        return np.ravel_multi_index(tuple(np.clip(cell, 0, np.array(self.counts) - 1).T), self.counts)


@dataclass(frozen=True)
class CellTables:
    """Score tables by cell number; adding two joins their cells."""

    by_cell: dict[int, ScoreTables] = field(default_factory=dict)

    def __add__(self, other: CellTables) -> CellTables:
        joined = dict(self.by_cell)
        for cell, tables in other.by_cell.items():
            joined[cell] = joined[cell] + tables if cell in joined else tables
        return CellTables(joined)

    @property
    def cells(self) -> list[ScoreTables]:
        """The tables in the order of their cells, so that a seeded bootstrap repeats."""
        return [self.by_cell[cell] for cell in sorted(self.by_cell)]

    def total(self, n_classes: int) -> ScoreTables:
        """All cells together."""
        return sum(self.cells, ScoreTables.zeros(n_classes))
