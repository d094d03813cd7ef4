"""Whether a change helps: the gain of one prediction over another on the same cells, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from voxclf.metrics.bootstrap import Interval, expanded_tail
from voxclf.metrics.voxelwise import ScoreTables, score_batch

GAINS = ("macro_f1", "mean_iou")


def bootstrap_gain(
    before: Sequence[ScoreTables],
    after: Sequence[ScoreTables],
    rng: np.random.Generator,
    n_draws: int = 2000,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Say how much macro F1 and mean IoU change, and how far off that could be (paired spatial bootstrap).

    Every draw takes whole cells with replacement, the same ones for both predictions, so what makes a cell easy or
    hard for both cancels out.

    Parameters
    ----------
    before, after : sequence of ScoreTables
        One per cell, in the same order; only their confusion tables are read.
    rng : numpy.random.Generator
        Source of the draws.
    n_draws : int
    confidence : float
        Between 0 and 1; 0.95 gives 95 % intervals.

    Returns
    -------
    dict of str to Interval
        "macro_f1" and "mean_iou": after minus before. With fewer than two labelled cells the ends are nan.

    Raises
    ------
    ValueError
        If the sequences differ in length or hold no labelled voxel.

    Notes
    -----
    Tails are widened for few cells, the expanded percentile interval of `bootstrap_scores`.
    """
    if len(before) != len(after):
        raise ValueError(f"before has {len(before)} cells, after {len(after)}; score both on the same cells")
    kept = [i for i, tables in enumerate(before) if tables.n_voxels]
    if not kept:
        raise ValueError(
            f"none of the {len(before)} cells holds a labelled voxel; choose cells that overlap the labels"
        )
    counts = np.stack([[tables[i].confusion for i in kept] for tables in (before, after)])  # (2, cells, K, K)
    present = counts.sum(axis=(0, 1, 3)) > 0
    value = _score(counts.sum(axis=1), present)
    if len(kept) < 2:
        return {name: Interval(float(value[name][1] - value[name][0]), np.nan, np.nan) for name in GAINS}
    weights = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=n_draws)
    drawn = [_score(np.tensordot(weights, table, axes=1), present) for table in counts]
    tail = expanded_tail((1 - confidence) / 2, len(kept))
    intervals = {}
    for name in GAINS:
        gains = drawn[1][name] - drawn[0][name]
        low, high = np.nanquantile(gains, [tail, 1 - tail])
        intervals[name] = Interval(float(value[name][1] - value[name][0]), float(low), float(high))
    return intervals


def _score(confusion: NDArray[np.int64], present: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    no_levels = np.zeros((*confusion.shape[:-1], 2), np.int64)
    return score_batch(confusion, no_levels, no_levels, present)
