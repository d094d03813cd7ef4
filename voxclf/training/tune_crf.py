"""Parameters of the dense CRF fitted on labels, and judged on other labels: it must earn its place.

1. Labelled tiles are divided, whole cells of the volume at a time, into a half to tune on and a half to judge on.
2. Widths, weights, how far the image is smoothed first, how far the penalties follow the contacts counted in the
   labels and how far they spare rare classes are searched for: points known to be good elsewhere, some spread over
   the space, then Nelder-Mead from the best of them. Objective: mean IoU of the tuning tiles.
3. The penalties are fitted in turn: of each class for any neighbour, then of the pairs of classes that touch most.
4. The best parameters found are applied to the other half. Unless the gain in mean IoU is at least 0.002 and positive
   with 95 % confidence (paired spatial bootstrap), and macro F1 does not fall, the answer is "no CRF".
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor as Pool
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from voxclf.geometry import VoxelSize
from voxclf.labels import LabelSet
from voxclf.metrics.bootstrap import Interval
from voxclf.metrics.cells import CellTables
from voxclf.metrics.paired import bootstrap_gain
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.structure import (
    StructureChange,
    StructureCounts,
    choose_speck_volume,
    count_structures,
    find_unseen_contacts,
)
from voxclf.metrics.voxelwise import ScoreTables, score_block, score_tables
from voxclf.models.crf_parameters import CrfParameters
from voxclf.models.crf_refiner import Window, make_refiner, measure_intensity_windows
from voxclf.probabilities import quantise
from voxclf.progress import Progress, silent
from voxclf.training.crf_tiles import (
    LoadedTile,
    Tile,
    TuningInputs,
    draw_tiles,
    load_tile,
    split_cells,
    sum_contacts,
)

MOST_TUNING_TILES, MOST_JUDGING_TILES = 24, 64
TUNING_VOXELS, JUDGING_VOXELS = 5_000_000, 60_000_000
"""Voxels read for the tiles of either kind: a trial takes about 4 s of one core, and judging a minute."""
N_START_POINTS, N_SIMPLEX, N_FACTORS = 20, 60, 60
"""Evaluations: points spread over the space, Nelder-Mead, and factors of the penalties."""
MOST_PAIRS = 6

# Widths in voxels of the finest axis. Weights: the kernels are normalised, so a weight of 1 moves log-odds by about 1.
BOUNDS = {
    "bilateral_sigma": (1.0, 20.0),
    "intensity_sigma": (0.02, 0.5),
    "spatial_sigma": (0.4, 6.0),
    "bilateral_weight": (0.1, 20.0),
    "spatial_weight": (0.1, 20.0),
    "image_sigma": (0.3, 4.0),
}
NARROWEST_INTENSITY = {1: 0.02, 2: 0.1, 3: 0.25}
"""By number of image channels: narrower kernels would need more than some hundred intensity terms."""
LEAST_IMAGE_SIGMA = 0.35
"""Below this many voxels a Gaussian is one voxel wide; 0 says so."""
# Bilateral width, intensity width, spatial width, two weights, image width, then the share of the contacts in the
# penalties and of the rarity: smoothing wears away what is thin and rare, unless it pays less for its neighbours.
HAND_PICKED = (
    (16.0, 0.1, 1.0, 4.0, 0.2, 2.0, 0.0, 0.0),
    (10.0, 0.1, 1.0, 2.0, 0.1, 0.7, 0.0, 0.4),
    (8.0, 0.1, 3.0, 1.0, 5.0, 1.0, 0.0, 0.0),
    (3.0, 0.05, 1.0, 1.0, 1.0, 0.3, 0.5, 0.2),
    (2.0, 0.1, 0.7, 0.5, 0.5, 0.3, 0.0, 0.0),
)
N_SHARES = 2
LEAST_SHARE = 0.01
"""Frequency below which a class counts as no rarer."""
FIRST_STEP, LEAST_STEP = 0.5, 0.1
"""Of the logarithm of a factor."""
STRONGEST_CONTACT = 3.0
LEAST_GAIN = 0.002
"""In mean IoU: less is not worth a second pass over the volume."""


@dataclass(frozen=True)
class CrfTuning:
    """What tuning found.

    Parameters
    ----------
    parameters : CrfParameters
        The best ones; ``enabled`` says whether they may be used.
    reason : str
        Why, or why not.
    before, after : ScoredLabels
        Of the judging tiles.
    gain : mapping of str to Interval
        Macro F1 and mean IoU, after minus before, on the judging tiles.
    structure : StructureChange
        Objects in the judging tiles, those of unlabelled voxels included.
    unseen_pairs : list of (int, int)
        Pairs of classes that never touch in the labels of any tile.
    tuned_mean_iou : (before, after)
        On the tuning tiles; more than the gain, as always on what was tuned on.
    n_evaluations : int
        Parameter sets tried.
    is_cut_short : bool
        Whether time ended the search; with more time, or on a faster machine, it may find other parameters.
    """

    parameters: CrfParameters
    reason: str
    before: ScoredLabels
    after: ScoredLabels
    gain: Mapping[str, Interval]
    structure: StructureChange
    unseen_pairs: list[tuple[int, int]]
    tuned_mean_iou: tuple[float, float]
    n_evaluations: int
    is_cut_short: bool

    def to_dict(self) -> dict[str, Any]:
        """As values for TOML and JSON; what is undefined is left out."""
        shown: dict[str, Any] = {
            "reason": self.reason,
            "macro_f1_gain": _interval_values(self.gain["macro_f1"]),
            "mean_iou_gain": _interval_values(self.gain["mean_iou"]),
            "tuning_mean_iou": list(self.tuned_mean_iou),
            "n_evaluations": self.n_evaluations,
            "cut_short_by_time": self.is_cut_short,
            "judged_on": self.before.note,
        }
        for name, scored in (("before", self.before), ("after", self.after)):
            scores = scored.scores.to_dict()
            shown[name] = {
                key: [v if v is not None else "absent" for v in value] if isinstance(value, list) else value
                for key, value in scores.items()
                if key in ("macro_f1", "mean_iou", "accuracy", "f1", "iou")
            }
        for name, counts in (("before", self.structure.before), ("after", self.structure.after)):
            shown[name] |= {kind: getattr(counts, kind).tolist() for kind in ("components", "specks", "holes")}
            shown[name]["unseen_contacts"] = counts.forbidden_contacts(self.unseen_pairs)
        return shown


def _interval_values(interval: Interval) -> dict[str, float]:
    return {name: value for name, value in interval.to_dict().items() if value is not None}


def tune_crf(
    inputs: TuningInputs,
    tiles: Sequence[Tile],
    *,
    n_iterations: int,
    seconds: float,
    seed: int,
    n_workers: int,
    progress: Progress = silent,
) -> CrfTuning:
    """Fit the parameters on some labelled tiles and judge them on others.

    Parameters
    ----------
    inputs : TuningInputs
        Image, probabilities and labels. The labels should not be those that the model was trained on, where its
        probabilities are better than anywhere else.
    tiles : sequence of Tile
        From :func:`voxclf.training.crf_tiles.find_tiles`.
    n_iterations : int
        Mean-field iterations.
    seconds : float
        When to stop the search; judging comes on top. The same seed gives the same result unless time cuts it short.
    seed, n_workers : int
    progress : Progress

    Returns
    -------
    CrfTuning

    Raises
    ------
    ValueError
        If the labels lie in too few places to keep some for judging.
    """
    rng = np.random.default_rng(seed)
    to_tune, to_judge = split_cells(tiles, rng)
    to_tune = draw_tiles(to_tune, inputs, TUNING_VOXELS, MOST_TUNING_TILES, rng)
    to_judge = draw_tiles(to_judge, inputs, JUDGING_VOXELS, MOST_JUDGING_TILES, rng)
    space = SearchSpace(
        inputs.voxel_size_nm,
        inputs.label_set,
        n_iterations,
        inputs.n_channels,
        measure_intensity_windows(inputs.images),
        sum_contacts(inputs, to_tune),
        np.sum([tile.counts for tile in to_tune], axis=0),
    )
    with ThreadPoolExecutor(n_workers, thread_name_prefix="tune") as pool:
        loaded = list(pool.map(lambda tile: load_tile(inputs, tile), to_tune))
        search = _Search(space, inputs, loaded, pool, seconds, seed)
        for _ in progress("tune CRF", search.evaluations(), search.n_planned, "trial"):
            pass
        judged = pool.map(lambda tile: _judge_tile(inputs, tile, search.best), to_judge)
        before, after = (
            sum(side[1:], start=side[0])
            for side in zip(*progress("judge CRF", judged, len(to_judge), "tile"), strict=True)
        )
    unseen = find_unseen_contacts(space.contacts + sum_contacts(inputs, to_judge))
    return _conclude(search, before, after, unseen, inputs, seed)


def _refine(tile: LoadedTile, parameters: CrfParameters, inputs: TuningInputs) -> np.ndarray:
    """Refined probabilities of a tile's core."""
    refiner = make_refiner(parameters, inputs.label_set.n_classes, inputs.voxel_size_nm, n_channels=inputs.n_channels)
    return refiner.refine(tile.arrays, tile.core)


@dataclass(frozen=True)
class _Judged:
    """What one prediction of some tiles amounts to; adds up."""

    cells: CellTables
    structure: StructureCounts

    def __add__(self, other: _Judged) -> _Judged:
        return _Judged(self.cells + other.cells, self.structure + other.structure)


def _judge_tile(inputs: TuningInputs, tile: Tile, parameters: CrfParameters) -> tuple[_Judged, _Judged]:
    """Before and after."""
    loaded = load_tile(inputs, tile)
    refined = quantise(_refine(loaded, parameters, inputs))
    size, n_classes = inputs.voxel_size_nm, inputs.label_set.n_classes

    def judge(probabilities: np.ndarray) -> _Judged:
        tables = score_block(loaded.classes, np.ascontiguousarray(probabilities), None, n_classes)
        predicted = probabilities.argmax(axis=0)
        structure = count_structures(predicted, n_classes, size, choose_speck_volume(size))
        return _Judged(CellTables({tile.cell: tables}), structure)

    return judge(loaded.stored_core), judge(refined)


def _conclude(
    search: _Search,
    before: _Judged,
    after: _Judged,
    unseen_pairs: list[tuple[int, int]],
    inputs: TuningInputs,
    seed: int,
) -> CrfTuning:
    gain = bootstrap_gain(before.cells.cells, after.cells.cells, np.random.default_rng(seed))
    f1, iou = gain["macro_f1"], gain["mean_iou"]
    is_significant = iou.low > 0 and iou.value >= LEAST_GAIN and f1.value >= 0
    found = f"mean IoU {iou.value:+.4f} [{iou.low:+.4f}, {iou.high:+.4f}], macro F1 {f1.value:+.4f}"
    verdict = "the gain is significant" if is_significant else "no CRF: the gain is not significant"
    note = f"{len(before.cells.cells)} cells that were not tuned on"
    n_classes, speck_nm3 = inputs.label_set.n_classes, choose_speck_volume(inputs.voxel_size_nm)
    return CrfTuning(
        replace(search.best, enabled=bool(is_significant)),
        f"{verdict} on {note}: {found}",
        ScoredLabels.from_cells(before.cells, n_classes, note, seed),
        ScoredLabels.from_cells(after.cells, n_classes, note, seed),
        gain,
        StructureChange(note, speck_nm3, before.structure, after.structure),
        unseen_pairs,
        (search.score_before, max(search.best_score, 0.0)),
        search.n_evaluations,
        search.is_cut_short,
    )


def contact_penalties(contacts: np.ndarray) -> np.ndarray:
    """Penalties that spare pairs of classes which touch in the labels; mean 1 off the diagonal, 0 on it.

    The root of expected over counted faces, if classes met by chance according to how much each touches others,
    kept between 1/3 and 3. The root, because counted contacts are those of small labelled areas.

    Parameters
    ----------
    contacts : ndarray of int64, shape (K, K)
        From :func:`voxclf.metrics.structure.count_contacts`.

    Returns
    -------
    ndarray of float64, shape (K, K)
    """
    between = contacts - np.diag(np.diag(contacts)).astype(np.float64)
    outward = between.sum(axis=1)
    expected = np.outer(outward, outward) / max(outward.sum(), 1.0)
    penalties = np.clip(np.sqrt((expected + 1) / (between + 1)), 1 / STRONGEST_CONTACT, STRONGEST_CONTACT)
    np.fill_diagonal(penalties, 0)
    n_classes = len(contacts)
    return penalties * (n_classes * (n_classes - 1) / penalties.sum())


def rarity_factors(counts: np.ndarray) -> np.ndarray:
    """Factors of the penalties of each class, in proportion to its frequency; their geometric mean is 1.

    Examples
    --------
    >>> rarity_factors(np.array([900, 100]))
    array([3.        , 0.33333333])
    """
    logs = np.log(np.maximum(counts, LEAST_SHARE * counts.sum()))
    return np.exp(logs - logs.mean())


@dataclass(frozen=True)
class SearchSpace:
    """Parameters as a point of the unit cube, and factors of the penalties of classes and pairs of classes."""

    voxel_size_nm: VoxelSize
    label_set: LabelSet
    n_iterations: int
    n_channels: int
    intensity_windows: tuple[Window, ...] | None
    contacts: np.ndarray
    counts: np.ndarray

    @property
    def n_dimensions(self) -> int:
        """Two widths in space, one in intensity, two weights, smoothing, and the shares of contacts and rarity."""
        return len(BOUNDS) + N_SHARES

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Of all but the shares, which run from 0 to 1."""
        narrowest = NARROWEST_INTENSITY[self.n_channels]
        return list({**BOUNDS, "intensity_sigma": (narrowest, BOUNDS["intensity_sigma"][1])}.values())

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of classes that touch most; a single pair is no different from the weights."""
        a, b = np.triu_indices(self.label_set.n_classes, 1)
        if len(a) < 2:
            return []
        order = np.argsort(-self.contacts[a, b], kind="stable")[:MOST_PAIRS]
        return [(int(a[i]), int(b[i])) for i in order]

    @property
    def n_factors(self) -> int:
        """One per class, then one per pair."""
        return self.label_set.n_classes + len(self.pairs)

    def locate(self, values: Sequence[float]) -> np.ndarray:
        """The point of widths in voxels, weights, smoothing and shares."""
        scaled = [np.log(v / low) / np.log(high / low) for v, (low, high) in zip(values, self.bounds, strict=False)]
        return np.clip([*scaled, *values[-N_SHARES:]], 0, 1)

    def parameters(self, point: np.ndarray, log_factors: Sequence[float] | np.ndarray = ()) -> CrfParameters:
        """The parameters of a point; factors multiply the penalties of classes, then of :attr:`pairs`."""
        values = [
            low * (high / low) ** float(u) for u, (low, high) in zip(np.clip(point, 0, 1), self.bounds, strict=False)
        ]
        finest = min(self.voxel_size_nm)
        share, rarity = np.clip(point[-N_SHARES:], 0, 1).tolist()
        n_classes = self.label_set.n_classes
        shape = (1 - share) * (1 - np.eye(n_classes)) + share * contact_penalties(self.contacts)
        factors = np.exp(log_factors) if len(log_factors) else np.ones(self.n_factors)
        for (a, b), factor in zip(self.pairs, factors[n_classes:], strict=True):
            shape[a, b] = shape[b, a] = shape[a, b] * factor
        shape *= (factors[:n_classes] * rarity_factors(self.counts) ** rarity)[:, None]
        return CrfParameters(
            bilateral_sigma_nm=(_round(values[0] * finest),),
            intensity_sigma=_round(values[1]),
            spatial_sigma_nm=(_round(values[2] * finest),),
            bilateral_weight=_as_weight(values[3] * shape),
            spatial_weight=_as_weight(values[4] * shape),
            n_iterations=self.n_iterations,
            image_sigma_nm=_round(values[5] * finest) if values[5] >= LEAST_IMAGE_SIGMA else 0.0,
            intensity_windows=self.intensity_windows,
            classes=self.label_set.names,
        )


def _round(value: float) -> float:
    """Four digits: a parameter file is read by people, and no score knows the fifth."""
    return float(f"{value:.4g}")


def _as_weight(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(_round(v) for v in row) for row in matrix.tolist())


class _SearchOver(Exception):  # noqa: N818 - it ends a search, nothing failed
    """Raised inside the optimiser when nothing is left to gain, time is up, or the caller has gone."""


@dataclass(eq=False)
class _Search:
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
        score = self._mean_iou(lambda tile: _refine(tile, parameters, self.inputs))
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
