"""Intervals: reproducible, honest about few slabs, and covering the truth about as often as they claim."""

import numpy as np
import pytest
from scipy.stats import norm, t

from voxclf.metrics.bootstrap import TrainingLoss, bootstrap_scores
from voxclf.metrics.voxelwise import SCALAR_SCORES, ScoreTables, score_block, score_tables


def slab_tables(confusion):
    levels = np.zeros((2, 256), np.int64)
    return ScoreTables(np.asarray(confusion, np.int64), levels, levels)


def random_slabs(rng, n_slabs):
    """Slabs of 100 voxels whose accuracy varies from slab to slab around 0.7."""
    tables = []
    for accuracy in np.clip(rng.normal(0.7, 0.08, n_slabs), 0, 1):
        hits = rng.binomial(50, accuracy, 2)
        tables.append(slab_tables([[hits[0], 50 - hits[0]], [50 - hits[1], hits[1]]]))
    return tables


def test_value_is_the_score_of_all_slabs_and_draws_repeat():
    slabs = random_slabs(np.random.default_rng(0), 6)
    first = bootstrap_scores(slabs, np.random.default_rng(1), n_draws=200)
    again = bootstrap_scores(slabs, np.random.default_rng(1), n_draws=200)
    whole = score_tables(sum(slabs[1:], start=slabs[0]))
    assert set(first) == set(SCALAR_SCORES)
    for name in ("macro_f1", "accuracy", "kappa", "mean_iou"):
        assert first[name].value == getattr(whole, name)
        assert first[name].low < first[name].value < first[name].high
        assert first[name] == again[name]
    assert np.isnan(first["log_loss"].low)


def test_equal_slabs_have_no_spread():
    slabs = [slab_tables([[8, 2], [1, 9]])] * 5
    interval = bootstrap_scores(slabs, np.random.default_rng(0), n_draws=50)["accuracy"]
    assert interval.low == interval.high == interval.value == 0.85


def test_one_slab_tells_no_spread_and_empty_slabs_do_not_count():
    slabs = [slab_tables([[8, 2], [1, 9]]), slab_tables(np.zeros((2, 2)))]
    interval = bootstrap_scores(slabs, np.random.default_rng(0))["accuracy"]
    assert interval.value == 0.85
    assert np.isnan(interval.low)
    assert interval.to_dict() == {"value": 0.85, "low": None, "high": None}


def test_probability_scores_have_intervals_too():
    rng = np.random.default_rng(2)
    slabs = []
    for _ in range(5):
        truth = rng.integers(0, 3, (4, 5, 6))
        p = rng.dirichlet(np.ones(3), truth.shape).transpose(3, 0, 1, 2)
        slabs.append(score_block(truth, p, None, 3))
    intervals = bootstrap_scores(slabs, rng, n_draws=100)
    for name in ("macro_average_precision", "log_loss", "brier"):
        assert intervals[name].low < intervals[name].value < intervals[name].high


def test_tails_are_those_of_the_expanded_percentile_interval():
    slabs = random_slabs(np.random.default_rng(3), 8)
    interval = bootstrap_scores(slabs, np.random.default_rng(4), n_draws=4000)["accuracy"]
    means = np.array([np.trace(s.confusion) / 100 for s in slabs])
    drawn = np.random.default_rng(5).choice(means, (4000, 8)).mean(axis=1)
    tail = norm.cdf(np.sqrt(8 / 7) * t.ppf(0.025, 7))
    assert interval.low == pytest.approx(np.quantile(drawn, tail), abs=0.01)
    assert interval.high == pytest.approx(np.quantile(drawn, 1 - tail), abs=0.01)


def test_interval_covers_the_true_score_about_95_percent_of_the_time():
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(200):
        interval = bootstrap_scores(random_slabs(rng, 10), rng, n_draws=300)["accuracy"]
        covered += interval.low <= 0.7 <= interval.high
    assert 0.90 <= covered / 200 <= 0.985


def shifted(slabs, by):
    """The same slabs, classified by a model that gets ``by`` more voxels of each class wrong."""
    step = np.array([[-by, by], [by, -by]])
    return [slab_tables(slab.confusion + step) for slab in slabs]


def test_training_loss_reaches_as_far_as_the_final_model_may():
    slabs = [slab_tables([[40, 10], [10, 40]]) for _ in range(6)]
    # Accuracy is 0.8 with half of all training data, 0.7 with a quarter: a step more makes all of it, and 0.9.
    loss = TrainingLoss(slabs, shifted(slabs, 5), (0.5, 0.25))
    assert loss.reach == pytest.approx(1)
    interval = bootstrap_scores(slabs, np.random.default_rng(0), n_draws=50, loss=loss)["accuracy"]
    assert interval.value == 0.8
    assert interval.low == pytest.approx(0.8)
    assert interval.high == pytest.approx(0.9)


def test_training_loss_never_narrows_and_follows_the_same_draws():
    slabs = random_slabs(np.random.default_rng(7), 9)
    plain = bootstrap_scores(slabs, np.random.default_rng(1), n_draws=300)
    none_lost = TrainingLoss(slabs, slabs, (0.7, 0.4))
    unmoved = bootstrap_scores(slabs, np.random.default_rng(1), n_draws=300, loss=none_lost)
    assert all(unmoved[name] == plain[name] for name in ("accuracy", "macro_f1", "kappa"))
    for by in (-4, 4):
        wider = bootstrap_scores(
            slabs, np.random.default_rng(1), n_draws=300, loss=TrainingLoss(slabs, shifted(slabs, by), (0.7, 0.4))
        )
        for name in ("accuracy", "macro_f1", "kappa"):
            assert wider[name].value == plain[name].value
            assert wider[name].low <= plain[name].low
            assert wider[name].high >= plain[name].high
        # Every draw moves by the same step of accuracy, 0.08 times the reach.
        moved = max(wider["accuracy"].high - plain["accuracy"].high, plain["accuracy"].low - wider["accuracy"].low)
        assert moved == pytest.approx(0.08 * np.log(1 / 0.7) / np.log(0.7 / 0.4))


def test_a_slope_is_not_carried_on_far():
    assert TrainingLoss([], [], (0.3, 0.28)).reach == 2


def test_empty_slabs_are_left_out_of_the_training_loss_too():
    slabs = [slab_tables([[40, 10], [10, 40]])] * 3
    empty = slab_tables(np.zeros((2, 2)))
    loss = TrainingLoss([*slabs, empty], [*shifted(slabs, 5), empty], (0.5, 0.25))
    with_empty = bootstrap_scores([*slabs, empty], np.random.default_rng(0), n_draws=20, loss=loss)["accuracy"]
    assert with_empty.high == pytest.approx(0.9)


def test_refusals():
    with pytest.raises(ValueError, match="none holds a labelled voxel"):
        bootstrap_scores([slab_tables(np.zeros((2, 2)))], np.random.default_rng(0))
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        bootstrap_scores([slab_tables(np.eye(2))], np.random.default_rng(0), confidence=95)
