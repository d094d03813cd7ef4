"""Reading with mirrored edges, and writing cores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxclf.engine.transfer import find_nonfinite, mirror_indices, read_block
from voxclf.geometry import Region, make_block


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 30))
def test_mirroring_is_numpys_symmetric_padding(size, before, after):
    expected = np.pad(np.arange(size), (before, after), mode="symmetric")
    np.testing.assert_array_equal(mirror_indices(-before, size + after, size), expected)


@pytest.mark.parametrize("core", [((0, 0, 0), (5, 6, 7)), ((4, 5, 6), (5, 6, 7)), ((2, 0, 3), (3, 6, 4))])
@pytest.mark.parametrize("halo", [(0, 0, 0), (1, 2, 3), (11, 9, 20)])
@pytest.mark.parametrize("alignment", [(1, 1, 1), (4, 2, 8)])
def test_read_block_equals_a_padded_whole(save_volume, core, halo, alignment):
    image = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7)
    block = make_block(0, Region(*core), halo, alignment)
    margin = 40
    padded = np.pad(image, margin, mode="symmetric")
    read = Region(*(tuple(v + margin for v in corner) for corner in (block.read.start, block.read.stop)))
    np.testing.assert_array_equal(read_block(save_volume(image), block)[0], padded[read.slices])


@settings(max_examples=20)
@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 2), st.integers(0, 3), st.integers(0, 4))
def test_nonfinite_voxels_are_found(value, z, y, x):
    array = np.zeros((1, 3, 4, 5), np.float32)
    assert find_nonfinite(array, (10, 20, 30)) is None
    array[0, z, y, x] = value
    assert find_nonfinite(array, (10, 20, 30)) == (10 + z, 20 + y, 30 + x)


def test_large_finite_values_are_not_taken_for_infinity():
    assert find_nonfinite(np.full((1, 9, 9, 9), 3e38, np.float32), (0, 0, 0)) is None
    assert find_nonfinite(np.full((1, 2, 2, 2), 255, np.uint8), (0, 0, 0)) is None
