"""Pictures of scores: which classes are taken for which, precision against recall, reliability of probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxclf.figures.style import INK, QUIET, new_figure, styled
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import ReliabilityTable
from voxclf.metrics.voxelwise import ScoreTables, precision_recall_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def draw_confusion(confusion: NDArray[np.integer], labels: LabelSet) -> Figure:
    """Draw which classes are taken for which: rows are the truth and sum to 1, with voxel counts below.

    Parameters
    ----------
    confusion : ndarray of int, shape (K, K)
        Voxels by true (row) and predicted (column) class.
    labels : LabelSet
        The K classes.
    """
    K = labels.n_classes
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    size = 1.6 + 0.72 * K
    figure = new_figure(size + 1.1, size)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(K):
        for column in range(K):
            share, count = shares[row, column], int(confusion[row, column])
            centred: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if share > 0.55 else INK}
            axes.text(column, row - 0.1, f"{share:.2f}", fontsize=9, **centred)
            axes.text(column, row + 0.22, short_count(count), fontsize=6, **centred)
    axes.set_xticks(range(K), labels.names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(K), labels.names)
    axes.tick_params(length=0, pad=9)
    axes.spines[:].set_visible(False)
    _mark_classes(axes, labels)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    bar.outline.set_visible(False)
    return figure


def _mark_classes(axes: Axes, labels: LabelSet) -> None:
    """Put a patch of each class's colour between the tick labels and the matrix."""
    from matplotlib.patches import Rectangle

    K = labels.n_classes
    for k, colour in enumerate(labels.colours):
        options: dict[str, Any] = {"facecolor": colour, "clip_on": False, "linewidth": 0}
        axes.add_patch(Rectangle((-0.62, k - 0.42), 0.08, 0.84, **options))
        axes.add_patch(Rectangle((k - 0.42, K - 0.46), 0.84, 0.08, **options))


def short_count(count: int) -> str:
    """Write a count in at most five characters: 950, 12.3k, 4.56M."""
    for limit, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            value = count / limit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{suffix}"
    return str(count)


@styled
def draw_precision_recall(tables: ScoreTables, labels: LabelSet, average_precision: ArrayLike | None = None) -> Figure:
    """Draw, per class, how pure the found voxels are (precision) as more of the class is found (recall).

    Classes without a true voxel are left out. `average_precision`, shape (K,), is written into the legend.
    """
    figure = new_figure(5.4, 4.0)
    axes = figure.add_subplot()
    shown = None if average_precision is None else np.asarray(average_precision, np.float64)
    for k, name in enumerate(labels.names):
        precision, recall = precision_recall_curve(tables, k)
        if not len(recall):
            continue
        # Past full recall a lower threshold only adds wrong voxels: a vertical line that tells nothing.
        complete = int(np.argmax(recall >= 1)) + 1
        label = name if shown is None else f"{name}  (AP {shown[k]:.3f})"
        axes.plot(recall[:complete], precision[:complete], color=labels.colours[k], linewidth=1.8, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall: share of the class found")
    axes.set_ylabel("precision: share that is right")
    axes.set_aspect("equal")
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


@styled
def draw_reliability(table: ReliabilityTable, labels: LabelSet) -> Figure:
    """Draw predicted against observed frequency per class; on the diagonal, probabilities mean what they say.

    The lower panel shows how many voxels stand behind each point, on a logarithmic axis.
    """
    figure = new_figure(5.4, 4.9)
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 1.1), sharex=True)
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    for k, name in enumerate(labels.names):
        if not np.any(np.nan_to_num(table.observed[k]) > 0):
            continue
        filled = table.count[k] > 0
        points = table.predicted[k][filled], table.observed[k][filled]
        upper.plot(*points, color=labels.colours[k], linewidth=1.6, marker="o", markersize=3.5, label=name)
        lower.plot(points[0], table.count[k][filled], color=labels.colours[k], linewidth=1.2)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="observed share of the class")
    upper.grid(True)
    upper.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    lower.set(yscale="log", ylabel="voxels", xlabel="predicted probability of the class")
    lower.grid(True, axis="y")
    return figure


@styled
def draw_pairs(values: NDArray[np.floating], labels: LabelSet, meaning: str, limit: float | None = None) -> Figure:
    """Draw a number for every pair of classes as a coloured matrix; what is nan stays blank.

    Parameters
    ----------
    values : ndarray of float, shape (K, K)
        For example effect sizes of class means, from `voxclf.explore`.
    labels : LabelSet
        The K classes.
    meaning : str
        What the numbers are, written beside the colour bar.
    limit : float, optional
        Value of the darkest colour; the largest by default. Larger values are written as they are.
    """
    K = labels.n_classes
    top = limit if limit is not None else float(np.nanmax(values, initial=1e-12))
    size = 1.6 + 0.62 * K
    figure = new_figure(size + 1.1, size)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=top)
    for row, column in np.argwhere(np.isfinite(values)).tolist():
        value = values[row, column]
        colour = "white" if value > 0.55 * top else INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(K), labels.names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(K), labels.names)
    axes.tick_params(length=0, pad=9)
    axes.spines[:].set_visible(False)
    _mark_classes(axes, labels)
    figure.colorbar(image, ax=axes, shrink=0.8, label=meaning).outline.set_visible(False)
    return figure
