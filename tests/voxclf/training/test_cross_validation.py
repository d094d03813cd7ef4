"""What is held out is never trained on, and intervals know that the models scored had less to train on."""

import numpy as np
import pytest

from voxclf.sampling import DrawnRows, Rows, SlabSplit
from voxclf.training.cross_validation import cross_validate

N = 100


class Memory:
    """Names the class of the nearest voxel it was trained on, less surely the farther it is."""

    def __init__(self, rows):
        self.rows = rows

    def predict_probabilities(self, features):
        distance = np.abs(features[0][:, None] - self.rows.features[0][None])
        nearest = distance.argmin(axis=1)
        sure = np.clip(1 - 0.01 * distance.min(axis=1), 0.5, 1)
        probabilities = np.stack([1 - sure, 1 - sure])
        probabilities[self.rows.classes[nearest], np.arange(len(nearest))] = sure
        return probabilities.astype(np.float32)


def rows_along_x(classes):
    positions = np.stack([np.zeros(N, int), np.zeros(N, int), np.arange(N)], axis=1)
    return Rows(np.arange(N, dtype=np.float32)[None], classes.astype(np.int16), positions)


@pytest.fixture
def drawn():
    rows = rows_along_x((np.arange(N) // 7) % 2)
    return DrawnRows(rows, rows)


SPLIT = SlabSplit(2, np.array([0, 20, 40, 60, 80, 100]), 5)


def test_models_never_see_their_slabs_or_the_gap(drawn):
    seen = []

    def fit(rows):
        seen.append(set(rows.positions[:, 2].tolist()))
        return Memory(rows)

    scores, models = cross_validate(fit, drawn, SPLIT, 2, seed=0)
    assert sorted(models) == [0, 1, 2, 3, 4]
    for slab, positions in enumerate(seen[:5]):
        assert positions.isdisjoint(range(20 * slab - 5, 20 * slab + 25))
    # Neighbours are held out together as well, then comes the naive split.
    for pair, positions in zip(((0, 1), (2, 3)), seen[5:7], strict=True):
        for slab in pair:
            assert positions.isdisjoint(range(20 * slab - 5, 20 * slab + 25))
    assert len(seen) == 8
    assert scores.honest.scores.n_voxels == N
    assert "5 slabs along x" in scores.honest.note


def test_what_less_training_costs_widens_the_interval_upwards():
    """A model as good as its share of the training voxels: wrong on all it has not, right on a part that grows."""

    class Share:
        def __init__(self, rows):
            self.share = rows.n_rows / N

        def predict_probabilities(self, features):
            x = features[0]
            truth = (x.astype(int) // 7) % 2
            is_right = (x * 37) % 100 < 100 * self.share
            probabilities = np.zeros((2, len(x)), np.float32)
            probabilities[np.where(is_right, truth, 1 - truth), np.arange(len(x))] = 1
            return probabilities

    rows = rows_along_x((np.arange(N) // 7) % 2)
    scores, _ = cross_validate(Share, DrawnRows(rows, rows), SPLIT, 2, seed=0)
    interval = scores.honest.intervals["accuracy"]
    assert interval.value == pytest.approx(0.73, abs=0.04)
    assert interval.high - interval.value > 1.3 * (interval.value - interval.low)


def test_two_slabs_leave_no_pair(drawn):
    scores, models = cross_validate(Memory, drawn, SlabSplit(2, np.array([0, 50, 100]), 5), 2, seed=0)
    assert sorted(models) == [0, 1]
    assert scores.honest.scores.n_voxels == N
