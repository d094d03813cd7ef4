"""Bars and lines: how labels spread over classes, which features count, how a score grows with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxclf.figures.style import ALARM, GRID, INK, LINE_COLOURS, QUIET, add_class_legend, new_figure, styled
from voxclf.labels import PALETTE, LabelSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
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
    figure = new_figure(6.4, 0.7 + 0.26 * len(names))
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


@styled
def draw_curves(curves: Sequence[Curve], x_label: str, y_label: str) -> Figure:
    """Draw lines over a common axis: training and validation loss, a score against the number of labels."""
    figure = new_figure(5.8, 3.4)
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


@styled
def draw_learning_curve(
    measured: Curve, predicted: Curve, x_label: str, y_label: str, truth: tuple[float, float] | None = None
) -> Figure:
    """Draw a score against the amount of labels: what was measured as points, what is expected as a band.

    Parameters
    ----------
    measured : Curve
        Points; `low` and `high` become error bars.
    predicted : Curve
        The fitted line, drawn dashed beyond the last measured point, with its band.
    x_label, y_label : str
    truth : (x, y), optional
        A further point to compare the expectation with.
    """
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    x, y = np.asarray(predicted.x, np.float64), np.asarray(predicted.y, np.float64)
    last = max(measured.x)
    for part, dashes in ((x <= last, "-"), (x >= last, (0, (4, 3)))):
        axes.plot(x[part], y[part], color=QUIET, linewidth=1.6, linestyle=dashes)
    if predicted.low is not None and predicted.high is not None:
        axes.fill_between(x, predicted.low, predicted.high, color=QUIET, alpha=0.2, linewidth=0, label=predicted.name)
    axes.plot(measured.x, measured.y, "o", color=INK, markersize=4.5, label=measured.name)
    if measured.low is not None and measured.high is not None:
        axes.vlines(measured.x, measured.low, measured.high, color=INK, linewidth=1)
    if truth is not None:
        axes.plot(*truth, "s", color=ALARM, markersize=5, label="measured there")
    axes.axvline(last, color=QUIET, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(True)
    axes.legend(loc="lower right")
    return figure


@styled
def draw_intervals(intervals: Mapping[str, ArrayLike], truth: ArrayLike, meaning: str) -> Figure:
    """Draw the intervals of repeated draws around what each should hold; those that miss it stand out.

    Parameters
    ----------
    intervals : mapping of str to array, shape (N, 2)
        Low and high end of every draw, by the kind of interval: a panel for each.
    truth : array, shape (N,)
    meaning : str
        What the numbers are.
    """
    true = np.asarray(truth, np.float64)
    figure = new_figure(3.4 * len(intervals), 3.4)
    panels = figure.subplots(1, len(intervals), sharey=True, squeeze=False)[0]
    for axes, (kind, ends) in zip(panels, intervals.items(), strict=True):
        low, high = np.asarray(ends, np.float64).T - true
        is_held = (low <= 0) & (high >= 0)
        for chosen, colour in ((is_held, INK), (~is_held, ALARM)):
            axes.vlines(np.flatnonzero(chosen), low[chosen], high[chosen], color=colour, linewidth=2)
        axes.axhline(0, color=QUIET, linewidth=1)
        axes.set(title=f"{kind}: {is_held.sum()} of {len(true)} hold it", xlabel="draw")
    panels[0].set_ylabel(f"{meaning} minus truth")
    return figure


@styled
def draw_intensity_histograms(
    grey: ArrayLike, counts: NDArray[np.integer], labels: LabelSet | None, overall: NDArray[np.integer] | None = None
) -> Figure:
    """Draw how often each grey value occurs, over all voxels (grey area) and within each class (lines).

    Every histogram is scaled to the same area, so rare classes are as visible as common ones.

    Parameters
    ----------
    grey : array_like, shape (B,)
        Grey value at the middle of each bin, evenly spaced.
    counts : ndarray of int, shape (K, B)
        Labelled voxels of each class; (0, B) without labels.
    labels : LabelSet or None
        The K classes.
    overall : ndarray of int, shape (B,), optional
        All voxels, labelled or not.
    """
    centres = np.asarray(grey, np.float64)
    figure = new_figure(7.2, 3.4)
    axes = figure.add_subplot()
    if overall is not None:
        share = 100 * overall / max(int(overall.sum()), 1)
        axes.fill_between(centres, share, step="mid", color=GRID, label="all voxels")
    for k in range(len(counts)):
        assert labels is not None, "counts of classes need the classes' names"
        if counts[k].any():
            share = 100 * counts[k] / counts[k].sum()
            axes.step(centres, share, where="mid", color=labels.colours[k], linewidth=1.5, label=labels.names[k])
    axes.set(xlabel="grey value", ylabel="voxels of the class per bin (%)" if len(counts) else "voxels per bin (%)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(True, axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


# More bars than this are narrower than a pixel of the page.
_MOST_BARS = 400


@styled
def draw_label_coverage(profiles: Sequence[NDArray[np.integer]], labels: LabelSet, shape: tuple[int, ...]) -> Figure:
    """Draw which share of every slice is labelled, and as what, slice by slice along z, y and x.

    Parameters
    ----------
    profiles : three ndarrays of int, shapes (K, Z), (K, Y), (K, X)
        Labelled voxels of each class in each slice across that axis.
    labels : LabelSet
        The K classes.
    shape : (Z, Y, X)
        Of the volume.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.2, 4.6)
    panels = figure.subplots(3, 1)
    for axis, (axes, profile) in enumerate(zip(panels, profiles, strict=True)):
        n_slices = shape[axis]
        plane = int(np.prod(shape)) // n_slices
        width = -(-n_slices // _MOST_BARS)
        starts = np.arange(0, n_slices, width)
        # The fullest slice of a bar stands for it: a mean would hide a single labelled slice among 10,000.
        fullest = [start + int(profile[:, start : start + width].sum(axis=0).argmax()) for start in starts]
        edges = np.minimum(np.append(starts, n_slices), n_slices) - 0.5
        base = np.zeros(len(starts))
        for k in range(labels.n_classes):
            top = base + 100 * profile[k, fullest] / plane
            axes.stairs(top, edges, baseline=base, fill=True, color=labels.colours[k], linewidth=0)
            base = top
        axes.set(xlim=(-0.5, n_slices - 0.5), xlabel="zyx"[axis], ylabel="labelled (%)")
        axes.set_ylim(0, max(1.05 * float(base.max()), 1e-9))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _mark_places(axes, (edges[:-1] + edges[1:])[base > 0] / 2, len(starts))
    add_class_legend(figure, labels)
    return figure


def _mark_places(axes: Axes, places: NDArray[np.floating], n_bars: int) -> None:
    """Tick where a few bars are: alone in a wide volume they are thinner than a pixel."""
    if 2 * len(places) > n_bars:
        return
    style: dict[str, Any] = {"color": INK, "markersize": 5, "markeredgewidth": 0.7, "clip_on": False}
    axes.plot(places, np.full(len(places), 1.04), "|", transform=axes.get_xaxis_transform(), **style)


@styled
def draw_slice_fit(values: Sequence[Curve], flagged: Mapping[int, str], y_label: str) -> Figure:
    """Draw a number per slice along z, with the slices marked about which something is wrong.

    `flagged` maps a slice's z to a few words, written beside its mark.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.2, 2.9)
    axes = figure.add_subplot()
    for curve, colour in zip(values, LINE_COLOURS, strict=False):
        marker = "." if len(curve.x) < 60 else None
        axes.plot(curve.x, curve.y, color=colour, linewidth=1.2, marker=marker, label=curve.name)
    for number, (z, text) in enumerate(sorted(flagged.items())[:12]):
        axes.axvline(z, color=ALARM, linewidth=0.9, linestyle=(0, (2, 2)))
        place: dict[str, Any] = {"xy": (z, 0.02 + 0.09 * (number % 4)), "xycoords": axes.get_xaxis_transform()}
        # Near the right end the words stand left of their mark, or they would run into the legend.
        side = -1 if z > 0.7 * max(values[0].x) else 1
        place |= {"xytext": (3 * side, 0), "textcoords": "offset points", "ha": "left" if side > 0 else "right"}
        axes.annotate(f"{z}: {text}", **place, fontsize=7, color=ALARM)
    axes.set(xlabel="z (slice)", ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
