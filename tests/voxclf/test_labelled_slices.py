"""Labelled slices are told from the lines that crossing slices leave."""

import numpy as np
import pytest

from voxclf.engine.executors import SerialExecutor
from voxclf.labelled_slices import LabelProfiles, profile_labels, spell_runs
from voxclf.labels import LabelSet
from voxclf.progress import silent
from voxclf.sampling import survey_labels

LABELS = LabelSet.from_ids([1, 2, 3])


def profile(array):
    along = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        along.append(np.stack([(array == i).sum(axis=others) for i in LABELS.ids]))
    return LabelProfiles(tuple(along))


def test_profiles_of_blocks_are_those_of_the_whole(save_volume, sparse_labels):
    labels = save_volume(sparse_labels, "labels.zarr", kind="labels")
    survey = None
    for part in survey_labels(labels, 0):
        survey = part.total
    found = profile_labels(labels, survey, LABELS, SerialExecutor(), silent)
    for mine, expected in zip(found.along, profile(sparse_labels).along, strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert found.n_labelled == np.count_nonzero(sparse_labels)


def test_crossing_slices(sparse_labels):
    found = profile(sparse_labels)
    assert [found.labelled_slices(axis).tolist() for axis in range(3)] == [[11], [18], [20]]
    assert len(found.slices_with_labels(0)) == 23
    # A voxel on a slice belongs to it; where slices cross, to the first axis; off all slices, to none.
    positions = np.array([[11, 3, 4], [2, 18, 4], [2, 3, 20], [11, 18, 20], [2, 3, 4]])
    assert found.assign(positions).tolist() == [0, 1, 2, 0, -1]


def test_dense_stack_counts_along_z(cells):
    found = profile(cells[1])
    assert found.slice_axis() == 0
    assert found.labelled_slices(0).tolist() == list(range(23))
    flat = np.zeros((20, 60, 70), np.uint8)
    flat[[2, 6, 10]] = 1
    found = profile(flat)
    assert found.labelled_slices(0).tolist() == [2, 6, 10]
    assert found.slice_axis() == 0
    assert found.labelled_slices(1).size == 0


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "none"),
        ([3], "3"),
        ([0, 1, 2, 5, 7, 8], "0–2, 5, 7–8"),
        (range(0, 40, 2), "0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
    ],
)
def test_runs(numbers, text):
    assert spell_runs(np.array(list(numbers), int)) == text
