"""The gain of one prediction over another, on tables whose answer is known."""

import numpy as np
import pytest

from voxclf.metrics.paired import bootstrap_gain
from voxclf.metrics.voxelwise import score_block, score_tables


def cell(truth, predicted):
    return score_block(np.asarray(truth), None, np.asarray(predicted), 2)


def test_the_value_is_the_difference_of_the_scores_of_all_cells():
    rng = np.random.default_rng(0)
    truths = [rng.integers(0, 2, 200) for _ in range(6)]
    before = [cell(t, np.where(rng.random(200) < 0.3, 1 - t, t)) for t in truths]
    after = [cell(t, np.where(rng.random(200) < 0.1, 1 - t, t)) for t in truths]
    gain = bootstrap_gain(before, after, np.random.default_rng(1))
    for name in ("macro_f1", "mean_iou"):
        expected = getattr(score_tables(sum(after[1:], after[0])), name) - getattr(
            score_tables(sum(before[1:], before[0])), name
        )
        assert gain[name].value == pytest.approx(expected)
        assert 0 < gain[name].low < gain[name].value < gain[name].high


def test_cells_that_are_hard_for_both_do_not_blur_the_gain():
    """Accuracy runs from 50 to 95 % over the cells, the gain is the same everywhere: the interval is narrow."""
    truth = np.arange(2000) % 2
    before, after = [], []
    for n_wrong in (100, 300, 500, 700, 900, 1000):
        wrong = np.arange(2000) < n_wrong
        before.append(cell(truth, np.where(wrong, 1 - truth, truth)))
        after.append(cell(truth, np.where(wrong & (np.arange(2000) >= 40), 1 - truth, truth)))
    gain = bootstrap_gain(before, after, np.random.default_rng(0))["macro_f1"]
    assert gain.value == pytest.approx(0.02, abs=1e-3)
    assert gain.high - gain.low < 0.005


def test_no_change_is_no_gain_and_one_cell_says_nothing_of_the_spread():
    tables = [cell([0, 1, 1], [0, 1, 0])] * 5
    gain = bootstrap_gain(tables, tables, np.random.default_rng(0))["macro_f1"]
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)
    alone = bootstrap_gain(tables[:1], tables[:1], np.random.default_rng(0))["mean_iou"]
    assert alone.value == 0
    assert np.isnan(alone.low)


def test_wrong_input_is_named():
    empty = cell([-1], [0])
    with pytest.raises(ValueError, match="before has 1 cells, after 0"):
        bootstrap_gain([empty], [], np.random.default_rng(0))
    with pytest.raises(ValueError, match="none of the 1 cells holds a labelled voxel"):
        bootstrap_gain([empty], [empty], np.random.default_rng(0))
