"""Zarr: OME-Zarr 0.1 to 0.5 images and plain arrays, Zarr 2 and 3, sharded or not; writes OME-Zarr 0.5."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from voxclf.errors import FormatError, OutputExistsError
from voxclf.formats.axes import order_axes
from voxclf.formats.disk_errors import explained_disk_errors
from voxclf.formats.multiscale import Level
from voxclf.formats.ome_metadata import (
    Kind,
    build_group_attributes,
    check_axes,
    read_axes,
    read_channel_names,
    read_multiscale,
    read_voxel_size,
)
from voxclf.formats.source import CHUNK_CACHE_BYTES, UNKNOWN_VOXEL_SIZE, KnownVoxelSize, SourceInfo, native_dtype
from voxclf.formats.tensorstore_array import (
    TensorStoreSource,
    chunk_shapes,
    open_array,
    shared_context,
    translated_errors,
)
from voxclf.formats.units import to_nanometres
from voxclf.geometry import Zyx, round_up

MARKERS = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_VOLUMES_LISTED = 12


def open_zarr(path: str, *, writable: bool = False) -> TensorStoreSource:
    """Open a Zarr array, or the finest level of an OME-Zarr image.

    ``image.zarr/2`` opens level 2 of the image, with that level's voxel size.

    Raises
    ------
    FormatError
        If the path is a group without an image (the message lists the arrays inside), or the metadata are
        damaged or of an unknown kind.
    """
    folder = Path(path)
    node = _read_node(folder)
    if node["is_array"]:
        group, level = _find_image_of(folder)
        return _open_array_node(folder, node, group, level, writable)
    multiscale = read_multiscale(node["attributes"])
    if multiscale is None:
        raise FormatError(_no_image_message(folder))
    dataset = folder / str(multiscale["datasets"][0]["path"])
    return _open_array_node(dataset, _read_node(dataset), node["attributes"], 0, writable)


def _read_node(folder: Path) -> dict[str, Any]:
    """Read one array's or group's metadata, whichever version: is_array, driver, attributes, axis names."""
    try:
        if (folder / "zarr.json").is_file():
            metadata = _read_json(folder / "zarr.json")
            return {
                "is_array": metadata["node_type"] == "array",
                "driver": "zarr3",
                "attributes": metadata.get("attributes", {}),
                "axes": metadata.get("dimension_names"),
            }
        attributes = _read_json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}
        is_array = (folder / ".zarray").is_file()
        if not is_array and not any((folder / marker).is_file() for marker in MARKERS):
            raise FormatError(f"{folder} has no Zarr metadata ({', '.join(MARKERS)}); check the path or copy it again")
        axes = attributes.get("_ARRAY_DIMENSIONS")
        return {"is_array": is_array, "driver": "zarr", "attributes": attributes, "axes": axes}
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{folder} has incomplete Zarr metadata (no {error}); write it again") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is damaged: it is not JSON ({error}); copy or write it again") from error


def _find_image_of(array: Path) -> tuple[Mapping[str, Any] | None, int]:
    """Find the OME image that an array is a level of: the attributes of its group, and which level it is."""
    parent = array.absolute().parent
    if not any((parent / marker).is_file() for marker in MARKERS):
        return None, 0
    attributes = _read_node(parent)["attributes"]
    multiscale = read_multiscale(attributes)
    paths = [str(dataset["path"]) for dataset in multiscale["datasets"]] if multiscale else []
    return (attributes, paths.index(array.name)) if array.name in paths else (None, 0)


def _open_array_node(
    folder: Path, node: Mapping[str, Any], group: Mapping[str, Any] | None, level: int, writable: bool
) -> TensorStoreSource:
    array = open_array(str(folder), node["driver"], writable=writable)
    multiscale = read_multiscale(group) if group else None
    if multiscale is not None and group is not None:
        names: Sequence[str] | None = read_axes(multiscale, array.ndim)
        voxel_size, channel_names = read_voxel_size(multiscale, level), read_channel_names(group)
        metadata = group.get("voxclf", {})
    else:
        names = _plain_axes(node["axes"])
        voxel_size, channel_names, metadata = _plain_voxel_size(node["attributes"]), (), {}
    if names is not None:
        check_axes(str(folder), names, array.ndim)
    axes = order_axes(names, array.shape, str(folder))
    read_chunk, write_chunk = chunk_shapes(array, axes)
    info = SourceInfo(
        cache_bytes=CHUNK_CACHE_BYTES,
        shape=axes.shape,
        dtype=native_dtype(array.dtype.numpy_dtype, str(folder)),
        chunk_shape=read_chunk,
        voxel_size_nm=voxel_size,
        write_shape=write_chunk if writable else None,
        metadata=metadata,
        channel_names=channel_names,
    )
    return TensorStoreSource(str(folder), array, axes, info)


def _plain_axes(names: Sequence[str | None] | None) -> Sequence[str] | None:
    """Axis names of a plain array, or None where they are not all of those voxclf knows ("dim_0")."""
    if names and all(name is not None and name.lower() in set("tczyx") for name in names):
        return [str(name) for name in names]
    return None


def _plain_voxel_size(attributes: Mapping[str, Any]) -> KnownVoxelSize:
    """Voxel size of a plain array: (z, y, x) under "voxel_size" or "resolution", in nm unless "units" say else."""
    for key in ("voxel_size", "resolution"):
        values = attributes.get(key)
        if isinstance(values, list) and len(values) >= 3:
            units = attributes.get("units") or ["nm"] * len(values)
            z, y, x = (to_nanometres(v, u) for v, u in zip(values[-3:], units[-3:], strict=True))
            return z, y, x
    return UNKNOWN_VOXEL_SIZE


def _no_image_message(folder: Path) -> str:
    """List what a group holds instead: images, and arrays that are not one of their levels."""
    nodes = [
        p.parent for depth in ("*", "*/*", "*/*/*") for p in sorted(folder.glob(f"{depth}/[z.]*")) if p.name in MARKERS
    ]
    found = [node for node in dict.fromkeys(nodes) if _is_volume(node)][:_VOLUMES_LISTED]
    if not found:
        return f"{folder} is a Zarr group without an image or array; check the path"
    inside = ", ".join(str(node.relative_to(folder)) for node in found)
    return f"{folder} is a Zarr group without an image; it holds {inside}: give one of them, as in {found[0]}"


def _is_volume(folder: Path) -> bool:
    node = _read_node(folder)
    if node["is_array"]:
        return _find_image_of(folder)[0] is None
    return read_multiscale(node["attributes"]) is not None


def create_zarr(
    path: str,
    levels: Sequence[Level],
    n_channels: int,
    dtype: np.dtype,
    chunk_shape: Zyx,
    shard_shape: Zyx | None,
    kind: Kind,
    attributes: Mapping[str, Any],
    channel_names: Sequence[str],
    overwrite: bool,
) -> None:
    """Create an OME-Zarr 0.5 image with all its levels, empty (zeros), ready to be written.

    Everything is made in a hidden folder beside it and renamed, so the image is there completely or not at all.

    Raises
    ------
    OutputExistsError
        If the path exists and ``overwrite`` is False, or it is something other than a Zarr folder.
    OSError
        If the disk is full or the folder may not be written.
    """
    folder = Path(path)
    axes = "zyx" if n_channels == 1 and kind in {"labels", "image"} else "czyx"
    group = build_group_attributes(folder.stem, axes, levels, kind, dtype, channel_names, attributes)
    # Always the same name, so that what a killed run left there is found and removed.
    unfinished = folder.with_name(f".{folder.name}.creating")
    with explained_disk_errors("create", path), translated_errors(path, "create"):
        _check_replaceable(folder, overwrite)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            for level in levels:
                place = unfinished / str(level.index)
                _create_array(place, axes, level.shape, n_channels, dtype, chunk_shape, shard_shape)
            write_json_atomically(
                unfinished / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": group}
            )
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{folder} exists already; choose another output, or overwrite it (--overwrite)")
    is_zarr = folder.is_dir() and any((folder / marker).is_file() for marker in MARKERS)
    if not is_zarr and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExistsError(
            f"{folder} exists and is not a Zarr folder, so it is not overwritten; remove it yourself or choose another "
            "output"
        )


def _create_array(
    folder: Path, axes: str, shape: Zyx, n_channels: int, dtype: np.dtype, chunk: Zyx, shard: Zyx | None
) -> None:
    chunk_zyx = _clip(chunk, shape)
    # One channel per chunk, so a viewer that shows one class reads one class.
    channels, one = ((n_channels,), (1,)) if axes == "czyx" else ((), ())
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, _compressor(dtype)]
    grid = [*one, *chunk_zyx]
    if shard is not None:
        grid = [*channels, *(min(s, round_up(n, c)) for s, n, c in zip(shard, shape, chunk_zyx, strict=True))]
        codecs = [_sharding([*one, *chunk_zyx], codecs)]
    metadata = {
        "shape": [*channels, *shape],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": codecs,
        "dimension_names": list(axes),
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata,
    }
    ts.open(spec, create=True, context=shared_context(is_cached=False)).result()


def _clip(chunk: Zyx, shape: Zyx) -> Zyx:
    z, y, x = (min(c, n) for c, n in zip(chunk, shape, strict=True))
    return z, y, x


def _compressor(dtype: np.dtype) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    # Bytes of equal significance compress better side by side.
    return {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": 3,
            "shuffle": "shuffle",
            "typesize": dtype.itemsize,
            "blocksize": 0,
        },
    }


def _sharding(chunk: Sequence[int], codecs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": list(codecs),
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }


def write_json_atomically(path: Path, values: Any) -> None:
    """Write a JSON file so that a reader, or a kill at any moment, sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
