"""How far a score could be off: intervals from redrawing slabs of the volume, on additive tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from voxclf.metrics.voxelwise import SCALAR_SCORES, ScoreTables, finite_or_none, score_batch, score_tables


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval, low <= high; nan where it cannot be told."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return value, low and high for JSON, None where undefined."""
        return {
            "value": finite_or_none(self.value),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
        }


@dataclass(frozen=True)
class TrainingLoss:
    """What training on less costs: the same voxels scored by models that were trained on less and on still less.

    Held-out scores come from models that could not train on what was held out; the final model trains on everything.
    A score grows about evenly with the logarithm of the amount trained on, so its growth from ``less`` to ``more``
    tells what is missing from ``more`` to everything.

    Parameters
    ----------
    more, less : sequence of ScoreTables
        One per slab, in the order of the slabs that are bootstrapped; the same voxels in both.
    shares : (float, float)
        Of all there is to train on, what the models behind ``more`` and ``less`` had, 1 > more > less > 0.
    """

    more: Sequence[ScoreTables]
    less: Sequence[ScoreTables]
    shares: tuple[float, float]

    @property
    def reach(self) -> float:
        """How far beyond ``more`` everything lies, in units of the step from ``less`` to ``more``; at most 2."""
        more, less = self.shares
        return min(float(np.log(1 / more) / np.log(more / less)), MOST_REACH)


#: Carrying a slope on over more than twice the step it was measured on says nothing.
MOST_REACH = 2.0


def bootstrap_scores(
    tables_per_slab: Sequence[ScoreTables],
    rng: np.random.Generator,
    n_draws: int = 1000,
    confidence: float = 0.95,
    loss: TrainingLoss | None = None,
) -> dict[str, Interval]:
    """Say how far each score could be off, by redrawing whole slabs of the volume (spatial block bootstrap).

    Neighbouring voxels are alike, so voxels are no independent witnesses; slabs are, roughly. Each draw
    takes as many slabs as there are, with replacement, adds their tables and scores the sum.

    Parameters
    ----------
    tables_per_slab : sequence of ScoreTables
        One per slab, cut thicker than the structures are long. Slabs without labelled voxels are left out.
    rng : numpy.random.Generator
        Source of the draws.
    n_draws : int
        Number of draws; 1000 settle the interval's ends to about a tenth of its width.
    confidence : float
        Between 0 and 1; 0.95 gives 95 % intervals.
    loss : TrainingLoss, optional
        For cross-validation: intervals then reach as far as the score of the final model may, which trained on what
        was held out as well. Values stay those measured.

    Returns
    -------
    dict of str to Interval
        For every name in :data:`SCALAR_SCORES`: the score of all slabs together and its interval. With fewer
        than two labelled slabs nothing can be said about the spread, and the ends are nan.

    Notes
    -----
    Plain percentile intervals are too narrow for few slabs, by the factor sqrt((S - 1) / S) and by using
    normal instead of t quantiles. The tails are widened for both (the *expanded percentile* interval of
    Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015). Memory
    is 64 draws at a time: 64 x (K x K + 2 x K x L) counts.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, must lie between 0 and 1; use 0.95 for 95 % intervals")
    kept = [i for i, tables in enumerate(tables_per_slab) if tables.n_voxels > 0]
    if not kept:
        raise ValueError(
            f"tables_per_slab has {len(tables_per_slab)} slabs but none holds a labelled voxel; choose a "
            "region that overlaps the labels"
        )
    slabs = [tables_per_slab[i] for i in kept]
    total = sum(slabs[1:], start=slabs[0])
    scores, present = score_tables(total), total.support > 0
    if len(slabs) < 2:
        return {name: Interval(getattr(scores, name), np.nan, np.nan) for name in SCALAR_SCORES}
    weights = rng.multinomial(len(slabs), np.full(len(slabs), 1 / len(slabs)), size=n_draws).astype(np.float64)
    draws = [_draw_scores(slabs, present, weights)]
    if loss is not None:
        more, less = (_draw_scores([part[i] for i in kept], present, weights) for part in (loss.more, loss.less))
        draws.append({name: draws[0][name] + loss.reach * (more[name] - less[name]) for name in SCALAR_SCORES})
    tail = expanded_tail((1 - confidence) / 2, len(slabs))
    return {name: _enclose(getattr(scores, name), [drawn[name] for drawn in draws], tail) for name in SCALAR_SCORES}


def _enclose(value: float, draws: Sequence[NDArray[np.float64]], tail: float) -> Interval:
    """The interval that holds all but ``tail`` of each of several sets of draws at either end."""
    known = [drawn[~np.isnan(drawn)] for drawn in draws]
    ends = [np.quantile(drawn, [tail, 1 - tail]) for drawn in known if drawn.size]
    if not ends:
        return Interval(value, np.nan, np.nan)
    return Interval(value, float(min(low for low, _ in ends)), float(max(high for _, high in ends)))


def _draw_scores(
    slabs: Sequence[ScoreTables], present: NDArray[np.bool_], weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Score resamples of the slabs; each is a sum of tables with one row of ``weights`` (draws, slabs)."""
    # float64 sums of counts are exact below 2^53 voxels, and use the fast matrix product int64 has not.
    stacked = [
        np.stack([getattr(tables, field.name) for tables in slabs]).astype(np.float64) for field in fields(ScoreTables)
    ]
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in SCALAR_SCORES}
    for start in range(0, len(weights), 64):
        some = weights[start : start + 64]
        confusion, class_levels, other_levels = (
            np.tensordot(some, table, axes=1).astype(np.int64) for table in stacked
        )
        batch = score_batch(confusion, class_levels, other_levels, present)
        for name in SCALAR_SCORES:
            parts[name].append(batch[name])
    return {name: np.concatenate(values) for name, values in parts.items()}


def expanded_tail(tail: float, n_slabs: int) -> float:
    """Widen a tail for few slabs: normal quantiles become t quantiles, and n becomes n - 1 (Hesterberg 2015)."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr(np.sqrt(n_slabs / (n_slabs - 1)) * stdtrit(n_slabs - 1, tail)))
