"""The split that contestants share: parts apart by a gap, nothing lost, classes and slices kept."""

import math

import numpy as np
import pytest
import tifffile
import tomli_w

from voxclf.compare.split import bounding_region, hold_out_slab, survey_all
from voxclf.engine.executors import SerialExecutor
from voxclf.labels import LabelSet
from voxclf.volume import open_labels

SIZE = (20.0, 10.0, 10.0)


def split(labels, label_set, gap, n_slabs, folder):
    return hold_out_slab(labels, label_set, SIZE, gap, n_slabs, folder, SerialExecutor())


def read_part(path, shape):
    return open_labels(path, shape).read((0, 0, 0), shape)[0]


def test_parts_are_a_gap_apart_and_hold_all_that_is_neither_in_the_gap(save_volume, sparse_labels, tmp_path):
    shape = sparse_labels.shape
    labels = save_volume(sparse_labels, "labels.zarr", kind="labels")
    label_set = LabelSet.from_ids([1, 2, 3], names=("inside", "membrane", "blob"))
    found = split(labels, label_set, (2, 3, 3), 4, tmp_path / "parts")
    train, test = read_part(found.train, shape), read_part(found.test, shape)
    assert not (train.astype(bool) & test.astype(bool)).any()
    for part in (train, test):
        np.testing.assert_array_equal(part[part > 0], sparse_labels[part > 0])
    # Labels span 37 voxels in y and 41 in x; with a gap of 3, x has most room: 41 / 4 against 37 / 4 and 23 / 3.
    along = [np.flatnonzero(part.any(axis=(0, 1))) for part in (train, test)]
    distances = np.abs(along[0][:, None] - along[1][None]) - 1
    assert distances.min() == 3
    kept = np.zeros(41, bool)
    kept[np.concatenate(along)] = True
    np.testing.assert_array_equal((train + test)[..., kept], sparse_labels[..., kept])
    assert (~kept).sum() in (3, 6)
    assert set(np.unique(test)) == {0, 1, 2, 3}
    assert open_labels(found.train, shape).metadata["classes"][1]["name"] == "membrane"
    z, y, x = (np.flatnonzero(test.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    assert str(found.region) == f"{z[0]}:{z[-1] + 1},{y[0]}:{y[-1] + 1},{x[0]}:{x[-1] + 1}"


def test_the_slab_with_most_classes_on_both_sides_is_held_out(save_volume, tmp_path):
    """Class 2 lies at both ends of x only, so one of the outer slabs must be held out."""
    dense = np.ones((4, 10, 60), np.uint8)
    dense[..., :5] = dense[..., 55:] = 2
    labels = save_volume(dense, "labels.zarr", kind="labels")
    found = split(labels, LabelSet.from_ids([1, 2]), (0, 0, 2), 3, tmp_path / "parts")
    assert str(found.region) in ("0:4,0:10,0:20", "0:4,0:10,40:60")


def test_another_unlabelled_value_stays_one(save_volume, tmp_path):
    dense = np.full((6, 20, 40), 9, np.uint8)
    dense[3, :, ::2], dense[3, :, 1::2] = 0, 4
    labels = save_volume(dense, "labels.zarr", kind="labels")
    found = split(labels, LabelSet.from_ids([0, 4], unlabelled=9), (0, 1, 1), 4, tmp_path / "parts")
    train, test = read_part(found.train, dense.shape), read_part(found.test, dense.shape)
    for part in (train, test):
        assert set(np.unique(part)) == {0, 4, 9}
        np.testing.assert_array_equal(part[part != 9], dense[part != 9])
    assert not ((train != 9) & (test != 9)).any()


def test_slices_of_a_listing_stay_slices(sparse_labels, tmp_path):
    shape = sparse_labels.shape
    entries = []
    for plane, axis, position in (("xy", 0, 11), ("xz", 1, 18), ("yz", 2, 20)):
        tifffile.imwrite(tmp_path / f"{plane}.tif", np.take(sparse_labels, position, axis))
        origin = [0, 0, 0]
        origin[axis] = position
        entries.append({"file": f"{plane}.tif", "plane": plane, "origin": origin})
    (tmp_path / "labels.toml").write_text(tomli_w.dumps({"slice": entries}))
    labels = open_labels(tmp_path / "labels.toml", shape)
    found = split(labels, LabelSet.from_ids([1, 2, 3]), (2, 3, 3), 4, tmp_path / "parts")
    assert found.train.endswith("train.toml")
    train, test = read_part(found.train, shape), read_part(found.test, shape)
    for part in (train, test):
        assert part.any()
        np.testing.assert_array_equal(part[part > 0], sparse_labels[part > 0])
    assert not (train.astype(bool) & test.astype(bool)).any()
    n_in_gap = math.prod(shape) - np.count_nonzero((train == 0) == (test == 0))
    assert np.count_nonzero(train) + np.count_nonzero(test) == n_in_gap
    assert all(1 in box.shape for box in open_labels(found.train, shape).labelled_boxes)


def test_labels_too_close_together_are_refused(save_volume, sparse_labels, tmp_path):
    labels = save_volume(sparse_labels, "labels.zarr", kind="labels")
    with pytest.raises(ValueError, match="label a second place, or use smaller --sigmas"):
        split(labels, LabelSet.from_ids([1, 2, 3]), (40, 40, 40), 5, tmp_path / "parts")


def test_classes_in_one_place_only_are_refused(save_volume, tmp_path):
    dense = np.ones((4, 10, 60), np.uint8)
    dense[..., 30:] = 2
    labels = save_volume(dense, "labels.zarr", kind="labels")
    with pytest.raises(ValueError, match=r"fewer than two classes are left on both sides of a gap of 1.*--validation"):
        split(labels, LabelSet.from_ids([1, 2]), (9, 9, 1), 2, tmp_path / "parts")


def test_no_label_at_all_is_refused(save_volume):
    labels = save_volume(np.zeros((4, 8, 8), np.uint8), "labels.zarr", kind="labels")
    with pytest.raises(ValueError, match="no labelled voxel: every voxel is 0"):
        survey_all(labels, 0, SerialExecutor())


def test_the_box_around_all_labels(save_volume):
    dense = np.zeros((20, 30, 40), np.uint8)
    dense[3, 5:9, 11] = dense[17, 22, 35] = 1
    survey = survey_all(save_volume(dense, "labels.zarr", kind="labels"), 0, SerialExecutor())
    assert str(bounding_region(survey)) == "3:18,5:23,11:36"
