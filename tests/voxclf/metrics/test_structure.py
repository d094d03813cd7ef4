"""Structure counts on arrays drawn by hand, and against SciPy's labelling."""

import numpy as np
import pytest
from scipy import ndimage

from voxclf.metrics.structure import choose_speck_volume, count_contacts, count_structures, find_unseen_contacts

UNIT = (1.0, 1.0, 1.0)


def test_a_ring_a_speck_and_a_hole_by_hand():
    classes = np.zeros((7, 9, 9), np.int16)
    classes[1:6, 1:6, 1:6] = 1
    classes[3, 3, 3] = 0  # a hole of one voxel
    classes[3, 7, 7] = 1  # a speck
    found = count_structures(classes, 3, UNIT, speck_nm3=2)
    assert found.components.tolist() == [2, 2, 0]
    assert found.specks.tolist() == [1, 1, 0]
    # The background encloses the block and the speck, both of which are holes in it.
    assert found.holes.tolist() == [2, 1, 0]
    assert found.contacts[0, 1] == 6 * 25 + 6 + 6
    assert found.contacts[0, 2] == 0


def test_pieces_joined_by_a_corner_are_one_and_a_corner_lets_nothing_out():
    classes = np.zeros((5, 5, 5), np.int16)
    classes[1:4, 1:4, 1:4] = 1
    classes[2, 2, 2] = 0
    classes[1, 1, 1] = 0  # touches the cavity by a corner only: it stays a hole, and the shell one piece
    found = count_structures(classes, 2, UNIT, 0)
    assert found.components[1] == 1
    assert found.holes[1] == 1
    classes[1, 2, 2] = 0  # a channel through a face opens it
    assert count_structures(classes, 2, UNIT, 0).holes[1] == 0


def test_specks_are_measured_in_nm_and_not_where_the_border_cuts():
    classes = np.zeros((6, 6, 6), np.int16)
    classes[2, 2, 2:4] = 1  # 2 voxels of 8 nm3
    classes[0, 0, 0] = 1  # cut by the border: who knows how large it is
    size = (2.0, 2.0, 2.0)
    assert count_structures(classes, 2, size, 16).specks.tolist() == [0, 0]
    assert count_structures(classes, 2, size, 16.1).specks.tolist() == [0, 1]


def test_unlabelled_voxels_are_no_class_and_touch_nothing():
    classes = np.array([[[0, -1, 1, 1, 0]]], np.int16)
    found = count_structures(classes, 2, UNIT, 0)
    assert found.components.tolist() == [2, 1]
    assert found.contacts.tolist() == [[0, 1], [1, 1]]


def test_counts_equal_scipy_on_noise():
    classes = np.random.default_rng(0).integers(0, 3, (23, 37, 41)).astype(np.int16)
    classes = ndimage.median_filter(classes, 3)
    found = count_structures(classes, 3, UNIT, 5)
    for k in range(3):
        pieces, n = ndimage.label(classes == k, np.ones((3, 3, 3)))
        assert found.components[k] == n
        sizes = np.bincount(pieces.ravel())[1:]
        inner = np.isin(np.arange(1, n + 1), np.unique(pieces[1:-1, 1:-1, 1:-1]))
        border = np.unique(np.concatenate([pieces.take(e, axis=a).ravel() for a in range(3) for e in (0, -1)]))
        cut = np.isin(np.arange(1, n + 1), border)
        assert found.specks[k] == np.sum((sizes < 5) & inner & ~cut)
        filled = ndimage.binary_fill_holes(classes == k)
        _, n_holes = ndimage.label(filled & (classes != k))
        assert found.holes[k] == n_holes


def test_contacts_by_brute_force_and_forbidden_ones():
    classes = np.random.default_rng(1).integers(-1, 4, (5, 6, 7)).astype(np.int16)
    expected = np.zeros((4, 4), int)
    for axis in range(3):
        pairs = np.moveaxis(classes, axis, 0)
        for a, b in zip(pairs[:-1].ravel(), pairs[1:].ravel(), strict=True):
            if a >= 0 and b >= 0:
                expected[a, b] += 1
                expected[b, a] += a != b
    np.testing.assert_array_equal(count_contacts(classes, 4), expected)
    found = count_structures(classes, 4, UNIT, 0)
    assert found.forbidden_contacts([(0, 1), (1, 0), (3, 2)]) == expected[0, 1] + expected[2, 3]


def test_pairs_that_never_touch_in_the_truth():
    truth = np.array([[[0, 0, 1, 1, 2, 2]]], np.int16)
    assert find_unseen_contacts(count_contacts(truth, 4)) == [(0, 2)]  # class 3 does not occur at all


@pytest.mark.parametrize(
    ("classes", "speck", "message"),
    [
        (np.zeros((3, 3), np.int16), 0, r"shape \(3, 3\); it must be \(Z, Y, X\)"),
        (np.zeros((3, 3, 3), np.float32), 0, "dtype float32; give class indices"),
        (np.full((3, 3, 3), 2, np.int16), 0, "run up to 2, allowed are negative .* to 1"),
        (np.zeros((3, 3, 3), np.int16), -1, "speck_nm3 is -1; give a volume"),
    ],
)
def test_wrong_input_is_named(classes, speck, message):
    with pytest.raises(ValueError, match=message):
        count_structures(classes, 2, UNIT, speck)


def test_counts_of_two_regions_add_up():
    one = count_structures(np.zeros((2, 3, 4), np.int16), 2, UNIT, 0)
    both = one + one
    assert both.components.tolist() == [2, 0]
    assert both.contacts.tolist() == [[2 * (12 + 16 + 18), 0], [0, 0]]
    assert choose_speck_volume((50.0, 4.0, 5.0)) == 27_000
