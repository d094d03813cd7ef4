"""Suggested boxes as files: a table for scripts, JSON, a page with pictures, and links into a viewer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxclf.config import SuggestConfig
from voxclf.figures import PlaneView, draw_overlays, render_jpeg
from voxclf.geometry import ORIGIN, Region, VoxelSize, Zyx
from voxclf.labels import LabelSet
from voxclf.neuroglancer_state import link_to_region
from voxclf.pages import render_csv, render_json, render_template, write_texts
from voxclf.predict import LABELS
from voxclf.report import ReportFigure
from voxclf.suggest import TABLE, Suggestion, Suggestions
from voxclf.volume import Volume, open_volume

N_PRINTED = 10
SURROUNDINGS, LEAST_SHOWN = 0.5, 64
"""A box is shown with half its width on each side, and 64 voxels in all: a membrane is known by where it goes."""
THUMBNAIL_DPI = 80


def write_suggestions(suggestions: Suggestions, config: SuggestConfig) -> tuple[Path, ...]:
    """Write the table, the JSON and, where the volume was given, the page; return their paths."""
    texts = {TABLE: render_table(suggestions), "suggestions.json": render_json(to_dict(suggestions))}
    if config.volume:
        texts["suggestions.html"] = render_page(suggestions, config)
    return write_texts(Path(config.output), texts)


def to_dict(suggestions: Suggestions) -> dict[str, Any]:
    """Everything as values for JSON."""
    return {
        "box_shape": list(suggestions.box_shape),
        "voxel_size_nm": list(suggestions.voxel_size_nm),
        "n_open_boxes": suggestions.n_open,
        "n_labelled_boxes": suggestions.n_labelled,
        "boxes": [_box_values(box, suggestions.voxel_size_nm) for box in suggestions.boxes],
    }


def _box_values(box: Suggestion, voxel_size_nm: VoxelSize) -> dict[str, Any]:
    return {
        "rank": box.rank,
        "region": str(box.region),
        "start": list(box.region.start),
        "stop": list(box.region.stop),
        "centre_nm": list(box.centre_nm),
        "score": box.score,
        "uncertainty": box.uncertainty,
        "rarity": box.rarity,
        "diversity": box.diversity,
        "classes": [{"name": name, "share": share} for name, share in box.classes],
        "neuroglancer": link_to_region(box.region, voxel_size_nm),
    }


def render_table(suggestions: Suggestions) -> str:
    """The table with one line per box; ``region`` is what ``--region`` takes."""
    corners = [f"{axis}{end}" for end in (0, 1) for axis in "zyx"]
    centres = [f"centre_{axis}_nm" for axis in "zyx"]
    factors = ["score", "uncertainty", "rarity", "diversity"]
    rows = (
        [
            box.rank,
            *box.region.start,
            *box.region.stop,
            *(f"{c:g}" for c in box.centre_nm),
            *(f"{getattr(box, factor):.6g}" for factor in factors),
            _spell_classes(box),
            box.region,
            link_to_region(box.region, suggestions.voxel_size_nm),
        ]
        for box in suggestions.boxes
    )
    return render_csv(["rank", *corners, *centres, *factors, "classes", "region", "neuroglancer"], rows)


def describe_suggestions(suggestions: Suggestions) -> tuple[list[str], dict[str, Any]]:
    """The first boxes as lines for the terminal, and all of them as values for ``--json``."""
    shown = suggestions.boxes[:N_PRINTED]
    width = max(len(str(box.region)) for box in shown)
    lines = [f"{'':>4}  {'region (z,y,x)':<{width}}  score  uncertain  rare  diverse  classes"]
    lines += [
        f"{box.rank:>4}  {box.region!s:<{width}}  {box.score:5.3f}  {box.uncertainty:9.2f}  {box.rarity:4.2f}  "
        f"{box.diversity:7.2f}  {_spell_classes(box)}"
        for box in shown
    ]
    if len(shown) < len(suggestions.boxes):
        lines.append(f"{'':>4}  and {len(suggestions.boxes) - len(shown)} more")
    size = " x ".join(map(str, suggestions.box_shape))
    labelled = f"; {suggestions.n_labelled:,} more hold labels already" if suggestions.n_labelled else ""
    lines.append(f"chosen from  {suggestions.n_open:,} boxes of {size} voxels{labelled}")
    return lines, to_dict(suggestions)


def _spell_classes(box: Suggestion) -> str:
    """Name the classes that make up at least a twentieth of the box, or else the first."""
    named = [f"{name} {share:.0%}" for name, share in box.classes if share >= 0.05]
    return ", ".join(named) or box.classes[0][0]


def render_page(suggestions: Suggestions, config: SuggestConfig) -> str:
    """The page that shows every box; it refers to nothing outside itself."""
    assert config.volume is not None
    image = open_volume(config.volume, suggestions.voxel_size_nm)
    predicted = open_volume(Path(config.prediction) / LABELS, kind="labels")
    values = {
        "volume": Path(config.volume).name,
        "suggestions": suggestions,
        "cards": list(_cards(suggestions, image, predicted)),
    }
    return render_template("voxclf", "suggest.html.jinja", values)


def _cards(suggestions: Suggestions, image: Volume, predicted: Volume) -> Iterator[dict[str, Any]]:
    for box in suggestions.boxes:
        yield {
            "box": box,
            "classes": _spell_classes(box),
            "picture": _picture(box, suggestions.label_set, image, predicted).data_uri,
            "neuroglancer": link_to_region(box.region, suggestions.voxel_size_nm),
        }


def _picture(box: Suggestion, label_set: LabelSet, image: Volume, predicted: Volume) -> ReportFigure:
    """The xy plane through the centre of a box, image and prediction side by side, the box outlined in both."""
    from matplotlib.patches import Rectangle

    region = box.region
    z = (region.start[0] + region.stop[0]) // 2
    _, height, width = region.shape
    margin: Zyx = (0, _margin(height), _margin(width))
    shown = region.grow(margin).intersect(Region(ORIGIN, image.shape))
    (_, y0, x0), (_, y1, x1) = shown.start, shown.stop
    plane, labels = (volume.read((z, y0, x0), (z + 1, y1, x1))[0, 0] for volume in (image, predicted))
    view = PlaneView(f"z = {z}", plane, None, label_set.remap_to_indices(labels), predicted.voxel_size_nm[1:])
    figure = draw_overlays([view], label_set, opacity=0.4)
    corner = (region.start[2] - x0 - 0.5, region.start[1] - y0 - 0.5)
    for axes in figure.axes:
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.2))
    return ReportFigure(f"{box.rank}", str(region), render_jpeg(figure, THUMBNAIL_DPI), "jpeg")


def _margin(width: int) -> int:
    return max(round(width * SURROUNDINGS), (LEAST_SHOWN - width) // 2)
