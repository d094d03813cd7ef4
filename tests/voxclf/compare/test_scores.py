"""Intervals over seeds, paired differences and the front, against numbers worked out by hand."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxclf.compare.contestants import parse_contestants
from voxclf.compare.cost import Cost
from voxclf.compare.runs import Run, load_tables, save_tables
from voxclf.compare.scores import (
    Standing,
    combine_seeds,
    differences_to_best,
    find_pareto,
    rank,
    stage_gains,
    subtract_runs,
)
from voxclf.metrics.bootstrap import Interval
from voxclf.metrics.cells import CellTables
from voxclf.metrics.voxelwise import score_block


def test_one_seed_keeps_its_spatial_interval():
    assert combine_seeds([Interval(0.6, 0.5, 0.8)]) == Interval(0.6, pytest.approx(0.5), pytest.approx(0.8))


def test_three_seeds_by_hand():
    """Values 0.5, 0.6, 0.7: deviation 0.1, t(2, 97.5 %) = 4.30265, so the seeds' half width is 0.248414."""
    given = [Interval(v, v - 0.1, v + 0.2) for v in (0.5, 0.6, 0.7)]
    found = combine_seeds(given)
    assert found.value == pytest.approx(0.6)
    assert found.low == pytest.approx(0.6 - math.hypot(0.1, 0.248414), abs=1e-5)
    assert found.high == pytest.approx(0.6 + math.hypot(0.2, 0.248414), abs=1e-5)
    assert combine_seeds(given, (0.4, 0.8)) == Interval(found.value, 0.4, 0.8)


def test_labels_in_one_place_leave_the_interval_open():
    found = combine_seeds([Interval(0.5, math.nan, math.nan), Interval(0.7, math.nan, math.nan)])
    assert found.value == pytest.approx(0.6)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def make_tables(wrong_share, seed, n_cells=6):
    """Cells of two classes in which a share of the voxels is predicted wrongly."""
    rng = np.random.default_rng(seed)
    cells = {}
    for cell in range(n_cells):
        truth = rng.integers(0, 2, 400)
        predicted = np.where(rng.random(400) < wrong_share, 1 - truth, truth)
        probabilities = np.stack([predicted == 0, predicted == 1]).astype(np.float32)
        cells[cell] = score_block(truth, probabilities, predicted, 2)
    return CellTables(cells)


def make_standing(name, shares, seconds=1.0):
    (contestant,) = parse_contestants(name)
    runs = [
        Run(contestant, seed, Cost(2 * seconds, 10), Cost(seconds, 20), 5, 0.5, make_tables(share, seed), Path("p"))
        for seed, share in enumerate(shares)
    ]
    return Standing(contestant, tuple(runs), 1000)


def test_means_over_seeds():
    standing = make_standing("xgboost", (0.1, 0.2), seconds=4.0)
    assert standing.intervals["macro_f1"].value == pytest.approx(
        np.mean([scored.scores.macro_f1 for scored in standing.scored])
    )
    assert (standing.fit_s, standing.predict_s, standing.voxels_per_s) == (8.0, 4.0, 250.0)
    cold = replace(standing.runs[0], fit=Cost(99.0, 1), predict=Cost(99.0, 1))
    assert Standing(standing.contestant, (cold, *standing.runs), 1000).fit_s == 8.0
    assert standing.peak == Cost(24.0, 20)
    assert standing.intervals["kappa"].low < standing.intervals["kappa"].value < standing.intervals["kappa"].high


def test_paired_differences_and_verdicts():
    good, bad = make_standing("xgboost", (0.05, 0.05, 0.05)), make_standing("random_forest", (0.3, 0.3, 0.3))
    ranked = rank([bad, good])
    assert [standing.name for standing in ranked] == ["xgboost", "random_forest"]
    (difference,) = differences_to_best(ranked)
    assert (difference.name, difference.against, difference.verdict) == ("random_forest", "xgboost", "worse")
    gap = bad.intervals["macro_f1"].value - good.intervals["macro_f1"].value
    assert difference.gains["macro_f1"].value == pytest.approx(gap)
    assert subtract_runs(good, bad).verdict == "better"
    same = subtract_runs(good, good)
    assert same.verdict == "not told apart"
    assert same.gains["macro_f1"] == Interval(0, 0, 0)


def test_only_common_seeds_are_compared():
    one, two = make_standing("xgboost", (0.1,)), make_standing("random_forest", (0.1, 0.4))
    found = subtract_runs(two, one)
    assert found.gains["macro_f1"].value == pytest.approx(0, abs=1e-12)
    later = Standing(two.contestant, two.runs[1:], 1000)
    assert subtract_runs(later, one) is None


def test_a_stage_is_compared_with_the_same_model_without_it():
    standings = [
        make_standing(name, (0.2,))
        for name in ("random_forest", "random_forest+autocontext", "random_forest+autocontext+crf", "xgboost+crf")
    ]
    gains = stage_gains(standings)
    assert [(gain.name, gain.against) for gain in gains] == [
        ("random_forest+autocontext", "random_forest"),
        ("random_forest+autocontext+crf", "random_forest+autocontext"),
    ]


def test_the_front_by_hand():
    times, scores = [1.0, 2.0, 3.0, 0.5, 4.0], [0.5, 0.7, 0.6, 0.4, 0.7]
    assert find_pareto(times, scores) == [3, 0, 1]


def test_tables_are_read_back_as_they_were(tmp_path):
    tables = make_tables(0.2, 3)
    save_tables(tables, tmp_path / "scores.npz")
    found = load_tables(tmp_path / "scores.npz")
    assert found.by_cell.keys() == tables.by_cell.keys()
    for cell, part in tables.by_cell.items():
        np.testing.assert_array_equal(found.by_cell[cell].confusion, part.confusion)
        np.testing.assert_array_equal(found.by_cell[cell].class_levels, part.class_levels)


def test_costs_add_up_in_time_and_take_the_larger_memory():
    assert Cost(1, 10, 3) + Cost(2, 7, 5) == Cost(3, 10, 5)


METER = """
import numpy as np
from voxclf.compare.cost import CostMeter
{before}
with CostMeter() as meter:
    array = np.ones(30_000_000)
    array += array[::-1]
    del array
print(meter.cost.peak_bytes, meter.cost.seconds)
"""
TRAINING = "from voxclf.freed_memory import keep_freed_memory; keep_freed_memory(); np.ones(50_000_000)"


@pytest.mark.parametrize("before", ["", TRAINING])
def test_the_meter_sees_an_array_that_is_gone_again(before):
    """Also where its memory is what a training before has freed and kept."""
    # In a process of its own: memory that others have freed may be used again, and then nothing grows.
    code = METER.format(before=before)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    peak_bytes, seconds = map(float, answer.split())
    assert 200e6 < peak_bytes < 2e9
    assert seconds > 0
