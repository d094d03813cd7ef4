"""Reliability, calibration error and the fitted maps, against scikit-learn and made-up miscalibration."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from voxclf.metrics.calibration import (
    CalibrationMap,
    expected_calibration_error,
    fit_calibration,
    reliability_table,
)
from voxclf.metrics.voxelwise import ScoreTables, score_block, score_tables, to_levels


def overconfident(rng, n=40_000, sharpness=2.5):
    """Two classes with known true probability q, predicted too sharply: log-odds times `sharpness`."""
    q = rng.beta(1.2, 1.2, n)
    truth = (rng.random(n) < q).astype(np.int16)
    odds = (q / (1 - q)) ** sharpness
    p = odds / (1 + odds)
    return truth, np.stack([1 - p, p]).astype(np.float32), q


def test_reliability_equals_scikit_learn():
    truth, p, _ = overconfident(np.random.default_rng(0), 5000)
    quantised = to_levels(p)[1] / 255
    # scikit-learn puts a value on a bin edge into the lower bin, we into the upper: 10 bins of 256 levels
    # share the edges 0, 0.2, 0.4, ... only, so those levels are left out on both sides.
    keep = ~np.isin(to_levels(p)[1], np.arange(51, 255, 51))
    tables = score_block(truth[keep], p[:, keep], None, 2)
    table = reliability_table(tables, n_bins=10)
    observed, predicted = calibration_curve(truth[keep], quantised[keep], n_bins=10)
    np.testing.assert_allclose(table.observed[1], observed)
    np.testing.assert_allclose(table.predicted[1], predicted)
    assert table.count[1].sum() == keep.sum()


def test_calibration_error_by_hand():
    # Four voxels at p = 1 of which three come true, six at p = 0 of which none does: ECE = 0.4 * 0.25.
    class_levels, other_levels = np.zeros((2, 2, 256), np.int64)
    class_levels[1, 255], other_levels[1, 255], other_levels[1, 0] = 3, 1, 6
    class_levels[0, 0], class_levels[0, 255], other_levels[0, 0] = 1, 6, 3
    tables = ScoreTables(np.array([[6, 1], [0, 3]]), class_levels, other_levels)
    np.testing.assert_allclose(expected_calibration_error(tables), [0.1, 0.1])
    table = reliability_table(tables, n_bins=5)
    assert table.count[1].tolist() == [6, 0, 0, 0, 4]
    assert np.isnan(table.observed[1, 2])


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_calibration_mends_overconfidence_on_new_voxels(method):
    rng = np.random.default_rng(1)
    truth, p, _ = overconfident(rng)
    calibration = fit_calibration(score_block(truth, p, None, 2), method)
    new_truth, new_p, q = overconfident(rng)
    mended = calibration.apply(new_p)
    np.testing.assert_allclose(mended.sum(axis=0), 1, atol=1e-6)
    assert np.abs(mended[1] - q).mean() < 0.02
    before, after = (score_block(new_truth, x, None, 2) for x in (new_p, mended))
    assert expected_calibration_error(before).max() > 0.08
    assert expected_calibration_error(after).max() < 0.015
    assert score_tables(after).log_loss < score_tables(before).log_loss


def test_isotonic_equals_scikit_learn():
    truth, p, _ = overconfident(np.random.default_rng(2), 2000)
    tables = score_block(truth, p, None, 2)
    # The same with the one made-up voxel per level written out.
    levels = np.arange(256) / 255
    x = np.concatenate([to_levels(p)[1] / 255, levels])
    fitted = IsotonicRegression().fit(x, np.concatenate([truth, levels])).predict(levels)
    np.testing.assert_allclose(fit_calibration(tables).curves[1], fitted, atol=1e-6)


def test_platt_equals_scikit_learn():
    truth, p, _ = overconfident(np.random.default_rng(3), 20_000)
    curve = fit_calibration(score_block(truth, p, None, 2), "platt").curves[1]
    level = np.clip(to_levels(p)[1] / 255, 0.5 / 255, 1 - 0.5 / 255)
    fitted = LogisticRegression(C=1e9, tol=1e-9).fit(np.log(level / (1 - level))[:, None], truth)
    grid = np.clip(np.arange(256) / 255, 0.5 / 255, 1 - 0.5 / 255)
    expected = fitted.predict_proba(np.log(grid / (1 - grid))[:, None])[:, 1]
    np.testing.assert_allclose(curve, expected, atol=1e-3)


def test_a_useless_prediction_gets_the_class_frequency():
    truth = np.array([0] * 30 + [1] * 10)
    p1 = np.where(truth == 1, 0.2, 0.8)
    calibration = fit_calibration(score_block(truth, np.stack([1 - p1, p1]), None, 2), "platt")
    np.testing.assert_allclose(calibration.curves[1], 0.25, atol=1e-6)


def test_a_class_without_held_out_voxels_is_left_as_it_is():
    truth, p, _ = overconfident(np.random.default_rng(4), 500)
    three = np.concatenate([p * 0.9, np.full((1, p.shape[1]), 0.1, np.float32)])
    curves = fit_calibration(score_block(truth, three, None, 3)).curves
    np.testing.assert_allclose(curves[2], np.linspace(0, 1, 256), atol=1e-6)


def test_stored_and_float_probabilities_give_the_same():
    truth, p, _ = overconfident(np.random.default_rng(5), 2000)
    calibration = fit_calibration(score_block(truth, p, None, 2))
    stored = to_levels(p).astype(np.uint8).reshape(2, 20, 100)
    as_float = stored.astype(np.float32) / 255
    np.testing.assert_allclose(calibration.apply(stored), calibration.apply(as_float), atol=1e-6)


def test_voxels_mapped_to_zero_everywhere_keep_their_probabilities():
    curves = np.zeros((2, 256), np.float32)
    p = np.array([[0.3], [0.7]], np.float32)
    np.testing.assert_allclose(CalibrationMap(curves).apply(p), p)
    np.testing.assert_allclose(CalibrationMap(curves).apply(np.array([[51], [204]], np.uint8)), [[0.2], [0.8]])


def test_arrays_round_trip_and_damage_is_noticed():
    truth, p, _ = overconfident(np.random.default_rng(6), 500)
    calibration = fit_calibration(score_block(truth, p, None, 2))
    arrays = calibration.to_arrays()
    np.testing.assert_array_equal(CalibrationMap.from_arrays(arrays).curves, calibration.curves)
    with pytest.raises(ValueError, match="curves must rise"):
        CalibrationMap.from_arrays({"curves": arrays["curves"][:, ::-1]})
    with pytest.raises(ValueError, match="must be finite"):
        CalibrationMap.from_arrays({"curves": arrays["curves"] * np.nan})


def test_refusals():
    labels_only = score_block(np.array([0, 1]), None, np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="tables hold no probabilities"):
        fit_calibration(labels_only)
    truth, p, _ = overconfident(np.random.default_rng(7), 50)
    tables = score_block(truth, p, None, 2)
    with pytest.raises(ValueError, match="'isotonic', 'platt'"):
        fit_calibration(tables, "beta")
    with pytest.raises(ValueError, match="n_bins is 300"):
        reliability_table(tables, 300)
    with pytest.raises(ValueError, match="fitted for 2 classes"):
        fit_calibration(tables).apply(p[:1])
