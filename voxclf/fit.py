"""From a volume and labels to a fitted model with an honest score.

    survey_labels → draw_rows (one pass over the boxes that hold labels) → cross-validate → fit on all
    → with autocontext: predict out of fold → draw_rows again, context included → … → save

The honest score comes from slabs of the volume held out in turn, a halo away from anything trained on. The
naive one, from voxels held out at random, is reported beside it to show how far it misleads.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from features.bank import FilterBank
from voxclf.config import BankOptions, FitConfig, FitOptions
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.ledger import fingerprint
from voxclf.engine.transfer import read_block
from voxclf.errors import OutputExistsError
from voxclf.feature_stack import FeatureStack, make_context_bank
from voxclf.geometry import Region, VoxelSize, Zyx, make_block
from voxclf.jobs import check_finite
from voxclf.labels import LabelSet, load_label_set, parse_classes
from voxclf.metrics.calibration import CalibrationMap, fit_calibration
from voxclf.models.checkpoint import load_model, save_model
from voxclf.models.registry import check_model_name
from voxclf.models.trees import Classifier, TreeModel
from voxclf.progress import Progress, last, silent
from voxclf.provenance import IntensityStatistics, describe_input, software_versions, timestamp
from voxclf.sampling import (
    DrawnRows,
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
from voxclf.training.autocontext import keep_predicted, predict_out_of_fold
from voxclf.training.cross_validation import CrossValidation, cross_validate
from voxclf.training.fit_trees import FittedModel, fit_tree_model
from voxclf.volume import Volume, open_labels, open_volume

N_EVALUATION = 200_000
"""Labelled voxels drawn to score on: macro F1 of a class with 1 % of them is then known to about 0.01."""
GOLDEN_CORE = 8


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
    if labels.labelled_boxes is not None and options.unlabelled != 0:
        raise ValueError(
            f"--unlabelled was {options.unlabelled}, but around the slices of {labels.path} every voxel is 0; leave it "
            "out and write 0 where nothing is labelled on a slice"
        )
    check_finite(volume, executor, progress)
    surveyed = survey_labels(labels, options.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, math.prod(labels.shape), "voxel")).total
    label_set = resolve_label_set(labels, survey, options)
    counts = [survey.counts.get(i, 0) for i in label_set.ids]
    label_set.check_counts(counts)
    watch.lap("survey labels")
    trainer = _Trainer(volume, labels, survey, label_set, options, executor, progress, watch)
    rounds = trainer.fit_rounds(folder)

    last_round = rounds[-1]
    example = choose_example(labels, survey, options.unlabelled)
    inputs = _describe_inputs(volume, labels)
    model = TreeModel(
        name=options.model,
        bank=last_round.stack.bank,
        classifiers=tuple(r.fitted.model for r in rounds),
        label_set=label_set,
        voxel_size_nm=volume.voxel_size_nm,
        intensity=IntensityStatistics.measure(volume),
        hyperparameters=last_round.fitted.hyperparameters,
        context=last_round.stack.context,
        calibration=_calibrate(last_round.scores) if options.calibrate else None,
        feature_importances=last_round.fitted.feature_importances,
        training={
            **inputs,
            "options": _asked(options),
            "job": _fit_fingerprint(inputs, options),
            "n_training_voxels": last_round.n_training,
            "honest_macro_f1_by_round": [r.scores.honest.scores.macro_f1 for r in rounds],
            "label_counts": survey.counts,
            "example": example,
            "versions": software_versions(),
            "finished": timestamp(),
        },
    )
    golden = read_golden_patch(volume, example, model.golden_halo)
    save_model(model, golden, folder, {"booster.ubj": last_round.fitted.native})
    last_round.scores.save(folder)
    return FitResult(model, folder, survey.counts, last_round.scores, watch.seconds)


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._started
        self._started = now


@dataclass(frozen=True)
class _Round:
    """One round of autocontext, or the only round without it."""

    stack: FeatureStack
    fitted: FittedModel
    scores: CrossValidation
    n_training: int


@dataclass(frozen=True)
class _Trainer:
    """Draws rows, cross-validates and fits, round after round."""

    volume: Volume
    labels: Volume
    survey: LabelSurvey
    label_set: LabelSet
    options: FitOptions
    executor: Executor
    progress: Progress
    watch: _Stopwatch

    def fit_rounds(self, folder: Path) -> list[_Round]:
        """Fit as many rounds as asked for; probabilities between rounds stand beside ``folder`` meanwhile."""
        bank = make_bank(self.options, self.volume.voxel_size_nm)
        stack = FeatureStack(bank, self.volume.voxel_size_nm)
        inputs = [self.volume]
        rows = self._draw(inputs, stack)
        context = make_context_bank(bank, self.volume.voxel_size_nm)
        # With autocontext a voxel's surroundings must not hold probabilities of models that were trained on it.
        with_context = FeatureStack(bank, self.volume.voxel_size_nm, context)
        gap = with_context.halo if self.options.autocontext > 1 else stack.halo
        split = split_into_slabs(rows.evaluation.positions, self.options.folds, gap)
        done, models = self._fit_round(rows, stack, split)
        rounds = [done]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".autocontext-", dir=folder.parent) as scratch:
            for index in range(1, self.options.autocontext):
                out_of_fold = predict_out_of_fold(
                    inputs,
                    stack,
                    models,
                    split,
                    self.survey,
                    self.label_set,
                    context.halo(self.volume.voxel_size_nm),
                    Path(scratch) / f"round_{index}.zarr",
                    self.executor,
                    self.progress,
                )
                self.watch.lap(f"out of fold {index}")
                inputs = [self.volume, out_of_fold]
                stack = FeatureStack(bank, self.volume.voxel_size_nm, context, self.label_set.names)
                rows = keep_predicted(self._draw(inputs, stack), split, models)
                done, models = self._fit_round(rows, stack, split)
                rounds.append(done)
        return rounds

    def _draw(self, inputs: list[Volume], stack: FeatureStack) -> DrawnRows:
        drawn = draw_rows(
            inputs,
            self.labels,
            self.survey,
            stack,
            self.label_set,
            n_training=self.options.samples,
            n_evaluation=N_EVALUATION,
            balance=self.options.balance,
            seed=self.options.seed,
            executor=self.executor,
        )
        n_boxed = sum(box.region.n_voxels for box in self.survey.boxes)
        rows = join_rows(last(self.progress("features", drawn, n_boxed, "voxel")).total)
        self.watch.lap("features")
        return rows

    def _fit_round(
        self, rows: DrawnRows, stack: FeatureStack, split: SlabSplit
    ) -> tuple[_Round, dict[int, Classifier]]:
        n_classes = self.label_set.n_classes
        scores, models = cross_validate(
            lambda part: self._fit(part).model, rows, split, n_classes, self.options.seed, self.progress
        )
        self.watch.lap("cross-validation")
        fitted = last(self.progress("fit", (self._fit(part) for part in (rows.training,)), 1, "model"))
        self.watch.lap("fit")
        return _Round(stack, fitted, scores, rows.training.n_rows), models

    def _fit(self, rows: Rows) -> FittedModel:
        options = self.options
        totals = np.array([self.survey.counts.get(i, 0) for i in self.label_set.ids])
        # The mixture is unsupervised: it takes the rows as they are.
        is_weighted = options.model != "gaussian_mixture"
        return fit_tree_model(
            options.model,
            rows.features.T,
            rows.classes,
            self.label_set.n_classes,
            seed=options.seed,
            n_jobs=self.executor.n_workers,
            n_trees=options.trees,
            max_depth=options.max_depth,
            min_samples_leaf=options.min_samples_leaf,
            sample_weight=row_weights(rows.classes, target_shares(totals, options.balance)) if is_weighted else None,
        )


def _calibrate(scores: CrossValidation) -> CalibrationMap:
    assert scores.honest.tables is not None
    return fit_calibration(scores.honest.tables)


def _asked(options: FitOptions) -> dict[str, Any]:
    """The options that decide a model, as values for JSON."""
    return options.model_dump(mode="json", include=set(FitOptions.model_fields))


def _describe_inputs(volume: Volume, labels: Volume) -> dict[str, Any]:
    return {"volume": describe_input(volume), "labels": describe_input(labels)}


def _fit_fingerprint(inputs: dict[str, Any], options: FitOptions) -> str:
    return fingerprint({**inputs, "options": _asked(options)})


def load_if_fitted(folder: Path, volume: Volume, labels: Volume, options: FitOptions) -> FitResult | None:
    """Return what this very job fitted earlier, if it did, so that an interrupted run need not fit again."""
    if not (folder / "model.json").exists():
        return None
    model = load_model(folder)
    if model.training.get("job") != _fit_fingerprint(_describe_inputs(volume, labels), options):
        return None
    counts = {int(label): count for label, count in model.training["label_counts"].items()}
    return FitResult(model, folder, counts, CrossValidation.load(folder), {})


def make_bank(options: BankOptions, voxel_size_nm: VoxelSize) -> FilterBank:
    """Build the filter bank that was asked for; what was left open follows from the voxel size."""
    bank = FilterBank.default(options.bank, voxel_size_nm)
    if options.dimensions is not None:
        bank = FilterBank.with_defaults(options.bank, options.dimensions, voxel_size_nm)
    return bank if options.sigmas is None else replace(bank, sigmas_nm=options.sigmas)


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
