"""Two segmentations of one volume compared: voxels, volumes, objects, and where they differ most. ``voxclf diff``.

One pass over both, block by block: voxels per pair of classes, connected pieces of either side and of what differs,
and the voxels that pieces of one class share. Pieces are united across blocks (`components.py`), so every number is
that of the whole volume, and none depends on the block size. Instance volumes take two passes (`instances.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.components import HALO, BlockPieces, PieceForest, Pieces, label_block
from voxclf.config import DiffConfig
from voxclf.diff.instances import ChangedFold, SharedFold
from voxclf.diff.objects import ObjectChanges, ObjectTable, relate
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.run import fold_blocks
from voxclf.errors import OutputExistsError
from voxclf.geometry import ORIGIN, Block, Region, VoxelSize, Zyx, split_into_blocks
from voxclf.jobs import choose_region
from voxclf.labels import LabelSet, parse_classes
from voxclf.predict import LABELS
from voxclf.progress import Progress, last, silent
from voxclf.volume import Volume, open_volume

TABLE = "diff.csv"
CORE: Zyx = (64, 256, 256)


@dataclass(frozen=True)
class Difference:
    """A connected region in which one class, or object, became another.

    Parameters
    ----------
    before, after : int
        Label ids, or instance ids; 0 is unlabelled or background.
    n_voxels : int
    region : Region
        Its bounding box.
    position : (z, y, x)
        A voxel of it.
    """

    before: int
    after: int
    n_voxels: int
    region: Region
    position: Zyx


@dataclass(frozen=True)
class Diff:
    """All that differs.

    Parameters
    ----------
    n_voxels, n_changed : int
        Compared voxels, and those that differ.
    confusion : ndarray of int64, shape (K + 1, K + 1), or None
        Voxels by class before (row) and after (column), unlabelled first; None for instances.
    objects : ObjectChanges
        Connected pieces of the classes, or instances.
    differences : tuple of Difference
        The largest, from the largest down.
    n_differences : int
        Connected regions that differ, of any size.
    label_set : LabelSet or None
        The classes; None for instances.
    """

    before: Volume
    after: Volume
    region: Region
    voxel_size_nm: VoxelSize
    n_voxels: int
    n_changed: int
    confusion: NDArray[np.int64] | None
    objects: ObjectChanges
    differences: tuple[Difference, ...]
    n_differences: int
    label_set: LabelSet | None


def compare_volumes(config: DiffConfig, progress: Progress = silent) -> Diff:
    """Compare two label or instance volumes of the same shape.

    Raises
    ------
    OutputExistsError
        If the output folder holds a comparison already and ``overwrite`` is not set.
    ValueError
        If shapes differ, a volume has several channels, or the voxel size is not known.

    Notes
    -----
    Reads both once (instances: twice). Memory: the blocks in work, the faces of about one layer of blocks, and some
    hundred bytes per connected piece and block, so noise of single voxels costs most.
    """
    table = Path(config.output) / TABLE
    if table.exists() and not config.overwrite:
        raise OutputExistsError(f"{table} exists; use --overwrite to replace it, or give another output folder")
    before, after = _open_side(config.before), _open_side(config.after)
    if before.shape != after.shape:
        raise ValueError(
            f"before {before.path} has shape {before.shape}, but after {after.path} has {after.shape} (z, y, x); give "
            "two segmentations of one volume"
        )
    voxel_size = _settle_voxel_size(config, before, after)
    _check_image(config, voxel_size, before.shape)
    region = choose_region(config.region, before)
    executor = make_executor(config.executor, config.workers)
    sides = _Sides(config, before, after, region, voxel_size, executor, progress)
    return _compare_instances(sides) if config.instances else _compare_labels(sides)


def _open_side(path: str) -> Volume:
    """Open a label volume, or the labels of a prediction folder."""
    inside = Path(path) / LABELS
    volume = open_volume(inside if inside.exists() else path, require_voxel_size=False, kind="labels")
    if volume.n_channels != 1:
        raise ValueError(
            f"{volume.path} has {volume.n_channels} channels; labels and instances are one channel of whole numbers"
        )
    return volume


def _check_image(config: DiffConfig, voxel_size: VoxelSize, shape: Zyx) -> None:
    """Refuse an image of another shape before any work; it is read only for the pictures, at the end."""
    if config.volume is None:
        return
    image = open_volume(config.volume, voxel_size)
    if image.shape != shape:
        raise ValueError(
            f"volume {config.volume} has shape {image.shape}, but the segmentations have {shape} (z, y, x); give the "
            "image behind them"
        )


def _settle_voxel_size(config: DiffConfig, before: Volume, after: Volume) -> VoxelSize:
    if config.voxel_size:
        return config.voxel_size
    for volume in (before, after):
        if volume.has_voxel_size:
            return volume.voxel_size_nm
    raise ValueError("--voxel-size is missing: neither volume states one; give z,y,x in nm, for example 50,4.6,4.6")


@dataclass(frozen=True)
class _Sides:
    """Both volumes, and how they are read."""

    config: DiffConfig
    before: Volume
    after: Volume
    region: Region
    voxel_size_nm: VoxelSize
    executor: Executor
    progress: Progress

    def fold(self, fold: Any, halo: Zyx, what: str) -> Any:
        """The sum of ``fold`` over the blocks of both."""
        blocks = split_into_blocks(self.before.shape, CORE, halo, region=self.region)
        running = fold_blocks(fold, [self.before, self.after], blocks, self.executor)
        return last(self.progress(what, running, self.region.n_voxels, "voxel")).total


# --- labels ---


@dataclass(frozen=True)
class _LabelBlock:
    """What one block tells."""

    confusion: NDArray[np.int64]
    before: BlockPieces
    after: BlockPieces
    changed: BlockPieces
    shared: NDArray[np.int64]
    counts: NDArray[np.int64]

    def __add__(self, other: _LabelBlock) -> _LabelSum:
        return _LabelSum(self.confusion * 0) + self + other


class _LabelSum:
    """The blocks so far. It grows in place: joining tables at every sum would copy them all."""

    def __init__(self, confusion: NDArray[np.int64]) -> None:
        self.confusion = confusion
        self.forests = (PieceForest(), PieceForest(), PieceForest())
        self.shared: list[NDArray[np.int64]] = []
        self.counts: list[NDArray[np.int64]] = []

    def __add__(self, block: _LabelBlock) -> _LabelSum:
        self.confusion = self.confusion + block.confusion
        sides = (block.before, block.after, block.changed)
        first, second, _ = (forest.add(pieces) for forest, pieces in zip(self.forests, sides, strict=True))
        self.shared.append(block.shared - 1 + np.array([first, second]))
        self.counts.append(block.counts)
        return self


@dataclass(frozen=True)
class _LabelFold:
    """Compares the labels of one block."""

    label_set: LabelSet
    origin: Zyx

    def __call__(self, block: Block, before: NDArray[Any], after: NDArray[Any]) -> _LabelBlock:
        """Arrays are (1, Z + 2, Y + 2, X + 2)."""
        n = self.label_set.n_classes + 1
        a, b = (self.label_set.remap_to_indices(array[0]).astype(np.uint32) + 1 for array in (before, after))
        changed = np.where(a != b, a * n + b + 1, 0)
        core = (slice(1, -1),) * 3
        codes = (a[core] * n + b[core]).ravel()
        pieces_a, numbers_a = label_block(a, block, self.origin)
        pieces_b, numbers_b = label_block(b, block, self.origin)
        same = (a[core] == b[core]) & (a[core] > 0)
        pairs, counts = np.unique(np.stack([numbers_a[same], numbers_b[same]]), axis=1, return_counts=True)
        return _LabelBlock(
            np.bincount(codes, minlength=n * n).reshape(n, n),
            pieces_a,
            pieces_b,
            label_block(changed, block, self.origin)[0],
            pairs.T.astype(np.int64),
            counts,
        )


def _compare_labels(sides: _Sides) -> Diff:
    label_set = _settle_classes(sides)
    compared: _LabelBlock | _LabelSum = sides.fold(_LabelFold(label_set, sides.region.start), HALO, "compare")
    # A single block was added to nothing.
    total = compared if isinstance(compared, _LabelSum) else _LabelSum(compared.confusion * 0) + compared
    (number_a, pieces_a), (number_b, pieces_b), (_, changed) = (forest.roots() for forest in total.forests)
    shared = np.concatenate(total.shared)
    shared = np.stack([number_a[shared[:, 0]], number_b[shared[:, 1]]], axis=1)
    tables = [ObjectTable(p.values, p.sizes, p.first) for p in (pieces_a, pieces_b)]
    objects = relate(tables[0], tables[1], shared, np.concatenate(total.counts), sides.config.least_overlap)
    confusion = total.confusion
    ids = np.array([label_set.unlabelled, *label_set.ids])
    n = len(ids)

    def spell(value: int) -> tuple[int, int]:
        return int(ids[(value - 1) // n]), int(ids[(value - 1) % n])

    return Diff(
        sides.before,
        sides.after,
        sides.region,
        sides.voxel_size_nm,
        int(confusion.sum()),
        int(confusion.sum() - np.trace(confusion)),
        confusion,
        objects,
        tuple(_largest(changed, sides.config.top, spell)),
        len(changed),
        label_set,
    )


def _settle_classes(sides: _Sides) -> LabelSet:
    """The classes that either volume carries; else the ids that occur, named as asked for."""
    config, before, after = sides.config, sides.before, sides.after
    found = [LabelSet.from_metadata(volume.metadata) for volume in (before, after)]
    carried = [label_set for label_set in found if label_set]
    if carried and not config.classes and all(label_set.ids == carried[0].ids for label_set in carried):
        return carried[0]
    ids = sorted(sides.fold(_IdFold(), ORIGIN, "find classes").ids - {0})
    if not ids:
        raise ValueError(
            f"{before.path} and {after.path} hold nothing but 0 in {sides.region}; there is nothing to compare"
        )
    if len(ids) > MOST_CLASSES:
        raise ValueError(
            f"{before.path} and {after.path} hold {len(ids):,} different values; if they are objects, use --instances"
        )
    return parse_classes(config.classes, ids, 0) if config.classes else LabelSet.from_ids(ids)


MOST_CLASSES = 255


@dataclass(frozen=True)
class _Ids:
    ids: frozenset[int]

    def __add__(self, other: _Ids) -> _Ids:
        return _Ids(self.ids | other.ids)


@dataclass(frozen=True)
class _IdFold:
    """Which values occur in one block."""

    def __call__(self, block: Block, before: NDArray[Any], after: NDArray[Any]) -> _Ids:
        return _Ids(frozenset(np.unique(before).tolist()) | frozenset(np.unique(after).tolist()))


def _largest(changed: Pieces, top: int, spell: Any) -> Iterator[Difference]:
    for i in changed.largest(top):
        a, b = spell(int(changed.values[i]))
        low, high, place = (tuple(array[i].tolist()) for array in (changed.low, changed.high, changed.first))
        yield Difference(a, b, int(changed.sizes[i]), Region(low, high), place)


# --- instances ---


def _compare_instances(sides: _Sides) -> Diff:
    pairs = sides.fold(SharedFold(), ORIGIN, "shared voxels").join()
    tables = [pairs.objects(0), pairs.objects(1)]
    both = (pairs.ids > 0).all(axis=1)
    shared = [np.searchsorted(table.values, pairs.ids[both, side]) for side, table in enumerate(tables)]
    objects = relate(tables[0], tables[1], np.stack(shared, axis=1), pairs.counts[both], sides.config.least_overlap)
    forest = PieceForest()
    for pieces in sides.fold(ChangedFold(pairs, sides.region.start), HALO, "differences"):
        forest.add(pieces)
    changed = forest.roots()[1]

    def spell(value: int) -> tuple[int, int]:
        a, b = pairs.ids[value - 1].tolist()
        return a, b

    return Diff(
        sides.before,
        sides.after,
        sides.region,
        sides.voxel_size_nm,
        sides.region.n_voxels,
        int(pairs.counts[~pairs.find_same()].sum()),
        None,
        objects,
        tuple(_largest(changed, sides.config.top, spell)),
        len(changed),
        None,
    )


def volume_nm3(n_voxels: int, voxel_size_nm: VoxelSize) -> float:
    """Cubic nanometres of some voxels."""
    return n_voxels * math.prod(voxel_size_nm)
