"""The report: what was run, on what, and what its result is worth, as one HTML page and as JSON.

A `Report` gathers numbers that other parts have computed; `write_report` lays them out. No score is computed
here. The page is one file without any reference to the outside, so it can be mailed, archived and printed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from voxclf import figures
from voxclf.json_values import to_json_values
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import reliability_table
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.voxelwise import SCALAR_SCORES, Scores, ScoreTables, finite_or_none
from voxclf.pages import render_json, render_template, write_texts

#: Raised when a field of report.json changes its meaning.
JSON_FORMAT = 1

# How each score is called and, in a few words, how to read it.
_SCORE_TEXTS: dict[str, tuple[str, str]] = {
    "macro_f1": ("Macro F1", "balance of precision and recall, every class counting alike; 1 is perfect"),
    "macro_average_precision": ("Average precision", "area under the precision-recall curve, class mean"),
    "kappa": ("Cohen's kappa", "agreement beyond chance; 0 is guessing, 1 is perfect"),
    "accuracy": ("Accuracy", "share of voxels that are right; large classes decide it"),
    "mean_iou": ("Mean IoU", "overlap of predicted and true voxels over their union, mean over classes"),
    "mean_dice": ("Mean Dice", "overlap over mean size; the same number as macro F1"),
    "macro_precision": ("Macro precision", "share of the voxels given to a class that belong to it"),
    "macro_recall": ("Macro recall", "share of a class's voxels that were found"),
    "log_loss": ("Log loss", "surprise at the truth, in nats; lower is better"),
    "brier": ("Brier score", "squared error of the probabilities, 0 to 2; lower is better"),
}

_HEADLINE = ("macro_f1", "mean_iou", "macro_average_precision", "kappa", "accuracy")


@dataclass(frozen=True)
class ReportFigure:
    """A picture with its title and one or two sentences on how to read it."""

    title: str
    caption: str
    data: bytes
    kind: Literal["svg", "png", "jpeg"] = "svg"

    @property
    def data_uri(self) -> str:
        """The picture as text that stands in the page itself."""
        mime = "svg+xml" if self.kind == "svg" else self.kind
        return f"data:image/{mime};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class ReportTable:
    """A table with its title and a sentence on how to read it; cells are text or numbers."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Report:
    """Everything the page says. Parts left out do not appear on it.

    Parameters
    ----------
    title : str
        Heading of the page.
    model_name : str
        As `voxclf models` lists it.
    labels : LabelSet
        The classes.
    held_out : ScoredLabels, optional
        Scores on labels never used for fitting.
    honest : ScoredLabels, optional
        Slabs of the labels held out from training, apart from it by what the model sees.
    naive : ScoredLabels, optional
        Voxels whose neighbours were trained on (trees: split at random), or that were trained on themselves
        (networks).
    label_counts : sequence of int, length K, optional
        Labelled voxels per class available for fitting.
    importances : mapping of str to float, optional
        How much the model leans on each feature.
    times_s : mapping of str to float, optional
        Seconds per stage, in the order they ran.
    inputs, configuration, versions : mapping, optional
        What the volume and labels are (paths, shape, voxel size), what was asked for, and with which
        libraries.
    figures, tables : sequence, optional
        Further pictures and tables, in the order shown.
    warnings : sequence of str, optional
        Shown on top, before those that the report finds in the scores itself (see `find_warnings`).
    summary : str, optional
        One or two sentences under the heading.
    """

    title: str
    model_name: str
    labels: LabelSet
    held_out: ScoredLabels | None = None
    honest: ScoredLabels | None = None
    naive: ScoredLabels | None = None
    label_counts: Sequence[int] | None = None
    importances: Mapping[str, float] = field(default_factory=dict)
    times_s: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[ReportFigure] = ()
    tables: Sequence[ReportTable] = ()
    warnings: Sequence[str] = ()
    summary: str = ""

    @property
    def best(self) -> ScoredLabels | None:
        """The most trustworthy scores there are: of labels given for it, else the honest ones, else the naive."""
        return self.held_out or self.honest or self.naive

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers of the page for JSON; pictures are named, not included."""
        scored = {"held_out": self.held_out, "honest": self.honest, "naive": self.naive}
        return {
            "format": JSON_FORMAT,
            "title": self.title,
            "summary": self.summary,
            "model": self.model_name,
            "classes": self.labels.to_dict(),
            "warnings": [*self.warnings, *find_warnings(self)],
            "scores": {name: None if part is None else part.to_dict() for name, part in scored.items()},
            "label_counts": None if self.label_counts is None else [int(count) for count in self.label_counts],
            "importances": {name: float(value) for name, value in self.importances.items()},
            "times_s": {name: float(value) for name, value in self.times_s.items()},
            "inputs": to_json_values(self.inputs),
            "configuration": to_json_values(self.configuration),
            "versions": dict(self.versions),
            "tables": [
                {"title": t.title, "columns": list(t.columns), "rows": to_json_values(t.rows)} for t in self.tables
            ],
            "figures": [figure.title for figure in self.figures],
        }


def find_warnings(report: Report) -> list[str]:
    """Say what in the numbers should make a reader careful, each in one sentence with what to do.

    Looks for classes with under 100 labelled voxels, classes never predicted or never scored, scores that are
    naive only, a naive score far above the honest one, and an interval too wide to compare models by.
    """
    names, found = report.labels.names, []
    for k, count in enumerate(() if report.label_counts is None else report.label_counts):
        if count < 100:
            found.append(
                f"Class “{names[k]}” has only {int(count)} labelled voxels to learn from. Its scores say "
                "little; label more of it."
            )
    best = report.best
    if best is not None:
        found += _class_warnings(best.scores, names)
        found += _interval_warnings(best)
    if report.naive is not None and best is report.naive:
        found.append(
            "No labels apart from the training labels were scored. Expect worse elsewhere in the volume "
            "than on the slices you labelled; label a slab some distance away and evaluate on it."
        )
    if report.naive is not None and report.honest is not None:
        gap = report.naive.scores.macro_f1 - report.honest.scores.macro_f1
        if gap > 0.05:
            found.append(
                f"The naive score is {gap:.3f} macro F1 above the honest one: where it was trained, and right beside, "
                "the model is much better than elsewhere. Quote the honest score."
            )
    return found


def _class_warnings(scores: Scores, names: Sequence[str]) -> list[str]:
    found = [
        f"Class “{names[k]}” does not occur in the labels scored; it is in no mean, and nothing is known about it."
        for k in scores.absent
    ]
    for k in np.flatnonzero((scores.predicted == 0) & (scores.support > 0)).tolist():
        found.append(
            f"Class “{names[k]}” was never predicted although {int(scores.support[k]):,} voxels have it. "
            "Label more of it, or balance the classes when fitting."
        )
    return found


def _interval_warnings(scored: ScoredLabels) -> list[str]:
    interval = scored.intervals.get("macro_f1")
    if interval is None or not interval.high - interval.low > 0.2:
        return []
    return [
        f"The 95 % interval of macro F1 runs from {interval.low:.3f} to {interval.high:.3f}: too wide to "
        "compare models by. Label slices further apart."
    ]


def standard_figures(
    labels: LabelSet,
    scored: ScoredLabels | None = None,
    label_counts: Sequence[int] | None = None,
    importances: Mapping[str, float] | None = None,
    views: Sequence[figures.PlaneView] = (),
) -> tuple[ReportFigure, ...]:
    """Draw the pictures every report has, as far as there is something to draw.

    Parameters
    ----------
    labels : LabelSet
        The classes.
    scored : ScoredLabels, optional
        With `tables`, gives the confusion matrix; with probabilities in them, precision-recall and
        reliability.
    label_counts, importances : optional
        As in `Report`.
    views : sequence of PlaneView, optional
        From `figures.cut_planes`, for the overlays.
    """
    drawn = []
    if views:
        drawn.append(
            ReportFigure(
                "Image, labels and prediction",
                "Three planes through one point, at their true proportions. Under “differences”, only "
                "labelled voxels predicted wrongly are coloured, by the class they were given.",
                figures.render_jpeg(figures.draw_overlays(views, labels)),
                "jpeg",
            )
        )
    if scored is not None and scored.tables is not None and scored.tables.n_voxels:
        drawn += _score_figures(labels, scored, scored.tables)
    if label_counts is not None:
        drawn.append(
            ReportFigure(
                "Label distribution",
                "What the model had to learn from. Classes with few voxels are learned worst and scored least surely.",
                figures.render_svg(figures.draw_label_distribution(label_counts, labels)),
            )
        )
    if importances:
        drawn.append(
            ReportFigure(
                "Feature importances",
                "How much the model leans on each feature. Features that resemble each other share their "
                "importance, so a short bar does not mean useless.",
                figures.render_svg(figures.draw_importances(importances)),
            )
        )
    return tuple(drawn)


def _score_figures(labels: LabelSet, scored: ScoredLabels, tables: ScoreTables) -> list[ReportFigure]:
    drawn = [
        ReportFigure(
            "Confusion matrix",
            "Read along a row: of the voxels that truly are this class, the share given to each class, and "
            "their number. The diagonal is right; dark cells beside it are the confusions to look into.",
            figures.render_svg(figures.draw_confusion(tables.confusion, labels)),
        )
    ]
    if not tables.has_probabilities:
        return drawn
    drawn.append(
        ReportFigure(
            "Precision and recall",
            "What a threshold on the probability of a class would give: further right finds more of the "
            "class, higher means fewer false voxels. The closer to the upper right corner, the better.",
            figures.render_svg(figures.draw_precision_recall(tables, labels, scored.scores.average_precision)),
        )
    )
    drawn.append(
        ReportFigure(
            "Reliability of the probabilities",
            "On the dashed line, voxels predicted at 80 % are right 80 % of the time. Below it the model "
            "is too sure of itself, above it too careful. Points with few voxels (lower panel) wander by "
            "chance.",
            figures.render_svg(figures.draw_reliability(reliability_table(tables), labels)),
        )
    )
    return drawn


def write_report(report: Report, folder: str | Path) -> Path:
    """Write ``report.html`` and ``report.json`` into `folder`, replacing older ones, and return the page's
    path.
    """
    texts = {"report.json": render_json(report.to_dict()), "report.html": render_html(report)}
    return write_texts(Path(folder), texts)[-1]


def render_html(report: Report) -> str:
    """Return the report as one HTML page that refers to nothing outside itself."""
    columns = _score_columns(report)
    details = (("Input", report.inputs), ("Configuration", report.configuration), ("Versions", report.versions))
    values = {
        "report": report,
        "warnings": [*report.warnings, *find_warnings(report)],
        "columns": columns,
        "score_rows": _score_rows(columns),
        "headline": _headline(report),
        "class_rows": _class_rows(report),
        "absent": [report.labels.names[k] for k in report.best.scores.absent] if report.best else [],
        "total_s": sum(report.times_s.values()),
        "details": [(title, _flatten(settings)) for title, settings in details if settings],
    }
    return render_template("voxclf", "report.html.jinja", values, FILTERS, TESTS)


def _score_columns(report: Report) -> list[tuple[str, str, ScoredLabels]]:
    """Column heading, what it means, and the scores, the most trustworthy first."""
    texts = (
        ("Held-out labels", "Labels the model was not trained on", report.held_out),
        (
            "Honest",
            "Slabs of the labels that the model scored here was not trained on, kept as far from its training "
            "labels as it can see; this is what to expect from the unlabelled rest of the volume",
            report.honest,
        ),
        (
            "Naive",
            "Voxels that the model scored here was trained on, or that lie among those; shown only to tell how "
            "far such a score flatters",
            report.naive,
        ),
    )
    return [(title, text, part) for title, text, part in texts if part is not None]


def _score_rows(columns: list[tuple[str, str, ScoredLabels]]) -> list[dict[str, Any]]:
    rows = []
    for name in SCALAR_SCORES:
        title, text = _SCORE_TEXTS[name]
        cells = [(getattr(part.scores, name), part.intervals.get(name)) for _, _, part in columns]
        if any(finite_or_none(value) is not None for value, _ in cells):
            rows.append({"title": title, "text": text, "cells": cells})
    return rows


def _headline(report: Report) -> list[dict[str, Any]]:
    if report.best is None:
        return []
    tiles = []
    for name in _HEADLINE:
        value = getattr(report.best.scores, name)
        if finite_or_none(value) is not None:
            interval = report.best.intervals.get(name)
            tiles.append({"title": _SCORE_TEXTS[name][0], "value": value, "interval": interval})
    return tiles


def _class_rows(report: Report) -> list[dict[str, Any]]:
    if report.best is None:
        return []
    scores = report.best.scores
    return [
        {
            "name": report.labels.names[k],
            "colour": report.labels.colours[k],
            "support": int(scores.support[k]),
            "predicted": int(scores.predicted[k]),
            "values": [
                float(values[k])
                for values in (
                    scores.f1,
                    scores.iou,
                    scores.precision,
                    scores.recall,
                    scores.average_precision,
                )
            ],
        }
        for k in range(report.labels.n_classes)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Turn nested settings into rows of "outer.inner" and text."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _format_cell(value)))
    return rows


def _format_score(value: float | None) -> str:
    """Three decimals, as scores are quoted; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_float(value):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}" if abs(int(value)) >= 10_000 else str(int(value))
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(_format_cell(item) for item in value)
    return str(value)


def _format_cell_or_score(value: Any) -> str:
    return _format_score(value) if _is_float(value) else _format_cell(value)


def _is_number(value: Any) -> bool:
    return _is_float(value) or isinstance(value, (int, np.integer))


def _is_float(value: Any) -> bool:
    return isinstance(value, (float, np.floating))


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"


FILTERS = {"score": _format_score, "cell": _format_cell_or_score, "duration": _format_duration}
TESTS = {"number": _is_number}
"""What ``report.html.jinja`` applies beside Jinja's own."""
