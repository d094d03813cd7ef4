"""The mixture on numbers that can be checked by hand, and what it refuses."""

import numpy as np
import pytest

from voxclf.errors import ModelError
from voxclf.models.gaussian_mixture import GaussianMixture


def two_peaks():
    """Equal weights, unit variance, means -1 and +1: the log odds at x are 2 x."""
    return GaussianMixture.from_parameters(
        weights=np.array([0.5, 0.5]),
        means=np.array([[-1.0], [1.0]]),
        precisions_cholesky=np.ones((2, 1, 1)),
        component_class=np.array([2, 0]),
        n_classes=3,
    )


def test_hand_computed_odds():
    x = np.linspace(-3, 3, 9001, dtype=np.float32)[None]
    found = two_peaks().predict_probabilities(x)
    right = 1 / (1 + np.exp(-2 * x[0].astype(np.float64)))
    np.testing.assert_allclose(found, [right, np.zeros_like(right), 1 - right], atol=1e-6)


def test_components_of_one_class_add_up():
    mixture = two_peaks()
    arrays = {**mixture.to_arrays(), "component_class": np.array([1, 1], dtype=np.int32)}
    found = GaussianMixture.from_arrays(arrays).predict_probabilities(np.zeros((1, 4), dtype=np.float32))
    np.testing.assert_allclose(found, [[0] * 4, [1] * 4, [0] * 4], atol=1e-6)


def test_far_away_rows_still_have_probabilities():
    found = two_peaks().predict_probabilities(np.float32([[-1e6, 1e6]]))
    np.testing.assert_array_equal(found.argmax(axis=0), [2, 0])
    np.testing.assert_allclose(found.sum(axis=0), 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("offset", np.zeros((2, 2)), "asks for"),
        ("log_weight", np.array([0.0, np.nan]), "not finite"),
        ("component_class", np.array([0, 3], dtype=np.int32), "component_class"),
        ("component_class", np.array([0.0, 1.0]), "component_class"),
        ("whitening", np.zeros(3), "whitening"),
        ("n_classes", np.array(1), "at least 2"),
    ],
)
def test_tampered_arrays_are_refused(name, value, message):
    with pytest.raises(ModelError, match=message):
        GaussianMixture.from_arrays({**two_peaks().to_arrays(), name: value})


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match=r"needs \(1, N\)"):
        two_peaks().predict_probabilities(np.zeros((2, 5), dtype=np.float32))
