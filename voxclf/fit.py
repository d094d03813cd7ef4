"""From a volume and labels to a fitted model with an honest score.

    survey_labels → draw_rows (one pass over the boxes that hold labels) → cross-validate → fit on all → save

The honest score comes from slabs of the volume held out in turn, a halo away from anything trained on. The
naive one, from voxels held out at random, is reported beside it to show how far it misleads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from features.bank import FilterBank
from voxclf.config import BankOptions, FitConfig, FitOptions
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.ledger import fingerprint
from voxclf.engine.transfer import read_block
from voxclf.errors import OutputExistsError
from voxclf.geometry import Region, VoxelSize, Zyx, make_block
from voxclf.jobs import check_finite
from voxclf.labels import LabelSet, load_label_set, parse_classes
from voxclf.metrics.cells import CellGrid, CellTables
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.voxelwise import score_block
from voxclf.models.checkpoint import load_model, save_model
from voxclf.models.registry import check_model_name
from voxclf.models.trees import TreeModel
from voxclf.progress import Progress, last, silent
from voxclf.provenance import IntensityStatistics, describe_input, software_versions, timestamp
from voxclf.sampling import (
    DrawnRows,
    LabelSurvey,
    Rows,
    SlabSplit,
    draw_rows,
    join_rows,
    random_folds,
    row_weights,
    split_into_slabs,
    survey_labels,
    target_shares,
)
from voxclf.training.fit_trees import FittedModel, fit_tree_model
from voxclf.volume import Volume, open_labels, open_volume

N_EVALUATION = 200_000
"""Labelled voxels drawn to score on: macro F1 of a class with 1 % of them is then known to about 0.01."""
GOLDEN_CORE = 8


@dataclass(frozen=True)
class CrossValidation:
    """Scores of models on labels they were not trained on, as additive tables.

    ``honest`` comes from held-out slabs, with intervals; ``naive`` from voxels held out at random.
    """

    honest: ScoredLabels
    naive: ScoredLabels

    def save(self, folder: Path) -> None:
        """Keep the scores beside the model they belong to."""
        self.honest.save(folder / "scores_honest.json")
        self.naive.save(folder / "scores_naive.json")

    @classmethod
    def load(cls, folder: Path) -> CrossValidation:
        """Read the scores of a saved model."""
        return cls(ScoredLabels.load(folder / "scores_honest.json"), ScoredLabels.load(folder / "scores_naive.json"))


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` gives."""

    model: TreeModel
    folder: Path
    label_counts: dict[int, int]
    cross_validation: CrossValidation
    seconds: dict[str, float]


def fit_model(config: FitConfig, progress: Progress = silent) -> FitResult:
    """Train a model on the labelled voxels of a volume, score it honestly and save it.

    Raises
    ------
    ValueError
        If shapes differ, the labels hold fewer than two classes, or the model's name is unknown.
    OutputExistsError
        If the output exists and ``overwrite`` is not set.
    """
    check_model_name(config.model)
    folder = Path(config.output)
    check_model_folder(folder, config.overwrite)
    volume = open_volume(config.volume, config.voxel_size)
    labels = open_labels(config.labels, volume.shape)
    executor = make_executor(config.executor, config.workers)
    return fit_on_labels(volume, labels, config, folder, executor, progress)


def check_model_folder(folder: Path, overwrite: bool) -> None:
    """Refuse, before any work, a folder that a model may not be written to.

    Raises
    ------
    OutputExistsError
        If it holds a model and ``overwrite`` is not set, or holds anything else.
    """
    if not folder.exists():
        return
    if not (folder / "model.json").exists():
        raise OutputExistsError(
            f"{folder} exists and is not a model folder, so it is not replaced; give another output"
        )
    if not overwrite:
        raise OutputExistsError(f"{folder} holds another model; use --overwrite to replace it, or give another output")


def fit_on_labels(
    volume: Volume,
    labels: Volume,
    options: FitOptions,
    folder: Path,
    executor: Executor,
    progress: Progress = silent,
) -> FitResult:
    """As :func:`fit_model`, with the volumes already open."""
    watch = _Stopwatch()
    check_finite(volume, executor, progress)
    survey = last(
        progress("survey labels", survey_labels(labels, options.unlabelled, executor), labels_total(labels), "voxel")
    ).total
    label_set = resolve_label_set(labels, survey, options)
    label_set.check_counts([survey.counts.get(i, 0) for i in label_set.ids])
    bank = make_bank(options, volume.voxel_size_nm)
    watch.lap("survey labels")

    drawn = draw_rows(
        volume,
        labels,
        survey,
        bank,
        label_set,
        n_training=options.samples,
        n_evaluation=N_EVALUATION,
        balance=options.balance,
        seed=options.seed,
        executor=executor,
    )
    n_boxed = sum(box.region.n_voxels for box in survey.boxes)
    rows = join_rows(last(progress("features", drawn, n_boxed, "voxel")).total)
    watch.lap("features")

    halo = bank.halo(volume.voxel_size_nm)
    shares = target_shares(np.array([survey.counts.get(i, 0) for i in label_set.ids]), options.balance)
    fit = _Fitter(options, shares, executor.n_workers)
    split = split_into_slabs(rows.evaluation.positions, options.folds, halo)
    validation = cross_validate(fit, rows, split, label_set.n_classes, options.seed, progress)
    watch.lap("cross-validation")
    fitted = last(progress("fit", iter([fit(rows.training)]), 1, "model"))
    watch.lap("fit")

    example = choose_example(labels, survey, options.unlabelled)
    model = TreeModel(
        name=options.model,
        bank=bank,
        classifier=fitted.model,
        label_set=label_set,
        voxel_size_nm=volume.voxel_size_nm,
        intensity=IntensityStatistics.measure(volume),
        hyperparameters=fitted.hyperparameters,
        feature_importances=fitted.feature_importances,
        training={
            "volume": describe_input(volume),
            "labels": describe_input(labels),
            "options": options.model_dump(mode="json", include=set(FitOptions.model_fields)),
            "job": _fit_fingerprint(volume, labels, options),
            "n_training_voxels": rows.training.n_rows,
            "label_counts": survey.counts,
            "example": example,
            "versions": software_versions(),
            "finished": timestamp(),
        },
    )
    golden = read_golden_patch(volume, example, halo)
    save_model(model, golden, folder, fitted.native)
    validation.save(folder)
    return FitResult(model, folder, survey.counts, validation, watch.seconds)


def labels_total(labels: Volume) -> int:
    """Voxels that a survey of these labels reads, for its progress."""
    return int(np.prod(labels.shape))


def _fit_fingerprint(volume: Volume, labels: Volume, options: FitOptions) -> str:
    asked = options.model_dump(mode="json", include=set(FitOptions.model_fields))
    return fingerprint({"volume": describe_input(volume), "labels": describe_input(labels), "options": asked})


def load_if_fitted(folder: Path, volume: Volume, labels: Volume, options: FitOptions) -> FitResult | None:
    """Return what this very job fitted earlier, if it did, so that an interrupted run need not fit again."""
    if not (folder / "model.json").exists():
        return None
    model = load_model(folder)
    if model.training.get("job") != _fit_fingerprint(volume, labels, options):
        return None
    counts = {int(label): count for label, count in model.training["label_counts"].items()}
    return FitResult(model, folder, counts, CrossValidation.load(folder), {})


def make_bank(options: BankOptions, voxel_size_nm: VoxelSize) -> FilterBank:
    """Build the filter bank that was asked for; what was left open follows from the voxel size."""
    bank = FilterBank.default(options.bank, voxel_size_nm)
    return FilterBank(
        options.bank,
        options.dimensions or bank.dimensions,
        options.sigmas if options.sigmas is not None else bank.sigmas_nm,
    )


def resolve_label_set(labels: Volume, survey: LabelSurvey, options: FitOptions) -> LabelSet:
    """Find names and colours: from ``--classes``, else stored with the labels or in a sidecar, else plain ids."""
    ids = [i for i in survey.counts if i != options.unlabelled]
    if options.classes:
        return parse_classes(options.classes, ids, options.unlabelled)
    stored = LabelSet.from_metadata(labels.metadata)
    if stored:
        return replace(stored, unlabelled=options.unlabelled)
    for sidecar in (Path(labels.path).with_suffix(".toml"), Path(labels.path).with_suffix(".classes.toml")):
        if sidecar.is_file() and sidecar != Path(labels.path):
            return replace(load_label_set(sidecar), unlabelled=options.unlabelled)
    return LabelSet.from_ids(ids, unlabelled=options.unlabelled)


@dataclass(frozen=True)
class _Fitter:
    options: FitOptions
    shares: np.ndarray
    n_jobs: int

    def __call__(self, rows: Rows) -> FittedModel:
        return fit_tree_model(
            self.options.model,
            rows.features.T,
            rows.classes,
            len(self.shares),
            seed=self.options.seed,
            n_jobs=self.n_jobs,
            n_trees=self.options.trees,
            max_depth=self.options.max_depth,
            min_samples_leaf=self.options.min_samples_leaf,
            # The mixture is unsupervised: it takes the rows as they are.
            sample_weight=None if self.options.model == "gaussian_mixture" else row_weights(rows.classes, self.shares),
        )


def cross_validate(
    fit: Callable[[Rows], FittedModel],
    rows: DrawnRows,
    split: SlabSplit,
    n_classes: int,
    seed: int,
    progress: Progress = silent,
) -> CrossValidation:
    """Score on held-out slabs, each a halo away from what was trained on, and once on voxels held out at random."""
    tasks = [_hold_out_slab(rows, split, fold) for fold in range(split.n_folds)]
    naive_task = _hold_out_at_random(rows, split.n_folds, seed)
    grid = _bootstrap_grid(rows.evaluation.positions, split)

    def score() -> Iterator[tuple[bool, CellTables]]:
        for is_honest, (train, test) in [*((True, task) for task in tasks), (False, naive_task)]:
            if not train.any() or not test.any() or len(np.unique(rows.training.classes[train])) < 2:
                continue
            model = fit(rows.training.take(train)).model
            held_out = rows.evaluation.take(test)
            probabilities = model.predict_probabilities(held_out.features)
            yield is_honest, _score_cells(held_out, probabilities, grid)

    honest, naive, n_slabs = CellTables(), CellTables(), 0
    for is_honest, tables in progress("cross-validation", score(), len(tasks) + 1, "model"):
        if is_honest:
            honest, n_slabs = honest + tables, n_slabs + 1
        else:
            naive = naive + tables
    if not honest.by_cell:
        raise ValueError(
            "labels are too unevenly placed to hold out slabs: no slab left two classes to train on; label several "
            "places, or use fewer --folds"
        )
    kept = np.mean([train.mean() for train, _ in tasks])
    note = (
        f"{n_slabs} slabs along {'zyx'[split.axis]}, training voxels at least {split.gap} voxels away from each, which "
        f"left {kept:.0%} of them to train on; {honest.total(n_classes).n_voxels:,} labelled voxels scored"
    )
    return CrossValidation(
        ScoredLabels.from_cells(honest, n_classes, note, seed),
        ScoredLabels.from_tables(naive.total(n_classes), f"one in {split.n_folds} labelled voxels held out at random"),
    )


def _score_cells(rows: Rows, probabilities: np.ndarray, grid: CellGrid) -> CellTables:
    cell_of = grid.number(rows.positions)
    return CellTables(
        {
            int(cell): score_block(
                rows.classes[cell_of == cell], probabilities[:, cell_of == cell], None, len(probabilities)
            )
            for cell in np.unique(cell_of)
        }
    )


def _bootstrap_grid(positions: np.ndarray, split: SlabSplit) -> CellGrid:
    start, stop = positions.min(axis=0), positions.max(axis=0) + 1
    # A cell is longer than a filter reaches, so that voxels of different cells share little.
    least = split.gap + 1
    return CellGrid.over(Region(tuple(start.tolist()), tuple(stop.tolist())), (1, least, least))


def _hold_out_slab(rows: DrawnRows, split: SlabSplit, fold: int) -> tuple[np.ndarray, np.ndarray]:
    train = split.may_train(rows.training.positions, fold)
    return train, split.fold_of(rows.evaluation.positions) == fold


def _hold_out_at_random(rows: DrawnRows, n_folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    train = random_folds(rows.training.positions, n_folds, seed) != 0
    return train, random_folds(rows.evaluation.positions, n_folds, seed) == 0


def choose_example(labels: Volume, survey: LabelSurvey, unlabelled: int) -> Zyx:
    """A voxel to show a model's work at: where the labelled planes of the most varied box cross."""
    box = max(survey.boxes, key=lambda candidate: (len(candidate.counts), candidate.n_labelled)).region
    labelled = labels.read(box.start, box.stop)[0] != unlabelled
    z, y, x = (
        int(labelled.sum(axis=tuple(other for other in range(3) if other != axis)).argmax()) + box.start[axis]
        for axis in range(3)
    )
    return z, y, x


def read_golden_patch(volume: Volume, example: Zyx, halo: Zyx) -> np.ndarray:
    """A small piece of the volume around a voxel, with its halo, (1, z, y, x), for the model's self-test."""
    z0, y0, x0 = (max(0, c - GOLDEN_CORE // 2) for c in example)
    z1, y1, x1 = (min(s + GOLDEN_CORE, n) for s, n in zip((z0, y0, x0), volume.shape, strict=True))
    return read_block(volume, make_block(0, Region((z0, y0, x0), (z1, y1, x1)), halo))


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._started
        self._started = now
