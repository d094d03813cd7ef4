"""A CRF tuned while fitting, on the labels that were fitted on: from probabilities of models that did not see them.

Every slab of the volume is predicted by the model of the cross-validation that was trained without it. These
probabilities are what they will be where nothing is labelled, or a little worse, since each of those models had fewer
labels; so the CRF can be tuned and judged on the training labels, and no label needs to be set aside for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from voxclf.engine.executors import Executor
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import ORIGIN, Region
from voxclf.labels import LabelSet
from voxclf.models.trees import Classifier
from voxclf.progress import Progress
from voxclf.sampling import LabelSurvey, SlabSplit
from voxclf.training.autocontext import predict_out_of_fold
from voxclf.training.crf_tiles import TuningInputs, find_tiles, split_cells, tile_margin
from voxclf.training.tune_crf import CrfTuning, tune_crf
from voxclf.volume import Volume

N_ITERATIONS, SECONDS = 5, 300.0
"""What ``voxclf crf-tune`` does unless told otherwise."""


def check_enough_labels(volume: Volume, labels: Volume, label_set: LabelSet, survey: LabelSurvey, seed: int) -> None:
    """Refuse labels that cannot be divided into some to tune on and some to judge on, before any work.

    Raises
    ------
    ValueError
        See :func:`voxclf.training.crf_tiles.split_cells`.
    """
    rng = np.random.default_rng(seed)
    # Tiles are found by their labels alone, so the image may stand for probabilities that are not there yet.
    inputs = TuningInputs((volume,), volume, label_set, labels)
    split_cells(find_tiles(inputs, survey, Region(ORIGIN, volume.shape), rng), rng)


def tune_on_held_out(
    inputs: list[Volume],
    labels: Volume,
    label_set: LabelSet,
    survey: LabelSurvey,
    stack: FeatureStack,
    models: Mapping[int, Classifier],
    split: SlabSplit,
    path: Path,
    *,
    seed: int,
    executor: Executor,
    progress: Progress,
) -> CrfTuning:
    """Predict the surroundings of all labels out of fold, and tune a CRF on that.

    Parameters
    ----------
    inputs, stack
        What the models read, the image first, and their features.
    models : mapping of int to Classifier
        By slab; labels of slabs without a model are left out.
    path : Path
        Where the probabilities are written meanwhile.
    """
    image = inputs[0]
    margin = tile_margin(image.voxel_size_nm)
    out_of_fold = predict_out_of_fold(inputs, stack, models, split, survey, label_set, margin, path, executor, progress)
    tuning = TuningInputs((image,), out_of_fold, label_set, labels)
    tiles = find_tiles(tuning, survey, Region(ORIGIN, image.shape), np.random.default_rng(seed))
    predicted = [t for t in tiles if out_of_fold.read(t.core.start, t.core.stop).any(axis=0).all()]
    return tune_crf(
        tuning,
        predicted,
        n_iterations=N_ITERATIONS,
        seconds=SECONDS,
        seed=seed,
        n_workers=executor.n_workers,
        progress=progress,
    )
