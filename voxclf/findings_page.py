"""Findings with coordinates as a page of cards, as a table and as JSON: what audits and comparisons share."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.figures import PlaneView, draw_overlays, render_jpeg
from voxclf.geometry import ORIGIN, Region, VoxelSize, Zyx
from voxclf.json_values import to_json_values
from voxclf.labels import LabelSet
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


def write_texts(folder: Path, texts: Mapping[str, str]) -> tuple[Path, ...]:
    """Write files under other names and rename them, so that a reader never sees half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(folder / name)
    return tuple(folder / name for name in texts)


def render_findings(title: str, texts: Sequence[str], tables: Sequence[ReportTable], cards: Iterable[Card]) -> str:
    """The page; it refers to nothing outside itself."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("voxclf").joinpath("findings.html.jinja").read_text("utf-8"))
    return template.render(title=title, texts=texts, tables=tables, cards=list(cards))


def render_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for scripts and spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def render_json(values: Mapping[str, Any]) -> str:
    """Values as JSON text."""
    return json.dumps(to_json_values(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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
    classes: tuple[np.ndarray, np.ndarray],
    shown: Region,
    axis: int,
    framed: Region,
    titles: tuple[str, str],
) -> str:
    """Draw image, first and second classes side by side, with a frame around the finding; returns a data URI.

    Parameters
    ----------
    classes : pair of ndarray of int, shape of ``shown``
        Class indices.
    framed : Region
        The finding; no frame is drawn around what fills the picture.
    titles : pair of str
        Of the columns that show the classes.
    """
    from matplotlib.patches import Rectangle

    plane = image.read(shown.start, shown.stop)[0]
    cut = [np.take(array, 0, axis=axis) for array in (plane, *classes)]
    rows, columns = (a for a in range(3) if a != axis)
    size = image.voxel_size_nm
    view = PlaneView(f"{'zyx'[axis]} = {shown.start[axis]}", cut[0], cut[1], cut[2], (size[rows], size[columns]))
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
