"""From a few labels to training rows: which voxels are labelled, which of them are drawn, how they are split.

Two passes with ``reduce_blocks``: :func:`survey_labels` counts classes and finds the boxes that hold labels;
:func:`draw_rows` visits just those boxes, once, and takes the features of the voxels drawn. Splits are made in
space: neighbouring voxels look alike, so a random split would test a model on what it has all but seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from voxclf.config import Balance
from voxclf.engine.executors import Executor
from voxclf.engine.run import Partial, fold_blocks
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import Block, Region, Zyx, add, make_block, select_blocks, split_into_blocks
from voxclf.labels import LabelSet
from voxclf.volume import Volume

SURVEY_CORE: Zyx = (32, 128, 128)
"""Blocks of the survey, voxels: flat enough for anisotropic stacks, small enough that a box around crossing
slices stays cheap to filter."""

HASH_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
"""Large odd numbers that scatter the bits of a position (as in splitmix64 and xxHash)."""


@dataclass(frozen=True)
class LabelledBox:
    """A box with labelled voxels in it, as tight as its block allows."""

    region: Region
    counts: Mapping[int, int]

    @property
    def n_labelled(self) -> int:
        """Labelled voxels of all classes."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class LabelSurvey:
    """Where the labels are and how many voxels each class has; surveys of blocks add up."""

    boxes: tuple[LabelledBox, ...] = ()

    def __add__(self, other: LabelSurvey) -> LabelSurvey:
        return LabelSurvey(self.boxes + other.boxes)

    @property
    def counts(self) -> dict[int, int]:
        """Labelled voxels per label id, ids ascending."""
        total: dict[int, int] = {}
        for box in self.boxes:
            for label, count in box.counts.items():
                total[label] = total.get(label, 0) + count
        return dict(sorted(total.items()))


@dataclass(frozen=True)
class SurveyFold:
    """Counts one block of a label volume."""

    unlabelled: int

    def __call__(self, block: Block, labels: np.ndarray) -> LabelSurvey:
        """Count classes in ``labels`` (1, Z, Y, X) and find the box around them."""
        labelled = labels[0] != self.unlabelled
        if not labelled.any():
            return LabelSurvey()
        start, stop = [], []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            hits = np.flatnonzero(labelled.any(axis=others))
            start.append(int(hits[0]))
            stop.append(int(hits[-1]) + 1)
        ids, counts = np.unique(labels[0][labelled], return_counts=True)
        region = Region(
            add(block.core.start, (start[0], start[1], start[2])),
            add(block.core.start, (stop[0], stop[1], stop[2])),
        )
        return LabelSurvey((LabelledBox(region, dict(zip(ids.tolist(), counts.tolist(), strict=True))),))


def survey_labels(labels: Volume, unlabelled: int, executor: Executor | None = None) -> Iterator[Partial[LabelSurvey]]:
    """Read a label volume once and say where its labels are; yields the survey as it grows."""
    grid = split_into_blocks(labels.shape, SURVEY_CORE)
    blocks: Sequence[Block] = grid
    if labels.labelled_boxes is not None:
        # A slice listing knows its slices, so the empty rest of a 10^12-voxel volume is not visited.
        blocks = select_blocks(grid, labels.labelled_boxes)
    return fold_blocks(SurveyFold(unlabelled), [labels], blocks, executor)


@dataclass(frozen=True)
class Rows:
    """Labelled voxels as rows of a table: features, class index and position.

    Parameters
    ----------
    features : ndarray of float32, shape (F, N)
        Feature-major, as the filter bank and the packed forest have them.
    classes : ndarray of int16, shape (N,)
        Class index 0 .. K-1.
    positions : ndarray of int64, shape (N, 3)
        Voxel (z, y, x) of each row.
    """

    features: np.ndarray
    classes: np.ndarray
    positions: np.ndarray

    @property
    def n_rows(self) -> int:
        """Number of voxels N."""
        return len(self.classes)

    def take(self, chosen: np.ndarray) -> Rows:
        """Keep the rows that an index or boolean array chooses."""
        return Rows(np.ascontiguousarray(self.features[:, chosen]), self.classes[chosen], self.positions[chosen])

    def class_counts(self, n_classes: int) -> np.ndarray:
        """Rows per class, shape (K,)."""
        return np.bincount(self.classes, minlength=n_classes)


@dataclass(frozen=True)
class _DrawnBlocks:
    """Rows of some blocks, to be joined once at the end: concatenating at every sum would copy them all."""

    training: tuple[Rows, ...]
    evaluation: tuple[Rows, ...]

    def __add__(self, other: _DrawnBlocks) -> _DrawnBlocks:
        return _DrawnBlocks(self.training + other.training, self.evaluation + other.evaluation)


@dataclass(frozen=True)
class DrawnRows:
    """What training and scoring need: rows drawn per class, and rows drawn evenly.

    ``training`` is drawn in the shares asked for. ``evaluation`` keeps the labels' own class frequencies, so
    scores computed on it estimate those over all labelled voxels.
    """

    training: Rows
    evaluation: Rows


@dataclass(frozen=True)
class DrawFold:
    """Takes the planned number of voxels of each class from one box and computes their features."""

    stack: FeatureStack
    label_set: LabelSet
    quotas: Mapping[int, tuple[np.ndarray, int]]
    seed: int

    def __call__(
        self, block: Block, labels: np.ndarray, image: np.ndarray, probabilities: np.ndarray | None = None
    ) -> _DrawnBlocks:
        """Draw from one box; the arrays are (C, Z + 2h, Y + 2h, X + 2h)."""
        per_class, n_evaluation = self.quotas[block.index]
        z, y, x = (slice(h, n - h) for h, n in zip(block.halo, labels.shape[1:], strict=True))
        classes = self.label_set.remap_to_indices(labels[0, z, y, x])
        rng = np.random.default_rng([self.seed, block.index])
        flat = classes.ravel()
        training = np.concatenate([_choose(np.flatnonzero(flat == k), int(n), rng) for k, n in enumerate(per_class)])
        evaluation = _choose(np.flatnonzero(flat >= 0), n_evaluation, rng)
        if not len(training) and not len(evaluation):
            return _DrawnBlocks((), ())
        table = self.stack.compute(image[0], probabilities).reshape(self.stack.n_features, -1)
        return _DrawnBlocks(
            (self._rows(table, flat, training, classes.shape, block),),
            (self._rows(table, flat, evaluation, classes.shape, block),),
        )

    def _rows(
        self, table: np.ndarray, flat: np.ndarray, chosen: np.ndarray, shape: tuple[int, ...], block: Block
    ) -> Rows:
        positions = np.stack(np.unravel_index(chosen, shape), axis=1) + np.array(block.core.start)
        return Rows(table[:, chosen], flat[chosen], positions)


def _choose(candidates: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    if n >= len(candidates):
        return candidates
    return np.sort(rng.choice(candidates, n, replace=False))


def draw_rows(
    inputs: Sequence[Volume],
    labels: Volume,
    survey: LabelSurvey,
    stack: FeatureStack,
    label_set: LabelSet,
    *,
    n_training: int,
    n_evaluation: int,
    balance: Balance,
    seed: int,
    executor: Executor | None = None,
) -> Iterator[Partial[_DrawnBlocks]]:
    """Compute the features of labelled voxels drawn from every box of the survey, in one pass.

    The number of voxels per class and box is drawn first, from the survey's counts, so the result depends on
    the seed but not on the executor or the order of blocks. Join the last partial with :func:`join_rows`.

    Parameters
    ----------
    inputs : sequence of Volume
        What the stack reads: the image and, with a context, probabilities.
    n_training : int
        Budget of rows to train on, divided among the classes as ``balance`` says, as far as a class has voxels.
    n_evaluation : int
        Rows drawn evenly from all labelled voxels, to score on.
    """
    rng = np.random.default_rng(seed)
    counts = np.array([[box.counts.get(i, 0) for i in label_set.ids] for box in survey.boxes], dtype=np.int64)
    totals = counts.sum(axis=0)
    wanted = share_budget(totals, n_training, target_shares(totals, balance))
    training = np.stack([_spread(counts[:, k], int(n), rng) for k, n in enumerate(wanted)], axis=1)
    evaluation = _spread(counts.sum(axis=1), n_evaluation, rng)
    fold = DrawFold(
        stack,
        label_set,
        {i: (training[i], int(evaluation[i])) for i in range(len(survey.boxes))},
        seed,
    )
    drawn_from = np.flatnonzero(training.any(axis=1) | (evaluation > 0)).tolist()
    blocks = [make_block(i, survey.boxes[i].region, stack.halo) for i in drawn_from]
    return fold_blocks(fold, [labels, *inputs], blocks, executor)


def join_rows(drawn: _DrawnBlocks) -> DrawnRows:
    """Join the rows of all blocks."""
    return DrawnRows(_concatenate(drawn.training), _concatenate(drawn.evaluation))


def _concatenate(parts: tuple[Rows, ...]) -> Rows:
    return Rows(
        np.ascontiguousarray(np.concatenate([part.features for part in parts], axis=1)),
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.positions for part in parts]),
    )


def target_shares(totals: np.ndarray, balance: Balance) -> np.ndarray:
    """Share of each class in training, summing to 1.

    "sqrt" goes halfway from the frequencies in the labels to equal shares. On both real volumes we tuned on, it gave
    the best macro F1: equal shares overrate rare classes (precision falls), frequencies as labelled underrate them.
    """
    weights = {"labelled": totals, "sqrt": np.sqrt(totals), "equal": totals > 0}[balance].astype(np.float64)
    return weights / weights.sum()


def share_budget(totals: np.ndarray, budget: int, shares: np.ndarray) -> np.ndarray:
    """Divide a budget of rows among classes in given shares; what a class cannot use goes to the others."""
    counts = np.zeros_like(totals)
    for _ in range(len(totals)):  # each round fills a class or uses up the budget
        weights = np.where(counts < totals, shares, 0.0)
        left = budget - int(counts.sum())
        if left <= 0 or not weights.any():
            break
        counts = np.minimum(totals, counts + np.floor(left * weights / weights.sum()).astype(np.int64))
    # Rounding down leaves a few rows over, and a class that occurs must not be left out.
    order = np.argsort(counts - shares * budget, kind="stable")
    for k in order[: max(0, budget - int(counts.sum()))]:
        counts[k] += counts[k] < totals[k]
    return np.maximum(counts, np.minimum(totals, 1))


def row_weights(classes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weight of each row, mean 1, so that the classes together weigh as their shares say, however many were drawn."""
    drawn = np.bincount(classes, minlength=len(shares))
    per_class = np.divide(shares, drawn, out=np.zeros(len(shares)), where=drawn > 0)
    weights = per_class[classes]
    return weights / weights.mean()


def _spread(counts: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw how many of ``n`` voxels fall into each box when all voxels are equally likely."""
    total = int(counts.sum())
    if n >= total:
        return counts.copy()
    if total < 10**9:  # NumPy's limit for the exact draw without replacement
        return rng.multivariate_hypergeometric(counts, n, method="marginals")
    return np.minimum(rng.multinomial(n, counts / total), counts)


@dataclass(frozen=True)
class SlabSplit:
    """Folds for cross-validation: slabs across one axis, with a gap that no training voxel may lie in.

    ``fold`` numbers the slab of each position. A row may train for fold ``i`` if it lies outside slab ``i`` and
    at least ``gap`` voxels from it.
    """

    axis: int
    edges: np.ndarray
    gap: int

    @property
    def n_folds(self) -> int:
        """Number of slabs."""
        return len(self.edges) - 1

    def fold_of(self, positions: np.ndarray) -> np.ndarray:
        """Slab of each position (N, 3)."""
        along = positions[:, self.axis]
        return np.clip(np.searchsorted(self.edges, along, side="right") - 1, 0, self.n_folds - 1)

    def may_train(self, positions: np.ndarray, fold: int) -> np.ndarray:
        """Whether each position may be trained on when slab ``fold`` is held out."""
        along = positions[:, self.axis]
        below = along < self.edges[fold] - self.gap
        above = along >= self.edges[fold + 1] + self.gap
        return below | above


def split_into_slabs(positions: np.ndarray, n_folds: int, halo: Zyx) -> SlabSplit:
    """Cut labelled positions into slabs along the axis with most room for gaps of one halo.

    Parameters
    ----------
    positions : ndarray of int, shape (N, 3)
        Labelled voxels (z, y, x).
    halo : (z, y, x)
        How far a feature sees; test and training voxels are kept at least this far apart.

    Raises
    ------
    ValueError
        If the labels are so close together along every axis that no training voxel would be left.
    """
    lowest, highest = positions.min(axis=0), positions.max(axis=0) + 1
    extent = highest - lowest
    gap = np.array(halo)
    room = extent / (gap + 1)
    room[extent < n_folds] = 0
    axis = int(np.argmax(room))
    if room[axis] < 2:
        raise ValueError(
            f"labels span only {tuple(extent.tolist())} voxels (z, y, x), too little to hold out slabs "
            f"{tuple(gap.tolist())} voxels away from the rest; label a second place, or use smaller --sigmas"
        )
    edges = np.linspace(lowest[axis], highest[axis], n_folds + 1)
    return SlabSplit(axis, np.round(edges).astype(np.int64), int(gap[axis]))


def random_folds(positions: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Fold of each voxel for the naive split, the same for a voxel however often it was drawn.

    It ignores that neighbours look alike and scores too well; it stands in reports only beside the honest one.
    """
    mixed = (positions.astype(np.uint64) * HASH_FACTORS).sum(axis=1, dtype=np.uint64)
    mixed = (mixed ^ np.uint64(seed)) * np.uint64(0xFF51AFD7ED558CCD)
    return ((mixed ^ (mixed >> np.uint64(33))) % np.uint64(n_folds)).astype(np.int64)
