"""The power law finds what it was made from, and the curve says what labels bring on a volume where that is known."""

import numpy as np
import pytest

from voxclf.config import FitOptions
from voxclf.engine.executors import SerialExecutor
from voxclf.explore.learning_curve import LearningCurve, PowerLaw, fit_power_law, measure_learning_curve
from voxclf.labelled_slices import profile_labels
from voxclf.labels import LabelSet
from voxclf.progress import silent
from voxclf.sampling import survey_labels

N = np.array([0.25, 0.5, 1, 2, 4])


@pytest.mark.parametrize("law", [(0.9, 0.2, 0.5), (0.75, 0.05, 1.2), (0.99, 0.4, 0.35)])
def test_exact_laws_are_found(law):
    ceiling, loss, exponent = law
    found = fit_power_law(N, (ceiling - loss * N**-exponent)[None])
    assert (found.ceiling[0], found.loss[0], found.exponent[0]) == pytest.approx(law, abs=1e-6)
    assert found.at(8.0)[0, 0] == pytest.approx(ceiling - loss * 8**-exponent)


def test_no_law_falls_or_rises_above_one():
    falling = fit_power_law(N, np.array([[0.9, 0.8, 0.7, 0.6, 0.5]]))
    assert falling.at(100.0)[0, 0] == pytest.approx(0.7)
    steep = fit_power_law(N, np.array([[0.5, 0.65, 0.8, 0.95, 0.999]]))
    assert steep.at(1000.0)[0, 0] <= 1
    # Several rows are fitted at once, each as if alone.
    both = fit_power_law(N, np.array([[0.5, 0.6, 0.65, 0.7, 0.72], [0.9, 0.8, 0.7, 0.6, 0.5]]))
    alone = fit_power_law(N, np.array([[0.5, 0.6, 0.65, 0.7, 0.72]]))
    assert both.ceiling[0] == pytest.approx(alone.ceiling[0], rel=1e-12)


def make_curve(laws):
    law = PowerLaw(*(np.array([v]) for v in (0.9, 0.2, 0.5)))
    scores = law.at(N)[0]
    return LearningCurve(N, scores, scores - 0.01, scores + 0.01, law, laws, 4.0, 1000.0, "made up")


def test_gain_and_its_interval_come_from_the_laws():
    loss = np.linspace(0.1, 0.3, 41)
    curve = make_curve(PowerLaw(np.full(41, 0.9), loss, np.full(41, 0.5)))
    gain = curve.expect_gain(1)
    step = 4**-0.5 - 5**-0.5
    assert gain.value == pytest.approx(0.2 * step)
    assert gain.low == pytest.approx(np.quantile(loss, 0.025) * step)
    assert gain.high == pytest.approx(np.quantile(loss, 0.975) * step)
    values = curve.to_dict()
    assert values["gain_of_one_slice"]["value"] == gain.value
    assert values["expected_now"]["value"] == pytest.approx(0.9 - 0.2 * 0.5)


def measure(save_volume, image, labels, **options):
    volume = save_volume(image, "image.zarr", overwrite=True)
    drawn = save_volume(labels, "labels.zarr", kind="labels", overwrite=True)
    survey = None
    for part in survey_labels(drawn, 0):
        survey = part.total
    label_set = LabelSet.from_ids([1, 2, 3])
    profiles = profile_labels(drawn, survey, label_set, SerialExecutor(), silent)
    asked = FitOptions(bank="edges", trees=6, max_depth=8, folds=3, **options)
    return measure_learning_curve(volume, drawn, survey, profiles, label_set, asked, SerialExecutor())


def test_more_labels_score_better_on_slabs_held_out(save_volume, cells):
    image, dense = cells
    curve = measure(save_volume, image, dense)
    assert len(curve.scores) == 4
    assert (np.diff(curve.n_slices) > 0).all()
    # A third is held out and a gap lost, so less than all labels were trained on.
    assert curve.n_slices[-1] < curve.n_slices_now == 23
    assert curve.scores[-1] > curve.scores[0]
    assert (curve.low <= curve.scores).all()
    assert (curve.scores <= curve.high).all()
    assert "whole labelled slices" in curve.note


def test_few_slices_are_cut_into_pieces(save_volume, cells, sparse_labels):
    curve = measure(save_volume, cells[0], sparse_labels)
    assert "pieces of slices" in curve.note
    assert 2 < curve.n_slices_now < 3.5
    again = measure(save_volume, cells[0], sparse_labels)
    np.testing.assert_array_equal(curve.scores, again.scores)


def test_labels_too_close_together_are_refused(save_volume, cells):
    labels = np.zeros_like(cells[1])
    labels[11:13, 18:20, 20:22] = cells[1][11:13, 18:20, 20:22]
    labels[11, 18, 20], labels[12, 18, 20] = 1, 2
    with pytest.raises(ValueError, match="too little to hold out slabs"):
        measure(save_volume, cells[0], labels)
