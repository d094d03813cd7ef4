"""TIFF stacks written page by page: for Fiji where it can be, else BigTIFF with OME metadata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from voxclf.formats.disk_errors import explained_disk_errors
from voxclf.geometry import VoxelSize

#: Classic TIFF addresses 4 GiB; what is left above this holds the page entries.
_CLASSIC_LIMIT_BYTES = 2**32 - 2**27
#: The voxel types that ImageJ's own format knows.
_IMAGEJ_TYPES = ("uint8", "uint16", "float32")


def write_tiff(
    path: str,
    pages: Iterable[NDArray[Any]],
    shape: tuple[int, int, int, int],
    dtype: np.dtype,
    voxel_size_nm: VoxelSize | None,
    channel_names: Sequence[str] = (),
    *,
    compress: bool = False,
) -> None:
    """Write pages to one TIFF file; it appears under its name only when complete.

    Parameters
    ----------
    path : str
        The file; replaced if it exists.
    pages : iterable of ndarray, shape (Y, X)
        In the order z, then channel: all channels of the first slice, then of the second …
    shape : (C, Z, Y, X)
        Of the whole.
    dtype : numpy dtype
        Of the pages.
    voxel_size_nm : (z, y, x), optional
        Stored as ImageJ or OME metadata; left out where it is not known.
    channel_names : sequence of str
        Stored in OME files only; ImageJ's format has no place for them.
    compress : bool
        Use zlib, which every reader knows; worth it for labels, hardly for EM.

    Raises
    ------
    OSError
        If the disk is full or the folder may not be written.
    """
    n_channels, n_slices, height, width = shape
    n_bytes = n_channels * n_slices * height * width * dtype.itemsize
    is_imagej = dtype.name in _IMAGEJ_TYPES and n_bytes < _CLASSIC_LIMIT_BYTES
    metadata = _imagej_metadata(voxel_size_nm) if is_imagej else _ome_metadata(voxel_size_nm, channel_names)
    partial = Path(path).with_name(Path(path).name + ".partial")
    with explained_disk_errors("write", path):
        try:
            tifffile.imwrite(
                partial,
                iter(pages),
                shape=(n_slices, n_channels, height, width),
                dtype=dtype,
                imagej=is_imagej,
                ome=not is_imagej,
                bigtiff=not is_imagej,
                compression="zlib" if compress else None,
                # Pixels per unit, in ImageJ's unit given below; OME files state sizes themselves.
                resolution=(1 / voxel_size_nm[2], 1 / voxel_size_nm[1]) if is_imagej and voxel_size_nm else None,
                metadata={"axes": "ZCYX", **metadata},
            )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _imagej_metadata(voxel_size_nm: VoxelSize | None) -> dict[str, Any]:
    return {"spacing": voxel_size_nm[0], "unit": "nm"} if voxel_size_nm else {}


def _ome_metadata(voxel_size_nm: VoxelSize | None, channel_names: Sequence[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"Channel": {"Name": list(channel_names)}} if channel_names else {}
    for axis, length in zip("ZYX", voxel_size_nm or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": length, f"PhysicalSize{axis}Unit": "nm"}
    return metadata
