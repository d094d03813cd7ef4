"""Neuroglancer precomputed: a folder with an ``info`` file. Its axes are x, y, z, channel; sizes are in nm."""

from __future__ import annotations

import json
from pathlib import Path

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.source import CHUNK_CACHE_BYTES, SourceInfo, native_dtype
from voxclf.formats.tensorstore_array import TensorStoreSource, chunk_shapes, open_array
from voxclf.formats.units import to_nanometres


def open_precomputed(path: str) -> TensorStoreSource:
    """Open the finest scale of a neuroglancer precomputed volume.

    A volume that begins at another voxel than 0 (``voxel_offset``) is read as beginning at 0.

    Raises
    ------
    FormatError
        If the ``info`` file is damaged, or describes something else than a volume (meshes, annotations).
    """
    try:
        scales = json.loads((Path(path) / "info").read_text(encoding="utf-8"))["scales"]
        resolutions = [[float(length) for length in scale["resolution"]] for scale in scales]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path}/info does not describe a precomputed volume ({error}); check the path or write it again"
        ) from error
    finest = min(range(len(resolutions)), key=lambda i: sum(resolutions[i]))
    array = open_array(path, "neuroglancer_precomputed", scale_index=finest)
    axes = order_axes(["x", "y", "z", "c"], array.shape, path)
    read_chunk, _ = chunk_shapes(array, axes)
    x, y, z = (to_nanometres(length, "nm") for length in resolutions[finest])
    info = SourceInfo(
        cache_bytes=CHUNK_CACHE_BYTES,
        shape=axes.shape,
        dtype=native_dtype(array.dtype.numpy_dtype, path),
        chunk_shape=read_chunk,
        voxel_size_nm=(z, y, x),
    )
    return TensorStoreSource(path, array, axes, info)
