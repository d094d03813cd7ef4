"""A folder of TIFF slices: one file per slice, in natural order (slice_2 before slice_10)."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.decode_cache import DecodeCache
from voxclf.formats.source import SourceInfo
from voxclf.formats.tiff import TiffSource
from voxclf.geometry import Zyx

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which numbers inside names count as numbers.

    Examples
    --------
    >>> sorted(["s10.tif", "s9.tif"], key=natural_key)
    ['s9.tif', 's10.tif']
    """
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def list_slices(folder: str) -> list[str]:
    """Return the TIFF files of a folder in natural order, hidden files left out."""
    names = [p.name for p in Path(folder).iterdir() if p.suffix.lower() in TIFF_SUFFIXES and p.name[0] != "."]
    return [str(Path(folder) / name) for name in sorted(names, key=natural_key)]


class TiffFolderSource:
    """All slices of a folder as one volume; each file is one z.

    With ``check`` every file's header is read first (about a millisecond each), so that a slice of another
    size, or a truncated one, is found before work begins.

    Raises
    ------
    FormatError
        If a slice differs from the first in shape or type, holds more than one page, or is damaged.
    """

    def __init__(self, folder: str, *, check: bool = True) -> None:
        self._files = list_slices(folder)
        # Page entries of the slices read last; parsing them anew for every block would cost more than reading.
        self._open_slice = functools.lru_cache(maxsize=512)(
            functools.partial(TiffSource, check=False, cache=DecodeCache())
        )
        first = TiffSource(self._files[0], check=check).info
        if first.shape[:2] != (1, 1):
            raise FormatError(
                f"{self._files[0]} holds {first.shape[0] * first.shape[1]} pages; in a folder of slices every file "
                "must be one slice: give the file itself if it is the whole volume"
            )
        if check:
            for file in self._files[1:]:
                _check_same(TiffSource(file).info, first, file, self._files[0])
        self._info = SourceInfo(
            shape=(1, len(self._files), *first.shape[2:]),
            dtype=first.dtype,
            chunk_shape=first.chunk_shape,
            voxel_size_nm=first.voxel_size_nm,
        )

    @property
    def info(self) -> SourceInfo:
        """Shape, dtype and voxel size; the first slice speaks for all."""
        return self._info

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (1, z, y, x)."""
        slices = [
            self._open_slice(self._files[z]).read((0, start[1], start[2]), (1, stop[1], stop[2]))
            for z in range(start[0], stop[0])
        ]
        return np.concatenate(slices, axis=1)


def _check_same(info: SourceInfo, first: SourceInfo, file: str, first_file: str) -> None:
    if info.shape != first.shape or info.dtype != first.dtype:
        raise FormatError(
            f"slice {file} has shape {info.shape[2:]} and type {info.dtype}, but {first_file} has {first.shape[2:]} "
            f"and {first.dtype}; all slices of a folder must agree: remove the file or export it again"
        )
