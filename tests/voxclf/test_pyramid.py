import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from voxclf.formats.multiscale import pyramid_levels
from voxclf.pyramid import average, downsampled_view, most_frequent
from voxclf.volume import create_volume, list_levels, open_level

FACTORS = st.tuples(*[st.sampled_from([1, 2])] * 3)


def boxes(array, factors):
    """Yield the place of every coarse voxel and the fine voxels it stands for."""
    counts = [-(-n // f) for n, f in zip(array.shape[1:], factors, strict=True)]
    for c, z, y, x in itertools.product(range(array.shape[0]), *map(range, counts)):
        box = tuple(slice(i * f, (i + 1) * f) for i, f in zip((z, y, x), factors, strict=True))
        yield (c, z, y, x), array[(c, *box)].ravel().tolist()


@settings(max_examples=60, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from([np.dtype("uint8"), np.dtype("int16"), np.dtype("uint64")]),
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=5),
        elements=st.integers(0, 100),
    ),
    factors=FACTORS,
)
def test_average_rounds_the_exact_mean(array, factors):
    coarse = average(array, factors)
    assert coarse.dtype == array.dtype
    for place, members in boxes(array, factors):
        assert int(coarse[place]) == math.floor(sum(members) / len(members) + 0.5)


def test_average_of_extremes_does_not_overflow():
    for dtype in ("uint8", "int8", "uint16", "int16", "uint32"):
        for value in (np.iinfo(dtype).min, np.iinfo(dtype).max):
            array = np.full((1, 2, 2, 2), value, dtype)
            assert average(array, (2, 2, 2)) == value
    assert average(np.full((1, 2, 2, 2), 60_000, np.float16), (2, 2, 2)) == np.float16(60_000)
    assert average(np.array([[[[-3, -2]]]], np.int8), (1, 1, 2)) == -2  # -2.5, halves upwards


@settings(max_examples=60, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from([np.dtype("uint8"), np.dtype("uint32")]),
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=5),
        elements=st.integers(0, 3),
    ),
    factors=FACTORS,
)
def test_most_frequent_counts_and_prefers_the_smallest(array, factors):
    coarse = most_frequent(array, factors)
    for place, members in boxes(array, factors):
        counts = Counter(members)
        assert coarse[place] == min(v for v, n in counts.items() if n == max(counts.values()))


@pytest.mark.parametrize(
    ("voxel_size", "factors"),
    [
        ((8, 8, 8), [(2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((50, 4.6, 4.6), [(1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2)]),
        ((6, 4, 4), [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((5, 4, 4), [(2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((4, 4, 40), [(2, 2, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2)]),
    ],
)
def test_levels_shrink_the_fine_axes_until_voxels_are_near_cubes(voxel_size, factors):
    levels = pyramid_levels((100, 500, 500), voxel_size, (64, 64, 64))
    assert [level.factors for level in levels[1 : len(factors) + 1]] == factors


@given(
    shape=st.tuples(*[st.integers(1, 5000)] * 3),
    voxel_size=st.tuples(*[st.floats(0.1, 1000)] * 3),
    chunk=st.tuples(*[st.integers(1, 128)] * 3),
)
def test_levels_end_in_one_chunk_and_agree_with_each_other(shape, voxel_size, chunk):
    levels = pyramid_levels(shape, voxel_size, chunk)
    assert (levels[0].shape, levels[0].voxel_size_nm) == (shape, voxel_size)
    assert all(n <= c for n, c in zip(levels[-1].shape, chunk, strict=True))
    assert len(levels) <= 40
    for finer, coarser in itertools.pairwise(levels):
        assert 2 in coarser.factors
        for axis in range(3):
            f = coarser.factors[axis]
            assert coarser.shape[axis] == -(-finer.shape[axis] // f)
            assert coarser.voxel_size_nm[axis] == finer.voxel_size_nm[axis] * f


@pytest.fixture
def volume(tmp_path):
    volume = create_volume(tmp_path / "v.zarr", (23, 37, 41), 2, "uint8", (50, 4.6, 4.6), (8, 16, 16), kind="image")
    volume.write((0, 0, 0), np.random.default_rng(0).integers(0, 256, (2, 23, 37, 41), dtype=np.uint8))
    return volume


@pytest.mark.parametrize("reduction", ["mean", "most frequent"])
@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
def test_view_read_in_boxes_equals_the_whole_reduced(volume, factors, reduction):
    view = downsampled_view(volume, factors, reduction)
    whole = {"mean": average, "most frequent": most_frequent}[reduction](volume.read((0, 0, 0), volume.shape), factors)
    assert (view.n_channels, *view.shape) == whole.shape
    assert view.voxel_size_nm == pytest.approx(tuple(v * f for v, f in zip((50, 4.6, 4.6), factors, strict=True)))
    z, y, x = view.shape
    for start in ((0, 0, 0), (3, 5, 7), (z - 1, y - 1, x - 1)):
        box = view.read(start, view.shape)
        np.testing.assert_array_equal(box, whole[:, start[0] :, start[1] :, start[2] :])


def test_view_survives_pickling(volume):
    view = downsampled_view(volume, (1, 2, 2), "mean")
    sent = pickle.dumps(view)
    assert len(sent) < 3000
    np.testing.assert_array_equal(pickle.loads(sent).read((0, 0, 0), view.shape), view.read((0, 0, 0), view.shape))


def test_levels_on_disk_are_as_planned_and_can_be_filled(volume, tmp_path):
    planned = pyramid_levels((23, 37, 41), (50, 4.6, 4.6), (8, 16, 16))
    stored = list_levels(tmp_path / "v.zarr")
    assert [(s.index, s.factors, s.shape) for s in stored] == [(p.index, p.factors, p.shape) for p in planned]
    for level in stored[1:]:
        view = downsampled_view(open_level(tmp_path / "v.zarr", level.index - 1), level.factors, "mean")
        target = open_level(tmp_path / "v.zarr", level.index, writable=True)
        assert target.shape == view.shape
        target.write((0, 0, 0), view.read((0, 0, 0), view.shape))
    coarsest = open_level(tmp_path / "v.zarr", stored[-1].index).read((0, 0, 0), stored[-1].shape)
    fine = volume.read((0, 0, 0), volume.shape)
    assert coarsest.mean() == pytest.approx(fine.mean(), rel=0.02)


def test_other_factors_are_refused(volume):
    with pytest.raises(ValueError, match=r"factors were \(1, 3, 3\); each must be 1 or 2"):
        downsampled_view(volume, (1, 3, 3), "mean")
