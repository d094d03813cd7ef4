"""Where to label next: small boxes ranked by what a model would learn from them. ``voxclf suggest``.

Two passes over a prediction and one choice:

1. count how often each class occurs, among the labels if they are given, else among the predicted voxels;
2. cut the volume into boxes, give each an uncertainty and a rarity, keep the best few hundred;
3. choose among those one by one, each time the box with the largest uncertainty x rarity x diversity.

The factors are defined in `box_scores.py`, the files written in `files.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.config import SuggestConfig
from voxclf.engine.executors import Executor, available_cores, make_executor
from voxclf.engine.run import fold_blocks
from voxclf.errors import FormatError, OutputExistsError
from voxclf.geometry import Block, Region, VoxelSize, Zyx, parse_region, round_up, split_into_blocks
from voxclf.jobs import SCAN_CORE, choose_region
from voxclf.labels import LabelSet
from voxclf.predict import LABELS, PROBABILITIES, check_one_channel
from voxclf.progress import Progress, last, silent
from voxclf.provenance import IntensityStatistics
from voxclf.sampling import survey_labels
from voxclf.suggest.box_scores import (
    CANDIDATES_PER_BOX,
    LEAST_CANDIDATES,
    SPACE_REACH,
    BoxTable,
    ScoreFold,
    choose_box_shape,
    choose_boxes,
    rarity_weights,
)
from voxclf.volume import Volume, open_labels, open_volume

TABLE = "suggestions.csv"


@dataclass(frozen=True)
class Suggestion:
    """A box to label, why, and where to find it.

    ``score`` is uncertainty x rarity x diversity. ``classes`` are the three most probable ones with their share of
    the box. ``centre_nm`` is (z, y, x) from the volume's corner.
    """

    rank: int
    region: Region
    centre_nm: VoxelSize
    score: float
    uncertainty: float
    rarity: float
    diversity: float
    classes: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Suggestions:
    """What ``suggest`` found: boxes from the best down, and how many there were to choose from."""

    boxes: tuple[Suggestion, ...]
    box_shape: Zyx
    n_open: int
    n_labelled: int
    label_set: LabelSet
    voxel_size_nm: VoxelSize


@dataclass(frozen=True)
class _CountFold:
    """Counts predicted voxels per class; the last entry counts those without a prediction."""

    label_set: LabelSet

    def __call__(self, block: Block, predicted: np.ndarray) -> np.ndarray:
        n_classes = self.label_set.n_classes
        # -1, which stands for no class, becomes the last entry.
        indices = self.label_set.remap_to_indices(predicted[0]) % (n_classes + 1)
        return np.bincount(indices.ravel(), minlength=n_classes + 1)


@dataclass(frozen=True)
class _Inputs:
    """What is read: the prediction, and labels and image where they were given."""

    labels: Volume
    probabilities: Volume
    label_set: LabelSet
    region: Region
    drawn: Volume | None
    image: Volume | None


def suggest_boxes(config: SuggestConfig, progress: Progress = silent) -> Suggestions:
    """Rank small boxes of a predicted volume by what labelling them would teach the model.

    Raises
    ------
    FileNotFoundError
        If the prediction does not exist, or was made without probabilities.
    OutputExistsError
        If the output folder holds suggestions already and ``overwrite`` is not set.
    ValueError
        If it has one class only or is not finished, if a shape differs, or if more boxes are asked for than exist.

    Notes
    -----
    Reads labels twice and everything else once. Memory is that of the blocks in work and of some hundred
    candidates, whatever the size of the volume.
    """
    table_path = Path(config.output) / TABLE
    if table_path.exists() and not config.overwrite:
        raise OutputExistsError(f"{table_path} exists; use --overwrite to replace it, or give another output folder")
    inputs = _open_inputs(config)
    voxel_size = inputs.labels.voxel_size_nm
    box = choose_box_shape(inputs.region.shape, voxel_size, config.box_size, config.box_size_nm)
    reach_nm = SPACE_REACH * max(n * size for n, size in zip(box, voxel_size, strict=True))
    predicted, counts = _count_classes(inputs, config, progress)
    weights = rarity_weights(counts, predicted > 0)
    limit = max(LEAST_CANDIDATES, CANDIDATES_PER_BOX * config.boxes)
    table = _score_boxes(inputs, config, box, reach_nm, weights, limit, progress)
    if table.n_open < config.boxes:
        raise ValueError(
            f"--boxes was {config.boxes}, but region {inputs.region} has only {table.n_open} boxes of {box} voxels to "
            f"label ({table.n_labelled} more hold labels already); ask for fewer, or for smaller ones with --box-size"
        )
    names = inputs.label_set.names
    boxes = tuple(
        _describe(rank, row, diversity, table, names, voxel_size)
        for rank, (row, diversity) in enumerate(choose_boxes(table, config.boxes, voxel_size, reach_nm), start=1)
    )
    return Suggestions(boxes, box, table.n_open, table.n_labelled, inputs.label_set, voxel_size)


def _open_inputs(config: SuggestConfig) -> _Inputs:
    folder = Path(config.prediction)
    if not (folder / LABELS).exists():
        raise FileNotFoundError(f"{folder} holds no {LABELS}; give a folder that `voxclf predict` wrote")
    if not (folder / PROBABILITIES).exists():
        raise FileNotFoundError(
            f"{folder} holds no {PROBABILITIES}, and suggestions need probabilities; predict again with "
            "--probabilities uint8"
        )
    labels, probabilities = open_volume(folder / LABELS, kind="labels"), open_volume(folder / PROBABILITIES)
    label_set = LabelSet.from_metadata(labels.metadata)
    if label_set is None or (label_set.n_classes, labels.shape) != (probabilities.n_channels, probabilities.shape):
        raise FormatError(
            f"{labels.path} and {probabilities.path} do not name the same classes and shape; give a folder as "
            "`voxclf predict` wrote it"
        )
    if label_set.n_classes < 2:
        raise ValueError(
            f"{folder} has one class, {label_set.names[0]}; a model of one class is never uncertain: at least two are "
            "needed, label and fit a second one"
        )
    drawn = open_labels(config.labels, labels.shape) if config.labels else None
    image = _open_image(config.volume, labels) if config.volume else None
    return _Inputs(labels, probabilities, label_set, _choose_region(config, labels), drawn, image)


def _open_image(path: str, labels: Volume) -> Volume:
    image = open_volume(path, labels.voxel_size_nm)
    check_one_channel(image)
    if image.shape != labels.shape:
        raise ValueError(
            f"volume {path} has shape {image.shape}, but the prediction {labels.path} has {labels.shape} (z, y, x); "
            "give the volume that was predicted"
        )
    return image


def _choose_region(config: SuggestConfig, labels: Volume) -> Region:
    """What was predicted, or the part of it that was asked for."""
    provenance: Any = labels.metadata.get("provenance", {})
    predicted = parse_region(provenance["region"], labels.shape) if "region" in provenance else None
    asked = choose_region(config.region, labels)
    region = asked.intersect(predicted) if predicted else asked
    if not region.n_voxels:
        raise ValueError(
            f"--region was {config.region}, but only {predicted} was predicted; choose a region inside that"
        )
    return region


def _count_classes(inputs: _Inputs, config: SuggestConfig, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Predicted voxels per class, and labelled ones where labels are given, else again the predicted ones: (K,)."""
    executor = make_executor(config.executor, config.workers)
    blocks = split_into_blocks(inputs.labels.shape, SCAN_CORE, region=inputs.region)
    counting = fold_blocks(_CountFold(inputs.label_set), [inputs.labels], blocks, executor)
    counts = last(progress("count classes", counting, inputs.region.n_voxels, "voxel")).total
    if counts[-1]:
        raise ValueError(
            f"{counts[-1]:,} voxels of {inputs.labels.path} in {inputs.region} have no class; the prediction was "
            "interrupted: run the same `voxclf predict` again to finish it"
        )
    predicted = counts[:-1]
    if inputs.drawn is None:
        return predicted, predicted
    survey = survey_labels(inputs.drawn, config.unlabelled, executor)
    labelled = last(progress("survey labels", survey, math.prod(inputs.drawn.shape), "voxel")).total.counts
    return predicted, np.array([labelled.get(i, 0) for i in inputs.label_set.ids])


def _score_boxes(
    inputs: _Inputs,
    config: SuggestConfig,
    box: Zyx,
    reach_nm: float,
    weights: np.ndarray,
    limit: int,
    progress: Progress,
) -> BoxTable:
    voxel_size, region = inputs.labels.voxel_size_nm, inputs.region
    z, y, x = (n * max(1, round(reach_nm / (n * size))) for n, size in zip(box, voxel_size, strict=True))
    cell = (z, y, x)
    fold = ScoreFold(
        box,
        cell,
        inputs.label_set,
        tuple(weights.tolist()),
        limit,
        None if inputs.drawn is None else config.unlabelled,
        None if inputs.image is None else IntensityStatistics.measure(inputs.image),
    )
    volumes = [inputs.probabilities, inputs.labels, inputs.drawn, inputs.image]
    chunk = inputs.probabilities.chunk_shape
    core_z, core_y, core_x = (round_up(min(c, n), s) for c, n, s in zip(chunk, region.stop, cell, strict=True))
    core = (core_z, core_y, core_x)
    blocks = split_into_blocks(inputs.labels.shape, core, region=region)
    executor = _executor_within(config, core, inputs.probabilities)
    scoring = fold_blocks(fold, [volume for volume in volumes if volume is not None], blocks, executor)
    return last(progress("score boxes", scoring, region.n_voxels, "voxel")).total


def _executor_within(config: SuggestConfig, core: Zyx, probabilities: Volume) -> Executor:
    """As many workers as asked for, or fewer where their blocks would exceed the memory budget."""
    per_voxel = probabilities.n_channels * (probabilities.dtype.itemsize + 2) + 48
    need = math.prod(core) * per_voxel
    if need > config.memory:
        raise ValueError(
            f"--memory was {config.memory / 1e9:.2f} GB, but one block of {core} voxels needs {need / 1e9:.2f} GB; "
            "raise it or choose a smaller --box-size"
        )
    return make_executor(config.executor, min(config.workers or available_cores(), config.memory // need))


def _describe(
    rank: int, row: int, diversity: float, table: BoxTable, names: tuple[str, ...], voxel_size_nm: VoxelSize
) -> Suggestion:
    start, stop = table.start[:, row].tolist(), table.stop[:, row].tolist()
    uncertainty, score = float(table.uncertainty[row]), float(table.score[row])
    z, y, x = ((a + b) / 2 * size for a, b, size in zip(start, stop, voxel_size_nm, strict=True))
    shares = table.probability[:, row]
    dominant = np.argsort(-shares, kind="stable")[:3]
    return Suggestion(
        rank=rank,
        region=Region(tuple(start), tuple(stop)),
        centre_nm=(z, y, x),
        score=score * diversity,
        uncertainty=uncertainty,
        rarity=score / uncertainty if uncertainty else 0.0,
        diversity=diversity,
        classes=tuple((names[k], float(shares[k])) for k in dominant),
    )
