"""What a model is worth on voxels it was not trained on: scores from held-out slabs, and the naive one beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxclf.geometry import Region
from voxclf.metrics.bootstrap import TrainingLoss
from voxclf.metrics.cells import CellGrid, CellTables
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.voxelwise import ScoreTables, score_block
from voxclf.models.trees import Classifier
from voxclf.progress import Progress, silent
from voxclf.sampling import DrawnRows, Rows, SlabSplit, random_folds

MAX_TRAINING_ROWS = 60_000
"""Rows that a model of the cross-validation is trained on: a forest of 150 000 rows scores 0.005 macro F1 more, and six
of them would take most of the time of a fit."""


@dataclass(frozen=True)
class CrossValidation:
    """Scores of models on labels they were not trained on.

    ``honest`` comes from held-out slabs, with intervals; ``naive`` from voxels held out at random (trees) or trained
    on (networks). The notes of both say which.
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
class _Fold:
    """One model to fit and score: without no slab (the naive split), one, or two."""

    slabs: tuple[int, ...]
    train: np.ndarray
    test: np.ndarray


def cross_validate(
    fit: Callable[[Rows], Classifier],
    rows: DrawnRows,
    split: SlabSplit,
    n_classes: int,
    seed: int,
    progress: Progress = silent,
) -> tuple[CrossValidation, dict[int, Classifier]]:
    """Score on held-out slabs, each a halo away from what was trained on, and once on voxels held out at random.

    Returns
    -------
    CrossValidation
        The scores.
    dict of int to Classifier
        The model that was trained without each slab. A slab that leaves fewer than two classes to train on has none.

    Raises
    ------
    ValueError
        If no slab could be held out.
    """
    folds = [*_hold_out_slabs(rows, split), _hold_out_at_random(rows, split.n_folds, seed)]
    usable = [fold for fold in folds if fold.test.any() and len(np.unique(rows.training.classes[fold.train])) > 1]
    grid = _bootstrap_grid(rows.evaluation.positions)

    def score() -> Iterator[tuple[_Fold, Classifier, CellTables]]:
        for fold in usable:
            model = fit(rows.training.take(_thin_out(np.flatnonzero(fold.train), seed)))
            held_out = rows.evaluation.take(fold.test)
            yield fold, model, _score_cells(held_out, model.predict_probabilities(held_out.features), grid)

    found: dict[tuple[int, ...], CellTables] = {}
    models: dict[int, Classifier] = {}
    for fold, model, tables in progress("cross-validation", score(), len(usable), "model"):
        found[fold.slabs] = tables
        if len(fold.slabs) == 1:
            models[fold.slabs[0]] = model
    if not models:
        raise ValueError(
            "labels are too unevenly placed to hold out slabs: no slab left two classes to train on; label several "
            "places, or use fewer --folds"
        )
    honest = sum((found[(slab,)] for slab in models), CellTables())
    kept = {fold.slabs: float(fold.train.mean()) for fold in usable}
    share = np.mean([kept[(slab,)] for slab in models])
    note = (
        f"{len(models)} slabs along {'zyx'[split.axis]}, training voxels at least {split.gap} voxels away from each, "
        f"which left {share:.0%} of them to train on; {honest.total(n_classes).n_voxels:,} labelled voxels scored"
    )
    naive_note = f"one in {split.n_folds} labelled voxels held out at random"
    scores = CrossValidation(
        ScoredLabels.from_cells(honest, n_classes, note, seed, _training_loss(found, kept, honest, n_classes)),
        ScoredLabels.from_tables(found.get((), CellTables()).total(n_classes), naive_note),
    )
    return scores, models


def _training_loss(
    found: dict[tuple[int, ...], CellTables],
    kept: dict[tuple[int, ...], float],
    honest: CellTables,
    n_classes: int,
) -> TrainingLoss | None:
    """What a second slab less to train on costs on the slabs of each pair; None where no pair could be held out."""
    pairs = [slabs for slabs in found if len(slabs) == 2 and all((slab,) in found for slab in slabs)]
    if not pairs:
        return None
    ones = [(slab,) for pair in pairs for slab in pair]
    more, less = (sum((found[slabs] for slabs in part), CellTables()) for part in (ones, pairs))
    shares = float(np.mean([kept[one] for one in ones])), float(np.mean([kept[pair] for pair in pairs]))
    if not 1 > shares[0] > shares[1] > 0:
        return None
    none = ScoreTables.zeros(n_classes)
    in_order = sorted(honest.by_cell)
    return TrainingLoss(
        [more.by_cell.get(cell, none) for cell in in_order], [less.by_cell.get(cell, none) for cell in in_order], shares
    )


def _thin_out(indices: np.ndarray, seed: int) -> np.ndarray:
    """Keep at most as many rows as a cross-validated model needs."""
    if len(indices) <= MAX_TRAINING_ROWS:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, MAX_TRAINING_ROWS, replace=False))


def _hold_out_slabs(rows: DrawnRows, split: SlabSplit) -> Iterator[_Fold]:
    """Each slab by itself, and most of them once more together with their neighbour.

    A slab of twice the thickness takes away labels and also lies farther from what is left: both differ in the same
    sense between a held-out slab and the volume, whose voxels mostly lie nearer to labels than the inside of a slab.
    """
    slab_of = split.fold_of(rows.evaluation.positions)
    n = split.n_folds
    for slabs in [*((slab,) for slab in range(n)), *((slab, slab + 1) for slab in range(0, n - 1, 2))]:
        train = np.all([split.may_train(rows.training.positions, slab) for slab in slabs], axis=0)
        yield _Fold(slabs, train, np.isin(slab_of, slabs))


def _hold_out_at_random(rows: DrawnRows, n_folds: int, seed: int) -> _Fold:
    train = random_folds(rows.training.positions, n_folds, seed) != 0
    return _Fold((), train, random_folds(rows.evaluation.positions, n_folds, seed) == 0)


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


def _bootstrap_grid(positions: np.ndarray) -> CellGrid:
    start, stop = positions.min(axis=0), positions.max(axis=0) + 1
    return CellGrid.over(Region(tuple(start.tolist()), tuple(stop.tolist())))
