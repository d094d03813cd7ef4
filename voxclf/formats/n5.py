"""N5: a folder of ``attributes.json`` files and blocks. Its axes are x, y, z: the first one runs fastest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.source import CHUNK_CACHE_BYTES, UNKNOWN_VOXEL_SIZE, KnownVoxelSize, SourceInfo, native_dtype
from voxclf.formats.tensorstore_array import TensorStoreSource, chunk_shapes, open_array
from voxclf.formats.units import to_nanometres

_DEFAULT_AXES = {2: "xy", 3: "xyz", 4: "xyzc", 5: "xyzct"}
_DATASETS_LISTED = 12


def open_n5(path: str) -> TensorStoreSource:
    """Open an N5 dataset, or the finest scale (``s0``) of a multi-scale group.

    Raises
    ------
    FormatError
        If the path is a group without a dataset of its own; the message lists those inside.
    """
    folder = Path(path)
    attributes = _read_attributes(folder)
    group: Mapping[str, Any] = {}
    if "dimensions" not in attributes:
        if not (folder / "s0" / "attributes.json").is_file():
            raise FormatError(_no_dataset_message(folder))
        group, folder = attributes, folder / "s0"
        attributes = _read_attributes(folder)
    elif folder.name == "s0":
        group = _read_attributes(folder.parent)
    array = open_array(str(folder), "n5")
    axes = order_axes(_axis_names(attributes, array.ndim), array.shape, path)
    read_chunk, _ = chunk_shapes(array, axes)
    info = SourceInfo(
        cache_bytes=CHUNK_CACHE_BYTES,
        shape=axes.shape,
        dtype=native_dtype(array.dtype.numpy_dtype, path),
        chunk_shape=read_chunk,
        voxel_size_nm=_voxel_size(attributes, group),
    )
    return TensorStoreSource(path, array, axes, info)


def _read_attributes(folder: Path) -> dict[str, Any]:
    file = folder / "attributes.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{file} is damaged: it is not a JSON table ({error}); copy or write it again") from error


def _no_dataset_message(folder: Path) -> str:
    inside = (f.parent for f in sorted(folder.rglob("attributes.json")) if "dimensions" in _read_attributes(f.parent))
    names = [str(p.relative_to(folder)) for p, _ in zip(inside, range(_DATASETS_LISTED), strict=False)]
    if not names:
        return f"{folder} is an N5 folder without a dataset; check the path"
    return (
        f"{folder} is an N5 group; choose a dataset inside it, as in {folder}/{names[0]}. It holds {', '.join(names)}"
    )


def _axis_names(attributes: Mapping[str, Any], n_axes: int) -> Sequence[str] | None:
    named = attributes.get("axes")
    if isinstance(named, list) and all(str(name).lower() in set("xyzct") for name in named):
        return [str(name) for name in named]
    return _DEFAULT_AXES.get(n_axes)


def _voxel_size(attributes: Mapping[str, Any], group: Mapping[str, Any]) -> KnownVoxelSize:
    """Read the voxel size in whichever of the three customs the writing program followed."""
    for source in (attributes, group):
        stated = source.get("pixelResolution")
        if isinstance(stated, Mapping):
            return _from_xyz(stated.get("dimensions", ()), [stated.get("unit")] * 3)
        transform = source.get("transform")
        if isinstance(transform, Mapping) and {"axes", "scale", "units"} <= set(transform):
            lengths = dict(
                zip(transform["axes"], zip(transform["scale"], transform["units"], strict=True), strict=True)
            )
            z, y, x = (to_nanometres(*lengths[a]) if a in lengths else None for a in "zyx")
            return z, y, x
        if isinstance(source.get("resolution"), list):
            return _from_xyz(source["resolution"], source.get("units") or ["nm"] * 3)
    return UNKNOWN_VOXEL_SIZE


def _from_xyz(lengths: Sequence[Any], units: Sequence[Any]) -> KnownVoxelSize:
    if len(lengths) < 3 or len(units) < 3:
        return UNKNOWN_VOXEL_SIZE
    x, y, z = (to_nanometres(length, unit) for length, unit in zip(lengths[:3], units[:3], strict=True))
    return z, y, x
