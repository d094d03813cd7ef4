"""Chunked arrays on disk through TensorStore: Zarr 2 and 3, N5 and neuroglancer precomputed.

All open arrays of a process share one bounded cache, and concurrent writers of one file are kept apart by the
operating system's own locks. A chunk is written beside its place and renamed, so it is old or new, never
half; the next write of a chunk replaces what a killed one left behind.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.axes import AxisOrder
from voxclf.formats.disk_errors import disk_error
from voxclf.formats.source import CHUNK_CACHE_BYTES, SourceInfo
from voxclf.geometry import Zyx


@functools.cache
def shared_context(*, is_cached: bool) -> Any:
    """Return one of this process's two TensorStore contexts: for reading, or for writing, which caches nothing.

    What was written is not read again by the same block, so caching it would only cost memory: measured, 160 MB
    of a process that otherwise needs 75. Locks are the system's ("os"): their files have the chunk's own name, so
    a rerun replaces them; the lock-free mode would leave files with random names behind after a kill.
    """
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": CHUNK_CACHE_BYTES if is_cached else 0},
            "file_io_locking": {"mode": "os"},
        }
    )


@contextmanager
def translated_errors(path: str, doing: str) -> Iterator[None]:
    """Turn TensorStore's errors into ones that name the file, the cause and what to do.

    Raises
    ------
    OSError
        For what the operating system refused: full disk, permissions. Its ``errno`` says which.
    FormatError
        For damaged or unreadable data.
    """
    try:
        yield
    except (ValueError, NotImplementedError, OverflowError) as error:
        number = _system_error(str(error))
        if number:
            raise disk_error(number, doing, path) from error
        reason = str(error).split(" [source locations")[0].split(" [tensorstore_spec")[0]
        raise FormatError(
            f"cannot {doing} {path}: {reason}; it is damaged or of a kind voxclf does not know"
        ) from error


def _system_error(message: str) -> int:
    found = re.search(r"os_error_code='(\d+)'", message)
    return int(found.group(1)) if found else 0


def open_array(path: str, driver: str, *, writable: bool = False, **options: Any) -> Any:
    """Open an existing array with one of TensorStore's drivers."""
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, **options}
    with translated_errors(path, "open"):
        return ts.open(
            spec, open=True, read=True, write=writable, context=shared_context(is_cached=not writable)
        ).result()


class TensorStoreSource:
    """An open TensorStore array whose axes are put in (C, Z, Y, X) order.

    Parameters
    ----------
    path : str
        For messages.
    array : tensorstore.TensorStore
        Open, of any axis order.
    axes : AxisOrder
        Of ``array``, as the file has them.
    info : SourceInfo
        As seen from outside.
    """

    def __init__(self, path: str, array: Any, axes: AxisOrder, info: SourceInfo) -> None:
        self._path = path
        # Precomputed volumes may begin at another voxel than 0; here every volume begins at 0.
        self._array = array[ts.d[:].translate_to[0]]
        self._axes = axes
        self._info = info

    @property
    def info(self) -> SourceInfo:
        """Shape, dtype, chunks and voxel size."""
        return self._info

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (C, z, y, x)."""
        with translated_errors(self._path, "read"):
            box = self._array[self._axes.index(start, stop)].read().result()
        return np.ascontiguousarray(self._axes.to_czyx(box), self._info.dtype)

    def write(self, start: Zyx, array: NDArray[Any]) -> None:
        """Replace the box at ``start`` by a (C, z, y, x) array; returns when it is on disk.

        Needs the axes of the file to be zyx or czyx, as voxclf writes them.
        """
        z, y, x = (s + n for s, n in zip(start, array.shape[1:], strict=True))
        index = self._axes.index(start, (z, y, x))
        with translated_errors(self._path, "write"):
            self._array[index].write(array.reshape([array.shape["czyx".index(a)] for a in self._axes.names])).result()


def chunk_shapes(array: Any, axes: AxisOrder) -> tuple[Zyx, Zyx]:
    """Return the (z, y, x) shapes of an array's read chunk and write chunk (they differ where it is sharded)."""
    layout = array.chunk_layout
    return _zyx(axes, layout.read_chunk.shape), _zyx(axes, layout.write_chunk.shape)


def _zyx(axes: AxisOrder, shape: Sequence[int]) -> Zyx:
    z, y, x = axes.zyx(shape, 1)
    return int(z), int(y), int(x)
