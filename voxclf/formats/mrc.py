"""MRC, the format of electron microscopes: x runs fastest, voxel size in ångström."""

from __future__ import annotations

import warnings
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.mapped import DISK_PAGE_BYTES, MappedArray
from voxclf.formats.source import SourceInfo, native_dtype
from voxclf.formats.units import to_nanometres
from voxclf.geometry import Zyx

_HEADER_BYTES = 1024
# Bytes 152 and 156 of the header (https://bio3d.colorado.edu/imod/doc/mrc_format.txt).
_IMOD_STAMP = 1146047817
_IMOD_SIGNED_BYTES = 1


class MrcSource:
    """An uncompressed MRC file as a (1, Z, Y, X) array.

    The header says which of x, y, z are the file's columns, rows and sections; the usual 1, 2, 3 means that
    sections are z. Files that leave these zero are read as usual.

    Raises
    ------
    FormatError
        If the file is truncated, complex (a Fourier transform), or its header makes no sense.
    """

    def __init__(self, path: str) -> None:
        try:
            with warnings.catch_warnings():
                # A truncated file is refused below in words of our own.
                warnings.simplefilter("ignore")
                with mrcfile.open(path, permissive=True, header_only=True) as mrc:
                    header = mrc.header.copy()
                    voxel_size = mrc.voxel_size.copy()
            file_dtype = _file_dtype(header)
        except ValueError as error:
            raise FormatError(f"{path} is no MRC file that voxclf reads: {error}; export it again") from error
        shape = (int(header.nz), int(header.ny), int(header.nx))
        if min(shape) < 1:
            raise FormatError(f"{path} is damaged: its header gives the shape {shape}; copy or export it again")
        dtype = native_dtype(file_dtype, path)
        self._axes = order_axes(_axis_names(path, header), shape, path)
        self._place = MappedArray(path, _HEADER_BYTES + int(header.nsymbt), file_dtype, shape)
        self._place.check_length()
        z, y, x = (to_nanometres(voxel_size[axis], "angstrom") for axis in "zyx")
        self._info = SourceInfo(
            shape=self._axes.shape,
            dtype=dtype,
            chunk_shape=(1, 1, min(self._axes.shape[3], DISK_PAGE_BYTES // dtype.itemsize)),
            # 1 Å in every direction is what programs write that know nothing.
            voxel_size_nm=(None, None, None) if (z, y, x) == (0.1, 0.1, 0.1) else (z, y, x),
        )

    @property
    def info(self) -> SourceInfo:
        """Shape, dtype and voxel size."""
        return self._info

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (1, z, y, x)."""
        box = self._place.read(self._axes.index(start, stop))
        return np.ascontiguousarray(self._axes.to_czyx(box), self._info.dtype)


def _file_dtype(header: Any) -> np.dtype:
    """Return the voxels' type; bytes are signed in the standard, but unsigned in what IMOD and many others write."""
    dtype = np.dtype(mrcfile.utils.dtype_from_mode(int(header.mode)))
    if dtype == np.int8:
        stamp, flags = np.frombuffer(header.extra2.tobytes()[40:48], header.nx.dtype)
        is_imod_unsigned = stamp == _IMOD_STAMP and not flags & _IMOD_SIGNED_BYTES
        if is_imod_unsigned or header.dmax > np.iinfo(np.int8).max:
            return np.dtype(np.uint8)
    return dtype.newbyteorder(header.nx.dtype.byteorder)


def _axis_names(path: str, header: Any) -> list[str]:
    """Name the axes of the file's (section, row, column) order."""
    order = [int(header.maps), int(header.mapr), int(header.mapc)]
    if order == [0, 0, 0]:
        return ["z", "y", "x"]
    if sorted(order) != [1, 2, 3]:
        raise FormatError(f"{path} is damaged: its header gives the axis order {order}; export it again")
    return ["xyz"[number - 1] for number in order]
