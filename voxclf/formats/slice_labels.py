"""Slice labels: a few annotated 2D slices of any orientation, placed in a volume by a small TOML listing.

::

    [[slice]]
    file = "xy_train.tif"     # beside the listing, or an absolute path
    plane = "xy"              # what runs along a row of pixels, then what runs down a column
    origin = [120, 300, 410]  # z, y, x of the file's first pixel

    [[classes]]               # optional, for each class
    id = 1
    name = "membrane"
    colour = "#4477AA"        # optional

So "xz" is a picture whose x runs to the right and z downwards, "yz" one with y to the right; "yx", "zx" and "zy"
are the same pictures turned over their diagonal.
A file may hold several pages; they follow each other along the axis that the plane leaves out. Where two slices
cross, a labelled voxel beats an unlabelled one (0); two different labels there are an error, because no rule
could say which the researcher meant.
"""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.detect import open_source
from voxclf.formats.source import SourceInfo
from voxclf.geometry import Region, Zyx, add

#: How a file's own (page, row, column) axes become z, y, x.
_PLANE_AXES = {
    "xy": (0, 1, 2),
    "yx": (0, 2, 1),
    "xz": (1, 0, 2),
    "zx": (2, 0, 1),
    "yz": (1, 2, 0),
    "zy": (2, 1, 0),
}
_CONFLICTS_LISTED = 3


@dataclass(frozen=True)
class PlacedSlice:
    """One annotated slice: where it lies in the volume, and its labels."""

    name: str
    region: Region
    labels: NDArray[Any]


class SliceLabelsSource:
    """A label volume that is 0 except on the slices of a listing.

    The slices are kept in memory (they are few); the volume is not.

    Parameters
    ----------
    path : str
        The TOML listing.
    volume_shape : (Z, Y, X)
        Shape of the volume the slices belong to.

    Raises
    ------
    FormatError
        If the listing cannot be read, a slice sticks out of the volume, or two slices disagree.
    """

    def __init__(self, path: str, volume_shape: Zyx) -> None:
        listing = _read_listing(path)
        self._slices = [_place_slice(entry, path, i, volume_shape) for i, entry in enumerate(listing["slice"])]
        _check_crossings(self._slices)
        self._info = SourceInfo(
            shape=(1, *volume_shape),
            dtype=np.result_type(*(s.labels.dtype for s in self._slices)),
            chunk_shape=(1, 1, 1),
            metadata={"classes": listing["classes"]} if "classes" in listing else {},
            labelled_boxes=tuple(s.region for s in self._slices),
        )

    @property
    def info(self) -> SourceInfo:
        """Shape of the whole volume, the labels' type, and the box of each slice."""
        return self._info

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (1, z, y, x)."""
        asked = Region(start, stop)
        box = np.zeros(asked.shape, self._info.dtype)
        for placed in self._slices:
            common = asked.intersect(placed.region)
            if common.n_voxels:
                labels = placed.labels[_within(common, placed.region)]
                np.copyto(box[_within(common, asked)], labels, where=labels != 0)
        return box[np.newaxis]


def _within(inner: Region, outer: Region) -> tuple[slice, slice, slice]:
    z, y, x = (slice(a - o, b - o) for a, b, o in zip(inner.start, inner.stop, outer.start, strict=True))
    return z, y, x


def _read_listing(path: str) -> dict[str, Any]:
    try:
        listing = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not a TOML file: {error}; see the example in the documentation") from error
    entries = listing.get("slice")
    if not isinstance(entries, list) or not entries or not set(listing) <= {"slice", "classes"}:
        raise FormatError(
            f"{path} has the entries {sorted(listing)}; a listing of slice labels holds [[slice]] tables, each with "
            "file, plane and origin, and may name its [[classes]]"
        )
    return listing


def _place_slice(entry: Any, path: str, number: int, volume_shape: Zyx) -> PlacedSlice:
    where = f"slice {number + 1} of {path}"
    if not isinstance(entry, dict) or set(entry) != {"file", "plane", "origin"}:
        raise FormatError(f"{where} has the fields {sorted(entry)}; it needs exactly file, plane and origin")
    if entry["plane"] not in _PLANE_AXES:
        raise FormatError(f"{where} has plane {entry['plane']!r}; allowed are {', '.join(map(repr, _PLANE_AXES))}")
    origin = _parse_origin(entry["origin"], where)
    file = Path(path).parent / str(entry["file"])
    name = f"{where} ({file.name})"
    source = open_source(str(file))
    if source.info.shape[0] != 1 or source.info.dtype.kind not in "iu":
        raise FormatError(
            f"{name} has {source.info.shape[0]} channels of type {source.info.dtype}; labels are one channel of "
            "whole numbers: save it as 8- or 16-bit grey values"
        )
    labels = source.read((0, 0, 0), source.info.shape[1:])[0].transpose(_PLANE_AXES[entry["plane"]])
    z, y, x = labels.shape
    region = Region(origin, add(origin, (z, y, x)))
    if region.intersect(Region((0, 0, 0), volume_shape)) != region:
        raise FormatError(
            f"{name} covers z,y,x {region}, which sticks out of the volume's shape {volume_shape}; correct its plane "
            f"({entry['plane']}) or origin {list(origin)} (z, y, x)"
        )
    return PlacedSlice(name, region, labels)


def _parse_origin(origin: Any, where: str) -> Zyx:
    is_triple = isinstance(origin, list) and len(origin) == 3
    if not is_triple or not all(isinstance(v, int) and not isinstance(v, bool) for v in origin):
        raise FormatError(f"{where} has origin {origin!r}; it needs three whole numbers [z, y, x]")
    z, y, x = origin
    return z, y, x


def _check_crossings(slices: list[PlacedSlice]) -> None:
    for first, second in itertools.combinations(slices, 2):
        common = first.region.intersect(second.region)
        if not common.n_voxels:
            continue
        a, b = (s.labels[_within(common, s.region)] for s in (first, second))
        conflicts = np.argwhere((a != b) & (a != 0) & (b != 0))
        if len(conflicts):
            listed = "; ".join(
                f"{tuple(int(p + s) for p, s in zip(place, common.start, strict=True))}: "
                f"{a[tuple(place)]} and {b[tuple(place)]}"
                for place in conflicts[:_CONFLICTS_LISTED]
            )
            more = "; …" if len(conflicts) > _CONFLICTS_LISTED else ""
            raise FormatError(
                f"{first.name} and {second.name} cross and give {len(conflicts)} voxels different labels "
                f"({listed}{more}); correct one of them, or set those voxels to 0 in one"
            )
