"""Geometry: cores partition the region, halos and alignment hold, for any shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxclf.geometry import Region, make_block, parse_region, round_down, round_up, split_into_blocks

extents = st.tuples(*[st.integers(1, 23)] * 3)
small = st.tuples(*[st.integers(1, 5)] * 3)
halos = st.tuples(*[st.integers(0, 7)] * 3)


@st.composite
def regions(draw, shape):
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    return Region(start, stop)


@given(st.data(), extents, extents, halos, small)
def test_cores_partition_the_region(data, shape, core_shape, halo, alignment):
    region = data.draw(regions(shape))
    blocks = split_into_blocks(shape, core_shape, halo, alignment, region)
    written = np.zeros(shape, int)
    for index, block in enumerate(blocks):
        assert block.index == index
        written[block.core.slices] += 1
    expected = np.zeros(shape, int)
    expected[region.slices] = 1
    np.testing.assert_array_equal(written, expected)


@given(extents, extents, halos, small)
def test_computed_boxes_are_aligned_and_hold_the_core(shape, core_shape, halo, alignment):
    for block in split_into_blocks(shape, core_shape, halo, alignment):
        for axis in range(3):
            assert block.computed.start[axis] % alignment[axis] == 0
            assert block.computed.stop[axis] % alignment[axis] == 0
            assert block.computed.start[axis] <= block.core.start[axis]
            assert block.core.stop[axis] <= block.computed.stop[axis]
            assert block.computed.start[axis] - block.read.start[axis] >= halo[axis]
            assert block.halo[axis] % alignment[axis] == 0
        inner = np.zeros(block.computed.shape)[block.core_in_computed.slices]
        assert inner.shape == block.core.shape


def test_blocks_of_two_regions_lie_on_one_grid():
    whole = {block.core.start for block in split_into_blocks((40, 40, 40), (16, 16, 16))}
    part = split_into_blocks((40, 40, 40), (16, 16, 16), region=Region((5, 16, 20), (40, 40, 40)))
    assert part[0].core.start == (5, 16, 20)
    assert {block.core.start for block in part if min(block.core.start) % 16 == 0} & whole


def test_a_ragged_block_reads_on_to_the_next_aligned_voxel():
    block = make_block(0, Region((16, 0, 0), (21, 7, 8)), halo=(3, 0, 0), alignment=(4, 8, 1))
    assert block.computed == Region((16, 0, 0), (24, 8, 8))
    assert block.halo == (4, 0, 0)
    assert block.read == Region((12, 0, 0), (28, 8, 8))
    assert block.core_in_computed == Region((0, 0, 0), (5, 7, 8))


@pytest.mark.parametrize(
    ("value", "multiple", "up", "down"), [(0, 4, 0, 0), (1, 4, 4, 0), (8, 4, 8, 8), (-1, 4, 0, -4)]
)
def test_rounding(value, multiple, up, down):
    assert round_up(value, multiple) == up
    assert round_down(value, multiple) == down


def test_parse_region_fills_in_open_ends():
    assert parse_region("2:5,:, 3:", (10, 20, 30)) == Region((2, 0, 3), (5, 20, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:2,3:4", "not three ranges"),
        ("1:2,3:4,5", "not three ranges"),
        ("a:2,:,:", "not a range of whole numbers"),
        ("5:5,:,:", "empty or outside"),
        (":,:,0:31", "empty or outside 0:30"),
    ],
)
def test_parse_region_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_region(text, (10, 20, 30))


def test_split_refuses_a_region_outside():
    with pytest.raises(ValueError, match="sticks out"):
        split_into_blocks((4, 4, 4), (2, 2, 2), region=Region((0, 0, 0), (5, 4, 4)))
    with pytest.raises(ValueError, match="core_shape was"):
        split_into_blocks((4, 4, 4), (0, 2, 2))


def test_a_large_grid_takes_no_memory():
    grid = split_into_blocks((10**4,) * 3, (64, 64, 64), (9, 9, 9))
    assert len(grid) == 157**3
    assert grid[-1].core.stop == (10**4,) * 3
