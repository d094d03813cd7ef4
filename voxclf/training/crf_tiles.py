"""Where CRF parameters are tried: small labelled tiles, kept apart in space into those tuned on and those judged on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from voxclf.geometry import ORIGIN, Region, VoxelSize, Zyx, subtract
from voxclf.metrics.cells import CellGrid
from voxclf.metrics.structure import count_contacts
from voxclf.models.crf_volumes import CrfVolumes
from voxclf.sampling import LabelSurvey
from voxclf.volume import Volume

LARGEST_TILE: Zyx = (24, 96, 96)
SMALLEST_CELL = 16
MARGIN = 16
"""Voxels of the finest axis that are read around a tile. Kernels reach further, but what lies beyond hardly changes
which parameters are best, and would take most of the time; on all sides it costs a score a little of its gain."""
MAX_BOXES = 512
"""Labelled boxes looked at; of more, as dense labels of a large volume have, a random choice is enough."""
LEAST_CELLS = LEAST_DRAWN = 4
N_SPLITS = 64


@dataclass(frozen=True)
class TuningInputs(CrfVolumes):
    """Everything a tile is read from: the volumes of a CRF, and ``labels``, whose classes the label set numbers too."""

    labels: Volume


@dataclass(frozen=True, eq=False)
class Tile:
    """A labelled box: where it is, the cell it belongs to, and its labelled voxels per class, shape (K,)."""

    core: Region
    cell: int
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class LoadedTile:
    """The arrays of a tile.

    Parameters
    ----------
    classes : ndarray of int16, shape (z, y, x)
        Class indices of the core, -1 where unlabelled.
    arrays : list of ndarray
        Images, then probabilities, of the core and what was read around it, as on disk.
    core : slices (z, y, x)
        The core within the arrays.
    """

    classes: np.ndarray
    arrays: list[np.ndarray]
    core: tuple[slice, slice, slice]

    @property
    def stored_core(self) -> np.ndarray:
        """Probabilities of the core as stored, shape (K, z, y, x)."""
        return self.arrays[-1][:, *self.core]


def choose_cell_shape(hull: Region) -> Zyx:
    """A quarter of the labelled extent, between 16 voxels and a tile: small volumes need several cells too."""
    z, y, x = (min(n, most, max(SMALLEST_CELL, n // 4)) for n, most in zip(hull.shape, LARGEST_TILE, strict=True))
    return z, y, x


def find_tiles(inputs: TuningInputs, survey: LabelSurvey, region: Region, rng: np.random.Generator) -> list[Tile]:
    """Cut the labelled boxes within a region into tiles and count their classes.

    Raises
    ------
    ValueError
        If no labelled voxel lies in the region.
    """
    boxes = [box.region.intersect(region) for box in survey.boxes]
    boxes = [box for box in boxes if box.n_voxels]
    if not boxes:
        raise ValueError(
            f"labels {inputs.labels.path} hold no labelled voxel in {region}, which is what was predicted; predict "
            "where the labels are"
        )
    if len(boxes) > MAX_BOXES:
        boxes = [boxes[i] for i in np.sort(rng.choice(len(boxes), MAX_BOXES, replace=False))]
    hull = _hull(boxes)
    grid = CellGrid.over(hull, choose_cell_shape(hull))
    pieces = [piece for box in boxes for piece in grid.split(box)]
    return [tile for cell, piece in pieces for tile in _cut(inputs, cell, piece)]


def _cut(inputs: TuningInputs, cell: int, piece: Region) -> Iterator[Tile]:
    """Cut the part of a box in one cell into tiles of equal size, and keep those with labels."""
    for ranges in product(*map(_cut_evenly, piece.start, piece.stop, LARGEST_TILE)):
        start, stop = zip(*ranges, strict=True)
        core = Region(start, stop)
        classes = read_classes(inputs, core)
        counts = np.bincount(classes[classes >= 0], minlength=inputs.label_set.n_classes)
        if counts.any():
            yield Tile(core, cell, counts)


def _cut_evenly(start: int, stop: int, longest: int) -> list[tuple[int, int]]:
    n_parts = -(-(stop - start) // longest)
    edges = [start + i * (stop - start) // n_parts for i in range(n_parts + 1)]
    return list(pairwise(edges))


def read_classes(inputs: TuningInputs, core: Region) -> np.ndarray:
    """Class indices of a box, -1 where unlabelled."""
    return inputs.label_set.remap_to_indices(inputs.labels.read(core.start, core.stop)[0])


def tile_margin(voxel_size_nm: VoxelSize) -> Zyx:
    """Voxels read around a tile: as many nanometres along every axis."""
    z, y, x = (math.ceil(MARGIN * min(voxel_size_nm) / size) for size in voxel_size_nm)
    return z, y, x


def count_read(tile: Tile, inputs: TuningInputs) -> int:
    """Voxels that :func:`load_tile` reads."""
    return _surroundings(tile, inputs).n_voxels


def load_tile(inputs: TuningInputs, tile: Tile) -> LoadedTile:
    """Read the arrays of a tile, with a margin that ends at the edge of the volume."""
    read = _surroundings(tile, inputs)
    start, stop = subtract(tile.core.start, read.start), subtract(tile.core.stop, read.start)
    return LoadedTile(
        read_classes(inputs, tile.core),
        [volume.read(read.start, read.stop) for volume in inputs.inputs],
        Region(start, stop).slices,
    )


def _surroundings(tile: Tile, inputs: TuningInputs) -> Region:
    whole = Region(ORIGIN, inputs.probabilities.shape)
    return tile.core.grow(tile_margin(inputs.voxel_size_nm)).intersect(whole)


def split_cells(tiles: Sequence[Tile], rng: np.random.Generator) -> tuple[list[Tile], list[Tile]]:
    """Divide tiles, whole cells at a time, into those to tune on and those to judge on.

    Of 64 random divisions into halves, the one whose scarcest class is divided most evenly.

    Raises
    ------
    ValueError
        If the labels lie in fewer than four cells, too few to keep apart.
    """
    cells = np.array(sorted({tile.cell for tile in tiles}))
    if len(cells) < LEAST_CELLS:
        raise ValueError(
            f"labels lie in only {len(cells)} cells of at least {SMALLEST_CELL} voxels a side, too few to tune on some "
            f"and judge on others; at least {LEAST_CELLS} are needed: label more places"
        )
    table = np.stack([sum(tile.counts for tile in tiles if tile.cell == cell) for cell in cells])
    total = np.maximum(table.sum(axis=0), 1)
    best, best_share = np.zeros(len(cells), bool), -1.0
    for _ in range(N_SPLITS):
        tunes = np.isin(np.arange(len(cells)), rng.permutation(len(cells))[: len(cells) // 2])
        share = np.minimum(table[tunes].sum(axis=0), table[~tunes].sum(axis=0)) / total
        share = float(share[table.any(axis=0)].min())
        if share > best_share:
            best, best_share = tunes, share
    chosen = set(cells[best].tolist())
    return [t for t in tiles if t.cell in chosen], [t for t in tiles if t.cell not in chosen]


def draw_tiles(
    tiles: Sequence[Tile], inputs: TuningInputs, n_voxels: int, most: int, rng: np.random.Generator
) -> list[Tile]:
    """Draw tiles cell by cell in turn, so that all cells are heard, until ``n_voxels`` would have to be read.

    At least four, and at most ``most``.
    """
    shuffled = [tiles[i] for i in rng.permutation(len(tiles))]
    taken: dict[int, int] = {}
    ranked = []
    for tile in shuffled:
        taken[tile.cell] = taken.get(tile.cell, 0) + 1
        ranked.append((taken[tile.cell], tile))
    drawn = [tile for _, tile in sorted(ranked, key=lambda item: item[0])[:most]]
    read = np.cumsum([count_read(tile, inputs) for tile in drawn])
    return drawn[: max(LEAST_DRAWN, int(np.searchsorted(read, n_voxels, side="right")))]


def sum_contacts(inputs: TuningInputs, tiles: Sequence[Tile]) -> np.ndarray:
    """Contacts of the labelled classes over tiles, shape (K, K)."""
    n_classes = inputs.label_set.n_classes
    contacts = np.zeros((n_classes, n_classes), np.int64)
    for tile in tiles:
        contacts += count_contacts(read_classes(inputs, tile.core), n_classes)
    return contacts


def _hull(boxes: Sequence[Region]) -> Region:
    start = np.array([box.start for box in boxes]).min(axis=0)
    stop = np.array([box.stop for box in boxes]).max(axis=0)
    return Region(tuple(start.tolist()), tuple(stop.tolist()))
