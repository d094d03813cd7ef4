"""A comparison of two segmentations as a page with pictures, tables and JSON, and in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from voxclf.config import DiffConfig
from voxclf.diff.objects import Fate
from voxclf.diff.volume_diff import TABLE, Diff, Difference, volume_nm3
from voxclf.findings_page import Card, draw_finding, render_findings, show_plane, to_nm
from voxclf.labels import LabelSet
from voxclf.neuroglancer_state import link_to_region
from voxclf.pages import render_csv, render_json, write_texts
from voxclf.report import ReportTable
from voxclf.volume import open_volume

#: Raised when a field of diff.json changes its meaning.
JSON_FORMAT = 1
OBJECTS = "objects.csv"
FATES: tuple[Fate, ...] = get_args(Fate)
COLUMNS = (
    "rank",
    "before",
    "after",
    *"zyx",
    *(f"{axis}_nm" for axis in "zyx"),
    "n_voxels",
    "volume_nm3",
    "region",
    "neuroglancer",
)
OBJECT_COLUMNS = ("fate", "object", *"zyx", *(f"{axis}_nm" for axis in "zyx"), "n_voxels", "volume_nm3", "n_relatives")


def write_diff(diff: Diff, config: DiffConfig) -> tuple[Path, ...]:
    """Write ``diff.html``, ``diff.json``, ``objects.csv`` and ``diff.csv``; return their paths."""
    differences = list_differences(diff)
    objects = list(_object_rows(diff))
    # The table comes last: it says that the comparison is complete.
    texts = {
        "diff.html": _render_page(diff, config),
        "diff.json": render_json(to_dict(diff)),
        OBJECTS: render_csv(OBJECT_COLUMNS, objects),
        TABLE: render_csv(COLUMNS, ([row[name] for name in COLUMNS] for row in differences)),
    }
    return write_texts(Path(config.output), texts)


def spell_value(diff: Diff, value: int) -> str:
    """The name of a class, or the number of an object."""
    if diff.label_set is None:
        return f"object {value}" if value else "background"
    if value == diff.label_set.unlabelled:
        return "unlabelled"
    return diff.label_set.names[diff.label_set.ids.index(value)]


def list_differences(diff: Diff) -> list[dict[str, Any]]:
    """The largest differences as plain values, largest first."""
    return [_difference_values(diff, rank, found) for rank, found in enumerate(diff.differences, start=1)]


def _difference_values(diff: Diff, rank: int, found: Difference) -> dict[str, Any]:
    size = diff.voxel_size_nm
    return {
        "rank": rank,
        "before": spell_value(diff, found.before),
        "after": spell_value(diff, found.after),
        **dict(zip("zyx", found.position, strict=True)),
        **dict(zip(("z_nm", "y_nm", "x_nm"), to_nm(found.position, size), strict=True)),
        "n_voxels": found.n_voxels,
        "volume_nm3": volume_nm3(found.n_voxels, size),
        "region": str(found.region),
        "neuroglancer": link_to_region(found.region, size),
    }


def _object_rows(diff: Diff) -> Iterator[list[Any]]:
    """Every object that was born, lost, split or merged, largest first within each."""
    for fate in FATES:
        table = diff.objects.table_of(fate)
        side = diff.objects.relatives_after if fate in ("born", "merged") else diff.objects.relatives_before
        rows = diff.objects.find(fate)
        for row in rows[np.argsort(-table.sizes[rows], kind="stable")].tolist():
            z, y, x = table.places[row].tolist()
            n_voxels = int(table.sizes[row])
            place = (*to_nm((z, y, x), diff.voxel_size_nm), n_voxels, volume_nm3(n_voxels, diff.voxel_size_nm))
            yield [fate, _object_name(diff, int(table.values[row])), z, y, x, *place, int(side[row])]


def _object_name(diff: Diff, value: int) -> str:
    return spell_value(diff, diff.label_set.ids[value - 1] if diff.label_set else value)


def count_fates(diff: Diff) -> dict[str, dict[str, int]]:
    """Objects before and after, born, lost, split and merged, per class; instances are one class, "objects"."""
    tables = {"before": diff.objects.before, "after": diff.objects.after}
    chosen = {name: np.arange(len(table.sizes)) for name, table in tables.items()}
    for fate in FATES:
        tables[fate], chosen[fate] = diff.objects.table_of(fate), diff.objects.find(fate)
    if diff.label_set is None:
        return {"objects": {name: len(rows) for name, rows in chosen.items()}}
    return {
        name: {kind: int((tables[kind].values[rows] == k).sum()) for kind, rows in chosen.items()}
        for k, name in enumerate(diff.label_set.names, start=1)
    }


def list_classes(diff: Diff) -> list[dict[str, Any]]:
    """Voxels and volumes of each class before and after; empty for instances."""
    if diff.confusion is None or diff.label_set is None:
        return []
    rows = []
    for k, name in enumerate(("unlabelled", *diff.label_set.names)):
        before, after = int(diff.confusion[k].sum()), int(diff.confusion[:, k].sum())
        both = int(diff.confusion[k, k])
        rows.append(
            {
                "class": name,
                "voxels_before": before,
                "voxels_after": after,
                "change": after - before,
                "volume_before_nm3": volume_nm3(before, diff.voxel_size_nm),
                "volume_after_nm3": volume_nm3(after, diff.voxel_size_nm),
                "iou": both / (before + after - both) if before + after else None,
            }
        )
    return rows


def to_dict(diff: Diff) -> dict[str, Any]:
    """Everything as values for JSON, but for the list of all objects, which is in ``objects.csv``."""
    return {
        "format": JSON_FORMAT,
        "before": diff.before.path,
        "after": diff.after.path,
        "region": str(diff.region),
        "voxel_size_nm": diff.voxel_size_nm,
        "n_voxels": diff.n_voxels,
        "n_changed": diff.n_changed,
        "classes": list_classes(diff),
        "confusion": diff.confusion,
        "objects": count_fates(diff),
        "n_differences": diff.n_differences,
        "differences": list_differences(diff),
    }


def describe_diff(diff: Diff) -> tuple[list[str], dict[str, Any]]:
    """The essentials as lines for the terminal, and everything as values for ``--json``."""
    lines = [f"changed      {diff.n_changed:,} of {diff.n_voxels:,} voxels ({diff.n_changed / diff.n_voxels:.3%})"]
    fates = count_fates(diff)
    width = max(map(len, fates))
    volumes = {row["class"]: row for row in list_classes(diff)}
    for name, counts in fates.items():
        voxels = f"{volumes[name]['change']:>+14,} voxels  " if name in volumes else ""
        lines.append(
            f"  {name:<{width}}  {voxels}objects {counts['before']:,} > {counts['after']:,}: "
            + ", ".join(f"{counts[fate]:,} {fate}" for fate in FATES)
        )
    for row in list_differences(diff)[:5]:
        place = f"{row['z']},{row['y']},{row['x']}"
        lines.append(f"{row['rank']:>4}  at {place:<16}  {row['before']} > {row['after']}, {row['n_voxels']:,} voxels")
    return lines, to_dict(diff)


def _render_page(diff: Diff, config: DiffConfig) -> str:
    names = [Path(volume.path).name for volume in (diff.before, diff.after)]
    # Two predictions are both called labels.zarr: their folders tell them apart.
    if names[0] == names[1]:
        names = ["/".join(Path(volume.path).parts[-2:]) for volume in (diff.before, diff.after)]
    texts = [
        f"{diff.n_changed:,} of {diff.n_voxels:,} voxels differ ({diff.n_changed / diff.n_voxels:.3%}), in "
        f"{diff.n_differences:,} connected regions; the largest {len(diff.differences)} are shown.",
        "Objects are connected pieces of a class." if diff.label_set else "Objects are the instances.",
        f"Two objects are related if they share at least {config.least_overlap:.0%} of the smaller one: born and lost "
        "have no relative on the other side, split and merged several. All of them are in objects.csv.",
    ]
    return render_findings(f"{names[0]} → {names[1]}", texts, _tables(diff), _cards(diff, config))


def _tables(diff: Diff) -> list[ReportTable]:
    tables = []
    fates = count_fates(diff)
    columns = ("class", "before", "after", *FATES)
    rows: list[list[Any]] = [[name, *(f"{counts[c]:,}" for c in columns[1:])] for name, counts in fates.items()]
    tables.append(ReportTable("Objects", "Connected through faces, edges and corners.", columns, rows))
    classes = list_classes(diff)
    if classes and diff.confusion is not None and diff.label_set is not None:
        rows = [
            [
                row["class"],
                f"{row['voxels_before']:,}",
                f"{row['voxels_after']:,}",
                f"{row['change']:+,}",
                f"{row['volume_before_nm3'] / 1e9:.4g}",
                f"{row['volume_after_nm3'] / 1e9:.4g}",
                "" if row["iou"] is None else f"{row['iou']:.3f}",
            ]
            for row in classes
        ]
        columns = ("class", "voxels before", "after", "change", "µm³ before", "after", "IoU")
        tables.append(ReportTable("Volumes", "IoU: shared voxels over all that either side has.", columns, rows))
        names = ("unlabelled", *diff.label_set.names)
        rows = [[name, *(f"{n:,}" for n in row)] for name, row in zip(names, diff.confusion.tolist(), strict=True)]
        tables.append(ReportTable("Voxels", "Rows: class before. Columns: class after.", ("", *names), rows))
    return tables


def _cards(diff: Diff, config: DiffConfig) -> Iterator[Card]:
    for found, values in zip(diff.differences, list_differences(diff), strict=True):
        facts = {"voxels": f"{found.n_voxels:,}", "µm³": f"{values['volume_nm3'] / 1e9:.3g}"}
        facts |= {"nm": ", ".join(f"{values[f'{axis}_nm']:g}" for axis in "zyx")}
        place = ",".join(map(str, found.position))
        heading = f"{values['before']} → {values['after']}"
        yield Card(values["rank"], heading, place, _draw(found, diff, config), facts, values["neuroglancer"])


def _draw(found: Difference, diff: Diff, config: DiffConfig) -> str | None:
    """The xy plane through a difference: image, before, after; nothing without the image."""
    if config.volume is None:
        return None
    image = open_volume(config.volume, diff.voxel_size_nm)
    shown = show_plane(found.region, 0, found.position[0], image.shape)
    arrays = [volume.read(shown.start, shown.stop)[0] for volume in (diff.before, diff.after)]
    if diff.label_set:
        label_set = diff.label_set
        classes = (label_set.remap_to_indices(arrays[0]), label_set.remap_to_indices(arrays[1]))
    else:
        # Of instances, the two that the difference is about are coloured.
        label_set = LabelSet.from_ids([1, 2], ["before: " + str(found.before), "after: " + str(found.after)])
        ids = (found.before, found.after)
        marked = [np.where((a == i) & (i > 0), k, -1) for k, (a, i) in enumerate(zip(arrays, ids, strict=True))]
        classes = (marked[0].astype(np.int16), marked[1].astype(np.int16))
    return draw_finding(image, label_set, classes, shown, 0, found.region, ("before", "after"))
