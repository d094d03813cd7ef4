"""Unsupervised scores against scikit-learn and by hand."""

import numpy as np
import pytest
import sklearn.metrics as sk

from voxclf.metrics.clustering import adjusted_rand_index, contingency_block, mutual_information


def test_equal_scikit_learn_and_add_up():
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 4, (23, 37))
    groups = np.where(rng.random(truth.shape) < 0.5, np.abs(truth), rng.integers(0, 6, truth.shape))
    table = contingency_block(truth[:9], groups[:9], 4, 6) + contingency_block(truth[9:], groups[9:], 4, 6)
    known = truth >= 0
    assert table.sum() == known.sum()
    assert mutual_information(table) == pytest.approx(sk.mutual_info_score(truth[known], groups[known]))
    assert adjusted_rand_index(table) == pytest.approx(sk.adjusted_rand_score(truth[known], groups[known]))


def test_by_hand():
    same = np.diag([5, 5])
    assert mutual_information(same) == pytest.approx(np.log(2))
    assert adjusted_rand_index(same) == 1.0
    independent = np.full((2, 2), 10)
    assert mutual_information(independent) == 0.0
    assert adjusted_rand_index(np.array([[7, 0]])) == 1.0


def test_huge_counts_do_not_overflow():
    table = np.array([[5, 1], [1, 5]], np.int64) * 10**10
    assert adjusted_rand_index(table) == pytest.approx((4 / 6) ** 2, rel=1e-6)


def test_empty_tables_are_undefined():
    assert np.isnan(mutual_information(np.zeros((2, 2), int)))
    assert np.isnan(adjusted_rand_index(np.zeros((2, 2), int)))


def test_refusals():
    with pytest.raises(ValueError, match="must be of one shape"):
        contingency_block(np.zeros(3, int), np.zeros(4, int), 1, 1)
    with pytest.raises(ValueError, match="groups 0 to 1"):
        contingency_block(np.zeros(3, int), np.full(3, 2), 1, 2)
