"""An audit as a page with pictures, a table and JSON, and in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxclf.audit.label_audit import TABLE, Audit, given_and_suggested, inside_volume
from voxclf.audit.regions import Contradiction
from voxclf.audit.slices import SliceShift
from voxclf.config import AuditConfig
from voxclf.findings_page import Card, draw_finding, render_findings, show_plane, to_nm
from voxclf.geometry import ORIGIN, Region, VoxelSize, Zyx
from voxclf.neuroglancer_state import link_to_region
from voxclf.pages import render_csv, render_json, write_texts
from voxclf.report import ReportTable

#: Raised when a field of audit.json changes its meaning.
JSON_FORMAT = 1
N_PRINTED = 10
COLUMNS = (
    "rank",
    "kind",
    *(f"{axis}" for axis in "zyx"),
    *(f"{axis}_nm" for axis in "zyx"),
    "given",
    "suggested",
    "n_voxels",
    "margin",
    "evidence",
    "region",
    "neuroglancer",
)
KINDS = {
    "slice": "slice elsewhere",
    "object": "whole piece as drawn",
    "part": "part of a piece",
    "leak": "runs over an edge",
}


def write_audit(audit: Audit, config: AuditConfig) -> tuple[Path, ...]:
    """Write ``audit.html``, ``audit.csv`` and ``audit.json``; return their paths."""
    findings = list_findings(audit)
    # The table comes last: it says that the audit is complete.
    texts = {
        "audit.html": _render_page(audit, config),
        "audit.json": render_json(to_dict(audit)),
        TABLE: render_csv(COLUMNS, ([_spell(finding[name]) for name in COLUMNS] for finding in findings)),
    }
    return write_texts(Path(config.output), texts)


def list_findings(audit: Audit) -> list[dict[str, Any]]:
    """Slices that lie elsewhere, then regions, as one ranked list of plain values."""
    size = audit.volume.voxel_size_nm
    rows = [_shift_values(shift, audit) for shift in audit.shifts]
    rows += [_region_values(region, audit) for region in audit.regions]
    return [{"rank": rank, **_place_values(row, size), **row} for rank, row in enumerate(rows, start=1)]


def _place_values(row: dict[str, Any], size: VoxelSize) -> dict[str, Any]:
    position: Zyx = row["position"]
    values: dict[str, Any] = dict(zip("zyx", position, strict=True))
    values |= dict(zip(("z_nm", "y_nm", "x_nm"), to_nm(position, size), strict=True))
    return values


def _shift_values(shift: SliceShift, audit: Audit) -> dict[str, Any]:
    region = _slice_region(shift, audit.volume.shape)
    z, y, x = ((a + b) // 2 for a, b in zip(region.start, region.stop, strict=True))
    axis = "zyx"[shift.axis]
    return {
        "kind": "slice",
        "position": (z, y, x),
        "given": f"{axis} = {shift.position}",
        "suggested": f"{axis} = {shift.position + shift.shift}",
        "n_voxels": shift.n_voxels,
        "margin": shift.gain,
        "evidence": shift.evidence,
        "region": str(region),
        "neuroglancer": link_to_region(region, audit.volume.voxel_size_nm),
    }


def _slice_region(shift: SliceShift, shape: Zyx) -> Region:
    start, stop = list(ORIGIN), list(shape)
    start[shift.axis], stop[shift.axis] = shift.position, shift.position + 1
    return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _region_values(found: Contradiction, audit: Audit) -> dict[str, Any]:
    names = audit.label_set.names
    return {
        "kind": found.kind,
        "position": found.position,
        "given": names[found.given],
        "suggested": names[found.suggested],
        "n_voxels": found.n_voxels,
        "margin": found.margin,
        "evidence": found.evidence,
        "region": str(found.region),
        "neuroglancer": link_to_region(found.region, audit.volume.voxel_size_nm),
    }


def to_dict(audit: Audit) -> dict[str, Any]:
    """Everything as values for JSON."""
    return {
        "format": JSON_FORMAT,
        "classes": audit.label_set.to_dict(),
        "voxel_size_nm": audit.volume.voxel_size_nm,
        "n_labelled": audit.n_labelled,
        "planes": dict(zip("zyx", audit.planes, strict=True)),
        "n_contradicted_regions": audit.n_found,
        "findings": list_findings(audit),
    }


def describe_audit(audit: Audit) -> tuple[list[str], dict[str, Any]]:
    """The first findings as lines for the terminal, and all as values for ``--json``."""
    findings = list_findings(audit)
    lines = [_method(audit)]
    if not findings:
        return [*lines, "nothing       is contradicted with confidence"], to_dict(audit)
    width = max(len(KINDS[f["kind"]]) for f in findings[:N_PRINTED])
    for f in findings[:N_PRINTED]:
        place = ",".join(map(str, f["position"]))
        lines.append(
            f"{f['rank']:>4}  {KINDS[f['kind']]:<{width}}  at {place:<16}  {f['given']} > {f['suggested']}, "
            f"{f['n_voxels']:,} voxels, evidence {f['evidence']:.1f}"
        )
    if len(findings) > N_PRINTED:
        lines.append(f"{'':>4}  and {len(findings) - N_PRINTED} more")
    return lines, to_dict(audit)


def _method(audit: Audit) -> str:
    split = audit.split
    gap = f", {split.gap} voxels apart" if split.gap else ""
    planes = " and ".join(f"{n} slices along {axis}" for n, axis in zip(audit.planes, "zyx", strict=True) if n)
    return (
        f"looked at    {audit.n_labelled:,} labelled voxels on {planes}, against models trained without them "
        f"({split.n_folds} slabs along {'zyx'[split.axis]}{gap})"
    )


def _render_page(audit: Audit, config: AuditConfig) -> str:
    texts = [
        f"{_method(audit)[13:].capitalize()}. {audit.n_found:,} regions are contradicted; the strongest "
        f"{len(audit.regions)} are shown, from the strongest down.",
        "A model that has not seen these labels would have drawn something else here. That is a reason to look, not a "
        "verdict: where a class is rare or looks like another, the model may be the one that is wrong. Evidence is "
        "the mean margin in probability between the suggested class and the given one, times the root of the size, "
        "in which thin rims count little, and less where models contradict this class so all over. Pictures: image, "
        "labels as drawn, as the models would draw them, and where the two differ.",
    ]
    kinds = [f["kind"] for f in list_findings(audit)]
    rows = [[KINDS[kind], kinds.count(kind)] for kind in KINDS if kind in kinds]
    caption = "A label runs over an edge where the image has its border inside the label, not at the label's own."
    tables = [ReportTable("What was found", caption, ("kind", "findings"), rows)]
    return render_findings(f"Label audit: {Path(config.labels).name}", texts, tables, _cards(audit))


def _cards(audit: Audit) -> Iterator[Card]:
    things: list[SliceShift | Contradiction] = [*audit.shifts, *audit.regions]
    for thing, values in zip(things, list_findings(audit), strict=True):
        facts = {"evidence": f"{values['evidence']:.2f}", "margin": f"{values['margin']:.2f}"}
        facts |= {"voxels": f"{values['n_voxels']:,}", "kind": KINDS[values["kind"]]}
        facts["nm"] = ", ".join(f"{values[f'{axis}_nm']:g}" for axis in "zyx")
        heading = f"{values['given']} → {values['suggested']}"
        place = ",".join(map(str, values["position"]))
        picture = _draw(thing, audit)
        yield Card(values["rank"], heading, place, picture, facts, values["neuroglancer"])


def _draw(thing: SliceShift | Contradiction, audit: Audit) -> str:
    """The plane of a finding; of a slice that lies elsewhere, its middle."""
    shape = audit.volume.shape
    if isinstance(thing, SliceShift):
        axis, position, framed = thing.axis, thing.position, _slice_region(thing, shape)
    else:
        axis, framed = thing.axis, thing.region
        position = thing.position[axis]
    shown = inside_volume(audit, show_plane(framed, axis, position, shape))
    classes = given_and_suggested(audit, shown.start, shown.stop)
    return draw_finding(audit.volume, audit.label_set, classes, shown, axis, framed, ("as drawn", "as models would"))


def _spell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
