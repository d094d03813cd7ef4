"""Tables kept apart per cell of a coarse grid: the units that a spatial bootstrap draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from voxclf.geometry import Region, Zyx
from voxclf.metrics.voxelwise import ScoreTables

CELLS_PER_AXIS = 8
"""At most 512 cells: enough draws for an interval, and few enough tables for any volume."""


@dataclass(frozen=True)
class CellGrid:
    """Cells of equal size over a box; neighbouring voxels mostly share one, so cells are nearly independent."""

    start: Zyx
    side: Zyx
    counts: Zyx

    @classmethod
    def over(cls, region: Region, least_side: Zyx) -> CellGrid:
        """Cut a box into at most 8 cells along each axis, none shorter than ``least_side``."""
        side = [max(-(-n // CELLS_PER_AXIS), least) for n, least in zip(region.shape, least_side, strict=True)]
        z, y, x = (-(-n // s) for n, s in zip(region.shape, side, strict=True))
        return cls(region.start, (side[0], side[1], side[2]), (z, y, x))

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
