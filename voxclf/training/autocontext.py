"""Autocontext: a second round of trees that also reads the first round's probabilities around each voxel.

Tu & Bai, "Auto-context and its application to high-level vision tasks", PAMI 2010. What the second round learns from
must look like what it will see: probabilities of voxels that the first round was *not* trained on. So every slab of
the volume is predicted by the model that was cross-validated on it, trained without this slab and a halo around it,
and the context features of labelled voxels are read from that out-of-fold volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from voxclf.engine.executors import Executor
from voxclf.engine.run import Output, Receipt, choose_chunk_shape, choose_core_shape, map_blocks
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import Region, Zyx, select_blocks, split_into_blocks
from voxclf.labels import LabelSet
from voxclf.models.trees import Classifier, TreePredictor
from voxclf.probabilities import quantise
from voxclf.progress import Progress, silent
from voxclf.sampling import DrawnRows, LabelSurvey, SlabSplit
from voxclf.volume import DEFAULT_CHUNK, Volume, create_volume, open_level

MEMORY_BYTES = 1_000_000_000
"""For the blocks in work; fitting has no budget of its own, because all else it holds is a table of rows."""


def predict_out_of_fold(
    inputs: list[Volume],
    stack: FeatureStack,
    models: Mapping[int, Classifier],
    split: SlabSplit,
    survey: LabelSurvey,
    label_set: LabelSet,
    context_halo: Zyx,
    path: Path,
    executor: Executor,
    progress: Progress = silent,
) -> Volume:
    """Predict the surroundings of all labels, each slab by the model that was trained without it.

    Parameters
    ----------
    inputs, stack
        What the models read, and their features.
    models : mapping of int to Classifier
        By slab; slabs without a model stay 0.
    context_halo : (z, y, x)
        How far around a labelled voxel the next round will look.
    path : Path
        Where to write the probabilities, OME-Zarr of uint8, zero away from labels.

    Returns
    -------
    Volume
        Opened for reading.
    """
    image = inputs[0]
    z, y, x = (min(c, n) for c, n in zip(DEFAULT_CHUNK, image.shape, strict=True))
    any_step = TreePredictor(stack, next(iter(models.values())))
    chunk = choose_chunk_shape(any_step, (z, y, x), MEMORY_BYTES, executor.n_workers)
    create_volume(path, image.shape, label_set.n_classes, np.uint8, image.voxel_size_nm, chunk, kind="probabilities")
    output = open_level(path, 0, writable=True)
    whole = Region((0, 0, 0), image.shape)
    near_labels = [box.region.grow(context_halo).intersect(whole) for box in survey.boxes]

    def predict() -> Iterator[Receipt]:
        for slab, model in models.items():
            step = TreePredictor(stack, model)
            region = _slab_region(split, slab, image.shape)
            core = choose_core_shape(step, output.write_shape, region.shape, MEMORY_BYTES, executor.n_workers)
            grid = split_into_blocks(image.shape, core, step.halo, region=region)
            blocks = select_blocks(grid, near_labels)
            # One slab after the other: two slabs may share a chunk, two blocks of a slab never do.
            yield from map_blocks(step, inputs, [Output(output, quantise)], blocks, executor)

    n_voxels = sum(_slab_region(split, slab, image.shape).n_voxels for slab in models)
    for _ in progress("out of fold", predict(), n_voxels, "voxel"):
        pass
    return open_level(path, 0)


def _slab_region(split: SlabSplit, slab: int, shape: Zyx) -> Region:
    """The part of the volume that belongs to a slab; the outermost slabs reach to the volume's edges."""
    start, stop = [0, 0, 0], list(shape)
    if slab > 0:
        start[split.axis] = int(split.edges[slab])
    if slab < split.n_folds - 1:
        stop[split.axis] = int(split.edges[slab + 1])
    return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def keep_predicted(rows: DrawnRows, split: SlabSplit, models: Mapping[int, Classifier]) -> DrawnRows:
    """Drop the rows of slabs that no model could predict."""
    kept = [
        part.take(np.isin(split.fold_of(part.positions), list(models))) for part in (rows.training, rows.evaluation)
    ]
    return DrawnRows(kept[0], kept[1])
