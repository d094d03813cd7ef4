"""OME-Zarr metadata as plain values: reading versions 0.1 to 0.5, writing 0.5.

The specification is at https://ngff.openmicroscopy.org/0.5/. Everything here works on dictionaries; files are
opened by :mod:`voxclf.formats.zarr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from voxclf.errors import FormatError
from voxclf.formats.multiscale import Level
from voxclf.formats.source import UNKNOWN_VOXEL_SIZE, KnownVoxelSize
from voxclf.formats.units import to_nanometres
from voxclf.geometry import VoxelSize

Kind = Literal["probabilities", "labels", "features", "image"]

#: Lookup tables that viewers give to channels, one after the other.
_CHANNEL_COLOURS = ("4477AA", "EE6677", "228833", "CCBB44", "66CCEE", "AA3377", "EE7733", "332288", "44AA99", "882255")


def read_multiscale(attributes: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first multiscale image described by a group's attributes, or None if there is none."""
    images = attributes.get("ome", attributes).get("multiscales")
    return images[0] if images else None


def read_axes(multiscale: Mapping[str, Any], n_axes: int) -> list[str]:
    """Return the axis names, lower case. Versions before 0.3 had none and were always t, c, z, y, x."""
    axes = multiscale.get("axes")
    if axes is None:
        return list("tczyx"[-n_axes:])
    return [str(axis["name"] if isinstance(axis, Mapping) else axis).lower() for axis in axes]


def read_voxel_size(multiscale: Mapping[str, Any], level: int) -> KnownVoxelSize:
    """Return the voxel size of one level in nm, None on axes without a unit of length."""
    axes = multiscale.get("axes") or []
    units = {a["name"].lower(): a.get("unit") for a in axes if isinstance(a, Mapping)}
    names = [a["name"].lower() for a in axes if isinstance(a, Mapping)]
    transformations = [
        *(multiscale["datasets"][level].get("coordinateTransformations") or []),
        *(multiscale.get("coordinateTransformations") or []),
    ]
    scales = [t["scale"] for t in transformations if t.get("type") == "scale"]
    if not scales or any(len(scale) != len(names) for scale in scales):
        return UNKNOWN_VOXEL_SIZE
    total = dict(zip(names, np.prod(scales, axis=0), strict=True))
    z, y, x = (to_nanometres(total.get(axis), units.get(axis)) for axis in "zyx")
    return z, y, x


def read_channel_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return channel names from ``omero`` or from voxclf's own attributes; empty if there are none."""
    own = attributes.get("voxclf", {}).get("channel_names")
    if own:
        return tuple(own)
    channels = attributes.get("ome", attributes).get("omero", {}).get("channels", [])
    names = tuple(str(channel.get("label", "")) for channel in channels)
    return names if all(names) else ()


def build_group_attributes(
    name: str,
    axes: str,
    levels: Sequence[Level],
    kind: Kind,
    dtype: np.dtype,
    channel_names: Sequence[str],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the attributes of an OME-Zarr 0.5 group.

    Parameters
    ----------
    name : str
        Shown by viewers.
    axes : str
        "zyx" or "czyx".
    levels : sequence of Level
        From fine to coarse.
    kind : str
        Decides what viewers are told: label colours, or channel names and contrast.
    dtype : numpy dtype
        Of the voxels.
    channel_names : sequence of str
        One per channel, or empty.
    attributes : mapping
        Stored as they are under "voxclf". ``classes``, a list of ``{"id", "name", "colour"}``, also colours a
        label volume.
    """
    multiscale = {
        "name": name,
        "axes": [_axis(axis) for axis in axes],
        "datasets": [_dataset(level, axes, levels[0].voxel_size_nm) for level in levels],
        "type": "most frequent of 2 per axis" if kind == "labels" else "mean of 2 per axis",
    }
    ome: dict[str, Any] = {"version": "0.5", "multiscales": [multiscale]}
    if kind == "labels":
        ome["image-label"] = _image_label(attributes.get("classes", []))
    elif channel_names and kind != "features":
        ome["omero"] = {"channels": _omero_channels(channel_names, kind, dtype)}
    own = {"kind": kind, **attributes}
    if channel_names:
        own["channel_names"] = list(channel_names)
    return {"ome": ome, "voxclf": own}


def _axis(name: str) -> dict[str, str]:
    if name == "c":
        return {"name": "c", "type": "channel"}
    return {"name": name, "type": "space", "unit": "nanometer"}


def _dataset(level: Level, axes: str, finest_nm: VoxelSize) -> dict[str, Any]:
    scale = [1.0] * (len(axes) - 3) + [float(v) for v in level.voxel_size_nm]
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    # Coordinates are those of voxel centres, and the centre of a coarse voxel is that of all it stands for.
    shift = [(coarse - fine) / 2 for coarse, fine in zip(level.voxel_size_nm, finest_nm, strict=True)]
    if any(shift):
        transformations.append({"type": "translation", "translation": [0.0] * (len(axes) - 3) + shift})
    return {"path": str(level.index), "coordinateTransformations": transformations}


def _image_label(classes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    label: dict[str, Any] = {"version": "0.5"}
    coloured = [c for c in classes if c.get("colour")]
    if coloured:
        label["colors"] = [
            {"label-value": int(c["id"]), "rgba": [*bytes.fromhex(str(c["colour"]).lstrip("#")), 255]} for c in coloured
        ]
    if classes:
        label["properties"] = [{"label-value": int(c["id"]), "name": str(c.get("name", c["id"]))} for c in classes]
    return label


def _omero_channels(names: Sequence[str], kind: Kind, dtype: np.dtype) -> list[dict[str, Any]]:
    top = float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0
    window = {"min": 0.0, "max": top, "start": 0.0, "end": top}
    colours = ("FFFFFF",) if kind == "image" and len(names) == 1 else _CHANNEL_COLOURS
    return [
        {"label": str(name), "color": colours[i % len(colours)], "window": dict(window), "active": True}
        for i, name in enumerate(names)
    ]


def check_axes(path: str, names: Sequence[str], n_axes: int) -> None:
    """Refuse metadata that name another number of axes than the array has."""
    if len(names) != n_axes:
        raise FormatError(
            f"{path} names {len(names)} axes ({', '.join(names)}) for an array of {n_axes}; correct its metadata"
        )
