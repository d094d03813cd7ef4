"""``voxclf explore``: look before training. What is labelled, what grey values tell, whether the volume is sound.

    open → choose boxes → count grey values → texture → slices
         → survey labels → profiles → grey values per class → learning curve (optional)

All of it is sums over blocks, so it takes the memory of a few blocks. Volumes above a budget of voxels are read in
boxes spread over them, and the result says so; labels are always read completely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.config import ExploreConfig, FitOptions
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.run import fold_blocks
from voxclf.explore.intensities import GreyScale, IntensityReport, describe_intensities
from voxclf.explore.learning_curve import LearningCurve, measure_learning_curve
from voxclf.explore.texture import (
    SliceFold,
    SliceOrder,
    Texture,
    TextureFold,
    cut_columns,
    describe_slices,
    describe_texture,
)
from voxclf.fit import resolve_label_set
from voxclf.geometry import Block, VoxelSize, Zyx, make_block, split_into_blocks
from voxclf.labelled_slices import LabelProfiles, profile_labels
from voxclf.labels import LabelSet
from voxclf.models.registry import TREE_MODELS
from voxclf.progress import Progress, last, silent
from voxclf.sampling import survey_labels
from voxclf.volume import Volume, open_labels, open_volume

CORE: Zyx = (64, 256, 256)
"""Boxes that are read, voxels: large enough to hold the structures whose correlation is measured."""
MOST_TEXTURE_BOXES = 12
MOST_SLICE_VOXELS = 64_000_000
"""Voxels of the columns that run through all slices: 6,400 of each slice of a stack of 10,000."""


@dataclass(frozen=True)
class ValueRange:
    """Lowest and highest grey value; those of several blocks add up."""

    low: float
    high: float

    def __add__(self, other: ValueRange) -> ValueRange:
        return ValueRange(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class RangeFold:
    """Finds the grey values' range in one block."""

    def __call__(self, block: Block, image: NDArray[Any]) -> ValueRange:
        """Look at ``image`` (C, Z, Y, X), first channel."""
        return ValueRange(float(image[0].min()), float(image[0].max()))


@dataclass(frozen=True)
class CountFold:
    """Counts the grey values of one block."""

    scale: GreyScale

    def __call__(self, block: Block, image: NDArray[Any]) -> NDArray[np.int64]:
        """Count ``image`` (C, Z, Y, X), first channel; returns shape (B,)."""
        return self.scale.count(image[0])


@dataclass(frozen=True)
class CountClassesFold:
    """Counts the grey values of each class in one block."""

    scale: GreyScale
    label_set: LabelSet

    def __call__(self, block: Block, labels: NDArray[np.integer], image: NDArray[Any]) -> NDArray[np.int64]:
        """Count voxels of ``image`` by class of ``labels``, both (1, Z, Y, X); returns shape (K, B)."""
        classes = self.label_set.remap_to_indices(labels[0])
        labelled = classes >= 0
        flat = classes[labelled].astype(np.int64) * self.scale.n_bins + self.scale.bin_of(image[0][labelled])
        n_cells = self.label_set.n_classes * self.scale.n_bins
        return np.bincount(flat, minlength=n_cells).reshape(-1, self.scale.n_bins)


@dataclass(frozen=True)
class Sampled:
    """How much of the volume was read for a result."""

    n_voxels: int
    n_total: int
    n_boxes: int

    @property
    def is_whole(self) -> bool:
        """Whether every voxel was read."""
        return self.n_voxels == self.n_total

    def describe(self, unit: str = "voxels") -> str:
        """In words: all, or how many."""
        if self.is_whole:
            return f"all {self.n_total:,} {unit}"
        share = self.n_voxels / self.n_total
        return f"{self.n_voxels:,} of {self.n_total:,} {unit} ({share:.2g} of them) in {self.n_boxes:,} boxes"


@dataclass(frozen=True)
class LabelSummary:
    """The labels: classes, where they are, and from how many of them grey values were counted."""

    label_set: LabelSet
    profiles: LabelProfiles
    sampled: Sampled
    path: str


@dataclass(frozen=True)
class Exploration:
    """All that ``explore`` found.

    Parameters
    ----------
    path, shape, dtype, voxel_size_nm
        The volume.
    intensities : IntensityReport
        Grey values, overall and per class.
    texture : Texture
        Correlation lengths, noise, implied voxel size.
    slices : SliceOrder
        How slices follow each other along z.
    labels : LabelSummary, optional
        None if none were given.
    curve : LearningCurve, optional
        None unless asked for.
    sampled : mapping of str to Sampled
        What was read for "intensities", "texture" and "slices".
    """

    path: str
    shape: Zyx
    dtype: str
    voxel_size_nm: VoxelSize
    intensities: IntensityReport
    texture: Texture
    slices: SliceOrder
    labels: LabelSummary | None = None
    curve: LearningCurve | None = None
    sampled: dict[str, Sampled] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; empty without labels."""
        return self.labels.label_set.names if self.labels else ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as values for JSON."""
        values: dict[str, Any] = {
            "volume": {
                "path": self.path,
                "shape": self.shape,
                "dtype": self.dtype,
                "voxel_size_nm": self.voxel_size_nm,
            },
            "sampled": {name: vars(part) for name, part in self.sampled.items()},
            "intensities": self.intensities.to_dict(self.names),
            "texture": self.texture.to_dict(),
            "slices": self.slices.to_dict(),
            "labels": None,
            "learning_curve": None if self.curve is None else self.curve.to_dict(),
        }
        if self.labels:
            values["labels"] = _label_values(self.labels, math.prod(self.shape))
        return values


def _label_values(labels: LabelSummary, n_total: int) -> dict[str, Any]:
    profiles = labels.profiles
    return {
        "path": labels.path,
        **labels.label_set.to_dict(),
        "counts": dict(zip(labels.label_set.names, profiles.counts, strict=True)),
        "n_labelled": profiles.n_labelled,
        "unlabelled_share": 1 - profiles.n_labelled / n_total,
        "slices": {
            axis: {
                "with_labels": profiles.slices_with_labels(a),
                "labelled": profiles.labelled_slices(a),
                "voxels": profiles.along[a].sum(axis=0)[profiles.slices_with_labels(a)],
            }
            for a, axis in enumerate("zyx")
        },
        "sampled": vars(labels.sampled),
    }


def explore(config: ExploreConfig, progress: Progress = silent) -> Exploration:
    """Look at a volume and its labels.

    Raises
    ------
    ValueError
        If a learning curve is asked for without labels or with a model that is no tree model, or labels and volume do
        not fit.
    """
    if config.learning_curve and not config.labels:
        raise ValueError("--learning-curve was given without LABELS; give labels to learn from, or leave it out")
    if config.model not in TREE_MODELS:
        raise ValueError(
            f"--model was {config.model!r}, but a learning curve fits tree models: {', '.join(TREE_MODELS)}; choose one"
        )
    volume = open_volume(config.volume, config.voxel_size)
    labels = open_labels(config.labels, volume.shape) if config.labels else None
    executor = make_executor(config.executor, config.workers)
    return explore_volume(volume, labels, config, executor, progress)


def explore_volume(
    volume: Volume, labels: Volume | None, config: ExploreConfig, executor: Executor, progress: Progress = silent
) -> Exploration:
    """As :func:`explore`, with the volumes already open."""
    blocks = choose_blocks(volume.shape, config.voxels, config.seed)
    scale = _choose_scale(volume, blocks, executor, progress)
    overall = _sum_blocks("grey values", CountFold(scale), [volume], blocks, executor, progress)
    few = choose_blocks(volume.shape, MOST_TEXTURE_BOXES * math.prod(CORE), config.seed)
    texture = _sum_blocks("texture", TextureFold(), [volume], few, executor, progress)
    columns = cut_columns(volume.shape, MOST_SLICE_VOXELS)
    slices = _sum_blocks("slices", SliceFold(volume.shape[0]), [volume], columns, executor, progress)
    n_total = math.prod(volume.shape)
    sampled = {
        "intensities": _describe_sample(blocks, n_total),
        "texture": _describe_sample(few, n_total),
        "slices": _describe_sample(columns, n_total),
    }
    counts = np.zeros((0, scale.n_bins), np.int64)
    summary, curve = None, None
    if labels is not None:
        summary, counts, curve = _look_at_labels(volume, labels, scale, config, executor, progress)
    return Exploration(
        path=volume.path,
        shape=volume.shape,
        dtype=str(volume.dtype),
        voxel_size_nm=volume.voxel_size_nm,
        intensities=describe_intensities(scale, counts, overall),
        texture=describe_texture(texture, volume.voxel_size_nm),
        slices=describe_slices(slices),
        labels=summary,
        curve=curve,
        sampled=sampled,
    )


def _look_at_labels(
    volume: Volume,
    labels: Volume,
    scale: GreyScale,
    config: ExploreConfig,
    executor: Executor,
    progress: Progress,
) -> tuple[LabelSummary, NDArray[np.int64], LearningCurve | None]:
    options = _fit_options(config)
    surveyed = survey_labels(labels, options.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, math.prod(labels.shape), "voxel")).total
    label_set = resolve_label_set(labels, survey, options)
    profiles = profile_labels(labels, survey, label_set, executor, progress)
    boxes = [make_block(i, box.region) for i, box in enumerate(survey.boxes)]
    chosen = _thin_out(boxes, config.voxels, config.seed)
    counts = _sum_blocks("classes", CountClassesFold(scale, label_set), [labels, volume], chosen, executor, progress)
    curve = None
    if config.learning_curve:
        label_set.check_counts(profiles.counts)
        curve = measure_learning_curve(volume, labels, survey, profiles, label_set, options, executor, progress)
    sampled = Sampled(int(counts.sum()), profiles.n_labelled, len(chosen))
    return LabelSummary(label_set, profiles, sampled, labels.path), counts, curve


def _fit_options(config: ExploreConfig) -> FitOptions:
    """What a fit would be asked for, as far as ``explore`` asks for it."""
    shared = set(FitOptions.model_fields) & set(ExploreConfig.model_fields)
    return FitOptions(**{name: getattr(config, name) for name in shared})


def choose_blocks(shape: Zyx, most_voxels: int, seed: int) -> list[Block] | Sequence[Block]:
    """All blocks of a volume or, above a budget of voxels, one drawn from each of equally many stretches of them."""
    grid = split_into_blocks(shape, tuple(min(c, n) for c, n in zip(CORE, shape, strict=True)))  # type: ignore[arg-type]
    return grid if math.prod(shape) <= most_voxels else _thin_out(grid, most_voxels, seed)


def _thin_out(blocks: Sequence[Block], most_voxels: int, seed: int) -> Sequence[Block]:
    largest = max(block.core.n_voxels for block in (blocks[:1] if len(blocks) > 10_000 else blocks))
    n_kept = max(1, most_voxels // largest)
    if n_kept >= len(blocks):
        return blocks
    # Blocks are numbered x fastest: a random place in each stretch spreads them evenly along z and at random in plane.
    edges = np.linspace(0, len(blocks), n_kept + 1)
    places = edges[:-1] + np.random.default_rng([seed, 3]).random(n_kept) * np.diff(edges)
    return [blocks[int(place)] for place in places]


def _choose_scale(volume: Volume, blocks: Sequence[Block], executor: Executor, progress: Progress) -> GreyScale:
    if volume.dtype.kind in "iu":
        return GreyScale.of_integers(volume.dtype)
    found = _sum_blocks("range", RangeFold(), [volume], blocks, executor, progress)
    return GreyScale.of_floats(found.low, found.high)


def _sum_blocks(
    stage: str,
    fold: Callable[..., Any],
    inputs: Sequence[Volume],
    blocks: Sequence[Block],
    executor: Executor,
    progress: Progress,
) -> Any:
    n_voxels = sum(block.core.n_voxels for block in blocks)
    return last(progress(stage, fold_blocks(fold, inputs, blocks, executor), n_voxels, "voxel")).total


def _describe_sample(blocks: Sequence[Block], n_total: int) -> Sampled:
    return Sampled(min(sum(block.core.n_voxels for block in blocks), n_total), n_total, len(blocks))
