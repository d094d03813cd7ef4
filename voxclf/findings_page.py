"""Findings with coordinates as a page of cards: what audits, suggestions and comparisons of segmentations share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxclf.figures import PlaneView, draw_overlays, render_jpeg
from voxclf.geometry import ORIGIN, Region, VoxelSize, Zyx
from voxclf.labels import LabelSet
from voxclf.pages import render_template
from voxclf.report import ReportFigure, ReportTable
from voxclf.volume import Volume

SURROUNDINGS, LEAST_SHOWN = 0.5, 96
"""A region is shown with half its width on each side, and 96 voxels in all: a membrane is known by where it goes."""
MOST_SHOWN = 768
DPI = 80


@dataclass(frozen=True)
class Card:
    """One finding on the page."""

    rank: int
    heading: str
    place: str
    picture: str | None
    facts: Mapping[str, Any]
    neuroglancer: str


def render_findings(title: str, texts: Sequence[str], tables: Sequence[ReportTable], cards: Iterable[Card]) -> str:
    """The page; it refers to nothing outside itself."""
    values = {"title": title, "texts": texts, "tables": tables, "cards": list(cards)}
    return render_template("voxclf", "findings.html.jinja", values)


def to_nm(position: Zyx, voxel_size_nm: VoxelSize) -> VoxelSize:
    """Where the centre of a voxel lies, nm from the volume's corner."""
    z, y, x = (round((p + 0.5) * size, 3) for p, size in zip(position, voxel_size_nm, strict=True))
    return z, y, x


def show_plane(region: Region, axis: int, position: int, shape: Zyx) -> Region:
    """The part of a plane that shows a region and its surroundings, centred and not too large for a small picture."""
    start, stop = list(region.start), list(region.stop)
    for a in range(3):
        width = region.shape[a]
        shown = min(max(round(width * (1 + 2 * SURROUNDINGS)), LEAST_SHOWN), MOST_SHOWN)
        start[a] += (width - shown) // 2
        stop[a] = start[a] + shown
    start[axis], stop[axis] = position, position + 1
    grown = Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return grown.intersect(Region(ORIGIN, shape))


def draw_finding(
    image: Volume,
    label_set: LabelSet,
    classes: tuple[np.ndarray | None, np.ndarray],
    shown: Region,
    axis: int,
    framed: Region,
    titles: tuple[str, str],
) -> str:
    """Draw image and classes side by side, with a frame around the finding; returns a data URI.

    Parameters
    ----------
    classes : pair of ndarray of int, shape of ``shown``
        Class indices; the first may be None, for a picture of the second alone.
    framed : Region
        The finding; no frame is drawn around what fills the picture.
    titles : pair of str
        Of the columns that show the classes.
    """
    from matplotlib.patches import Rectangle

    plane = image.read(shown.start, shown.stop)[0]
    cut, first, second = (None if array is None else np.take(array, 0, axis=axis) for array in (plane, *classes))
    assert cut is not None
    rows, columns = (a for a in range(3) if a != axis)
    size = image.voxel_size_nm
    view = PlaneView(f"{'zyx'[axis]} = {shown.start[axis]}", cut, first, second, (size[rows], size[columns]))
    figure = draw_overlays([view], label_set, opacity=0.4)
    framed = framed.intersect(shown)
    corner = (framed.start[columns] - shown.start[columns] - 0.5, framed.start[rows] - shown.start[rows] - 0.5)
    for axes in figure.axes:
        title = axes.get_title()
        axes.title.set_text({"labels": titles[0], "prediction": titles[1]}.get(title, title))
        if framed == shown:
            continue
        width, height = framed.shape[columns], framed.shape[rows]
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.2))
    return ReportFigure("", "", render_jpeg(figure, DPI), "jpeg").data_uri
