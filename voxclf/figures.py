"""The pictures of voxclf in one style: what reports, notebooks and papers show.

Every ``draw_*`` function takes numbers and a `LabelSet` and returns a matplotlib ``Figure`` (no pyplot, no
global state); `render_svg`, `render_png` and `render_jpeg` turn it into bytes. A class has its `LabelSet`
colour in all of them. Nothing is computed here beyond what drawing needs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxclf.labels import LabelSet
from voxclf.metrics.calibration import ReliabilityTable
from voxclf.metrics.voxelwise import ScoreTables, precision_recall_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
Plane = Literal["xy", "xz", "yz"]

INK, QUIET, GRID = "#222222", "#6B6B6B", "#E3E3E3"

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # The same numbers give the same bytes, so a report can be compared and cached.
    "svg.hashsalt": "voxclf",
}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under `STYLE`, leaving the caller's matplotlib settings alone."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure as NewFigure

    return NewFigure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, **options: Any) -> bytes:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, bbox_inches="tight", pad_inches=0.06, **options)
        return buffer.getvalue()


def render_svg(figure: Figure) -> bytes:
    """Return the figure as SVG, sharp at any size; for line drawings. Equal figures give equal bytes."""
    return _save(figure, format="svg", metadata={"Date": None, "Creator": "voxclf"})


def render_png(figure: Figure, dpi: int = 150) -> bytes:
    """Return the figure as PNG with `dpi` dots per inch."""
    return _save(figure, format="png", dpi=dpi, metadata={"Software": "voxclf"})


def render_jpeg(figure: Figure, dpi: int = 180) -> bytes:
    """Return the figure as JPEG; for pictures of EM, whose noise makes a PNG five times as large."""
    # Without chroma subsampling, class borders stay sharp.
    return _save(figure, format="jpeg", dpi=dpi, pil_kwargs={"quality": 88, "subsampling": 0})


@_styled
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
    figure = _new_figure(size + 1.1, size)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(K):
        for column in range(K):
            share, count = shares[row, column], int(confusion[row, column])
            centred: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if share > 0.55 else INK}
            axes.text(column, row - 0.1, f"{share:.2f}", fontsize=9, **centred)
            axes.text(column, row + 0.22, _short_count(count), fontsize=6, **centred)
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


def _short_count(count: int) -> str:
    """Write a count in at most five characters: 950, 12.3k, 4.56M."""
    for limit, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            value = count / limit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{suffix}"
    return str(count)


@_styled
def draw_precision_recall(tables: ScoreTables, labels: LabelSet, average_precision: ArrayLike | None = None) -> Figure:
    """Draw, per class, how pure the found voxels are (precision) as more of the class is found (recall).

    Classes without a true voxel are left out. `average_precision`, shape (K,), is written into the legend.
    """
    figure = _new_figure(5.4, 4.0)
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


@_styled
def draw_reliability(table: ReliabilityTable, labels: LabelSet) -> Figure:
    """Draw predicted against observed frequency per class; on the diagonal, probabilities mean what they say.

    The lower panel shows how many voxels stand behind each point, on a logarithmic axis.
    """
    figure = _new_figure(5.4, 4.9)
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


@_styled
def draw_bars(
    names: Sequence[str],
    values: ArrayLike,
    x_label: str,
    colours: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    errors: ArrayLike | None = None,
) -> Figure:
    """Draw horizontal bars, the first on top.

    Parameters
    ----------
    names, values : length M
        One bar each.
    x_label : str
        What the length of a bar means.
    colours : sequence of str, optional
        One per bar.
    notes : sequence of str, optional
        Text at the end of each bar.
    errors : array_like, length M, optional
        Half width of an error bar.
    """
    length = np.asarray(values, np.float64)
    figure = _new_figure(6.4, 0.7 + 0.26 * len(names))
    axes = figure.add_subplot()
    rows = np.arange(len(names))
    axes.barh(rows, length, color=colours or "#4477AA", height=0.72)
    half = np.zeros_like(length) if errors is None else np.asarray(errors, np.float64)
    if errors is not None:
        axes.errorbar(length, rows, xerr=half, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    for row, note in enumerate(notes or ()):
        end = max(length[row] + half[row], 0)
        axes.annotate(note, (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=QUIET)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.02, x=0.12)
    axes.grid(True, axis="x")
    axes.set_xlabel(x_label)
    return figure


def draw_importances(
    importances: Mapping[str, float], top: int = 20, errors: Mapping[str, float] | None = None
) -> Figure:
    """Draw the features a model leans on most, largest first; `errors` are half widths per feature."""
    ranked = sorted(importances.items(), key=lambda item: -item[1])[:top]
    names = [name for name, _ in ranked]
    return draw_bars(
        names,
        [value for _, value in ranked],
        "importance",
        notes=[f"{value:.3f}" for _, value in ranked],
        errors=None if errors is None else [errors[name] for name in names],
    )


def draw_label_distribution(counts: Sequence[int] | NDArray[np.integer], labels: LabelSet) -> Figure:
    """Draw how the labelled voxels (`counts`, length K) spread over the classes."""
    total = max(int(np.sum(counts)), 1)
    shares = [100 * int(count) / total for count in counts]
    notes = [f"{share:.1f} %   {int(count):,} voxels" for share, count in zip(shares, counts, strict=True)]
    return draw_bars(labels.names, shares, "share of the labelled voxels (%)", labels.colours, notes)


@dataclass(frozen=True)
class Curve:
    """A line to draw, optionally with a band between `low` and `high`; all of one length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str | None = None


@_styled
def draw_curves(curves: Sequence[Curve], x_label: str, y_label: str) -> Figure:
    """Draw lines over a common axis: training and validation loss, a score against the number of labels."""
    from voxclf.labels import PALETTE

    figure = _new_figure(5.8, 3.4)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        colour = curve.colour or PALETTE[number % len(PALETTE)]
        marker = "o" if len(curve.x) <= 15 else None
        axes.plot(curve.x, curve.y, color=colour, lw=1.8, marker=marker, markersize=4, label=curve.name)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


@dataclass(frozen=True)
class PlaneView:
    """One plane cut through a volume, ready to be drawn.

    Parameters
    ----------
    title : str
        Which plane and where, for example "xy, z = 14".
    image : ndarray, shape (H, W)
        Intensities.
    truth, predicted : ndarray of int, shape (H, W), or None
        Class indices, negative where there is none.
    pixel_size_nm : (float, float)
        Height and width of a pixel.
    """

    title: str
    image: NDArray
    truth: NDArray[np.integer] | None
    predicted: NDArray[np.integer] | None
    pixel_size_nm: tuple[float, float]


def cut_planes(
    image: Any,
    truth: Any | None,
    predicted: Any | None,
    voxel_size_nm: tuple[float, float, float],
    point: tuple[int, int, int],
    window_nm: float | None = None,
) -> tuple[PlaneView, ...]:
    """Cut the xy, xz and yz planes through one point; only the three planes are read.

    Parameters
    ----------
    image, truth, predicted : array-like, shape (Z, Y, X)
        Arrays or anything that reads its part when indexed with slices; truth and predicted hold class
        indices and may be None. Volumes one voxel thin along an axis give only the planes that show
        something.
    voxel_size_nm : (z, y, x)
        In nanometres.
    point : (z, y, x)
        Voxel through which all planes go.
    window_nm : float, optional
        Show at most this length along each axis, around `point`; everything by default.

    Returns
    -------
    tuple of PlaneView
        xy (rows y), xz (rows z) and yz (rows z, columns y).
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or any(not 0 <= p < n for p, n in zip(point, shape, strict=True)):
        raise ValueError(f"point {point} must lie inside the image of shape {shape} (z, y, x); choose another")
    windows = [
        _window(p, n, None if window_nm is None else window_nm / size)
        for p, n, size in zip(point, shape, voxel_size_nm, strict=True)
    ]
    views = []
    for plane, axis, rows, columns in (("xy", 0, 1, 2), ("xz", 1, 0, 2), ("yz", 2, 0, 1)):
        if shape[rows] < 2 or shape[columns] < 2:
            continue
        box = tuple(slice(point[a], point[a] + 1) if a == axis else windows[a] for a in range(3))
        cut = [None if v is None else np.squeeze(np.asarray(v[box]), axis) for v in (image, truth, predicted)]
        assert cut[0] is not None
        title = f"{plane}, {'zyx'[axis]} = {point[axis]}"
        views.append(PlaneView(title, cut[0], cut[1], cut[2], (voxel_size_nm[rows], voxel_size_nm[columns])))
    return tuple(views)


def _window(position: int, length: int, size: float | None) -> slice:
    if size is None or size >= length:
        return slice(0, length)
    n = max(round(size), 2)
    start = min(max(position - n // 2, 0), length - n)
    return slice(start, start + n)


@_styled
def draw_overlays(views: Sequence[PlaneView], labels: LabelSet, opacity: float = 0.5) -> Figure:
    """Draw image, drawn labels, prediction and where they differ, one row per plane, at the true aspect.

    The columns for labels and for differences are left out where no view has labels. "Differences" shows the
    predicted class at labelled voxels where it is wrong.
    """
    columns = _overlay_columns(views)
    heights = [view.image.shape[0] * view.pixel_size_nm[0] for view in views]
    widths = [view.image.shape[1] * view.pixel_size_nm[1] for view in views]
    panel = 8.0 / len(columns)
    # Rows get the height their aspect asks for, but thin stacks keep enough of it to be seen.
    ratios = [max(h / w, 0.15) for h, w in zip(heights, widths, strict=True)]
    figure = _new_figure(8.0, 0.96 * panel * sum(ratios) + 0.2 * len(views) + 0.5)
    grid = figure.subplots(len(views), len(columns), squeeze=False, height_ratios=ratios)
    for row, view in enumerate(views):
        low, high = np.percentile(view.image, [0.5, 99.5])
        for column, (title, pick) in enumerate(columns):
            axes = grid[row, column]
            strength = 1.0 if pick is _differences else opacity
            _show_plane(axes, view, (float(low), float(high)), pick(view), labels, strength)
            if row == 0:
                axes.set_title(title)
        grid[row, 0].set_title(view.title, loc="left", fontsize=8, fontweight="normal", color=QUIET)
        _add_scale_bar(grid[row, 0], view)
    _add_class_legend(figure, labels)
    return figure


# What a column of overlays colours, picked from a plane; None shows the bare image.
_Pick = Callable[[PlaneView], "NDArray[np.integer] | None"]


def _overlay_columns(views: Sequence[PlaneView]) -> list[tuple[str, _Pick]]:
    has_truth = any(view.truth is not None for view in views)
    has_prediction = any(view.predicted is not None for view in views)
    columns: list[tuple[str, _Pick]] = [("image", lambda view: None)]
    if has_truth:
        columns.append(("labels", lambda view: view.truth))
    if has_prediction:
        columns.append(("prediction", lambda view: view.predicted))
    if has_truth and has_prediction:
        columns.append(("differences", _differences))
    return columns


def _differences(view: PlaneView) -> NDArray[np.integer] | None:
    if view.truth is None or view.predicted is None:
        return None
    return np.where((view.truth >= 0) & (view.truth != view.predicted), view.predicted, -1)


def _show_plane(
    axes: Axes,
    view: PlaneView,
    limits: tuple[float, float],
    indices: NDArray[np.integer] | None,
    labels: LabelSet,
    opacity: float,
) -> None:
    low, high = limits
    grey = np.clip((view.image.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    # Opaque colours are few and far between (differences); a pale image lets them stand out.
    pale = 0.6 if opacity == 1 else 0.0
    rgb = np.repeat(pale + (1 - pale) * grey[..., None], 3, axis=-1)
    if indices is not None:
        coloured = indices >= 0
        # Membranes are nearly black in EM; lifting the dark end lets them take on their class colour.
        lifted = 0.25 + 0.75 * rgb[coloured]
        rgb[coloured] = (1 - opacity) * lifted + opacity * labels.rgb[indices[coloured]] / 255
    aspect = view.pixel_size_nm[0] / view.pixel_size_nm[1]
    axes.imshow(rgb, aspect=aspect, interpolation="auto", interpolation_stage="rgba")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def scale_bar_length_nm(width_nm: float) -> float:
    """Choose a round length (1, 2 or 5 times a power of ten) of at most a third of the width shown."""
    limit = width_nm / 3
    power = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit)


def _add_scale_bar(axes: Axes, view: PlaneView) -> None:
    from matplotlib import patheffects
    from matplotlib.transforms import ScaledTranslation

    W = view.image.shape[1]
    length = scale_bar_length_nm(W * view.pixel_size_nm[1])
    text = f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
    outline = [patheffects.withStroke(linewidth=2, foreground="black")]
    start, stop = 0.03, 0.03 + length / (W * view.pixel_size_nm[1])
    # Height in points, not in parts of the panel, so that the bar fits a thin stack's side view as well.
    lift = axes.transAxes + ScaledTranslation(0, 5 / 72, axes.figure.dpi_scale_trans)
    style: dict[str, Any] = {"transform": lift, "color": "white", "path_effects": outline}
    axes.plot([start, stop], [0, 0], linewidth=2.5, solid_capstyle="butt", **style)
    raised = lift + ScaledTranslation(0, 3 / 72, axes.figure.dpi_scale_trans)
    axes.text((start + stop) / 2, 0, text, ha="center", va="bottom", fontsize=8, **style | {"transform": raised})


def _add_class_legend(figure: Figure, labels: LabelSet) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(labels.names, labels.colours, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
