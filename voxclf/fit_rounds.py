"""Trees, round after round: draw rows, cross-validate, fit on all; with autocontext again on the probabilities.

draw_rows (one pass over the boxes that hold labels) → cross-validate → fit on all
→ with autocontext: predict out of fold → draw_rows again, context included → …
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxclf.feature_stack import FeatureStack, make_context_bank
from voxclf.fit_job import FitJob, Fitted, make_bank
from voxclf.metrics.calibration import fit_calibration
from voxclf.models.trees import Classifier, TreeModel
from voxclf.progress import last
from voxclf.provenance import IntensityStatistics
from voxclf.sampling import (
    DrawnRows,
    Rows,
    SlabSplit,
    draw_rows,
    join_rows,
    row_weights,
    split_into_slabs,
    target_shares,
)
from voxclf.training.autocontext import keep_predicted, predict_out_of_fold
from voxclf.training.cross_validation import CrossValidation, cross_validate
from voxclf.training.fit_trees import FittedModel, fit_tree_model
from voxclf.training.tune_crf import CrfTuning
from voxclf.training.tune_held_out import check_enough_labels, tune_on_held_out
from voxclf.volume import Volume

N_EVALUATION = 200_000
"""Labelled voxels drawn to score on: macro F1 of a class with 1 % of them is then known to about 0.01."""


def fit_tree_rounds(job: FitJob) -> Fitted:
    """Fit trees, in as many rounds as asked for."""
    if job.options.tune_crf:
        check_enough_labels(job.volume, job.labels, job.label_set, job.survey, job.options.seed)
    rounds, crf = _Trainer(job).fit_rounds()
    last_round = rounds[-1]
    honest = last_round.scores.honest
    assert honest.tables is not None
    model = TreeModel(
        name=job.options.model,
        bank=last_round.stack.bank,
        classifiers=tuple(r.fitted.model for r in rounds),
        label_set=job.label_set,
        voxel_size_nm=job.volume.voxel_size_nm,
        intensity=IntensityStatistics.measure(job.volume),
        hyperparameters=last_round.fitted.hyperparameters,
        context=last_round.stack.context,
        calibration=fit_calibration(honest.tables) if job.options.calibrate else None,
        feature_importances=last_round.fitted.feature_importances,
        training=job.facts(
            n_training_voxels=last_round.n_training,
            honest_macro_f1_by_round=[r.scores.honest.scores.macro_f1 for r in rounds],
        ),
    )
    return Fitted(model, last_round.scores, {"booster.ubj": last_round.fitted.native}, crf)


@dataclass(frozen=True)
class _Round:
    """One round of autocontext, or the only round without it."""

    stack: FeatureStack
    fitted: FittedModel
    scores: CrossValidation
    n_training: int


@dataclass(frozen=True)
class _Trainer:
    """Draws rows, cross-validates and fits."""

    job: FitJob

    def fit_rounds(self) -> tuple[list[_Round], CrfTuning | None]:
        """Fit as many rounds as asked for, and a CRF; probabilities stand beside the model's folder meanwhile."""
        folder = self.job.folder
        bank = make_bank(self.job.options, self.job.volume.voxel_size_nm)
        stack = FeatureStack(bank, self.job.volume.voxel_size_nm)
        inputs = [self.job.volume]
        rows = self._draw(inputs, stack)
        context = make_context_bank(bank, self.job.volume.voxel_size_nm)
        # With autocontext a voxel's surroundings must not hold probabilities of models that were trained on it.
        with_context = FeatureStack(bank, self.job.volume.voxel_size_nm, context)
        gap = with_context.halo if self.job.options.autocontext > 1 else stack.halo
        split = split_into_slabs(rows.evaluation.positions, self.job.options.folds, gap)
        done, models = self._fit_round(rows, stack, split)
        rounds = [done]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".autocontext-", dir=folder.parent) as scratch:
            for index in range(1, self.job.options.autocontext):
                out_of_fold = predict_out_of_fold(
                    inputs,
                    stack,
                    models,
                    split,
                    self.job.survey,
                    self.job.label_set,
                    context.halo(self.job.volume.voxel_size_nm),
                    Path(scratch) / f"round_{index}.zarr",
                    self.job.executor,
                    self.job.progress,
                )
                self.job.watch.lap(f"out of fold {index}")
                inputs = [self.job.volume, out_of_fold]
                stack = FeatureStack(bank, self.job.volume.voxel_size_nm, context, self.job.label_set.names)
                rows = keep_predicted(self._draw(inputs, stack), split, models)
                done, models = self._fit_round(rows, stack, split)
                rounds.append(done)
            crf = self._tune_crf(inputs, stack, models, split, Path(scratch)) if self.job.options.tune_crf else None
        return rounds, crf

    def _tune_crf(
        self,
        inputs: list[Volume],
        stack: FeatureStack,
        models: dict[int, Classifier],
        split: SlabSplit,
        scratch: Path,
    ) -> CrfTuning:
        job = self.job
        tuned = tune_on_held_out(
            inputs,
            job.labels,
            job.label_set,
            job.survey,
            stack,
            models,
            split,
            scratch / "held_out.zarr",
            seed=job.options.seed,
            executor=job.executor,
            progress=job.progress,
        )
        job.watch.lap("tune CRF")
        return tuned

    def _draw(self, inputs: list[Volume], stack: FeatureStack) -> DrawnRows:
        drawn = draw_rows(
            inputs,
            self.job.labels,
            self.job.survey,
            stack,
            self.job.label_set,
            n_training=self.job.options.samples,
            n_evaluation=N_EVALUATION,
            balance=self.job.options.row_balance,
            seed=self.job.options.seed,
            executor=self.job.executor,
        )
        n_boxed = sum(box.region.n_voxels for box in self.job.survey.boxes)
        rows = join_rows(last(self.job.progress("features", drawn, n_boxed, "voxel")).total)
        self.job.watch.lap("features")
        return rows

    def _fit_round(
        self, rows: DrawnRows, stack: FeatureStack, split: SlabSplit
    ) -> tuple[_Round, dict[int, Classifier]]:
        n_classes = self.job.label_set.n_classes
        scores, models = cross_validate(
            lambda part: self._fit(part).model, rows, split, n_classes, self.job.options.seed, self.job.progress
        )
        self.job.watch.lap("cross-validation")
        fitted = last(self.job.progress("fit", (self._fit(part) for part in (rows.training,)), 1, "model"))
        self.job.watch.lap("fit")
        return _Round(stack, fitted, scores, rows.training.n_rows), models

    def _fit(self, rows: Rows) -> FittedModel:
        options = self.job.options
        totals = np.array([self.job.survey.counts.get(i, 0) for i in self.job.label_set.ids])
        # The mixture is unsupervised: it takes the rows as they are.
        is_weighted = options.model != "gaussian_mixture"
        return fit_tree_model(
            options.model,
            rows.features.T,
            rows.classes,
            self.job.label_set.n_classes,
            seed=options.seed,
            n_jobs=self.job.executor.n_workers,
            n_trees=options.trees,
            max_depth=options.max_depth,
            min_samples_leaf=options.min_samples_leaf,
            sample_weight=row_weights(rows.classes, target_shares(totals, options.row_balance))
            if is_weighted
            else None,
        )
