"""What another labelled slice would bring: scores of models fitted on growing parts of the labels, carried on.

    draw rows once → for each held-out slab: fit on 1/8, 1/4, 1/2 and all of the labels a halo away from it
    → macro F1 by amount of labels → a - b n^-c, with how far it could be off

Parts are whole labelled slices, or pieces of them where fewer than six were labelled, never single voxels: a voxel more
from a slice that is already in the training set brings next to nothing. Learning curves of classifiers follow a power
law over the range that matters (Hestness et al., 2017; Figueroa et al., BMC Med. Inform. 12, 2012).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.config import FitOptions
from voxclf.engine.executors import Executor
from voxclf.feature_stack import FeatureStack
from voxclf.fit_job import make_bank
from voxclf.fit_rounds import N_EVALUATION
from voxclf.labelled_slices import LabelProfiles
from voxclf.labels import LabelSet
from voxclf.metrics.bootstrap import Interval
from voxclf.metrics.voxelwise import score_batch, score_block
from voxclf.progress import Progress, last, silent
from voxclf.sampling import (
    DrawnRows,
    LabelSurvey,
    Rows,
    SlabSplit,
    draw_rows,
    join_rows,
    row_weights,
    split_into_slabs,
    target_shares,
)
from voxclf.training.fit_trees import fit_tree_model
from voxclf.volume import Volume

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
REPEATS = 3
"""Random choices of parts at each share below 1; which slices one happens to have matters most when they are few."""
TREES = 50
"""Trees of each of the models: their F1 is within 0.005 of that of the default number, at half the time."""
LEAST_SLICES = 6
PIECES_PER_AXIS, LEAST_PIECE = 4, 32
N_DRAWS = 400

_EXPONENTS = np.linspace(0.1, 2.0, 39)


@dataclass(frozen=True)
class PowerLaw:
    """``score(n) = ceiling - loss * n ** -exponent``; arrays of one length hold several at once."""

    ceiling: NDArray[np.float64]
    loss: NDArray[np.float64]
    exponent: NDArray[np.float64]

    def at(self, n: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Scores (D, N) of D laws at N amounts."""
        amounts = np.atleast_1d(np.asarray(n, np.float64))
        return self.ceiling[:, None] - self.loss[:, None] * amounts[None] ** -self.exponent[:, None]


def fit_power_law(n: NDArray[np.float64], scores: NDArray[np.float64]) -> PowerLaw:
    """Fit a rising power law through scores by least squares, one law per row.

    Parameters
    ----------
    n : ndarray of float, shape (S,)
        Amounts, positive.
    scores : ndarray of float, shape (D, S)
        One curve per row. No law rises above a score of 1.

    Returns
    -------
    PowerLaw
        D of them; exponents lie between 0.1 and 2, below and above which S points cannot tell.
    """
    best = PowerLaw(*(np.full(len(scores), np.nan) for _ in range(3)))
    least = np.full(len(scores), np.inf)
    for exponent in _EXPONENTS:
        x = n**-exponent
        spread = x - x.mean()
        loss = np.maximum(-(scores @ spread) / (spread @ spread), 0.0)
        ceiling = scores.mean(axis=1) + loss * x.mean()
        over = ceiling > 1
        # Held to a ceiling of 1, the best loss goes through the points measured from there.
        loss = np.where(over, np.maximum(((1 - scores) @ x) / (x @ x), 0.0), loss)
        ceiling = np.minimum(ceiling, 1.0)
        error = ((ceiling[:, None] - loss[:, None] * x[None] - scores) ** 2).sum(axis=1)
        better = error < least
        least[better] = error[better]
        for kept, found in ((best.ceiling, ceiling), (best.loss, loss)):
            kept[better] = found[better]
        best.exponent[better] = exponent
    return best


@dataclass(frozen=True)
class LearningCurve:
    """Macro F1 on held-out slabs by the amount of labels trained on.

    Parameters
    ----------
    n_slices : ndarray of float, shape (S,)
        Amount of labels, in labelled slices' worth.
    scores, low, high : ndarray of float, shape (S,)
        Macro F1 and its 95 % interval over held-out slabs and choices of parts.
    law : PowerLaw
        Through the scores (one).
    drawn_laws : PowerLaw
        Through scores of redrawn slabs and choices; their spread is the uncertainty of what is expected.
    n_slices_now : float
        All the labels there are, in slices' worth.
    voxels_per_slice : float
        Labelled voxels of a typical labelled slice.
    note : str
        How it was measured.
    """

    n_slices: NDArray[np.float64]
    scores: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    law: PowerLaw
    drawn_laws: PowerLaw
    n_slices_now: float
    voxels_per_slice: float
    note: str

    def expect(self, n_slices: float) -> Interval:
        """Macro F1 to expect from an amount of labels, with its 95 % interval under the power law."""
        low, high = np.nanquantile(self.drawn_laws.at(n_slices)[:, 0], [0.025, 0.975])
        return Interval(float(self.law.at(n_slices)[0, 0]), float(low), float(high))

    def expect_gain(self, n_more: float) -> Interval:
        """Macro F1 that ``n_more`` slices like those there are would add, with its 95 % interval."""
        both = np.array([self.n_slices_now, self.n_slices_now + n_more])
        gains = np.diff(self.drawn_laws.at(both), axis=1)[:, 0]
        low, high = np.nanquantile(gains, [0.025, 0.975])
        return Interval(float(np.diff(self.law.at(both), axis=1)[0, 0]), float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        """Everything as values for JSON."""
        return {
            "n_slices": self.n_slices,
            "macro_f1": self.scores,
            "low": self.low,
            "high": self.high,
            "law": {name: float(values[0]) for name, values in vars(self.law).items()},
            "n_slices_now": self.n_slices_now,
            "voxels_per_slice": self.voxels_per_slice,
            "expected_now": self.expect(self.n_slices_now).to_dict(),
            "gain_of_one_slice": self.expect_gain(1).to_dict(),
            "gain_of_twice_the_labels": self.expect_gain(self.n_slices_now).to_dict(),
            "note": self.note,
        }


def measure_learning_curve(
    volume: Volume,
    labels: Volume,
    survey: LabelSurvey,
    profiles: LabelProfiles,
    label_set: LabelSet,
    options: FitOptions,
    executor: Executor,
    progress: Progress = silent,
) -> LearningCurve:
    """Fit models on growing parts of the labels and score each on slabs at least a halo away.

    Parameters
    ----------
    volume, labels : Volume
        Image, and labels of the same shape.
    survey, profiles
        Of the labels: :func:`~voxclf.sampling.survey_labels`, :func:`~voxclf.labelled_slices.profile_labels`.
    label_set : LabelSet
        The classes.
    options : FitOptions
        Which model, on which features; autocontext and calibration are left out.
    executor, progress

    Raises
    ------
    ValueError
        If the labels are too close together to hold out slabs, or too few to be divided.

    Notes
    -----
    Takes 10 fits for each of ``options.folds`` slabs.
    """
    stack = FeatureStack(make_bank(options, volume.voxel_size_nm), volume.voxel_size_nm)
    drawn = draw_rows(
        [volume],
        labels,
        survey,
        stack,
        label_set,
        n_training=options.samples,
        n_evaluation=N_EVALUATION,
        balance=options.row_balance,
        seed=options.seed,
        executor=executor,
    )
    n_boxed = sum(box.region.n_voxels for box in survey.boxes)
    rows = join_rows(last(progress("features", drawn, n_boxed, "voxel")).total)
    split = split_into_slabs(rows.evaluation.positions, options.folds, stack.halo)
    trials = list(_plan_trials(rows, split, profiles, options.seed))
    confusion = np.zeros((len(SHARES), split.n_folds, REPEATS, *(label_set.n_classes,) * 2), np.int64)
    amounts = np.zeros(confusion.shape[:3])
    fitted = (_fit_trial(trial, rows, label_set, survey, options, executor.n_workers) for trial in trials)
    for trial, table in zip(trials, progress("learning curve", fitted, len(trials), "model"), strict=True):
        confusion[trial.size, trial.fold, trial.repeats] = table
        amounts[trial.size, trial.fold, trial.repeats] = trial.share_of_labels
    voxels_per_slice = _voxels_per_slice(profiles)
    n_now = profiles.n_labelled / voxels_per_slice
    scored = confusion[-1].any(axis=(1, 2, 3))
    if not scored.any():
        raise ValueError(
            "labels are too unevenly placed for a learning curve: no held-out slab left labels of two classes to train "
            "on; label several places, or use smaller --sigmas or fewer --folds"
        )
    note = (
        f"{int(scored.sum())} slabs along {'zyx'[split.axis]} held out, each model trained on labels at least "
        f"{split.gap} voxels away; {_describe_parts(profiles)}"
    )
    return _assemble(confusion[:, scored], amounts[:, scored] * n_now, n_now, voxels_per_slice, note, options.seed)


@dataclass(frozen=True)
class _Trial:
    """One model to fit and score: trained on ``train``, scored on ``test``, for the repeats it stands for."""

    size: int
    fold: int
    repeats: slice
    train: NDArray[np.intp]
    test: NDArray[np.intp]
    share_of_labels: float


def _plan_trials(rows: DrawnRows, split: SlabSplit, profiles: LabelProfiles, seed: int) -> Iterator[_Trial]:
    parts = {name: _number_parts(getattr(rows, name).positions, profiles) for name in ("training", "evaluation")}
    slab_of = split.fold_of(rows.evaluation.positions)
    rng = np.random.default_rng([seed, 1])
    for fold in range(split.n_folds):
        allowed = split.may_train(rows.training.positions, fold)
        allowed_evenly = split.may_train(rows.evaluation.positions, fold)
        test = np.flatnonzero(slab_of == fold)
        usable = np.unique(parts["training"][allowed])
        if not len(test) or len(usable) < 2:
            continue
        for size, share in enumerate(SHARES):
            n_parts = max(1, round(share * len(usable)))
            is_all = n_parts == len(usable)
            # All parts can be chosen in one way only, so that model stands for all repeats.
            for repeats in [slice(None)] if is_all else [slice(r, r + 1) for r in range(REPEATS)]:
                chosen = rng.choice(usable, n_parts, replace=False)
                train = np.flatnonzero(allowed & np.isin(parts["training"], chosen))
                if len(np.unique(rows.training.classes[train])) < 2:
                    continue
                share_of_labels = float((allowed_evenly & np.isin(parts["evaluation"], chosen)).mean())
                yield _Trial(size, fold, repeats, train, test, share_of_labels)


def _number_parts(positions: NDArray[np.int64], profiles: LabelProfiles) -> NDArray[np.int64]:
    """Number of the part that each voxel belongs to: its slice, or its piece of the slice where slices are few."""
    slices = profiles.assign(positions)
    if len(np.unique(slices)) >= LEAST_SLICES:
        return slices
    number = slices + 1
    for axis in range(3):
        present = profiles.slices_with_labels(axis)
        start, extent = int(present[0]), int(present[-1]) + 1 - int(present[0])
        n_pieces = max(1, min(PIECES_PER_AXIS, extent // LEAST_PIECE))
        number = number * n_pieces + np.minimum((positions[:, axis] - start) * n_pieces // extent, n_pieces - 1)
    return number


def _describe_parts(profiles: LabelProfiles) -> str:
    numbers = [len(profiles.labelled_slices(axis)) for axis in range(3)]
    if sum(n for n in numbers if n) >= LEAST_SLICES:
        return "parts are whole labelled slices"
    return "parts are pieces of slices, because fewer than six slices are labelled"


def _voxels_per_slice(profiles: LabelProfiles) -> float:
    axes = [axis for axis in range(3) if len(profiles.labelled_slices(axis))]
    # Where slices cross all three axes alike, those of the axis with fewest stand for what a person labels.
    fewest = min(axes, key=lambda axis: len(profiles.labelled_slices(axis)))
    return float(np.median(profiles.along[fewest].sum(axis=0)[profiles.labelled_slices(fewest)]))


def _fit_trial(
    trial: _Trial, rows: DrawnRows, label_set: LabelSet, survey: LabelSurvey, options: FitOptions, n_jobs: int
) -> NDArray[np.int64]:
    """Confusion table (K, K) of one model on its held-out slab."""
    part: Rows = rows.training.take(trial.train)
    totals = np.array([survey.counts.get(i, 0) for i in label_set.ids])
    is_weighted = options.model != "gaussian_mixture"
    fitted = fit_tree_model(
        options.model,
        part.features.T,
        part.classes,
        label_set.n_classes,
        seed=options.seed,
        n_jobs=n_jobs,
        n_trees=options.trees or TREES,
        max_depth=options.max_depth,
        min_samples_leaf=options.min_samples_leaf,
        sample_weight=row_weights(part.classes, target_shares(totals, options.row_balance)) if is_weighted else None,
    )
    held_out = rows.evaluation.take(trial.test)
    predicted = fitted.model.predict_probabilities(held_out.features).argmax(axis=0)
    return score_block(held_out.classes, None, predicted, label_set.n_classes).confusion


def _assemble(
    confusion: NDArray[np.int64],
    amounts: NDArray[np.float64],
    n_now: float,
    voxels_per_slice: float,
    note: str,
    seed: int,
) -> LearningCurve:
    """Score tables (S, folds, repeats, K, K) at amounts (S, folds, repeats) and fit the law."""
    n_sizes, n_folds, n_repeats = confusion.shape[:3]
    rng = np.random.default_rng([seed, 2])
    folds = rng.integers(n_folds, size=(N_DRAWS, n_folds))
    repeats = rng.integers(n_repeats, size=(N_DRAWS, n_sizes, n_folds))
    present = confusion[-1].sum(axis=(0, 1, 3)) > 0
    drawn = np.stack(
        [_macro_f1(confusion[s, folds, repeats[:, s]].sum(axis=1), present) for s in range(n_sizes)], axis=1
    )
    scores = _macro_f1(confusion.sum(axis=(1, 2)), present)
    sizes = np.array([amounts[s][amounts[s] > 0].mean() if amounts[s].any() else np.nan for s in range(n_sizes)])
    kept = np.isfinite(sizes)
    low, high = np.quantile(drawn[:, kept], [0.025, 0.975], axis=0)
    law = fit_power_law(sizes[kept], scores[None, kept])
    laws = fit_power_law(sizes[kept], drawn[:, kept])
    return LearningCurve(sizes[kept], scores[kept], low, high, law, laws, n_now, voxels_per_slice, note)


def _macro_f1(confusion: NDArray[np.int64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    no_levels = np.zeros((*confusion.shape[:-1], 2), np.int64)
    return score_batch(confusion, no_levels, no_levels, present)["macro_f1"]
