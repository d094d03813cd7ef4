"""From runs to a ranking: scores over seeds with intervals, differences between contestants, what each stage gains.

Two things move a score: where the labels happen to lie, and the seed. The first is the spatial bootstrap of
:mod:`voxclf.metrics.bootstrap`, within each run; the second the spread between runs. They are independent, so the
half widths of their intervals are added as squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Literal

import numpy as np

from voxclf.compare.contestants import Contestant
from voxclf.compare.cost import Cost
from voxclf.compare.runs import Run
from voxclf.metrics.bootstrap import Interval
from voxclf.metrics.paired import GAINS, bootstrap_gain
from voxclf.metrics.scored import ScoredLabels

SCORES = ("macro_f1", "mean_iou", "macro_average_precision", "kappa")
LIMITS = {"kappa": (-1.0, 1.0)}
Verdict = Literal["better", "worse", "not told apart"]


def combine_seeds(
    intervals: Sequence[Interval], limits: tuple[float, float] = (-math.inf, math.inf), confidence: float = 0.95
) -> Interval:
    """One interval for the mean over seeds, from the spatial interval of each.

    Below and above the mean, the spatial half width (mean over seeds) and the half width of a t interval over seeds
    are added as squares. Of one seed only the spatial part is known.

    Parameters
    ----------
    intervals : sequence of Interval
        One per seed; ends may be nan where the labels lie in one place only, and are then nan in the result.
    limits : (lowest, highest)
        What the score can reach; an interval is cut there.
    confidence : float
        Of the given intervals, and of the t interval.

    Examples
    --------
    >>> combine_seeds([Interval(0.5, 0.4, 0.6)])
    Interval(value=0.5, low=0.4, high=0.6)
    """
    values = [interval.value for interval in intervals]
    mean, seeds = fmean(values), 0.0
    if len(values) > 1:
        from scipy.special import stdtrit

        quantile = float(stdtrit(len(values) - 1, (1 + confidence) / 2))
        seeds = quantile * stdev(values) / math.sqrt(len(values))
    below = fmean(interval.value - interval.low for interval in intervals)
    above = fmean(interval.high - interval.value for interval in intervals)
    if math.isnan(below) or math.isnan(above):
        return Interval(mean, math.nan, math.nan)
    low, high = mean - math.hypot(below, seeds), mean + math.hypot(above, seeds)
    return Interval(mean, max(low, limits[0]), min(high, limits[1]))


@dataclass(frozen=True)
class Standing:
    """One contestant over all its seeds."""

    contestant: Contestant
    runs: tuple[Run, ...]
    n_voxels: int

    @property
    def name(self) -> str:
        """As it was written after ``--models``."""
        return self.contestant.name

    @cached_property
    def scored(self) -> tuple[ScoredLabels, ...]:
        """Scores of each run, as ``voxclf evaluate`` gives them."""
        note = f"{self.name} on the held-out labels"
        return tuple(
            ScoredLabels.from_cells(run.tables, run.tables.cells[0].n_classes, note, run.seed) for run in self.runs
        )

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Mean over seeds with its interval, for each of :data:`SCORES`."""
        return {
            name: combine_seeds([s.intervals[name] for s in self.scored], LIMITS.get(name, (0.0, 1.0)))
            for name in SCORES
        }

    @property
    def class_f1(self) -> np.ndarray:
        """F1 per class, mean over seeds, shape (K,)."""
        return np.mean([scored.scores.f1 for scored in self.scored], axis=0)

    @property
    def honest(self) -> float | None:
        """Mean macro F1 of the fits' own cross-validation; None where there is none."""
        known = [run.honest for run in self.runs if run.honest is not None]
        return fmean(known) if known else None

    @property
    def fit_s(self) -> float:
        """Median time of a fit; the first of a kind also loads its libraries, which a mean would carry on."""
        return median(run.fit.seconds for run in self.runs)

    @property
    def predict_s(self) -> float:
        """Median time of predicting the region."""
        return median(run.predict.seconds for run in self.runs)

    @property
    def voxels_per_s(self) -> float:
        """Voxels of the region predicted per second."""
        return self.n_voxels / self.predict_s

    @property
    def size(self) -> int:
        """Mean number of parameters or nodes."""
        return round(fmean(run.size for run in self.runs))

    @property
    def peak(self) -> Cost:
        """Most memory of any run and stage."""
        costs = [cost for run in self.runs for cost in (run.fit, run.predict)]
        return sum(costs[1:], start=costs[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the runs have to say, each once."""
        return tuple(dict.fromkeys(note for run in self.runs for note in run.notes))


@dataclass(frozen=True)
class Difference:
    """How much one contestant's scores lie above another's on the same labels and seeds."""

    name: str
    against: str
    gains: dict[str, Interval]

    @property
    def verdict(self) -> Verdict:
        """By macro F1: "better" or "worse" only if the whole interval lies on one side of 0."""
        gain = self.gains["macro_f1"]
        if gain.low > 0:
            return "better"
        return "worse" if gain.high < 0 else "not told apart"


def subtract_runs(standing: Standing, against: Standing) -> Difference | None:
    """Compare two contestants seed by seed, on the same cells of the held-out labels; None without a common seed."""
    before = {run.seed: run.tables for run in against.runs}
    pairs = [(before[run.seed], run.tables) for run in standing.runs if run.seed in before]
    if not pairs:
        return None
    found = [bootstrap_gain(b.cells, a.cells, np.random.default_rng(0)) for b, a in pairs]
    gains = {name: combine_seeds([gain[name] for gain in found]) for name in GAINS}
    return Difference(standing.name, against.name, gains)


def rank(standings: Sequence[Standing]) -> list[Standing]:
    """The best macro F1 first."""
    return sorted(standings, key=lambda standing: -standing.intervals["macro_f1"].value)


def differences_to_best(ranked: Sequence[Standing]) -> list[Difference]:
    """Every contestant but the best against the best."""
    found = (subtract_runs(standing, ranked[0]) for standing in ranked[1:])
    return [difference for difference in found if difference is not None]


def stage_gains(standings: Sequence[Standing]) -> list[Difference]:
    """What the last stage of each contestant adds to the same contestant without it, where both took part."""
    by_name = {standing.name: standing for standing in standings}
    gains = []
    for standing in standings:
        before = standing.contestant.without_last_stage
        if before is not None and before.name in by_name:
            gains.append(subtract_runs(standing, by_name[before.name]))
    return [gain for gain in gains if gain is not None]


def find_pareto(times_s: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the points that none beats in both time and score, by rising time."""
    order = sorted(range(len(scores)), key=lambda i: (times_s[i], -scores[i]))
    front: list[int] = []
    for i in order:
        if not front or scores[i] > scores[front[-1]]:
            front.append(i)
    return front
