"""What in an exploration should make a researcher stop, each in one sentence with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from voxclf.explore.exploration import Exploration, LabelSummary
from voxclf.explore.texture import SliceDefect, SliceOrder

LEAST_CLASS_VOXELS = 100
#: Tissue itself may look different along its axes; only a greater factor than this points at the voxel size.
SIZE_FACTOR = 2.5
MOST_LISTED = 6

_DEFECT_TEXTS: dict[str, tuple[str, str]] = {
    "blank": ("blank (one grey value throughout)", "Cut them off, or expect nonsense in and next to them."),
    "repeated": ("a copy of the slice before", "Remove the copies, or replace the slices that they stand for."),
    "exchanged": ("probably exchanged with the next", "Put them in order before labelling or training."),
    "foreign": ("unlike both neighbours", "Look whether they are damaged or stand in the wrong place."),
    "jump": (
        "much less like the one before than slices usually are",
        "Look whether slices are missing or shifted there; 3D filters mix both sides of a jump.",
    ),
}


def find_warnings(found: Exploration) -> list[str]:
    """All warnings, those about labels first."""
    warnings = list(_about_labels(found.labels)) if found.labels else []
    return [*warnings, *_about_intensities(found), *_about_slices(found.slices), *_about_voxel_size(found)]


def _about_labels(labels: LabelSummary) -> Iterator[str]:
    for name, count in zip(labels.label_set.names, labels.profiles.counts.tolist(), strict=True):
        if count < LEAST_CLASS_VOXELS:
            yield (
                f"Class “{name}” has {count} labelled voxels. Under {LEAST_CLASS_VOXELS}, neither training nor "
                "scores mean much; label more of it, or merge it with another class."
            )
    for axis, (letter, plane) in enumerate(zip("zyx", ("xy", "xz", "yz"), strict=True)):
        slices = labels.profiles.slices_with_labels(axis)
        if len(slices) == 1 and len(labels.profiles.along[axis][0]) > 1:
            yield (
                f"All labels lie on a single {plane} slice ({letter} = {slices[0]}). Nothing is known about the rest "
                "of the volume, and a score from these labels cannot tell; label a second slice some distance away."
            )


def _about_intensities(found: Exploration) -> Iterator[str]:
    saturation = found.intensities.saturation
    for share, end, value in (
        (saturation.dark, "darkest", found.intensities.overall_range[0]),
        (saturation.bright, "brightest", found.intensities.overall_range[1]),
    ):
        if share:
            yield (
                f"{100 * share:.1f} % of the voxels have the {end} grey value there is, {value:g}, far more than the "
                "values next to it: the detector was saturated, the contrast was stretched too far, or the image has "
                "an empty border. What was cut off is lost; go back to the original images if you can."
            )


def _about_slices(slices: SliceOrder) -> Iterator[str]:
    for kind, (meaning, advice) in _DEFECT_TEXTS.items():
        places = [defect for defect in slices.defects if defect.kind == kind]
        if places:
            listed = ", ".join(_spell_places(place) for place in places[:MOST_LISTED])
            more = f" and {len(places) - MOST_LISTED} more" if len(places) > MOST_LISTED else ""
            yield f"Slices along z that are {meaning}: {listed}{more}. {advice}"


def _spell_places(defect: SliceDefect) -> str:
    return f"{defect.z} to {defect.last}" if defect.kind == "blank" and defect.last > defect.z else str(defect.z)


def _about_voxel_size(found: Exploration) -> Iterator[str]:
    for letter, stated, implied in zip("zyx", found.voxel_size_nm, found.texture.implied_size_nm, strict=True):
        if letter == "x" or math.isnan(implied):
            continue  # y is compared with x; the other way round would say the same thing twice
        if max(implied / stated, stated / implied) > SIZE_FACTOR:
            reference = "in the plane" if letter == "z" else "along x"
            yield (
                f"The voxel size along {letter} is stated as {stated:g} nm, but neighbours along {letter} are as alike "
                f"as voxels {implied:.3g} nm apart {reference}. Check the voxel size: features are computed in nm."
            )
