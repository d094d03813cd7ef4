"""The two pictures of a comparison: score against time, and every contestant's prediction of one plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from voxclf.compare.scores import Standing, find_pareto
from voxclf.figures import PlaneView, draw_overlays
from voxclf.figures.style import QUIET, new_figure, styled
from voxclf.fit import choose_example
from voxclf.geometry import Region, Zyx
from voxclf.labels import PALETTE, LabelSet
from voxclf.predict import LABELS
from voxclf.sampling import LabelSurvey
from voxclf.volume import Volume, open_volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW = 320
"""Longest side of the plane shown, in voxels of the finest axis: enough for organelles, near enough for membranes."""
MARKERS = {"bare": "o", "autocontext": "s", "crf": "^"}


@styled
def draw_pareto(standings: Sequence[Standing]) -> Figure:
    """Draw macro F1 against the time of predicting, and against that of fitting, both on logarithmic axes.

    Bars are 95 % intervals. A dotted line joins a contestant with the one it adds a stage to. The grey steps are the
    front: contestants that none beats in both time and score.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = new_figure(8.6, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    colours = _model_colours(standings)
    for axes, times, label in (
        (left, [s.predict_s for s in standings], "time to predict the held-out region, s"),
        (right, [s.fit_s for s in standings], "time to fit, s"),
    ):
        _draw_panel(axes, standings, times, colours)
        axes.set(xscale="log", xlabel=label)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True)
    left.set_ylabel("macro F1 on the held-out labels")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3 if max(map(len, names)) < 28 else 2)
    return figure


def _draw_panel(axes: Axes, standings: Sequence[Standing], times: Sequence[float], colours: dict[str, str]) -> None:
    intervals = [standing.intervals["macro_f1"] for standing in standings]
    scores = [interval.value for interval in intervals]
    front = find_pareto(times, scores)
    axes.step([times[i] for i in front], [scores[i] for i in front], where="post", color=QUIET, alpha=0.5, zorder=1)
    place = {standing.name: (times[i], scores[i]) for i, standing in enumerate(standings)}
    for i, standing in enumerate(standings):
        before = standing.contestant.without_last_stage
        colour = colours[_bare_name(standing)]
        if before is not None and before.name in place:
            axes.plot(*zip(place[before.name], place[standing.name], strict=True), color=colour, ls=":", lw=1.2)
        ends = np.nan_to_num([[scores[i] - intervals[i].low], [intervals[i].high - scores[i]]])
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[_stage(standing)], "markersize": 7}
        axes.errorbar(times[i], scores[i], yerr=ends, capsize=2, lw=1, ls="none", label=standing.name, **style)


def _model_colours(standings: Sequence[Standing]) -> dict[str, str]:
    names = dict.fromkeys(_bare_name(standing) for standing in standings)
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def _bare_name(standing: Standing) -> str:
    return standing.name.split("+")[0]


def _stage(standing: Standing) -> str:
    if standing.contestant.with_crf:
        return "crf"
    return "autocontext" if standing.contestant.rounds > 1 else "bare"


def draw_predictions(
    standings: Sequence[Standing],
    volume: Volume,
    truth: Volume,
    survey: LabelSurvey,
    region: Region,
    labels: LabelSet,
) -> Figure:
    """Draw one plane of the held-out region: a row per contestant, with labels, prediction and differences.

    The plane goes through the most varied held-out labels, along the two axes on which most of them are seen; the
    prediction is that of the first seed.

    Parameters
    ----------
    standings : sequence of Standing
        At least one.
    volume, truth : Volume
        Image, and the labels scored on.
    survey : LabelSurvey
        Where ``truth`` is labelled.
    region : Region
        What was predicted.
    labels : LabelSet
    """
    point = choose_example(truth, survey, labels.unlabelled)
    planes = [_cut_plane(axis, point, region, volume.voxel_size_nm) for axis in range(3)]
    axis = int(np.argmax([(truth.read(p.start, p.stop) != labels.unlabelled).sum() for p in planes]))
    plane = planes[axis]
    drawn = labels.remap_to_indices(truth.read(plane.start, plane.stop)[0])
    z, y, x = volume.voxel_size_nm
    views: list[PlaneView] = []
    for standing in standings:
        predicted = open_volume(standing.runs[0].prediction / LABELS, kind="labels").read(plane.start, plane.stop)[0]
        arrays = [volume.read(plane.start, plane.stop)[0], drawn, labels.remap_to_indices(predicted)]
        image, true, found = (np.squeeze(array, axis) for array in arrays)
        # The first row also bears the columns' titles, which a long name must not run into.
        title = standing.name if views else f"{standing.name}\n"
        views.append(PlaneView(title, image, true, found, ((y, x), (z, x), (z, y))[axis]))
    return draw_overlays(views, labels)


def _cut_plane(axis: int, point: Zyx, region: Region, voxel_size_nm: tuple[float, float, float]) -> Region:
    """The plane through a point across an axis, at most a window wide, within a region."""
    start, stop = list(region.start), list(region.stop)
    for other in range(3):
        centre = min(max(point[other], region.start[other]), region.stop[other] - 1)
        if other == axis:
            start[other], stop[other] = centre, centre + 1
            continue
        side = max(2, round(WINDOW * min(voxel_size_nm) / voxel_size_nm[other]))
        if side < stop[other] - start[other]:
            start[other] = min(max(centre - side // 2, region.start[other]), region.stop[other] - side)
            stop[other] = start[other] + side
    return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
