"""NumPy .npy files: an array of yx, zyx or czyx. They state no voxel size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.mapped import DISK_PAGE_BYTES, MappedArray
from voxclf.formats.source import SourceInfo, native_dtype
from voxclf.geometry import Zyx


class NpySource:
    """An array saved by ``numpy.save`` as (C, Z, Y, X); objects are never unpickled.

    Raises
    ------
    FormatError
        If the file is truncated or holds anything but numbers.
    """

    def __init__(self, path: str) -> None:
        try:
            with Path(path).open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0
                if version >= (2, 0):
                    read_header = np.lib.format.read_array_header_2_0
                shape, is_fortran, file_dtype = read_header(file)
                offset = file.tell()
        except ValueError as error:
            raise FormatError(f"{path} is damaged or no .npy file: {error}; save it again") from error
        dtype = native_dtype(file_dtype, path)
        self._axes = order_axes(None, shape, path)
        self._place = MappedArray(path, offset, file_dtype, shape, "F" if is_fortran else "C")
        self._place.check_length()
        chunk_x = min(self._axes.shape[3], DISK_PAGE_BYTES // dtype.itemsize)
        self._info = SourceInfo(shape=self._axes.shape, dtype=dtype, chunk_shape=(1, 1, chunk_x))

    @property
    def info(self) -> SourceInfo:
        """Shape and dtype."""
        return self._info

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (C, z, y, x)."""
        box = self._place.read(self._axes.index(start, stop))
        return np.ascontiguousarray(self._axes.to_czyx(box), self._info.dtype)
