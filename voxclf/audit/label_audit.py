"""Which labels are probably wrong: voxels that models which never saw them contradict. ``voxclf audit``.

    survey_labels → draw_rows → a forest per slab, trained without it → predict_out_of_fold
    → slice positions (slices.py) → contradicted regions (regions.py) → one ranked list

The slabs are runs of labelled slices where there are enough of them, without a gap: the question is not what a model
is worth elsewhere, as for the honest score, but what the rest of the labels say about these, and their neighbours
know most. Else they are cut and kept apart as for the honest score.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxclf.audit.regions import (
    ContextFold,
    Contradiction,
    ContradictionFold,
    cut_plane_tiles,
    log_context,
    weigh_by_surprise,
)
from voxclf.audit.slices import REACH, SliceFold, SliceShift, find_shifts, join_tiles
from voxclf.config import AuditConfig, FitOptions
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.run import fold_blocks
from voxclf.errors import OutputExistsError
from voxclf.feature_stack import FeatureStack
from voxclf.fit import resolve_label_set
from voxclf.fit_job import make_bank
from voxclf.geometry import ORIGIN, Block, Region, Zyx
from voxclf.jobs import check_finite
from voxclf.labelled_slices import LabelProfiles, profile_labels
from voxclf.labels import LabelSet
from voxclf.models.trees import Classifier
from voxclf.predict import check_one_channel
from voxclf.progress import Progress, last, silent
from voxclf.sampling import (
    LabelSurvey,
    Rows,
    SlabSplit,
    draw_rows,
    join_rows,
    row_weights,
    split_into_slabs,
    survey_labels,
    target_shares,
)
from voxclf.training.autocontext import predict_out_of_fold
from voxclf.training.fit_trees import fit_tree_model
from voxclf.volume import Volume, open_labels, open_volume

TABLE = "audit.csv"
OUT_OF_FOLD = "out_of_fold.zarr"
FOLDS = 6
LEAST_SLICES = 3
"""Fewest labelled slices along an axis that are held out slice by slice."""


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found: slices that lie elsewhere, and contradicted regions from the strongest down.

    ``planes`` counts the labelled slices that were looked at along z, y and x. ``n_found`` counts regions before the
    list was cut.
    """

    shifts: tuple[SliceShift, ...]
    regions: tuple[Contradiction, ...]
    n_found: int
    n_labelled: int
    planes: Zyx
    split: SlabSplit
    label_set: LabelSet
    volume: Volume
    labels: Volume
    out_of_fold: Volume


@dataclass(frozen=True)
class _Job:
    """What the audit reads, and how it walks."""

    volume: Volume
    labels: Volume
    survey: LabelSurvey
    label_set: LabelSet
    config: AuditConfig
    executor: Executor
    progress: Progress


def audit_labels(config: AuditConfig, progress: Progress = silent) -> Audit:
    """List the labelled regions, and labelled slices, that models trained on the other labels contradict.

    Raises
    ------
    OutputExistsError
        If the output folder holds an audit already and ``overwrite`` is not set.
    ValueError
        If shapes differ, the labels hold fewer than two classes, or are too few to hold a part of them out.

    Notes
    -----
    Predicts the surroundings of all labels once, into the output folder, a byte per voxel and class there. Memory is
    that of a tile of a labelled plane, about 70 bytes per voxel and class, and of the training rows.
    """
    folder = Path(config.output)
    if (folder / TABLE).exists() and not config.overwrite:
        raise OutputExistsError(
            f"{folder / TABLE} exists; use --overwrite to replace it, or give another output folder"
        )
    job = _open_job(config, progress)
    profiles = profile_labels(job.labels, job.survey, job.label_set, job.executor, progress)
    planes = choose_planes(profiles)
    out_of_fold, split = _predict_without(job, profiles, folder)
    shifts = _check_positions(job, planes, out_of_fold)
    shifted = {(shift.axis, shift.position) for shift in shifts}
    found = _find_regions(job, planes, out_of_fold, shifted, profiles.counts)
    return Audit(
        tuple(sorted(shifts, key=lambda shift: -shift.evidence)),
        tuple(sorted(found, key=lambda region: -region.evidence)[: config.top]),
        len(found),
        profiles.n_labelled,
        (len(planes[0]), len(planes[1]), len(planes[2])),
        split,
        job.label_set,
        job.volume,
        job.labels,
        out_of_fold,
    )


def _open_job(config: AuditConfig, progress: Progress) -> _Job:
    volume = open_volume(config.volume, config.voxel_size)
    check_one_channel(volume)
    labels = open_labels(config.labels, volume.shape)
    executor = make_executor(config.executor, config.workers)
    check_finite(volume, executor, progress)
    surveyed = survey_labels(labels, config.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, math.prod(labels.shape), "voxel")).total
    options = FitOptions(classes=config.classes, unlabelled=config.unlabelled)
    label_set = resolve_label_set(labels, survey, options)
    label_set.check_counts([survey.counts.get(i, 0) for i in label_set.ids])
    return _Job(volume, labels, survey, label_set, config, executor, progress)


def choose_planes(profiles: LabelProfiles) -> tuple[list[int], list[int], list[int]]:
    """Positions of the planes to look at along z, y and x: those that somebody drew.

    Of dense labels and strokes these are all slices across one axis. Where single slices were labelled across several
    axes, they are those slices, and the lines that they leave in others are not taken for slices.
    """
    main = profiles.slice_axis()
    planes: list[list[int]] = [[], [], []]
    for axis in range(3):
        slices = profiles.labelled_slices(axis)
        if axis != main and len(slices) and (np.diff(slices) > 1).all():
            planes[axis] = slices.tolist()
    alone = not any(planes)
    chosen = profiles.slices_with_labels(main) if alone else profiles.labelled_slices(main)
    planes[main] = chosen.tolist()
    return planes[0], planes[1], planes[2]


def choose_slabs(profiles: LabelProfiles, positions: np.ndarray, halo: Zyx) -> SlabSplit:
    """Hold out runs of labelled slices if there are at least three along an axis, else slabs a halo apart."""
    axis = profiles.slice_axis()
    slices = profiles.slices_with_labels(axis)
    if len(profiles.labelled_slices(axis)) < LEAST_SLICES:
        return split_into_slabs(positions, FOLDS, halo)
    firsts = [part[0] for part in np.array_split(slices, min(FOLDS, len(slices)))]
    edges = np.array([*firsts, slices[-1] + 1], np.int64)
    return SlabSplit(axis, edges, gap=0)


def _predict_without(job: _Job, profiles: LabelProfiles, folder: Path) -> tuple[Volume, SlabSplit]:
    """Predict every labelled slab, and the slices that a shift could move it to, by a model trained without it."""
    config, executor = job.config, job.executor
    voxel_size = job.volume.voxel_size_nm
    stack = FeatureStack(make_bank(config, voxel_size), voxel_size)
    drawn = draw_rows(
        [job.volume],
        job.labels,
        job.survey,
        stack,
        job.label_set,
        n_training=config.samples,
        n_evaluation=0,
        balance="sqrt",
        seed=config.seed,
        executor=executor,
    )
    n_boxed = sum(box.region.n_voxels for box in job.survey.boxes)
    rows = join_rows(last(job.progress("features", drawn, n_boxed, "voxel")).total).training
    split = choose_slabs(profiles, rows.positions, stack.halo)
    models = _fit_slabs(job, rows, split)
    path = folder / OUT_OF_FOLD
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    margin = (REACH, REACH, REACH)
    inputs = [job.volume]
    predicted = predict_out_of_fold(
        inputs, stack, models, split, job.survey, job.label_set, margin, path, executor, job.progress
    )
    return predicted, split


def _fit_slabs(job: _Job, rows: Rows, split: SlabSplit) -> dict[int, Classifier]:
    """A model for each slab, of the rows that lie outside it."""
    training = {slab: rows.take(split.may_train(rows.positions, slab)) for slab in range(split.n_folds)}
    usable = {slab: part for slab, part in training.items() if len(np.unique(part.classes)) > 1}
    if not usable:
        raise ValueError(
            "labels are too unevenly placed to hold a part of them out: the rest has only one class; label both "
            "classes in several places"
        )
    fitting = ((slab, _fit(job, part)) for slab, part in usable.items())
    return dict(job.progress("fit", fitting, len(usable), "model"))


def _fit(job: _Job, rows: Rows) -> Classifier:
    config = job.config
    totals = np.array([job.survey.counts.get(i, 0) for i in job.label_set.ids])
    return fit_tree_model(
        "extra_trees",
        rows.features.T,
        rows.classes,
        job.label_set.n_classes,
        seed=config.seed,
        n_jobs=job.executor.n_workers,
        n_trees=config.trees,
        # Leaves of one voxel would learn the wrong labels by heart.
        min_samples_leaf=3,
        sample_weight=row_weights(rows.classes, target_shares(totals, "sqrt")),
    ).model


def _tiles(job: _Job, axis: int, positions: list[int], margin: int) -> list[Block]:
    """The labelled part of each plane, in tiles."""
    tiles = []
    for position in positions:
        start, stop = list(job.volume.shape), [0, 0, 0]
        for box in job.survey.boxes:
            if box.region.start[axis] <= position < box.region.stop[axis]:
                start = [min(a, b) for a, b in zip(start, box.region.start, strict=True)]
                stop = [max(a, b) for a, b in zip(stop, box.region.stop, strict=True)]
        start[axis], stop[axis] = position, position + 1
        tiles += cut_plane_tiles(Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])), axis, margin)
    return tiles


def _check_positions(job: _Job, planes: tuple[list[int], ...], out_of_fold: Volume) -> list[SliceShift]:
    found = []
    for axis, positions in enumerate(planes):
        tiles = _tiles(job, axis, positions, REACH)
        if not tiles:
            continue
        fold = SliceFold(job.label_set, axis, job.volume.shape[axis])
        comparing = fold_blocks(fold, [job.labels, out_of_fold], tiles, job.executor)
        n_voxels = sum(tile.core.n_voxels for tile in tiles)
        found += join_tiles(last(job.progress("slice positions", comparing, n_voxels, "voxel")).total)
    return find_shifts(found)


def _find_regions(
    job: _Job,
    planes: tuple[list[int], ...],
    out_of_fold: Volume,
    shifted: set[tuple[int, int]],
    n_labelled: np.ndarray,
) -> list[Contradiction]:
    """All contradictions of slices that lie where they should: in the others everything is contradicted."""
    found: list[Contradiction] = []
    for axis, positions in enumerate(planes):
        tiles = _tiles(job, axis, [p for p in positions if (axis, p) not in shifted], 1)
        if not tiles:
            continue
        size, n_voxels = job.volume.shape[axis], sum(tile.core.n_voxels for tile in tiles)
        counting = fold_blocks(ContextFold(job.label_set, axis, size), [job.labels], tiles, job.executor)
        context = log_context(last(job.progress("context", counting, n_voxels, "voxel")).total)
        fold = ContradictionFold(job.label_set, axis, size, context, job.config.smallest, 2 * job.config.top)
        looking = fold_blocks(fold, [job.labels, out_of_fold, job.volume], tiles, job.executor)
        found += weigh_by_surprise(last(job.progress("contradictions", looking, n_voxels, "voxel")).total, n_labelled)
    return found


def given_and_suggested(audit: Audit, start: Zyx, stop: Zyx) -> tuple[np.ndarray, np.ndarray]:
    """Class indices as drawn and as the models would draw them in a box, (z, y, x) each; -1 where there is none."""
    given = audit.label_set.remap_to_indices(audit.labels.read(start, stop)[0])
    stored = audit.out_of_fold.read(start, stop)
    return given, np.where(stored.any(axis=0), stored.argmax(axis=0), -1)


def inside_volume(audit: Audit, region: Region) -> Region:
    """The part of a box that lies in the volume."""
    return region.intersect(Region(ORIGIN, audit.volume.shape))
