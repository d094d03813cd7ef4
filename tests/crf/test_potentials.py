"""What enters the CRF: probabilities and penalties, and every way they can be wrong."""

import numpy as np
import pytest

from crf.potentials import (
    PROBABILITY_FLOOR,
    against_last_class,
    check_probabilities,
    clip_probabilities,
    parse_penalty,
    penalty_matrix,
    per_axis,
    symmetric_part,
)


@pytest.fixture
def probabilities():
    values = np.random.default_rng(0).random((3, 4, 5, 6), dtype=np.float32)
    return values / values.sum(axis=0)


def test_probabilities_pass(probabilities):
    check_probabilities(probabilities)


def test_eight_bit_rounding_is_close_enough(probabilities):
    check_probabilities(np.rint(probabilities * 255) / 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:, 0], r"four axes \(K, Z, Y, X\)"),
        (lambda p: p[:1], "at least 2 classes"),
        (lambda p: p[:, :, :0], "at least 2 classes and 1 voxel"),
        (lambda p: p * 0.9, "Divide by the sum over axis 0"),
        (lambda p: p - 0.5, "Apply a softmax"),
        (lambda p: np.where(p == p.max(), np.nan, p), "NaN or infinity in slice z="),
        (lambda p: np.where(p == p.max(), np.inf, p), "NaN or infinity in slice z="),
        (lambda p: np.zeros_like(p), "must sum to one"),
    ],
)
def test_wrong_probabilities_are_named(probabilities, change, message):
    with pytest.raises(ValueError, match=message):
        check_probabilities(change(probabilities))


def test_integer_probabilities_are_a_type_error(probabilities):
    with pytest.raises(TypeError, match="Divide 8-bit probabilities by 255"):
        check_probabilities((probabilities * 255).astype(np.uint8))


def test_zeros_are_raised_to_the_floor():
    certain = np.zeros((2, 1, 1, 1))
    certain[0] = 1.0
    clipped = clip_probabilities(certain)
    assert clipped[1, 0, 0, 0] == pytest.approx(PROBABILITY_FLOOR, rel=1e-4)
    assert clipped.sum() == pytest.approx(1.0)


def test_a_number_is_the_potts_penalty():
    np.testing.assert_array_equal(penalty_matrix(2.0, 3, "w"), [[0, 2, 2], [2, 0, 2], [2, 2, 0]])


def test_a_matrix_is_kept_as_it_is():
    matrix = [[0.0, 1.0], [3.0, 0.5]]
    np.testing.assert_array_equal(penalty_matrix(parse_penalty(matrix, "w"), 2, "w"), matrix)
    np.testing.assert_array_equal(symmetric_part(matrix), [[0, 2], [2, 0.5]])


def test_a_matrix_of_the_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"bilateral_weight is a 2×2 matrix but the probabilities have 3 classes"):
        penalty_matrix(((0.0, 1.0), (1.0, 0.0)), 3, "bilateral_weight")


@pytest.mark.parametrize("weight", [[1.0, 2.0], np.ones((2, 3)), np.ones((2, 2, 2))])
def test_a_weight_that_is_not_square_is_refused(weight):
    with pytest.raises(ValueError, match=r"a number .* or a square \(K, K\) matrix"):
        parse_penalty(weight, "spatial_weight")


def test_a_nan_weight_is_refused():
    with pytest.raises(ValueError, match="finite penalties"):
        parse_penalty(np.nan, "spatial_weight")


def test_costs_against_the_last_class_differ_by_a_constant():
    rng = np.random.default_rng(1)
    matrix = rng.random((5, 5))
    messages = rng.random(5)
    full = matrix @ messages
    reduced, offset = against_last_class(matrix)
    np.testing.assert_allclose(reduced @ messages[:-1] + offset * messages.sum(), full[:-1] - full[-1])


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, (1.0, 2.0, 0.0)])
def test_widths_must_be_positive(value):
    with pytest.raises(ValueError, match="must be positive and finite"):
        per_axis(value, 3, "bilateral_sigma_nm", "nanometres")


def test_widths_come_alone_or_per_axis():
    assert per_axis(2, 3, "s") == (2.0, 2.0, 2.0)
    assert per_axis((1, 2, 3), 3, "s") == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match=r"give one number or 3 of them in the order \(z, y, x\)"):
        per_axis((1, 2), 3, "s")
