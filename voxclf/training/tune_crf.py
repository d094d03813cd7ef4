"""Parameters of the dense CRF fitted on labels, and judged on other labels: it must earn its place.

1. Labelled tiles are divided, whole cells of the volume at a time, into a half to tune on and a half to judge on.
2. Widths, weights, how far the image is smoothed first, how far the penalties follow the contacts counted in the
   labels and how far they spare rare classes (:mod:`voxclf.training.crf_space`) are searched for on the first half
   (:mod:`voxclf.training.crf_search`).
3. The best parameters found are applied to the other half. Unless the gain in mean IoU is at least 0.002 and positive
   with 95 % confidence (paired spatial bootstrap), and macro F1 does not fall, the answer is "no CRF".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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
from voxclf.metrics.voxelwise import score_block
from voxclf.models.crf_parameters import CrfParameters
from voxclf.models.crf_refiner import measure_intensity_windows
from voxclf.probabilities import quantise
from voxclf.progress import Progress, silent
from voxclf.training.crf_search import CrfSearch, refine_tile
from voxclf.training.crf_space import SearchSpace
from voxclf.training.crf_tiles import (
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
        search = CrfSearch(space, inputs, loaded, pool, seconds, seed)
        for _ in progress("tune CRF", search.evaluations(), search.n_planned, "trial"):
            pass
        judged = pool.map(lambda tile: _judge_tile(inputs, tile, search.best), to_judge)
        before, after = (
            sum(side[1:], start=side[0])
            for side in zip(*progress("judge CRF", judged, len(to_judge), "tile"), strict=True)
        )
    unseen = find_unseen_contacts(space.contacts + sum_contacts(inputs, to_judge))
    return _conclude(search, before, after, unseen, inputs, seed)


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
    refined = quantise(refine_tile(loaded, parameters, inputs))
    size, n_classes = inputs.voxel_size_nm, inputs.label_set.n_classes

    def judge(probabilities: np.ndarray) -> _Judged:
        tables = score_block(loaded.classes, np.ascontiguousarray(probabilities), None, n_classes)
        predicted = probabilities.argmax(axis=0)
        structure = count_structures(predicted, n_classes, size, choose_speck_volume(size))
        return _Judged(CellTables({tile.cell: tables}), structure)

    return judge(loaded.stored_core), judge(refined)


def _conclude(
    search: CrfSearch,
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
