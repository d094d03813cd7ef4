"""Voxelwise scores against hand-computed cases and scikit-learn; sums of blocks against the whole."""

import itertools
import json

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from voxclf.metrics.voxelwise import (
    SCALAR_SCORES,
    ScoreTables,
    precision_recall_curve,
    score_block,
    score_tables,
    to_levels,
)


def draw(rng, shape=(7, 11, 13), n_classes=4, absent=(), unlabelled=0.3):
    """Random truth and probabilities that lean towards it."""
    present = [k for k in range(n_classes) if k not in absent]
    truth = rng.choice(present, shape).astype(np.int16)
    raw = rng.random((n_classes, *shape)) + 0.7 * (np.arange(n_classes).reshape(-1, 1, 1, 1) == truth)
    probabilities = (raw / raw.sum(axis=0)).astype(np.float32)
    truth[rng.random(shape) < unlabelled] = -1
    return truth, probabilities


def test_two_classes_by_hand():
    # Truth 0 0 0 1 1, one unlabelled; predicted 0 0 1 1 0.
    truth = np.array([0, 0, 0, 1, 1, -1])
    predicted = np.array([0, 0, 1, 1, 0, 1])
    tables = score_block(truth, None, predicted, 2)
    np.testing.assert_array_equal(tables.confusion, [[2, 1], [1, 1]])
    scores = score_tables(tables)
    assert scores.n_voxels == 5
    assert scores.accuracy == pytest.approx(3 / 5)
    np.testing.assert_allclose(scores.precision, [2 / 3, 1 / 2])
    np.testing.assert_allclose(scores.recall, [2 / 3, 1 / 2])
    np.testing.assert_allclose(scores.f1, [2 / 3, 1 / 2])
    np.testing.assert_allclose(scores.dice, scores.f1)
    np.testing.assert_allclose(scores.iou, [2 / 4, 1 / 3])
    assert scores.macro_f1 == scores.mean_dice == pytest.approx(7 / 12)
    assert scores.mean_iou == pytest.approx(5 / 12)
    # Chance agreement: (3*3 + 2*2) / 25 = 13/25.
    assert scores.kappa == pytest.approx((3 / 5 - 13 / 25) / (12 / 25))
    assert np.isnan(scores.macro_average_precision)
    assert np.isnan(scores.log_loss)


def test_average_precision_and_losses_by_hand():
    # Class 1 scores .8 (true), .6 (false), .4 (true): AP = 1/2 * 1 + 1/2 * 2/3.
    p1 = np.array([204, 153, 102], np.uint8)
    tables = score_block(np.array([1, 0, 1]), np.stack([255 - p1, p1]), None, 2)
    scores = score_tables(tables)
    assert scores.average_precision[1] == pytest.approx(1 / 2 + 1 / 3)
    # Class 0 scores .2 (false), .4 (true), .6 (false): AP = 1 * 1/2.
    assert scores.average_precision[0] == pytest.approx(1 / 2)
    assert scores.log_loss == pytest.approx(-(np.log(0.8) + 2 * np.log(0.4)) / 3)
    assert scores.brier == pytest.approx(2 * (0.2**2 + 0.6**2 + 0.6**2) / 3)
    precision, recall = precision_recall_curve(tables, 1)
    np.testing.assert_allclose(recall, [0, 1 / 2, 1 / 2, 1])
    np.testing.assert_allclose(precision, [1, 1, 1 / 2, 2 / 3])


@pytest.mark.parametrize("absent", [(), (2,)])
@pytest.mark.parametrize("n_levels", [256, 1024])
def test_scores_equal_scikit_learn(absent, n_levels):
    rng = np.random.default_rng(n_levels + len(absent))
    truth, probabilities = draw(rng, absent=absent)
    scores = score_tables(score_block(truth, probabilities, None, 4, n_levels))
    known = truth >= 0
    y, p = truth[known], to_levels(probabilities, n_levels)[:, known] / (n_levels - 1)
    guess = probabilities[:, known].argmax(axis=0)
    present = np.unique(y)
    options = {"labels": present, "average": None, "zero_division": 0}
    np.testing.assert_allclose(scores.f1[present], sk.f1_score(y, guess, **options))
    np.testing.assert_allclose(scores.precision[present], sk.precision_score(y, guess, **options))
    np.testing.assert_allclose(scores.recall[present], sk.recall_score(y, guess, **options))
    np.testing.assert_allclose(scores.iou[present], sk.jaccard_score(y, guess, **options))
    macro = {**options, "average": "macro"}
    assert scores.macro_f1 == pytest.approx(sk.f1_score(y, guess, **macro))
    assert scores.mean_iou == pytest.approx(sk.jaccard_score(y, guess, **macro))
    assert scores.kappa == pytest.approx(sk.cohen_kappa_score(y, guess))
    assert scores.accuracy == pytest.approx(sk.accuracy_score(y, guess))
    ap = [sk.average_precision_score(y == k, p[k]) for k in present]
    np.testing.assert_allclose(scores.average_precision[present], ap)
    assert scores.macro_average_precision == pytest.approx(np.mean(ap))
    one_hot = np.eye(4)[y].T
    assert scores.brier == pytest.approx(((p - one_hot) ** 2).sum(axis=0).mean())
    assert scores.absent == absent
    assert np.isnan(scores.f1[list(absent)]).all()


def test_curve_equals_scikit_learn():
    truth, probabilities = draw(np.random.default_rng(3), unlabelled=0)
    tables = score_block(truth, probabilities, None, 4)
    precision, recall = precision_recall_curve(tables, 2)
    expected = sk.precision_recall_curve(truth.ravel() == 2, to_levels(probabilities)[2].ravel())
    np.testing.assert_allclose(precision[1:], expected[0][-2::-1])
    np.testing.assert_allclose(recall[1:], expected[1][-2::-1])


def test_levels_cost_little_against_exact_floats():
    truth, probabilities = draw(np.random.default_rng(4), shape=(23, 37, 41), unlabelled=0)
    scores = score_tables(score_block(truth, probabilities, None, 4))
    flat = truth.ravel()
    exact = np.mean([sk.average_precision_score(flat == k, probabilities[k].ravel()) for k in range(4)])
    assert scores.macro_average_precision == pytest.approx(exact, abs=2e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 23), max_size=4),
    with_probabilities=st.booleans(),
)
def test_score_of_sum_of_blocks_is_score_of_whole(seed, cuts, with_probabilities):
    truth, probabilities = draw(np.random.default_rng(seed), shape=(23, 3, 5), unlabelled=0.5)
    predicted = probabilities.argmax(axis=0)

    def count(part):
        block = probabilities[:, part] if with_probabilities else None
        return score_block(truth[part], block, predicted[part], 4)

    edges = [0, *sorted(cuts), 23]
    total = ScoreTables.zeros(4)
    for start, stop in itertools.pairwise(edges):
        total += count(slice(start, stop))
    whole = count(slice(None))
    for name in ("confusion", "class_levels", "other_levels"):
        np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
    assert score_tables(total).to_dict() == score_tables(whole).to_dict()


def test_uint8_and_float_probabilities_agree():
    truth, probabilities = draw(np.random.default_rng(5))
    stored = to_levels(probabilities).astype(np.uint8)
    a = score_block(truth, stored, probabilities.argmax(axis=0), 4)
    b = score_block(truth, probabilities, None, 4)
    assert a.to_dict() == b.to_dict()


def test_order_in_memory_does_not_matter():
    truth, probabilities = draw(np.random.default_rng(6))
    turned = np.asfortranarray(probabilities)
    assert score_block(truth, turned, None, 4).to_dict() == score_block(truth, probabilities, None, 4).to_dict()


def test_json_round_trip():
    truth, probabilities = draw(np.random.default_rng(7), absent=(1,))
    tables = score_block(truth, probabilities, None, 4)
    back = ScoreTables.from_dict(json.loads(json.dumps(tables.to_dict())))
    assert back.to_dict() == tables.to_dict()
    stored = json.loads(json.dumps(score_tables(tables).to_dict(), allow_nan=False))
    assert stored["f1"][1] is None
    assert set(SCALAR_SCORES) < set(stored)


def test_no_labelled_voxel_gives_nan_not_a_crash():
    tables = score_block(np.full((2, 3), -1), np.full((2, 2, 3), 0.5), None, 2)
    scores = score_tables(tables)
    assert tables.n_voxels == scores.n_voxels == 0
    assert not tables.has_probabilities
    assert np.isnan(scores.macro_f1)
    assert scores.absent == (0, 1)


def test_kappa_of_ten_billion_voxels_does_not_overflow():
    confusion = np.array([[4, 1], [1, 4]], np.int64) * 10**9
    tables = ScoreTables(confusion, np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64))
    assert score_tables(tables).kappa == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": np.zeros((2, 3))}, "truth must be integer class indices"),
        ({"truth": np.full((2, 3), 2)}, "allowed are 0 to 1"),
        ({"predicted": np.full((2, 3), -1)}, "predict a class for every labelled voxel"),
        ({"predicted": np.zeros((3, 2), int)}, r"predicted has shape \(3, 2\)"),
        ({"probabilities": np.full((3, 2, 3), 0.5)}, r"expected \(2, 2, 3\)"),
        ({"probabilities": np.full((2, 2, 3), np.nan)}, "allowed are 0 to 1 without nan"),
        ({"probabilities": np.full((2, 2, 3), 1.5)}, "run from 1.5 to 1.5"),
        ({"probabilities": np.zeros((2, 2, 3), int)}, "allowed are float"),
        ({"probabilities": np.zeros((2, 2, 3), np.uint8), "n_levels": 64}, "have exactly 256"),
        ({"probabilities": None, "predicted": None}, "both None"),
    ],
)
def test_bad_blocks_are_refused(change, message):
    arguments = {
        "truth": np.zeros((2, 3), int),
        "probabilities": np.full((2, 2, 3), 0.5),
        "predicted": np.zeros((2, 3), int),
        "n_classes": 2,
    }
    with pytest.raises(ValueError, match=message):
        score_block(**(arguments | change))


def test_bad_values_at_unlabelled_voxels_do_not_matter():
    truth = np.array([0, -1])
    tables = score_block(truth, np.array([[1.0, np.nan], [0.0, 7.0]]), np.array([0, 99]), 2)
    assert tables.n_voxels == 1


def test_tables_that_do_not_belong_together_are_refused():
    truth, probabilities = draw(np.random.default_rng(8))
    with_probabilities = score_block(truth, probabilities, None, 4)
    without = score_block(truth, None, probabilities.argmax(axis=0), 4)
    with pytest.raises(ValueError, match="some blocks were scored with probabilities and some without"):
        with_probabilities + without
    with pytest.raises(ValueError, match="same classes and n_levels"):
        with_probabilities + ScoreTables.zeros(4, 1024)
    with pytest.raises(ValueError, match=r"must be \(K, K\)"):
        ScoreTables(np.zeros((2, 3), np.int64), np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64))
