"""TIFF stacks: multi-page, tiled or in strips, compressed or not, BigTIFF, ImageJ and OME.

Uncompressed pages are read straight from the file; compressed ones strip by strip (or tile by tile) through a
bounded cache, because a strip usually spans many blocks. Pages may stand for z, channels and one time point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.decode_cache import DecodeCache
from voxclf.formats.mapped import DISK_PAGE_BYTES, MappedArray, read_bytes
from voxclf.formats.source import SourceInfo, native_dtype
from voxclf.formats.tiff_chain import count_pages
from voxclf.formats.tiff_voxel_size import read_voxel_size
from voxclf.geometry import Zyx


class TiffSource:
    """One TIFF file as a (C, Z, Y, X) array.

    Parameters
    ----------
    path : str
        The file.
    check : bool
        Look at every page's place in the file first, so that a truncated file is found before work begins.
        A worker that opens a file again passes False.
    cache : DecodeCache, optional
        Shared by the files of a folder; by default each file has its own.

    Raises
    ------
    FormatError
        If the file is truncated, in colour, or not one stack of equal pages.
    """

    def __init__(self, path: str, *, check: bool = True, cache: DecodeCache | None = None) -> None:
        self._path = path
        self._cache = cache or DecodeCache()
        n_pages = count_pages(path) if check else None
        with tifffile.TiffFile(path) as tif:
            self._read_layout(tif, n_pages)
        if check:
            self._check_page_bounds()

    @property
    def info(self) -> SourceInfo:
        """Shape, dtype and voxel size as the file states them."""
        return self._info

    def _read_layout(self, tif: Any, n_pages: int | None) -> None:
        series = tif.series[0]
        _check_kind(self._path, tif, series, n_pages)
        leading = series.shape[: -len("YX")]
        names = _page_axes(tif, series)
        order = order_axes((*names, "y", "x"), series.shape, self._path)
        numbers = np.arange(int(np.prod(leading, dtype=np.int64))).reshape((*leading, 1, 1))
        #: Page number of every (channel, z).
        self._page_numbers = order.to_czyx(numbers)[:, :, 0, 0]
        self._keyframe = series.keyframe
        self._page_shape = (int(self._keyframe.imagelength), int(self._keyframe.imagewidth))
        if self._page_shape != tuple(series.shape[-2:]):
            raise FormatError(
                f"{self._path} stores pages of shape {self._page_shape} for a stack of shape {tuple(series.shape)}; "
                "save it with one slice per page"
            )
        self._locate_pages(series, numbers.size)
        self._info = SourceInfo(
            shape=order.shape,
            dtype=native_dtype(series.dtype, self._path),
            chunk_shape=self._chunk_shape(),
            voxel_size_nm=read_voxel_size(tif),
        )

    def _locate_pages(self, series: Any, n_pages: int) -> None:
        """Fill ``_segments``: per page, byte offset and length of each strip or tile."""
        page = self._keyframe
        file_dtype = np.dtype(page.parent.byteorder + page.dtype.char)
        page_bytes = file_dtype.itemsize * self._page_shape[0] * self._page_shape[1]
        self._is_mapped = bool(page.is_contiguous) and page.dtype.kind in "iuf"
        self._file_dtype = file_dtype
        if series.dataoffset is not None and self._is_mapped:
            first = int(series.dataoffset)
            self._segments = [((first + i * page_bytes,), (page_bytes,)) for i in range(n_pages)]
            return
        frames = list(series.pages)
        if len(frames) != n_pages or any(frame is None for frame in frames):
            missing = next((i for i, f in enumerate(frames) if f is None), len(frames))
            raise FormatError(
                f"{self._path} lacks page {missing} of the {n_pages} that its metadata promise; copy or export it "
                "again (a set of several OME-TIFF files must be complete and in one folder)"
            )
        if any(frame.parent.filehandle.path != series.parent.filehandle.path for frame in frames):
            raise FormatError(
                f"{self._path} is one of several OME-TIFF files of a stack; save it as one file, or as a folder "
                "with one slice per file"
            )
        self._segments = [(tuple(f.dataoffsets), tuple(f.databytecounts)) for f in frames]
        if any(len(o) != self._n_segments or len(n) != self._n_segments for o, n in self._segments):
            raise FormatError(
                f"{self._path} is damaged: its pages of shape {self._page_shape} should have {self._n_segments} strips "
                "or tiles each, but not all do; copy or export it again"
            )
        # Frames must lie in one piece as well, not only the first.
        self._is_mapped = self._is_mapped and all(
            sum(counts) == page_bytes and _is_one_piece(offsets, counts) for offsets, counts in self._segments
        )

    def _chunk_shape(self) -> Zyx:
        height, width = self._segment_shape
        if self._is_mapped:
            return 1, 1, min(width, max(1, DISK_PAGE_BYTES // self._file_dtype.itemsize))
        return 1, height, width

    @property
    def _segment_shape(self) -> tuple[int, int]:
        page, (height, width) = self._keyframe, self._page_shape
        if page.is_tiled:
            return int(page.tilelength), int(page.tilewidth)
        return min(int(page.rowsperstrip), height), width

    @property
    def _n_segments(self) -> int:
        (height, width), (segment_height, segment_width) = self._page_shape, self._segment_shape
        return -(-height // segment_height) * -(-width // segment_width)

    def _check_page_bounds(self) -> None:
        size = Path(self._path).stat().st_size
        for number, (offsets, counts) in enumerate(self._segments):
            end = max((o + n for o, n in zip(offsets, counts, strict=True) if n), default=0)
            if end > size:
                raise FormatError(
                    f"{self._path} is truncated: page {number} of {len(self._segments)} ends at byte {end}, but the "
                    f"file has only {size}; copy or export it again"
                )

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (C, z, y, x)."""
        n_channels = self._info.shape[0]
        box = np.empty((n_channels, *(b - a for a, b in zip(start, stop, strict=True))), self._info.dtype)
        read_page = self._read_mapped if self._is_mapped else self._read_segments
        for c, z in itertools.product(range(n_channels), range(start[0], stop[0])):
            read_page(int(self._page_numbers[c, z]), (start[1:], stop[1:]), box[c, z - start[0]])
        return box

    def _read_mapped(self, page: int, window: tuple[Any, Any], out: NDArray[Any]) -> None:
        (y0, x0), (y1, x1) = window
        place = MappedArray(self._path, self._segments[page][0][0], self._file_dtype, self._page_shape)
        out[...] = place.read((slice(y0, y1), slice(x0, x1)))

    def _read_segments(self, page: int, window: tuple[Any, Any], out: NDArray[Any]) -> None:
        (y0, x0), (y1, x1) = window
        for index, top, left in self._segments_in(window):
            segment = self._cache.get((self._path, page, index), self._decoder(page, index))
            bottom, right = top + segment.shape[0], left + segment.shape[1]
            ya, yb, xa, xb = max(y0, top), min(y1, bottom), max(x0, left), min(x1, right)
            out[ya - y0 : yb - y0, xa - x0 : xb - x0] = segment[ya - top : yb - top, xa - left : xb - left]

    def _segments_in(self, window: tuple[Any, Any]) -> Iterator[tuple[int, int, int]]:
        """Yield number, first row and first column of the strips or tiles that a window of a page meets."""
        (y0, x0), (y1, x1) = window
        height, width = self._segment_shape
        n_across = -(-self._page_shape[1] // width)
        for row in range(y0 // height, -(-y1 // height)):
            for column in range(x0 // width, -(-x1 // width)):
                yield row * n_across + column, row * height, column * width

    def _decoder(self, page: int, index: int) -> Callable[[], NDArray[Any]]:
        def decode() -> NDArray[Any]:
            offset, n_bytes = (part[index] for part in self._segments[page])
            # A length of 0 marks a tile that was never written and stands for zeros.
            data = read_bytes(self._path, offset, n_bytes) if n_bytes else None
            try:
                decoded, _, shape = self._keyframe.decode(data, index, jpegtables=self._keyframe.jpegtables)
            except Exception as error:  # codecs raise types of their own
                raise FormatError(
                    f"{self._path} is damaged: page {page}, strip or tile {index} cannot be decoded ({error}); copy "
                    "or export it again"
                ) from error
            height, width = int(shape[1]), int(shape[2])
            if decoded is None:
                return np.zeros((height, width), self._info.dtype)
            # A copy, because a view would keep the padding of an edge tile alive.
            return np.array(decoded[0, :height, :width, 0], self._info.dtype)

        return decode


def _is_one_piece(offsets: tuple[int, ...], counts: tuple[int, ...]) -> bool:
    return all(o + n == following for o, n, following in zip(offsets, counts, offsets[1:], strict=False))


def _check_kind(path: str, tif: Any, series: Any, n_pages: int | None) -> None:
    page = series.keyframe
    if page.samplesperpixel > 1 or "S" in series.axes:
        raise FormatError(
            f"{path} is a colour image ({page.samplesperpixel} samples per pixel); voxclf reads grey values: convert "
            "it first (Fiji: Image > Type > 8-bit)"
        )
    if not series.axes.endswith("YX") or page.imagedepth > 1 or getattr(page, "tiledepth", 1) > 1:
        raise FormatError(f"{path} stores its pages with the axes {series.axes}; voxclf reads pages of y, x")
    if len(tif.series) > 1:
        shapes = ", ".join(str(tuple(s.shape)) for s in tif.series[:4])
        raise FormatError(
            f"{path} holds {len(tif.series)} images of different kinds (shapes {shapes}); save the volume alone in a "
            "file"
        )
    promised = _promised_pages(tif, series)
    found = int(np.prod(series.shape[:-2], dtype=np.int64))
    if series.dataoffset is None and n_pages is not None:
        found = min(found, n_pages)
    if promised is not None and found < promised:
        raise FormatError(
            f"{path} is truncated: it has {found} pages and its metadata promise {promised}; copy or export it again"
        )


def _promised_pages(tif: Any, series: Any) -> int | None:
    if tif.is_imagej and tif.imagej_metadata:
        return int(tif.imagej_metadata.get("images", 1))
    if series.kind in {"ome", "shaped"}:
        return int(np.prod(series.shape[:-2], dtype=np.int64))
    return None


def _page_axes(tif: Any, series: Any) -> list[str]:
    """Name the axes that pages run along; axes without a meaning of their own are z."""
    names = [name.lower() for name in series.axes[:-2]]
    if tif.is_imagej and "channels" not in (tif.imagej_metadata or {}):
        # ImageJ calls a plain stack "images"; readers take that for channels.
        names = ["z" if name == "c" and "z" not in names else name for name in names]
    lengths = series.shape[: len(names)]
    unnamed = [i for i, name in enumerate(names) if name in "iq" and lengths[i] > 1]
    if len(unnamed) == 1 and "z" not in names:
        names[unnamed[0]] = "z"
    # Axes of length 1 that are named twice ("q", "q") get names of their own.
    return [name if name in "czt" else f"{name}{i}" for i, name in enumerate(names)]
