"""Planes cut through a volume, drawn at their true proportions: image, labels, prediction, probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxclf.figures.style import QUIET, add_class_legend, new_figure, styled
from voxclf.labels import LabelSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


@styled
def draw_overlays(
    views: Sequence[PlaneView],
    labels: LabelSet,
    opacity: float = 0.5,
    titles: tuple[str, str, str] = ("labels", "prediction", "differences"),
) -> Figure:
    """Draw image, drawn labels, prediction and where they differ, one row per plane, at the true aspect.

    The columns for labels and for differences are left out where no view has labels. "Differences" shows the
    predicted class at labelled voxels where it is wrong. With other titles, two predictions can be compared.
    """
    columns = _overlay_columns(views, titles)
    heights = [view.image.shape[0] * view.pixel_size_nm[0] for view in views]
    widths = [view.image.shape[1] * view.pixel_size_nm[1] for view in views]
    panel = 8.0 / len(columns)
    # Rows get the height their aspect asks for, but thin stacks keep enough of it to be seen.
    ratios = [max(h / w, 0.15) for h, w in zip(heights, widths, strict=True)]
    figure = new_figure(8.0, 0.96 * panel * sum(ratios) + 0.2 * len(views) + 0.5)
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
    add_class_legend(figure, labels)
    return figure


# What a column of overlays colours, picked from a plane; None shows the bare image.
_Pick = Callable[[PlaneView], "NDArray[np.integer] | None"]


def _overlay_columns(views: Sequence[PlaneView], titles: tuple[str, str, str]) -> list[tuple[str, _Pick]]:
    has_truth = any(view.truth is not None for view in views)
    has_prediction = any(view.predicted is not None for view in views)
    columns: list[tuple[str, _Pick]] = [("image", lambda view: None)]
    if has_truth:
        columns.append((titles[0], lambda view: view.truth))
    if has_prediction:
        columns.append((titles[1], lambda view: view.predicted))
    if has_truth and has_prediction:
        columns.append((titles[2], _differences))
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


def _aspect(view: PlaneView) -> float:
    """Height of a plane over its width, in nm."""
    (H, W), (pixel_height, pixel_width) = view.image.shape, view.pixel_size_nm
    return H * pixel_height / (W * pixel_width)


@styled
def draw_montage(views: Sequence[PlaneView], labels: LabelSet | None, opacity: float = 0.45) -> Figure:
    """Draw slices two to a row, each with its drawn labels beside it; without labels, four to a row.

    Parameters
    ----------
    views : sequence of PlaneView
        At least one; `truth` holds the labels.
    labels : LabelSet or None
        The classes; None shows the images alone.
    opacity : float
        Of the labels, 0 to 1.
    """
    panels: list[tuple[PlaneView, NDArray[np.integer] | None]] = []
    for view in views:
        panels.append((view, None))
        if labels is not None:
            panels.append((view, view.truth))
    n_columns = min(4, len(panels))
    rows = [panels[i : i + n_columns] for i in range(0, len(panels), n_columns)]
    # Rows get the height of their tallest panel, but thin stacks keep enough of it to be seen.
    ratios = [max(0.12, *(_aspect(view) for view, _ in row)) for row in rows]
    width = 2.4 * n_columns
    figure = new_figure(width, 2.4 * sum(ratios) + 0.24 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), n_columns, squeeze=False, height_ratios=ratios)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (view, indices) in zip(grid.flat, panels, strict=False):
        low, high = np.percentile(view.image, [0.5, 99.5])
        shown = labels if labels is not None else LabelSet.from_ids([1])
        _show_plane(axes, view, (float(low), float(high)), indices, shown, opacity)
        if indices is None:
            axes.set_title(view.title, loc="left", fontsize=8, fontweight="normal", color=QUIET)
            _add_scale_bar(axes, view)
    if labels is not None:
        add_class_legend(figure, labels)
    return figure


@styled
def draw_probabilities(view: PlaneView, probabilities: NDArray, labels: LabelSet) -> Figure:
    """Draw, for one plane, how probable each class is at every voxel: white is 0, the class's colour is 1.

    Parameters
    ----------
    view : PlaneView
        The image; shown first.
    probabilities : ndarray, shape (K, H, W)
        Floats from 0 to 1, or uint8 from 0 to 255 as volumes store them.
    labels : LabelSet
        The K classes.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if probabilities.shape != (labels.n_classes, *view.image.shape):
        raise ValueError(
            f"probabilities have shape {probabilities.shape}, must be (classes, height, width) = "
            f"{(labels.n_classes, *view.image.shape)}; cut them from the same plane as the image"
        )
    share = probabilities.astype(np.float64) / (255 if probabilities.dtype == np.uint8 else 1)
    n_columns = min(4, 1 + labels.n_classes)
    n_rows = -(-(1 + labels.n_classes) // n_columns)
    aspect = view.pixel_size_nm[0] / view.pixel_size_nm[1]
    panel_height = max(2.2 * aspect * view.image.shape[0] / view.image.shape[1], 0.4)
    figure = new_figure(2.2 * n_columns, (panel_height + 0.3) * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    low, high = np.percentile(view.image, [0.5, 99.5])
    _show_plane(panels[0], view, (float(low), float(high)), None, labels, 1.0)
    panels[0].set_title(view.title, fontweight="normal", color=QUIET)
    _add_scale_bar(panels[0], view)
    for k, axes in enumerate(panels[1:]):
        axes.set_axis_off()
        if k < labels.n_classes:
            rgb = 1 - share[k][..., None] * (1 - labels.rgb[k] / 255)
            axes.imshow(rgb, aspect=aspect, interpolation="auto", interpolation_stage="rgba")
            axes.set_title(labels.names[k])
    return figure
