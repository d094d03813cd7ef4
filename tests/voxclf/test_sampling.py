"""Which voxels are drawn, which features they get, and how far apart splits keep them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.bank import FilterBank
from voxclf.engine.executors import SerialExecutor, ThreadExecutor
from voxclf.feature_stack import FeatureStack
from voxclf.labels import LabelSet
from voxclf.progress import last
from voxclf.sampling import (
    draw_rows,
    join_rows,
    random_folds,
    row_weights,
    share_budget,
    split_into_slabs,
    survey_labels,
    target_shares,
)

BANK = FilterBank("edges", 3)


def draw(image, labels, **options):
    survey = last(survey_labels(labels, 0)).total
    options = {"n_training": 300, "n_evaluation": 500, "balance": "equal", "seed": 3, **options}
    label_set = LabelSet.from_ids(survey.counts)
    return join_rows(
        last(draw_rows([image], labels, survey, FeatureStack(BANK, (20, 10, 10)), label_set, **options)).total
    ), survey


def test_the_survey_counts_every_label_once(save_volume, cells, sparse_labels):
    labels = save_volume(sparse_labels, "labels.zarr", "labels")
    survey = last(survey_labels(labels, 0, ThreadExecutor(2))).total
    values, counts = np.unique(sparse_labels[sparse_labels > 0], return_counts=True)
    assert survey.counts == dict(zip(values.tolist(), counts.tolist(), strict=True))
    inside = np.zeros(sparse_labels.shape, bool)
    for box in survey.boxes:
        inside[box.region.slices] = True
    assert inside[sparse_labels > 0].all()


def test_rows_carry_the_features_and_class_of_their_voxel(save_volume, cells, sparse_labels):
    image, _ = cells
    rows, _ = draw(save_volume(image), save_volume(sparse_labels, "labels.zarr", "labels"))
    halo = BANK.halo((20, 10, 10))
    padded = np.pad(image, [(h, h) for h in halo], mode="symmetric")
    features = BANK.compute(padded, (20, 10, 10))
    for part in (rows.training, rows.evaluation):
        z, y, x = part.positions.T
        np.testing.assert_allclose(part.features, features[:, z, y, x], rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(part.classes + 1, sparse_labels[z, y, x])
        assert len(np.unique(part.positions, axis=0)) == part.n_rows


def test_training_rows_are_balanced_and_evaluation_rows_are_not(save_volume, cells, sparse_labels):
    rows, survey = draw(save_volume(cells[0]), save_volume(sparse_labels, "labels.zarr", "labels"))
    assert rows.training.class_counts(3).tolist() == [100, 100, 100]
    shares = np.array(list(survey.counts.values())) / sum(survey.counts.values())
    assert rows.evaluation.n_rows == 500
    np.testing.assert_allclose(rows.evaluation.class_counts(3) / 500, shares, atol=0.07)


def test_drawing_depends_on_the_seed_only(save_volume, cells, sparse_labels):
    image, labels = save_volume(cells[0]), save_volume(sparse_labels, "labels.zarr", "labels")
    first, _ = draw(image, labels, executor=SerialExecutor())
    again, _ = draw(image, labels, executor=ThreadExecutor(2))
    other, _ = draw(image, labels, seed=4)
    np.testing.assert_array_equal(first.training.features, again.training.features)
    np.testing.assert_array_equal(first.evaluation.positions, again.evaluation.positions)
    assert not np.array_equal(first.training.positions, other.training.positions)


def test_a_budget_above_all_labels_takes_them_all(save_volume, cells, sparse_labels):
    rows, survey = draw(
        save_volume(cells[0]), save_volume(sparse_labels, "labels.zarr", "labels"), n_training=10**6, n_evaluation=10**6
    )
    assert rows.training.n_rows == rows.evaluation.n_rows == sum(survey.counts.values())


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(8, 3000))
def test_budgets_are_used_up_fairly(totals, budget):
    totals = np.array([*totals, 5])
    counts = share_budget(totals, budget, target_shares(totals, "equal"))
    assert (counts <= totals).all()
    assert ((counts > 0) == (totals > 0)).all()
    assert abs(counts.sum() - min(budget, totals.sum())) <= len(totals)
    # Nobody gets more than a class that still has voxels left, but for rounding.
    unfilled = counts[counts < totals]
    if len(unfilled):
        assert counts.max() <= unfilled.min() + len(totals)


@pytest.mark.parametrize(
    ("balance", "expected"), [("labelled", [0.8, 0.2, 0]), ("sqrt", [2 / 3, 1 / 3, 0]), ("equal", [0.5, 0.5, 0])]
)
def test_shares_of_classes(balance, expected):
    np.testing.assert_allclose(target_shares(np.array([400, 100, 0]), balance), expected)


def test_row_weights_give_every_class_its_share_however_many_rows_it_has():
    classes = np.array([0] * 30 + [1] * 10)
    weights = row_weights(classes, np.array([0.25, 0.75]))
    np.testing.assert_allclose(weights.mean(), 1)
    np.testing.assert_allclose(weights[classes == 1].sum() / weights.sum(), 0.75)


def test_slabs_keep_training_voxels_a_halo_away():
    rng = np.random.default_rng(0)
    positions = np.stack([rng.integers(0, n, 5000) for n in (20, 300, 100)], axis=1)
    split = split_into_slabs(positions, 5, (0, 9, 9))
    assert (split.axis, split.gap, split.n_folds) == (1, 9, 5)
    folds = split.fold_of(positions)
    assert set(folds) == set(range(5))
    for fold in range(5):
        test = positions[folds == fold, 1]
        train = positions[split.may_train(positions, fold), 1]
        assert np.abs(test[:, None] - train[None]).min() >= 9


def test_labels_too_close_together_are_refused():
    positions = np.argwhere(np.ones((1, 20, 20)))
    with pytest.raises(ValueError, match="too little to hold out slabs"):
        split_into_slabs(positions, 5, (30, 30, 30))


def test_random_folds_depend_on_the_voxel_alone():
    positions = np.argwhere(np.ones((7, 20, 30)))
    folds = random_folds(positions, 5, 0)
    np.testing.assert_array_equal(random_folds(positions[::-1], 5, 0), folds[::-1])
    assert np.abs(np.bincount(folds) / len(folds) - 0.2).max() < 0.03
    assert not np.array_equal(random_folds(positions, 5, 1), folds)
