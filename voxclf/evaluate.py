"""A prediction against labels it was not trained on: one walk over the labelled boxes, additive tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxclf.config import EvaluateConfig
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.run import fold_blocks
from voxclf.errors import FormatError
from voxclf.geometry import Block, Region, make_block, subtract
from voxclf.jobs import choose_region
from voxclf.labels import LabelSet, parse_classes
from voxclf.metrics.cells import CellGrid, CellTables
from voxclf.metrics.voxelwise import score_block
from voxclf.progress import Progress, last, silent
from voxclf.sampling import LabelSurvey, survey_labels
from voxclf.volume import Volume, open_labels, open_volume


@dataclass(frozen=True)
class Evaluation:
    """How a prediction agrees with labels, as tables that scores and intervals come from."""

    label_set: LabelSet
    tables: CellTables
    survey: LabelSurvey


@dataclass(frozen=True)
class _ScoreFold:
    label_set: LabelSet
    truth_set: LabelSet
    grid: CellGrid

    def __call__(
        self, block: Block, truth: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray | None = None
    ) -> CellTables:
        true = self.truth_set.remap_to_indices(truth[0])
        found = self.label_set.remap_to_indices(predicted[0])
        tables = {}
        for cell, piece in self.grid.split(block.core):
            box = Region(subtract(piece.start, block.core.start), subtract(piece.stop, block.core.start)).slices
            part = None if probabilities is None else probabilities[:, *box]
            tables[cell] = score_block(true[box], part, found[box], self.label_set.n_classes)
        return CellTables(tables)


def evaluate(config: EvaluateConfig, progress: Progress = silent) -> Evaluation:
    """Score a prediction (a folder from ``predict``, or any label volume) against labels.

    Raises
    ------
    FileNotFoundError
        If the prediction does not exist.
    ValueError
        If the labels have another shape, hold no labelled voxel, or a class the prediction does not know.
    """
    folder = Path(config.prediction)
    probabilities = None
    if (folder / "labels.zarr").exists():
        predicted = open_volume(str(folder / "labels.zarr"))
        if (folder / "probabilities.zarr").exists():
            probabilities = open_volume(str(folder / "probabilities.zarr"))
    else:
        predicted = open_volume(config.prediction, require_voxel_size=False)
    truth = open_labels(config.labels, predicted.shape)
    # What a prediction of a region left out is not wrong, it is not there.
    predicted_region = predicted.metadata.get("provenance", {}).get("region")
    region = choose_region(config.region or predicted_region, truth)
    executor = make_executor(config.executor, config.workers)
    return evaluate_volumes(predicted, probabilities, truth, region, config, executor, progress)


def evaluate_volumes(
    predicted: Volume,
    probabilities: Volume | None,
    truth: Volume,
    region: Region,
    config: EvaluateConfig,
    executor: Executor,
    progress: Progress = silent,
) -> Evaluation:
    """As :func:`evaluate`, with the volumes already open; only ``region`` is scored."""
    surveyed = survey_labels(truth, config.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, float(np.prod(truth.shape)), "voxel")).total
    label_set = _resolve_label_set(predicted, survey, config)
    boxes = [box.region.intersect(region) for box in survey.boxes]
    boxes = [box for box in boxes if box.n_voxels]
    if not boxes:
        raise ValueError(
            f"labels {truth.path} hold no labelled voxel in {region}; every voxel is {config.unlabelled}: give labels "
            "of this region, or say with --unlabelled which value means unlabelled"
        )
    grid = CellGrid.over(_hull(boxes))
    inputs = [truth, predicted] if probabilities is None else [truth, predicted, probabilities]
    blocks = [make_block(i, box) for i, box in enumerate(boxes)]
    scored = fold_blocks(
        _ScoreFold(label_set, replace(label_set, unlabelled=config.unlabelled), grid), inputs, blocks, executor
    )
    n_voxels = sum(box.n_voxels for box in boxes)
    return Evaluation(label_set, last(progress("score", scored, n_voxels, "voxel")).total, survey)


def _hull(boxes: list[Region]) -> Region:
    starts = np.array([box.start for box in boxes]).min(axis=0)
    stops = np.array([box.stop for box in boxes]).max(axis=0)
    return Region(tuple(starts.tolist()), tuple(stops.tolist()))


def _resolve_label_set(predicted: Volume, survey: LabelSurvey, config: EvaluateConfig) -> LabelSet:
    stored = LabelSet.from_metadata(predicted.metadata)
    if stored:
        return stored
    if predicted.dtype.kind not in "iu":
        raise FormatError(
            f"{predicted.path} holds {predicted.dtype}, not labels; give a folder from `voxclf predict` or a volume "
            "of integers"
        )
    if config.classes:
        return parse_classes(config.classes, survey.counts, config.unlabelled)
    return LabelSet.from_ids(survey.counts, unlabelled=config.unlabelled)
