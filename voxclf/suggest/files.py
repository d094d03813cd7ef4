"""Suggested boxes as files: a table for scripts, JSON, a page with pictures, and links into a viewer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxclf.config import SuggestConfig
from voxclf.findings_page import Card, draw_finding, render_findings, show_plane
from voxclf.geometry import VoxelSize
from voxclf.labels import LabelSet
from voxclf.neuroglancer_state import link_to_region
from voxclf.pages import render_csv, render_json, write_texts
from voxclf.predict import LABELS
from voxclf.suggest.suggestions import TABLE, Suggestion, Suggestions
from voxclf.volume import Volume, open_volume

N_PRINTED = 10


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
    size = " × ".join(map(str, suggestions.box_shape))
    text = (
        f"{len(suggestions.boxes)} boxes of {Path(config.volume).name}, best first, out of {suggestions.n_open:,} of "
        f"{size} voxels (z, y, x). The score is uncertainty × rarity × diversity, each from 0 to 1: how unsure the "
        "model is, how rare the classes are between which it wavers, and how far and different the box is from those "
        "above it. Each picture is the xy plane through the middle of the box, which the white frame marks."
    )
    return render_findings("Where to label next", [text], [], _cards(suggestions, image, predicted))


def _cards(suggestions: Suggestions, image: Volume, predicted: Volume) -> Iterator[Card]:
    for box in suggestions.boxes:
        facts = {"score": f"{box.score:.3f}"}
        facts |= {factor: f"{getattr(box, factor):.2f}" for factor in ("uncertainty", "rarity", "diversity")}
        picture = _picture(box, suggestions.label_set, image, predicted)
        link = link_to_region(box.region, suggestions.voxel_size_nm)
        yield Card(box.rank, _spell_classes(box), str(box.region), picture, facts, link)


def _picture(box: Suggestion, label_set: LabelSet, image: Volume, predicted: Volume) -> str:
    """The xy plane through the centre of a box, image and prediction side by side, the box outlined in both."""
    z = (box.region.start[0] + box.region.stop[0]) // 2
    shown = show_plane(box.region, 0, z, image.shape)
    classes = label_set.remap_to_indices(predicted.read(shown.start, shown.stop)[0])
    return draw_finding(image, label_set, (None, classes), shown, 0, box.region, ("labels", "prediction"))
