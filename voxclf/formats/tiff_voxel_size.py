"""Voxel sizes in TIFF files: OME-XML, then ImageJ's spacing and unit, then the resolution tags.

TIFF itself knows only pixels per inch or centimetre within a page; the distance of slices stands in whatever
metadata the writing program added, if it did.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from voxclf.formats.source import KnownVoxelSize
from voxclf.formats.units import to_nanometres

#: Above this, a resolution tag is about paper (72 to 2400 dots per inch), not about the specimen.
_LARGEST_PIXEL_NM = 10_000.0
_TAG_UNITS = {2: "inch", 3: "cm"}


def read_voxel_size(tif: Any) -> KnownVoxelSize:
    """Return (z, y, x) in nm from an open ``tifffile.TiffFile``, None on axes where nothing is stated."""
    if tif.is_ome:
        stated = _from_ome(tif.ome_metadata)
        if any(stated):
            return stated
    metadata = dict(tif.imagej_metadata or {}) if tif.is_imagej else _shaped_metadata(tif)
    unit = metadata.get("unit")
    z = to_nanometres(metadata.get("spacing"), unit)
    page = tif.pages[0]
    if tif.is_imagej:
        y, x = (to_nanometres(_pixel_length(page, axis), unit) for axis in "YX")
    else:
        tag_unit = _TAG_UNITS.get(int(page.resolutionunit or 1))
        y, x = (_plausible(to_nanometres(_pixel_length(page, axis), tag_unit)) for axis in "YX")
    return z, y, x


def _shaped_metadata(tif: Any) -> dict[str, Any]:
    return dict((tif.shaped_metadata or ({},))[0]) if tif.is_shaped else {}


def _pixel_length(page: Any, axis: str) -> float | None:
    tag = page.tags.get(f"{axis}Resolution")
    if tag is None:
        return None
    numerator, denominator = tag.value
    # 1/1 is what programs write that know nothing.
    if not numerator or not denominator or (numerator, denominator) == (1, 1):
        return None
    return denominator / numerator


def _plausible(length_nm: float | None) -> float | None:
    return length_nm if length_nm is not None and length_nm <= _LARGEST_PIXEL_NM else None


def _from_ome(xml: str | None) -> KnownVoxelSize:
    try:
        root = ElementTree.fromstring(xml or "<OME/>")
    except ElementTree.ParseError:
        return None, None, None
    pixels = next((e for e in root.iter() if e.tag.endswith("Pixels")), None)
    if pixels is None:
        return None, None, None
    # The OME schema's default unit is the micrometre.
    z, y, x = (to_nanometres(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit", "µm")) for a in "ZYX")
    return z, y, x
