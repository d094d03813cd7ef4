"""Which labels a network in training is watched on: one slab of the volume, kept apart from those it learns from.

Networks are trained too long for folds, so a single slab is held out. Where it lies is chosen so that the images
seen from both sides do not overlap, as far as the labels have room for that::

      training labels      |   gap   | held out |   gap   |   training labels
    -----------------------|---------|----------|---------|------------------->  axis
                       start - gap  start      stop   stop + gap

At an end of the labels one gap suffices. Three crossing slices have no room across any of them, but along each of
them there is: the end of two slices is held out, the third is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxclf.geometry import Region, Zyx, make_block
from voxclf.labels import LabelSet
from voxclf.sampling import LabelledBox, LabelSurvey, SurveyFold
from voxclf.volume import Volume

HELD_OUT_SHARE = 0.15
"""Labelled voxels held out: enough to tell macro F1 to a few hundredths, and few enough not to be missed."""
LEAST_TRAINING_SHARE = 0.5
"""Training keeps at least this share of the labels; the gap gives way before."""
GAP_LADDER = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the receptive field tried as gap, widest first."""
N_PLACES = 9
"""Places of the slab tried along each axis, both ends among them."""


@dataclass(frozen=True)
class HeldOut:
    """A slab ``start <= position < stop`` across one axis, and the gap on both sides of it.

    Parameters
    ----------
    axis : int
        0, 1, 2 for z, y, x.
    start, stop : int
        The slab, voxels.
    gap : int
        Voxels on either side of it whose labels are not used at all.
    wanted_gap : int
        The receptive field along the axis: from this gap on, nothing is seen from both sides.
    n_training, n_held_out, n_unused : int
        Labelled voxels on the three sides of the split.
    """

    axis: int
    start: int
    stop: int
    gap: int
    wanted_gap: int
    n_training: int
    n_held_out: int
    n_unused: int

    def may_train(self, region: Region) -> np.ndarray:
        """Whether voxels of a box may be trained on; boolean, broadcasts to (z, y, x)."""
        along = self._positions(region)
        return (along < self.start - self.gap) | (along >= self.stop + self.gap)

    def _positions(self, region: Region) -> np.ndarray:
        shape = [1, 1, 1]
        shape[self.axis] = -1
        return np.arange(region.start[self.axis], region.stop[self.axis]).reshape(shape)

    def split(self, survey: LabelSurvey, labels: Volume, unlabelled: int) -> tuple[LabelSurvey, LabelSurvey]:
        """Cut the boxes of a survey at the slab: the boxes to train on, and those held out."""
        lowest, highest = -1, 1 + labels.shape[self.axis]
        training = _cut(survey, labels, unlabelled, self.axis, (lowest, self.start - self.gap))
        training += _cut(survey, labels, unlabelled, self.axis, (self.stop + self.gap, highest))
        return training, _cut(survey, labels, unlabelled, self.axis, (self.start, self.stop))

    @property
    def note(self) -> str:
        """One line for reports."""
        kept = f"{self.gap} voxels away"
        if self.gap < self.wanted_gap:
            kept += f" (the network sees {self.wanted_gap}: the labels leave no room for more)"
        return (
            f"labels at {'zyx'[self.axis]} {self.start}:{self.stop} held out, training labels {kept}; "
            f"{self.n_training:,} labelled voxels to train on, {self.n_held_out:,} held out, {self.n_unused:,} between"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "axis": "zyx"[self.axis],
            "start": self.start,
            "stop": self.stop,
            "gap": self.gap,
            "wanted_gap": self.wanted_gap,
            "is_gap_kept": self.gap >= self.wanted_gap,
            "n_training": self.n_training,
            "n_held_out": self.n_held_out,
            "n_unused": self.n_unused,
            "note": self.note,
        }


def _cut(survey: LabelSurvey, labels: Volume, unlabelled: int, axis: int, interval: tuple[int, int]) -> LabelSurvey:
    """Restrict a survey to ``interval`` along one axis; boxes that stick out are counted again."""
    total = LabelSurvey()
    kept: list[LabelledBox] = []
    for box in survey.boxes:
        low, high = max(box.region.start[axis], interval[0]), min(box.region.stop[axis], interval[1])
        if low >= high:
            continue
        if (low, high) == (box.region.start[axis], box.region.stop[axis]):
            kept.append(box)
            continue
        region = Region(_set(box.region.start, axis, low), _set(box.region.stop, axis, high))
        total += SurveyFold(unlabelled)(make_block(0, region), labels.read(region.start, region.stop))
    return LabelSurvey(tuple(kept)) + total


def _set(position: Zyx, axis: int, value: int) -> Zyx:
    z, y, x = (value if a == axis else p for a, p in enumerate(position))
    return z, y, x


def count_along_axes(labels: Volume, survey: LabelSurvey, label_set: LabelSet) -> Iterator[tuple[np.ndarray, ...]]:
    """Count the labelled voxels of each class in every plane across z, y and x; one read of the labels.

    Yields
    ------
    three ndarrays of int64, shapes (K, Z), (K, Y), (K, X)
        The counts so far, after each box.
    """
    K = label_set.n_classes
    counts = tuple(np.zeros((K, n), np.int64) for n in labels.shape)
    for box in survey.boxes:
        classes = label_set.remap_to_indices(labels.read(box.region.start, box.region.stop)[0])
        for k in range(K):
            found = classes == k
            for axis, table in enumerate(counts):
                others = tuple(a for a in range(3) if a != axis)
                table[k, box.region.start[axis] : box.region.stop[axis]] += found.sum(axis=others)
        yield counts


@dataclass(frozen=True)
class _Place:
    """A slab that could be held out, and how good that would be."""

    slab: HeldOut
    training_share: float
    n_missing: int
    coverage: float

    @property
    def quality(self) -> tuple[float, float]:
        return (-self.n_missing, self.coverage + self.training_share)


def choose_held_out(counts: Sequence[np.ndarray], receptive_field: Zyx, names: Sequence[str]) -> HeldOut:
    """Choose the slab to hold out: the widest gap that leaves training half the labels, with every class on both sides.

    Parameters
    ----------
    counts : three ndarrays of int, shapes (K, Z), (K, Y), (K, X)
        Labelled voxels by class and plane, from :func:`count_along_axes`.
    receptive_field : (z, y, x)
        What the network sees around a voxel, from end to end.
    names : sequence of str, length K
        For the message below.

    Raises
    ------
    ValueError
        If no slab leaves voxels of every class to train on.
    """
    fallback: _Place | None = None
    for share in GAP_LADDER:
        places = [
            place
            for axis in range(3)
            for place in _places(counts[axis], axis, math.ceil(share * receptive_field[axis]), receptive_field[axis])
            if place.training_share >= LEAST_TRAINING_SHARE
        ]
        best = max(places, key=lambda place: place.quality, default=None)
        if best is not None and best.n_missing == 0:
            return best.slab
        if best is not None and (fallback is None or best.quality > fallback.quality):
            fallback = best
    if fallback is None:
        totals = counts[0].sum(axis=1)
        rarest = names[int(np.argmin(np.where(totals > 0, totals, totals.max() + 1)))]
        raise ValueError(
            f"labels cover {int(totals.sum()):,} voxels in one place, the fewest of class {rarest!r}: no part of them "
            "can be held out for validation that leaves every class to train on; label a second place"
        )
    return fallback.slab


def _places(counts: np.ndarray, axis: int, gap: int, wanted_gap: int) -> Iterator[_Place]:
    """Slabs along one axis that hold about the wanted share of the labels and leave every class to train on."""
    below = np.concatenate([np.zeros((len(counts), 1), np.int64), counts.cumsum(axis=1)], axis=1)  # (K, n + 1)
    totals = below[:, -1]
    present = totals > 0
    of_all = below.sum(axis=0)
    n, N = counts.shape[1], int(of_all[-1])
    for quantile in np.linspace(0, 1 - HELD_OUT_SHARE, N_PLACES):
        start = int(np.searchsorted(of_all, quantile * N, side="right")) - 1
        stop = int(np.searchsorted(of_all, min(N, (quantile + HELD_OUT_SHARE) * N), side="left"))
        if stop <= start:
            continue
        held_out = below[:, stop] - below[:, start]
        training = below[:, max(0, start - gap)] + totals - below[:, min(n, stop + gap)]
        if not training[present].all() or not held_out.any():
            continue
        shares = held_out[present] / (HELD_OUT_SHARE * totals[present])
        n_training, n_held_out = int(training.sum()), int(held_out.sum())
        slab = HeldOut(axis, start, stop, gap, wanted_gap, n_training, n_held_out, N - n_training - n_held_out)
        yield _Place(
            slab=slab,
            training_share=n_training / N,
            n_missing=int((held_out[present] == 0).sum()),
            coverage=float(np.minimum(shares, 1).mean()),
        )
