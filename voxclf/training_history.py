"""How the training of a network went, round by round: the figures of its ``history.csv`` for the report."""

from __future__ import annotations

import csv
from pathlib import Path

from voxclf import figures
from voxclf.report import ReportFigure

HISTORY = "history.csv"


def draw_history(model_folder: Path) -> tuple[ReportFigure, ...]:
    """Loss and score against training time; nothing for a model that was not trained in rounds."""
    path = model_folder / HISTORY
    if not path.exists():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        rounds = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    minutes = [entry["seconds"] / 60 for entry in rounds]

    def curve(name: str, column: str) -> figures.Curve:
        return figures.Curve(name, minutes, [entry[column] for entry in rounds])

    loss = figures.draw_curves(
        [curve("training labels", "train_loss"), curve("held-out labels", "validation_loss")], "minutes", "loss"
    )
    score = figures.draw_curves([curve("held-out labels", "validation_macro_f1")], "minutes", "macro F1")
    return (
        ReportFigure(
            "Loss during training",
            "What training lowers. Where the held-out curve rises while the other falls, the network learns its "
            "training labels by heart; the best round is kept, not the last.",
            figures.render_svg(loss),
        ),
        ReportFigure(
            "Score during training",
            "Macro F1 on a part of the held-out labels after each round. If it still rises at the end, train longer "
            "(--time).",
            figures.render_svg(score),
        ),
    )
