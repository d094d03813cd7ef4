"""What every reader gives, whatever the file: a (C, Z, Y, X) array that is read box by box.

A source knows nothing of padding, classes or missing voxel sizes; :mod:`voxclf.volume` handles those once for
all formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.geometry import Region, Zyx

#: A voxel size (z, y, x) in nm as far as the file tells it. TIFF, for one, has no standard place for the
#: distance of slices, so often only y and x are known.
KnownVoxelSize = tuple[float | None, float | None, float | None]
UNKNOWN_VOXEL_SIZE: KnownVoxelSize = (None, None, None)

#: What one open file may keep decoded in memory (bytes, per process), so that neighbouring blocks do not
#: decode the same page or chunk again. A memory budget must count it once per open compressed input.
READ_CACHE_BYTES = 128 * 2**20

#: The same for Zarr, N5 and precomputed, whose chunks are as small as blocks: those between neighbours suffice.
CHUNK_CACHE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class SourceInfo:
    """The facts about a volume on disk that are known without reading a voxel; small, and safe to pickle.

    Parameters
    ----------
    shape : (C, Z, Y, X)
        Channels and voxels.
    dtype : numpy dtype
        Integer or float, in the machine's byte order.
    chunk_shape : (z, y, x)
        The natural read unit: page strip, tile, chunk. Reading less than one costs as much as reading it.
    voxel_size_nm : (z, y, x), each float or None
        As the file states it; None where it does not.
    write_shape : (z, y, x), optional
        Unit that no two writers may share (the shard, else the chunk); None where the file is read-only.
    metadata : mapping
        What voxclf itself stored beside the voxels: kind, provenance, classes. Empty for other files.
    channel_names : tuple of str
        One per channel, or empty.
    labelled_boxes : tuple of Region, optional
        Boxes outside which every voxel is 0, where the format knows (slice labels); None where it does not.
    cache_bytes : int
        Limit of what the open file keeps decoded.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    chunk_shape: Zyx
    voxel_size_nm: KnownVoxelSize = UNKNOWN_VOXEL_SIZE
    write_shape: Zyx | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    channel_names: tuple[str, ...] = ()
    labelled_boxes: tuple[Region, ...] | None = None
    cache_bytes: int = READ_CACHE_BYTES

    @property
    def most_cached_bytes(self) -> int:
        """What an open file keeps decoded at most: its cache, or all of a volume that is smaller."""
        return min(self.cache_bytes, math.prod(self.shape) * self.dtype.itemsize)


class ArraySource(Protocol):
    """An open file. Reading is safe from several threads at once."""

    @property
    def info(self) -> SourceInfo:
        """Shape, dtype and what else is known without reading a voxel."""

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read the box ``start <= voxel < stop``, which lies inside the volume, as a new (C, z, y, x) array."""


class WritableSource(ArraySource, Protocol):
    """An open file whose voxels can be replaced."""

    def write(self, start: Zyx, array: NDArray[Any]) -> None:
        """Replace the box that begins at ``start`` by a (C, z, y, x) array of the file's own dtype."""


#: Opens a file anew. It is picklable (a function and a path), so a worker process receives no data.
Opener = Callable[[], ArraySource]


def native_dtype(dtype: Any, where: str) -> np.dtype:
    """Return the dtype that voxels of this file have in memory, or refuse what is neither integer nor float.

    Booleans become uint8 (0 and 1) and big-endian files the machine's own byte order.

    Raises
    ------
    FormatError
        If the voxels are complex numbers, text, records or wider than 64 bit.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise FormatError(
            f"{where} holds voxels of type {dtype}; voxclf reads integers and floats: save it as uint8, uint16 "
            "or float32"
        )
    return dtype.newbyteorder("=")
