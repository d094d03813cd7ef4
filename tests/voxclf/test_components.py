"""Pieces found block by block are those of the whole volume, wherever blocks cut them."""

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxclf.components import HALO, PieceForest, label_block
from voxclf.geometry import Region, split_into_blocks


def pad(array):
    return np.pad(array, 1, mode="symmetric")


def find_pieces(array, core, region=None):
    """Pieces of an array in memory through blocks, and the volume of their numbers (from 1)."""
    grid = split_into_blocks(array.shape, core, HALO, region=region)
    forest, numbers, padded = PieceForest(), np.zeros(array.shape, np.int64), pad(array)
    for block in grid:
        read = tuple(slice(a + 1, b + 1) for a, b in zip(block.read.start, block.read.stop, strict=True))
        pieces, here = label_block(padded[read], block, grid.region.start)
        offset = forest.add(pieces)
        numbers[block.core.slices] = np.where(here > 0, here.astype(np.int64) + offset, 0)
    new, pieces = forest.roots()
    return np.concatenate([[0], new + 1])[numbers], pieces


def describe(array, numbers):
    """Value, size and bounding box of every piece, as a sorted list."""
    found = []
    for i in np.unique(numbers[numbers > 0]):
        places = np.argwhere(numbers == i)
        value = int(array[tuple(places[0])])
        found.append((value, len(places), tuple(places.min(axis=0).tolist()), tuple((places.max(axis=0) + 1).tolist())))
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    core=st.tuples(*[st.integers(1, 5)] * 3),
    density=st.sampled_from([0.1, 0.3, 0.6]),
    seed=st.integers(0, 10**6),
)
def test_blocks_equal_the_whole(shape, core, density, seed):
    rng = np.random.default_rng(seed)
    array = (rng.integers(1, 3, shape) * (rng.random(shape) < density)).astype(np.uint32)
    whole = cc3d.connected_components(array, connectivity=26)
    numbers, pieces = find_pieces(array, core)
    assert describe(array, numbers) == describe(array, whole)
    listed = zip(pieces.values.tolist(), pieces.sizes.tolist(), pieces.low.tolist(), pieces.high.tolist(), strict=True)
    assert sorted((v, n, tuple(a), tuple(b)) for v, n, a, b in listed) == describe(array, whole)
    for number, place in enumerate(pieces.first.tolist(), start=1):
        assert numbers[tuple(place)] == number


@pytest.mark.parametrize("other", [(0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 0, 1)])
def test_a_piece_goes_on_through_faces_edges_and_corners_of_blocks(other):
    array = np.zeros((6, 6, 6), np.uint32)
    array[2, 2, 2] = array[tuple(2 + step for step in other)] = 7
    _, pieces = find_pieces(array, (3, 3, 3))
    assert pieces.sizes.tolist() == [2]
    # The other diagonal: from the upper block to the lower one.
    array = array[:, ::-1]
    assert find_pieces(array, (3, 3, 3))[1].sizes.tolist() == [2]


def test_nothing_outside_the_region_joins_what_is_inside():
    array = np.zeros((4, 4, 7), np.uint32)
    array[1, 1], array[2, 2, [0, 6]] = 1, 1  # a bar at z = 1, and its ends at z = 2
    _, pieces = find_pieces(array, (2, 2, 2), Region((2, 0, 0), (4, 4, 7)))
    assert sorted(pieces.sizes.tolist()) == [1, 1]


def test_an_empty_volume_has_no_pieces():
    assert len(find_pieces(np.zeros((3, 4, 5), np.uint32), (2, 2, 2))[1]) == 0
