"""What a fit or an evaluation amounts to, in a few lines for the terminal and as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxclf.config import EvaluateConfig
from voxclf.evaluate import Evaluation
from voxclf.fit import FitResult
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.voxelwise import finite_or_none
from voxclf.provenance import software_versions
from voxclf.report import Report, ReportTable, standard_figures, write_report

SHOWN = ("macro_f1", "mean_iou", "macro_average_precision", "kappa", "accuracy")


def format_scores(name: str, scored: ScoredLabels) -> str:
    """One line of scores: macro F1 with its interval, then the others."""
    interval = scored.intervals.get("macro_f1")
    known = interval is not None and interval.low == interval.low
    spread = f" [{interval.low:.3f}, {interval.high:.3f}]" if interval is not None and known else ""
    values = scored.scores
    return (
        f"{name:<12} macro F1 {values.macro_f1:.3f}{spread}  mean IoU {values.mean_iou:.3f}  "
        f"AP {values.macro_average_precision:.3f}  kappa {values.kappa:.3f}  accuracy {values.accuracy:.3f}"
    )


def score_values(scored: ScoredLabels) -> dict[str, Any]:
    """The scores of :func:`format_scores` as values for ``--json``."""
    shown: dict[str, Any] = {name: finite_or_none(getattr(scored.scores, name)) for name in SHOWN}
    interval = scored.intervals.get("macro_f1")
    ends = None if interval is None else [finite_or_none(interval.low), finite_or_none(interval.high)]
    return {**shown, "macro_f1_interval": ends}


def format_certificate(certificate: dict[str, Any]) -> str:
    """One line: how far a network's probabilities are from those of single patches."""
    if not certificate["n_voxels"]:
        return "certificate  no voxel of the grid lies in the region"
    return (
        f"certificate  {certificate['n_voxels']:,} voxels classified again patch by patch: probabilities differ by "
        f"{certificate['largest_difference']:.1g} at most (allowed {certificate['tolerance']:g}), "
        f"{certificate['same_class']:.2%} have the same class"
    )


FEW_STEPS = 500
"""On vnc, UNets of 3 minutes came to macro F1 .43 to .54 in 100 to 400 steps and to .55 to .77 in 600 to 900."""


def describe_cross_validation(result: FitResult) -> tuple[list[str], dict[str, Any]]:
    """The honest score and the naive one beside it."""
    scores = result.cross_validation
    lines = [
        format_scores("honest", scores.honest),
        format_scores("naive", scores.naive),
        f"{'':<12} honest: {scores.honest.note}",
        f"{'':<12} naive: {scores.naive.note}",
    ]
    rounds = result.model.training["honest_macro_f1_by_round"]
    if len(rounds) > 1:
        lines.append(f"{'':<12} honest macro F1 by round: {', '.join(f'{value:.3f}' for value in rounds)}")
    lines += _describe_steps(result.model.training)
    values = {"honest": score_values(scores.honest), "naive": score_values(scores.naive)}
    return lines, {**values, "honest_macro_f1_by_round": rounds}


def _describe_steps(training: Mapping[str, Any]) -> list[str]:
    """How long a network was trained, and what to do if that was too short."""
    n_steps = training.get("n_steps")
    if n_steps is None:
        return []
    lines = [
        f"{'trained':<12} {n_steps:,} steps in {training['seconds']:.0f} s, best after round {training['best_epoch']}"
    ]
    if n_steps < FEW_STEPS:
        lines.append(
            f"{'':<12} that is few: networks want {FEW_STEPS} steps or more to learn rare classes. A narrower network "
            "(--width 0.25), a smaller --patch or a GPU make steps quicker; more --time makes them more"
        )
    return lines


def score_evaluation(result: Evaluation, note: str = "given as --validation or to evaluate") -> ScoredLabels:
    """Scores and intervals of an evaluation."""
    return ScoredLabels.from_cells(result.tables, result.label_set.n_classes, note)


def describe_evaluation(result: Evaluation) -> tuple[list[str], dict[str, Any]]:
    """Overall scores and a line per class."""
    scored = score_evaluation(result)
    width = max(map(len, result.label_set.names))
    scores = scored.scores
    lines = [format_scores("held out", scored)]
    for k, name in enumerate(result.label_set.names):
        lines.append(
            f"  {name:<{width}}  F1 {scores.f1[k]:.3f}  IoU {scores.iou[k]:.3f}  "
            f"precision {scores.precision[k]:.3f}  recall {scores.recall[k]:.3f}  {int(scores.support[k]):,} voxels"
        )
    return lines, {"held_out": score_values(scored), "classes": scores.to_dict()}


def report_evaluation(
    result: Evaluation, config: EvaluateConfig, folder: Path, tables: Sequence[ReportTable] = ()
) -> Path:
    """Write the report of an evaluation; returns the path of the page."""
    scored = score_evaluation(result)
    report = Report(
        title="Evaluation",
        model_name="",
        labels=result.label_set,
        held_out=scored,
        inputs={"prediction": config.prediction, "labels": config.labels},
        configuration=config.model_dump(mode="json", exclude_none=True),
        versions=software_versions(),
        figures=standard_figures(result.label_set, scored),
        tables=tables,
    )
    return write_report(report, folder)
