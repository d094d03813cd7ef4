"""Which slices a person labelled, told from the labels alone: the unit in which labelling is done and paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxclf.engine.executors import Executor
from voxclf.engine.run import Partial, fold_blocks
from voxclf.geometry import Block, Zyx, make_block
from voxclf.labels import LabelSet
from voxclf.progress import Progress, last
from voxclf.sampling import LabelSurvey
from voxclf.volume import Volume

#: A slice counts as labelled if it holds at least this share of what the fullest slice holds. Lines that a crossing
#: slice leaves in all others are far below it.
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class LabelProfiles:
    """Labelled voxels of each class, slice by slice along z, y and x; profiles of blocks add up.

    Parameters
    ----------
    along : three ndarrays of int64, shapes (K, Z), (K, Y), (K, X)
    """

    along: tuple[NDArray[np.int64], ...]

    def __add__(self, other: LabelProfiles) -> LabelProfiles:
        return LabelProfiles(tuple(a + b for a, b in zip(self.along, other.along, strict=True)))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Labelled voxels per class, shape (K,)."""
        return self.along[0].sum(axis=1)

    @property
    def n_labelled(self) -> int:
        """Labelled voxels of all classes."""
        return int(self.along[0].sum())

    def slices_with_labels(self, axis: int) -> NDArray[np.intp]:
        """Positions along an axis of all slices that hold a labelled voxel."""
        return np.flatnonzero(self.along[axis].sum(axis=0))

    def labelled_slices(self, axis: int) -> NDArray[np.intp]:
        """Positions along an axis of the slices that were labelled as such (see :data:`LEAST_SHARE`)."""
        totals = [profile.sum(axis=0) for profile in self.along]
        return np.flatnonzero(totals[axis] >= max(1.0, LEAST_SHARE * max(int(total.max()) for total in totals)))

    def slice_axis(self) -> int:
        """The axis across which slices were labelled: the one with fewest of them, z where all are alike."""
        numbers = [len(self.labelled_slices(axis)) or np.inf for axis in range(3)]
        return int(np.argmin(numbers))

    def assign(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number the labelled slice that each voxel (N, 3) belongs to; -1 where it lies on none.

        Where slices cross, a voxel belongs to the axis with fewer labelled slices, then to the first axis.
        """
        slices = [self.labelled_slices(axis) for axis in range(3)]
        number = np.full(len(positions), -1, np.int64)
        offsets = np.cumsum([0, *(len(s) for s in slices)])
        for axis in sorted((a for a in range(3) if len(slices[a])), key=lambda a: len(slices[a])):
            place = np.searchsorted(slices[axis], positions[:, axis])
            place = np.minimum(place, len(slices[axis]) - 1)
            found = (slices[axis][place] == positions[:, axis]) & (number < 0)
            number[found] = offsets[axis] + place[found]
        return number


@dataclass(frozen=True)
class ProfileFold:
    """Counts one block of a label volume of a given shape."""

    label_set: LabelSet
    shape: Zyx

    def __call__(self, block: Block, labels: NDArray[np.integer]) -> LabelProfiles:
        """Count ``labels`` (1, Z, Y, X) per class and slice."""
        classes = self.label_set.remap_to_indices(labels[0])
        along = []
        for axis, n in enumerate(self.shape):
            profile = np.zeros((self.label_set.n_classes, n), np.int64)
            others = tuple(a for a in range(3) if a != axis)
            part = slice(block.core.start[axis], block.core.stop[axis])
            for k in range(self.label_set.n_classes):
                profile[k, part] = (classes == k).sum(axis=others)
            along.append(profile)
        return LabelProfiles(tuple(along))


def profile_labels(
    labels: Volume, survey: LabelSurvey, label_set: LabelSet, executor: Executor, progress: Progress
) -> LabelProfiles:
    """Read the boxes that hold labels and count them slice by slice."""
    blocks = [make_block(i, box.region) for i, box in enumerate(survey.boxes)]
    counted = fold_blocks(ProfileFold(label_set, labels.shape), [labels], blocks, executor)
    n_voxels = sum(block.core.n_voxels for block in blocks)
    final: Partial[LabelProfiles] = last(progress("label slices", counted, n_voxels, "voxel"))
    return final.total


def spell_runs(numbers: Sequence[int] | NDArray[np.integer], most: int = 8) -> str:
    """Write ascending whole numbers in short: 3, 7-19, 25."""
    values = np.asarray(numbers)
    if not len(values):
        return "none"
    breaks = np.flatnonzero(np.diff(values) > 1)
    firsts, ends = values[np.concatenate([[0], breaks + 1])], values[np.concatenate([breaks, [-1]])]
    runs = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(firsts, ends, strict=True)]
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")
