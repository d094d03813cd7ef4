"""Scores with what is needed to show and keep them: tables, intervals, and how the labels were chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.metrics.bootstrap import Interval, TrainingLoss, bootstrap_scores
from voxclf.metrics.cells import CellTables
from voxclf.metrics.voxelwise import Scores, ScoreTables, score_tables


@dataclass(frozen=True)
class ScoredLabels:
    """The scores on one set of labels, with what is needed to show them.

    Parameters
    ----------
    scores : Scores
        From `score_tables`.
    note : str
        How the labels were chosen, for example "5 slabs along z, at least 18 voxels apart".
    intervals : mapping of str to Interval
        95 % intervals by score name; empty where none can be told.
    tables : ScoreTables, optional
        What the scores came from; the confusion matrix is written to the JSON, curves are drawn from it.
    """

    scores: Scores
    note: str = ""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    tables: ScoreTables | None = None

    @classmethod
    def from_cells(
        cls, cells: CellTables, n_classes: int, note: str, seed: int = 0, loss: TrainingLoss | None = None
    ) -> ScoredLabels:
        """Score the sum of all cells, with intervals from redrawing cells (spatial bootstrap).

        ``loss`` is for cross-validation, its tables in the order of ``cells.cells``.
        """
        tables = cells.total(n_classes)
        intervals = bootstrap_scores(cells.cells, np.random.default_rng(seed), loss=loss)
        return cls(score_tables(tables), note, intervals, tables)

    @classmethod
    def from_tables(cls, tables: ScoreTables, note: str) -> ScoredLabels:
        """Score tables that are not kept apart in space, so without intervals."""
        return cls(score_tables(tables), note, {}, tables)

    def save(self, path: Path) -> None:
        """Write note, intervals and tables as JSON; :meth:`load` reads them back."""
        assert self.tables is not None, "only scores that keep their tables can be saved"
        intervals = {name: interval.to_dict() for name, interval in self.intervals.items()}
        values = {"note": self.note, "intervals": intervals, "tables": self.tables.to_dict()}
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ScoredLabels:
        """Read what :meth:`save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        tables = ScoreTables.from_dict(values["tables"])
        intervals = {
            name: Interval(*(math.nan if v is None else v for v in interval.values()))
            for name, interval in values["intervals"].items()
        }
        return cls(score_tables(tables), values["note"], intervals, tables)

    def to_dict(self) -> dict[str, Any]:
        """Return note, scores, intervals and confusion matrix for JSON."""
        return {
            "note": self.note,
            "scores": self.scores.to_dict(),
            "intervals": {name: interval.to_dict() for name, interval in self.intervals.items()},
            "confusion": None if self.tables is None else self.tables.confusion.tolist(),
        }
