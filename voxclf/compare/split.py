"""The split that every model of a comparison shares: labels to train on, labels to score on, a gap between them.

Without labels given for scoring, the labelled extent is cut into slabs along the axis with most room, and one slab is
held out. Both parts are written as files of their own, so they can be looked at, and given to ``voxclf run`` again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import tomli_w

from voxclf.engine.executors import Executor
from voxclf.engine.run import fold_blocks
from voxclf.geometry import ORIGIN, Block, Region, VoxelSize, Zyx, make_block, select_blocks, split_into_blocks
from voxclf.labels import LabelSet
from voxclf.progress import last
from voxclf.sampling import LabelledBox, LabelSurvey, SlabSplit, split_into_slabs, survey_labels
from voxclf.volume import DEFAULT_CHUNK, Volume, create_volume

# How the axes of a thin box are turned into pages, rows and columns of a file, by the axis it is thinnest along.
_PLANES = ("xy", "xz", "yz")


@dataclass(frozen=True)
class HeldOut:
    """Labels split in two.

    Parameters
    ----------
    train, test : str
        Label volume or slice listing, as ``--labels`` and ``--validation`` take them.
    region : Region
        Box around the test labels: all that has to be predicted.
    note : str
        How the split was made.
    classes : str, optional
        Names that neither part carries and a fit has to be told.
    """

    train: str
    test: str
    region: Region
    note: str
    classes: str | None = None


def survey_all(labels: Volume, unlabelled: int, executor: Executor) -> LabelSurvey:
    """Find all labelled boxes of a volume; refuses labels that hold none.

    Raises
    ------
    ValueError
        If no voxel is labelled.
    """
    survey = last(survey_labels(labels, unlabelled, executor)).total
    if not survey.boxes:
        raise ValueError(
            f"labels {labels.path} hold no labelled voxel: every voxel is {unlabelled}; label some voxels, or say with "
            "--unlabelled which value means unlabelled"
        )
    return survey


def survey_within(labels: Volume, unlabelled: int, region: Region, executor: Executor) -> LabelSurvey:
    """Find the labelled boxes of a region, each as far as it lies inside and holds a label there.

    Raises
    ------
    ValueError
        If nothing is labelled in the region.
    """
    kept = []
    for box in survey_all(labels, unlabelled, executor).boxes:
        inside = box.region.intersect(region)
        if inside.n_voxels and (labels.read(inside.start, inside.stop) != unlabelled).any():
            kept.append(LabelledBox(inside, box.counts))
    if not kept:
        raise ValueError(
            f"labels {labels.path} hold no labelled voxel in {region}, so there is nothing to score; give another "
            "--region, or leave it out"
        )
    return LabelSurvey(tuple(kept))


def bounding_region(survey: LabelSurvey) -> Region:
    """The smallest box around all labels."""
    starts = np.array([box.region.start for box in survey.boxes]).min(axis=0)
    stops = np.array([box.region.stop for box in survey.boxes]).max(axis=0)
    return Region(tuple(starts.tolist()), tuple(stops.tolist()))


def hold_out_slab(
    labels: Volume,
    label_set: LabelSet,
    voxel_size_nm: VoxelSize,
    gap: Zyx,
    n_slabs: int,
    folder: Path,
    executor: Executor,
) -> HeldOut:
    """Hold out one slab of the labels and write both parts into a folder.

    Of all slabs the one is taken that leaves most classes on both sides and, of those, most voxels to train on;
    labels within the gap are in neither part.

    Parameters
    ----------
    labels : Volume
    label_set : LabelSet
        Stored with both parts, so that classes keep their names and colours.
    voxel_size_nm : (z, y, x)
        Of the volume; label files need not state theirs.
    gap : (z, y, x)
        Voxels between the parts: how far a model's features reach.
    n_slabs : int
        Into how many slabs the labelled extent is cut.
    folder : Path
        Receives both parts; files of the same names are replaced.

    Raises
    ------
    ValueError
        If the labels leave no room for a gap along any axis, or no slab leaves two classes on both sides.
    """
    survey = survey_all(labels, label_set.unlabelled, executor)
    hull = bounding_region(survey)
    split = split_into_slabs(np.array([hull.start, np.array(hull.stop) - 1]), n_slabs, gap)
    along = _count_along(labels, label_set, survey, split.axis, executor)
    slab = _choose_slab(along, split)
    first, behind = int(split.edges[slab]), int(split.edges[slab + 1])
    test = [_cut(labels.shape, split.axis, first, behind)]
    train = [
        _cut(labels.shape, split.axis, 0, first - split.gap),
        _cut(labels.shape, split.axis, behind + split.gap, labels.shape[split.axis]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        name: _write_part(labels, label_set, survey, regions, folder, name, voxel_size_nm)
        for name, regions in (("train", train), ("held_out", test))
    }
    n_test, n_train = along[:, first:behind].sum(), along[:, _training_part(split, slab)].sum()
    note = (
        f"held out {n_test:,} labelled voxels between {first} and {behind} along {'zyx'[split.axis]}, left out "
        f"{split.gap} voxels on each side of them, {n_train:,} labelled voxels to train on"
    )
    region = bounding_region(survey_within(labels, label_set.unlabelled, test[0], executor))
    return HeldOut(paths["train"], paths["held_out"], region, note)


@dataclass(frozen=True)
class _CountAlong:
    """Labelled voxels by class and by position along one axis of the whole volume."""

    label_set: LabelSet
    axis: int
    length: int

    def __call__(self, block: Block, labels: np.ndarray) -> np.ndarray:
        planes = np.moveaxis(self.label_set.remap_to_indices(labels[0]), self.axis, 0)
        counts = np.zeros((self.label_set.n_classes, self.length), np.int64)
        for position, plane in enumerate(planes, block.core.start[self.axis]):
            counts[:, position] = np.bincount(plane[plane >= 0], minlength=self.label_set.n_classes)
        return counts


def _count_along(labels: Volume, label_set: LabelSet, survey: LabelSurvey, axis: int, executor: Executor) -> np.ndarray:
    blocks = [make_block(i, box.region) for i, box in enumerate(survey.boxes)]
    return last(fold_blocks(_CountAlong(label_set, axis, labels.shape[axis]), [labels], blocks, executor)).total


def _training_part(split: SlabSplit, slab: int) -> np.ndarray:
    """Positions along the axis that may train when a slab is held out."""
    positions = np.zeros((int(split.edges[-1]), 3), np.int64)
    positions[:, split.axis] = np.arange(len(positions))
    return np.flatnonzero(split.may_train(positions, slab))


def _choose_slab(along: np.ndarray, split: SlabSplit) -> int:
    """Number of the slab to hold out, from counts by class and position, (K, length)."""

    def worth(slab: int) -> tuple[int, int]:
        test = along[:, split.edges[slab] : split.edges[slab + 1]].sum(axis=1)
        train = along[:, _training_part(split, slab)].sum(axis=1)
        return int(((test > 0) & (train > 0)).sum()), int(train.sum())

    best = max(range(split.n_folds), key=worth)
    if worth(best)[0] < 2:
        raise ValueError(
            f"labels cannot be split: whichever of {split.n_folds} slabs along {'zyx'[split.axis]} is held out, fewer "
            f"than two classes are left on both sides of a gap of {split.gap} voxels; give labels of another place "
            "with --validation, or use more --slabs or smaller --sigmas"
        )
    return best


def _cut(shape: Zyx, axis: int, start: int, stop: int) -> Region:
    """The part of a volume between two positions along an axis."""
    lower, upper = list(ORIGIN), list(shape)
    lower[axis], upper[axis] = max(start, 0), max(min(stop, shape[axis]), 0)
    return Region((lower[0], lower[1], lower[2]), (upper[0], upper[1], upper[2]))


def _write_part(
    labels: Volume,
    label_set: LabelSet,
    survey: LabelSurvey,
    regions: Sequence[Region],
    folder: Path,
    name: str,
    voxel_size_nm: VoxelSize,
) -> str:
    if labels.labelled_boxes is not None:
        return _write_listing(labels, label_set, regions, folder, name)
    return _write_volume(labels, label_set, survey, regions, folder / f"{name}.zarr", voxel_size_nm)


def _write_listing(labels: Volume, label_set: LabelSet, regions: Sequence[Region], folder: Path, name: str) -> str:
    """Slices stay slices: a listing of their parts, so that the empty rest of a huge volume is never visited."""
    entries = []
    boxes = [box.intersect(region) for box in labels.labelled_boxes or () for region in regions]
    for number, box in enumerate(box for box in boxes if box.n_voxels):
        axis = int(np.argmin(box.shape))
        file = f"{name}_{number}.tif"
        pages = np.moveaxis(labels.read(box.start, box.stop)[0], axis, 0)
        tifffile.imwrite(folder / file, pages, compression="zlib", photometric="minisblack")
        entries.append({"file": file, "plane": _PLANES[axis], "origin": list(box.start)})
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps({"slice": entries, "classes": label_set.to_dict()["classes"]}), encoding="utf-8")
    return str(path)


def _write_volume(
    labels: Volume,
    label_set: LabelSet,
    survey: LabelSurvey,
    regions: Sequence[Region],
    path: Path,
    voxel_size_nm: VoxelSize,
) -> str:
    size = labels.voxel_size_nm if labels.has_voxel_size else voxel_size_nm
    written = create_volume(
        path, labels.shape, 1, labels.dtype, size, kind="labels", attributes=label_set.to_dict(), overwrite=True
    )
    z, y, x = (min(c, n) for c, n in zip(DEFAULT_CHUNK, labels.shape, strict=True))
    grid = split_into_blocks(labels.shape, (z, y, x))
    # A new volume is 0 throughout; only where 0 is a class must the unlabelled rest be written as well.
    blocks = select_blocks(grid, [box.region for box in survey.boxes]) if label_set.unlabelled == 0 else grid
    for block in blocks:
        part = np.full((1, *block.core.shape), label_set.unlabelled, labels.dtype)
        for region in regions:
            common = block.core.intersect(region)
            if common.n_voxels:
                inside = tuple(
                    slice(a - s, b - s) for a, b, s in zip(common.start, common.stop, block.core.start, strict=True)
                )
                part[:, *inside] = labels.read(common.start, common.stop)
        written.write(block.core.start, part)
    return str(path)
