"""A cheap look at a TIFF file's page list that finds a truncated file before any work begins.

TIFF readers stop quietly at the first page they cannot reach, so half a stack looks like a smaller stack. Here
the list itself is walked: 12 bytes per page (20 in BigTIFF), no voxel is read.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from voxclf.errors import FormatError


def count_pages(path: str) -> int:
    """Walk a TIFF file's chain of pages to its end and return how many there are.

    Raises
    ------
    FormatError
        If the chain leaves the file or runs in a circle; the message names the file and the page.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        order, is_big, offset = _read_header(file, path)
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise FormatError(f"{path} is damaged: its page {len(seen)} points back to an earlier page")
            seen.add(offset)
            try:
                offset = _next_page(file, offset, order, is_big)
            except (struct.error, OverflowError):
                raise FormatError(
                    f"{path} is truncated: the entry of page {len(seen) - 1} at byte {offset} runs past the end of "
                    f"the file ({size} bytes); copy or export it again"
                ) from None
    return len(seen)


def _read_header(file: BinaryIO, path: str) -> tuple[str, bool, int]:
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise FormatError(f"{path} is not a TIFF file: it does not begin with II or MM; check how it was written")
    is_big = struct.unpack(order + "H", head[2:4])[0] == 43
    if is_big and len(head) < 16:
        raise FormatError(f"{path} is truncated inside its header; copy or export it again")
    first: int = struct.unpack(order + ("Q" if is_big else "I"), head[8:16] if is_big else head[4:8])[0]
    return order, is_big, first


def _next_page(file: BinaryIO, offset: int, order: str, is_big: bool) -> int:
    count_format, tag_bytes, next_format = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    count_bytes = struct.calcsize(order + count_format)
    file.seek(offset)
    (n_tags,) = struct.unpack(order + count_format, file.read(count_bytes))
    file.seek(offset + count_bytes + n_tags * tag_bytes)
    following: int = struct.unpack(order + next_format, file.read(struct.calcsize(order + next_format)))[0]
    return following
