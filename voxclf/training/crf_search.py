"""How the parameters of a dense CRF are searched for: the mean IoU of labelled tiles, made as large as time allows.

1. Points known to be good elsewhere, and some spread over the space.
2. Nelder-Mead from the best of them.
3. The penalties in turn: of each class for any neighbour, then of the pairs of classes that touch most.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor as Pool
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from voxclf.metrics.voxelwise import ScoreTables, score_block, score_tables
from voxclf.models.crf_parameters import CrfParameters
from voxclf.models.crf_refiner import make_refiner
from voxclf.training.crf_space import SearchSpace
from voxclf.training.crf_tiles import LoadedTile, TuningInputs

N_START_POINTS, N_SIMPLEX, N_FACTORS = 20, 60, 60
"""Evaluations: points spread over the space, Nelder-Mead, and factors of the penalties."""
# Bilateral width, intensity width, spatial width, two weights, image width, then the share of the contacts in the
# penalties and of the rarity: smoothing wears away what is thin and rare, unless it pays less for its neighbours.
HAND_PICKED = (
    (16.0, 0.1, 1.0, 4.0, 0.2, 2.0, 0.0, 0.0),
    (10.0, 0.1, 1.0, 2.0, 0.1, 0.7, 0.0, 0.4),
    (8.0, 0.1, 3.0, 1.0, 5.0, 1.0, 0.0, 0.0),
    (3.0, 0.05, 1.0, 1.0, 1.0, 0.3, 0.5, 0.2),
    (2.0, 0.1, 0.7, 0.5, 0.5, 0.3, 0.0, 0.0),
)
FIRST_STEP, LEAST_STEP = 0.5, 0.1
"""Of the logarithm of a factor."""


class _SearchOver(Exception):  # noqa: N818 - it ends a search, nothing failed
    """Raised inside the optimiser when nothing is left to gain, time is up, or the caller has gone."""


@dataclass(eq=False)
class CrfSearch:
    """The objective with its memory of the best, and the stages of the optimisation."""

    space: SearchSpace
    inputs: TuningInputs
    tiles: list[LoadedTile]
    pool: Pool
    seconds: float
    seed: int
    best_score: float = field(default=-1.0, init=False)
    n_evaluations: int = field(default=0, init=False)
    is_cut_short: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.best = self.space.parameters(self.space.locate(HAND_PICKED[-1]))
        self.score_before = self._mean_iou(lambda tile: tile.stored_core)
        self._deadline = time.monotonic() + self.seconds
        self._is_stopped = threading.Event()

    @property
    def n_planned(self) -> int:
        """Evaluations if time allows."""
        return N_START_POINTS + N_SIMPLEX + N_FACTORS

    def evaluations(self) -> Iterator[float]:
        """Run the search and yield the objective of every trial.

        The optimiser calls the objective and progress wants to be called: a thread turns one into the other.
        """
        results: queue.Queue[float | BaseException | None] = queue.Queue()

        def run() -> None:
            try:
                self._optimise(results.put)
                results.put(None)
            except _SearchOver:
                results.put(None)
            except BaseException as error:
                results.put(error)

        thread = threading.Thread(target=run, name="optimiser", daemon=True)
        thread.start()
        try:
            while (item := results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._is_stopped.set()
            thread.join()

    def _optimise(self, report: Callable[[float], None]) -> None:
        from scipy.optimize import minimize

        space = self.space
        scored: list[tuple[float, np.ndarray]] = []

        def try_point(point: np.ndarray, log_factors: Sequence[float] | np.ndarray = ()) -> float:
            score = self._evaluate(space.parameters(point, log_factors))
            scored.append((score, np.array(point)))
            report(score)
            return -score

        for values in HAND_PICKED:
            try_point(space.locate(values))
        for point in _latin_hypercube(N_START_POINTS - len(HAND_PICKED), space.n_dimensions, self.seed):
            try_point(point)
        start = max(scored, key=lambda item: item[0])[1]
        minimize(
            try_point,
            start,
            method="Nelder-Mead",
            bounds=[(0, 1)] * space.n_dimensions,
            options={"maxfev": N_SIMPLEX, "initial_simplex": _simplex(start), "xatol": 0.02, "fatol": 1e-5},
        )
        best = max(scored, key=lambda item: item[0])[1]
        self._fit_factors(lambda log_factors: -try_point(best, log_factors))

    def _fit_factors(self, score: Callable[[np.ndarray], float]) -> None:
        """Move one factor at a time up or down while that helps, then by half as much."""
        log_factors, best, step = np.zeros(self.space.n_factors), self.best_score, FIRST_STEP
        n_left = N_FACTORS
        while step >= LEAST_STEP:
            is_better = False
            for i, sign in product(range(len(log_factors)), (-1, 1)):
                moved = log_factors.copy()
                moved[i] += sign * step
                if n_left == 0:
                    return
                n_left -= 1
                found = score(moved)
                if found > best:
                    log_factors, best, is_better = moved, found, True
            if not is_better:
                step /= 2

    def _evaluate(self, parameters: CrfParameters) -> float:
        if self._is_stopped.is_set() or self.best_score >= 1 or self.score_before >= 1:
            raise _SearchOver
        if time.monotonic() > self._deadline and self.n_evaluations:
            self.is_cut_short = True
            raise _SearchOver
        score = self._mean_iou(lambda tile: refine_tile(tile, parameters, self.inputs))
        self.n_evaluations += 1
        if score > self.best_score:
            self.best, self.best_score = parameters, score
        return score

    def _mean_iou(self, predict: Callable[[LoadedTile], np.ndarray]) -> float:
        n_classes = self.space.label_set.n_classes

        def count(tile: LoadedTile) -> ScoreTables:
            return score_block(tile.classes, None, predict(tile).argmax(axis=0), n_classes)

        return score_tables(sum(self.pool.map(count, self.tiles), ScoreTables.zeros(n_classes))).mean_iou


def _latin_hypercube(n_points: int, n_dimensions: int, seed: int) -> np.ndarray:
    """Points of the unit cube that lie in different n-ths of every axis."""
    rng = np.random.default_rng(seed)
    strata = rng.permuted(np.tile(np.arange(n_points), (n_dimensions, 1)), axis=1).T
    return (strata + rng.random(strata.shape)) / n_points


def _simplex(start: np.ndarray, side: float = 0.2) -> np.ndarray:
    """Corners around a start, inside the unit cube."""
    corners = np.tile(start, (len(start) + 1, 1))
    for i in range(len(start)):
        corners[i + 1, i] += side if start[i] <= 0.5 else -side
    return corners


def refine_tile(tile: LoadedTile, parameters: CrfParameters, inputs: TuningInputs) -> np.ndarray:
    """Refined probabilities of a tile's core."""
    refiner = make_refiner(parameters, inputs.label_set.n_classes, inputs.voxel_size_nm, n_channels=inputs.n_channels)
    return refiner.refine(tile.arrays, tile.core)
