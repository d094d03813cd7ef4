"""A refined prediction beside the one it was made from: scores, their paired difference, objects, and pictures.

A folder of ``crf-refine`` says which probabilities it refined; where those still are what they were, whatever is
measured on the folder can be measured on them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.config import EvaluateConfig
from voxclf.evaluate import Evaluation, evaluate
from voxclf.figures import PlaneView, draw_overlays, render_jpeg
from voxclf.geometry import Region, parse_region
from voxclf.labels import LabelSet
from voxclf.metrics.bootstrap import Interval
from voxclf.metrics.paired import bootstrap_gain
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.structure import (
    StructureChange,
    choose_speck_volume,
    count_contacts,
    count_structures,
    find_unseen_contacts,
)
from voxclf.predict import LABELS, PROBABILITIES
from voxclf.progress import Progress, silent
from voxclf.provenance import describe_input
from voxclf.refine import central_box
from voxclf.report import ReportFigure, ReportTable
from voxclf.volume import Volume, open_labels, open_volume

MOST_BOXES = 64
"""Labelled boxes in which contacts of classes are looked for."""


@dataclass(frozen=True)
class BeforeAfter:
    """Two predictions of the same voxels, measured on the same labels.

    Parameters
    ----------
    parent : Path
        Folder of the prediction that was refined.
    before, after : ScoredLabels
    gain : mapping of str to Interval
        Macro F1 and mean IoU, after minus before, with paired intervals.
    structure : StructureChange
        Objects in a box in the middle of what was refined.
    unseen_pairs : list of (int, int)
        Pairs of classes that never touch in the labels.
    names : tuple of str
        Of the classes.
    """

    parent: Path
    before: ScoredLabels
    after: ScoredLabels
    gain: Mapping[str, Interval]
    structure: StructureChange
    unseen_pairs: list[tuple[int, int]]
    names: tuple[str, ...]


def find_parent(folder: Path) -> Path | None:
    """The folder of the prediction that was refined into this one; None if it is no refined one, or the other is gone.

    It is looked for where it was, and around the refined folder, in case both were moved; the fingerprint decides.
    """
    if not (folder / LABELS).exists():
        return None
    provenance = open_volume(str(folder / LABELS), kind="labels").metadata.get("provenance", {})
    if provenance.get("job") != "crf-refine":
        return None
    refined = provenance["prediction"]
    for candidate in (Path(refined["path"]).parent, folder.parent):
        stored = candidate / PROBABILITIES
        if not stored.exists() or not (candidate / LABELS).exists():
            continue
        if describe_input(open_volume(str(stored)))["fingerprint"] == refined["fingerprint"]:
            return candidate
    return None


def compare_with_parent(
    config: EvaluateConfig, after: Evaluation, scored: ScoredLabels, progress: Progress = silent
) -> BeforeAfter | None:
    """Score the prediction that a refined one was made from on the same labels, and count objects in both.

    Parameters
    ----------
    config : EvaluateConfig
        That of the refined prediction.
    after : Evaluation
        What it gave.
    scored : ScoredLabels
        Its scores.
    progress : Progress

    Returns
    -------
    BeforeAfter or None
        None where there is nothing to compare with, see :func:`find_parent`.
    """
    folder = Path(config.prediction)
    parent = find_parent(folder)
    if parent is None:
        return None
    labels = [open_volume(str(place / LABELS), kind="labels") for place in (parent, folder)]
    refined = labels[1].metadata["provenance"]["region"]
    region = config.region or refined
    before = evaluate(config.model_copy(update={"prediction": str(parent), "region": region}), progress)
    gain = bootstrap_gain(before.tables.cells, after.tables.cells, np.random.default_rng(0))
    truth = open_labels(config.labels, labels[1].shape)
    return BeforeAfter(
        parent,
        ScoredLabels.from_cells(before.tables, before.label_set.n_classes, scored.note),
        scored,
        gain,
        count_change(labels[0], labels[1], after, parse_region(refined, labels[1].shape)),
        _find_unseen_pairs(truth, after),
        after.label_set.names,
    )


def count_change(before: Volume, after: Volume, evaluation: Evaluation, region: Region) -> StructureChange:
    """Count the objects of two label volumes in a box in the middle of a region."""
    box = central_box(region)
    label_set, size = evaluation.label_set, after.voxel_size_nm
    speck_nm3 = choose_speck_volume(size)
    counted = [
        count_structures(
            label_set.remap_to_indices(volume.read(box.start, box.stop)[0]), label_set.n_classes, size, speck_nm3
        )
        for volume in (before, after)
    ]
    return StructureChange(str(box), speck_nm3, *counted)


def _find_unseen_pairs(truth: Volume, evaluation: Evaluation) -> list[tuple[int, int]]:
    label_set = evaluation.label_set
    contacts = np.zeros((label_set.n_classes,) * 2, np.int64)
    for box in evaluation.survey.boxes[:MOST_BOXES]:
        indices = label_set.remap_to_indices(truth.read(box.region.start, box.region.stop)[0])
        contacts += count_contacts(indices, label_set.n_classes)
    return find_unseen_contacts(contacts)


# ------------------------------------------------------------------------------------------- as text and tables


def describe_change(change: BeforeAfter) -> tuple[list[str], dict[str, Any]]:
    """Lines for the terminal, values for ``--json``."""
    f1, iou = change.gain["macro_f1"], change.gain["mean_iou"]
    before = change.before.scores
    lines = [
        f"refined from {change.parent}: macro F1 {before.macro_f1:.3f}, mean IoU {before.mean_iou:.3f}",
        f"gain         macro F1 {_spell_gain(f1)}, mean IoU {_spell_gain(iou)}",
    ]
    values = {
        "parent": str(change.parent),
        "before": change.before.to_dict(),
        "gain": {name: interval.to_dict() for name, interval in change.gain.items()},
        "structure": {side: counts.to_dict() for side, counts in _sides(change).items()},
        "unseen_contacts": {
            side: counts.forbidden_contacts(change.unseen_pairs) for side, counts in _sides(change).items()
        },
    }
    return lines, values


def change_tables(change: BeforeAfter) -> tuple[ReportTable, ReportTable]:
    """What a report shows: scores before and after, and objects before and after."""
    before, after = change.before.scores, change.after.scores
    scores: list[list[Any]] = []
    for title, name in (("all classes: macro F1", "macro_f1"), ("all classes: mean IoU", "mean_iou")):
        scored = (_spell_interval(side.intervals.get(name), getattr(side.scores, name)) for side in _scored(change))
        scores.append([title, *scored, _spell_gain(change.gain[name])])
    for title, values in (("F1", (before.f1, after.f1)), ("IoU", (before.iou, after.iou))):
        for k, name in enumerate(change.names):
            one, two = (float(side[k]) for side in values)
            scores.append([f"{name}: {title}", f"{one:.3f}", f"{two:.3f}", f"{two - one:+.3f}"])
    return (
        ReportTable(
            "Before and after refining",
            "On the same labels. Brackets are 95 % intervals; that of the difference draws the same places for both, "
            "so it can be narrow where the others are wide.",
            ("Score", "Before", "After", "Difference"),
            scores,
        ),
        _structure_table(change),
    )


def draw_change(views: Sequence[PlaneView], label_set: LabelSet) -> ReportFigure:
    """Overlays before and after side by side; views whose "truth" is the prediction before."""
    titles = ("before", "after", "changed")
    return ReportFigure(
        "Before and after refining",
        "Three planes through one point. Under “changed”, voxels are coloured by the class they were given.",
        render_jpeg(draw_overlays(views, label_set, titles=titles)),
        "jpeg",
    )


def _structure_table(change: BeforeAfter) -> ReportTable:
    sides = _sides(change)
    rows: list[list[Any]] = []
    for k, name in enumerate(change.names):
        for kind in ("components", "specks", "holes"):
            rows.append([f"{name}: {OBJECT_WORDS[kind]}", *(int(getattr(side, kind)[k]) for side in sides.values())])
        per_object = (round(float(side.holes_per_object[k]), 2) for side in sides.values())
        rows.append([f"{name}: holes per object", *per_object])
    faces = [side.forbidden_contacts(change.unseen_pairs) for side in sides.values()]
    rows.append(["faces between classes that never touch in the labels", *faces])
    return ReportTable(
        "What scores do not show",
        f"Objects in {change.structure.place}. Specks are pieces smaller than {change.structure.speck_nm3:.3g} nm³. A "
        "membrane that is broken shows as many pieces.",
        ("Count", "Before", "After"),
        rows,
    )


OBJECT_WORDS = {"components": "pieces", "specks": "specks", "holes": "holes"}


def _scored(change: BeforeAfter) -> tuple[ScoredLabels, ScoredLabels]:
    return change.before, change.after


def _sides(change: BeforeAfter) -> dict[str, Any]:
    return {"before": change.structure.before, "after": change.structure.after}


def _spell_gain(gain: Interval) -> str:
    known = gain.low == gain.low
    return f"{gain.value:+.3f}" + (f" [{gain.low:+.3f}, {gain.high:+.3f}]" if known else "")


def _spell_interval(interval: Interval | None, value: float) -> str:
    if interval is None or interval.low != interval.low:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
