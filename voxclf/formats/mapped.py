"""Uncompressed arrays inside a file, read through a memory map that lives no longer than one read.

A map kept open would count every page it ever touched as this process's memory, so a whole volume would seem
to be resident. Mapping anew costs tens of microseconds.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError

#: What the system reads from disk at least; the natural unit of an array that has no chunks.
DISK_PAGE_BYTES = 4096


@dataclass(frozen=True)
class MappedArray:
    """Where an uncompressed array lies in a file: byte offset, dtype with its byte order, shape, memory order."""

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    order: str = "C"

    def check_length(self) -> None:
        """Refuse a file that ends before the array does.

        Raises
        ------
        FormatError
            If the file is too short; the message says by how much.
        """
        n_bytes = self.offset + self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        size = Path(self.path).stat().st_size
        if size < n_bytes:
            raise FormatError(
                f"{self.path} is truncated: an array of shape {self.shape} and type {self.dtype} needs {n_bytes} "
                f"bytes, the file has {size}; copy or export it again"
            )

    def read(self, index: tuple[slice | int, ...]) -> NDArray[Any]:
        """Copy one box into a new array in the machine's byte order."""
        with Path(self.path).open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            whole: NDArray[Any] = np.ndarray(
                self.shape, self.dtype, buffer, self.offset, order="F" if self.order == "F" else "C"
            )
            box = whole[index].astype(self.dtype.newbyteorder("="), order="C", copy=True)
            del whole
        finally:
            buffer.close()
        return box


def read_bytes(path: str, offset: int, n_bytes: int) -> bytes:
    """Read a byte range without a shared file position, so threads need no lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while n_bytes:
            part = os.pread(descriptor, n_bytes, offset)
            if not part:
                raise FormatError(f"{path} ended while it was read; it was cut short after it was opened")
            parts.append(part)
            offset += len(part)
            n_bytes -= len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)
