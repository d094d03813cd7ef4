"""A small web server, on this machine only, for the volumes that a viewer in the browser reads.

Zarr folders are served as the files they are, so neuroglancer reads pyramids, shards and compressed chunks itself. A
volume in any other format is served as if it were OME-Zarr: its chunks are read and cut when they are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import numpy as np

from voxclf.formats.multiscale import pyramid_levels
from voxclf.formats.ome_metadata import Kind, build_group_attributes
from voxclf.geometry import Zyx
from voxclf.volume import Volume

HOST = "127.0.0.1"
CHUNK: Zyx = (32, 64, 64)
MOST_READ = 64_000_000
"""Most voxels that one chunk of a coarse level may make the server read; coarser levels are left out."""


class Source(Protocol):
    """Something below ``/data/NAME/``."""

    def read(self, path: str, first: int, last: int | None) -> tuple[bytes, int] | None:
        """Return bytes ``first`` to ``last`` (inclusive; None: to the end; negative ``first``: the last ones) of what
        stands at a path, and the length of all of it; None if nothing does."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """The files of a folder, and nothing above it."""

    folder: Path

    def read(self, path: str, first: int = 0, last: int | None = None) -> tuple[bytes, int] | None:
        """Read a file or a part of it, such as one chunk of a shard."""
        file = (self.folder / path).resolve()
        if not file.is_relative_to(self.folder.resolve()) or not file.is_file():
            return None
        size = file.stat().st_size
        start = max(0, size + first) if first < 0 else first
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(max(0, (size if last is None else last + 1) - start)), size


class VolumeSource:
    """A volume of one channel in any format, served as OME-Zarr 0.5 without compression.

    Coarser levels take every second, fourth, … voxel; the voxels between are read and dropped, so they cost as much as
    the finest level. ``voxclf convert`` makes an OME-Zarr whose coarser levels are stored.
    """

    def __init__(self, volume: Volume, kind: Kind) -> None:
        self._volume = volume
        # Viewers know no float64 and no float16.
        self._dtype = np.dtype(np.float32) if volume.dtype.kind == "f" else volume.dtype.newbyteorder("<")
        levels = pyramid_levels(volume.shape, volume.voxel_size_nm, CHUNK)
        # Voxels of the volume per voxel of each level, along z, y, x.
        self._factors = np.cumprod([level.factors for level in levels], axis=0).tolist()
        n = sum(np.prod(factors) * np.prod(CHUNK) <= MOST_READ for factors in self._factors)
        self._levels = levels[:n]
        metadata = build_group_attributes("volume", "zyx", self._levels, kind, self._dtype, (), {})
        group = {"zarr_format": 3, "node_type": "group", "attributes": metadata}
        self._texts = {"zarr.json": json.dumps(group)}
        for level in self._levels:
            self._texts[f"{level.index}/zarr.json"] = json.dumps(self._describe(level.shape))

    def _describe(self, shape: Zyx) -> dict[str, object]:
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": self._dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": CHUNK}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0,
            "dimension_names": ["z", "y", "x"],
            "attributes": {},
        }

    def read(self, path: str, first: int = 0, last: int | None = None) -> tuple[bytes, int] | None:
        """Return metadata, or cut a chunk."""
        content = self._texts[path].encode() if path in self._texts else self._read_chunk(path)
        if content is None:
            return None
        return content[first : None if last is None else last + 1], len(content)

    def _read_chunk(self, path: str) -> bytes | None:
        match = re.fullmatch(r"(\d+)/c/(\d+)/(\d+)/(\d+)", path)
        if not match or int(match[1]) >= len(self._levels):
            return None
        level, factors = self._levels[int(match[1])], self._factors[int(match[1])]
        z, y, x = (int(match[i + 2]) * CHUNK[i] for i in range(3))
        if any(a >= n for a, n in zip((z, y, x), level.shape, strict=True)):
            return None
        start = [a * f for a, f in zip((z, y, x), factors, strict=True)]
        stop = [min(a + c * f, n) for a, c, f, n in zip(start, CHUNK, factors, self._volume.shape, strict=True)]
        box = self._volume.read((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))[0]
        fz, fy, fx = factors
        thinned = box[::fz, ::fy, ::fx][: CHUNK[0], : CHUNK[1], : CHUNK[2]]
        chunk = np.zeros(CHUNK, self._dtype)
        chunk[tuple(slice(n) for n in thinned.shape)] = thinned
        return chunk.tobytes()


class ViewServer(ThreadingHTTPServer):
    """Serves each source at ``/data/NAME/``.

    Parameters
    ----------
    port : int
        On this machine; 0 takes any that is free.
    sources : mapping of str to Source
        By name.
    allowed_origins : collection of str
        Web addresses whose pages may read the data, such as the viewer's. No other page may: any that is open in the
        browser could otherwise fetch unpublished data.

    Raises
    ------
    OSError
        If the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, sources: Mapping[str, Source], allowed_origins: Collection[str] = ()) -> None:
        self.sources = sources
        self.allowed_origins = frozenset(allowed_origins)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise OSError(f"port {port} cannot be used: {error.strerror}; choose another with --port, or 0") from None

    @property
    def address(self) -> str:
        """Where to find it."""
        return f"http://{HOST}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_OPTIONS(self) -> None:
        """What a browser asks before it reads a part of a file for a page from elsewhere."""
        self._start(HTTPStatus.NO_CONTENT, 0)
        self.send_header("Access-Control-Allow-Headers", "Range")
        self.end_headers()

    def _answer(self, send_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        first, last = self._asked_range()
        found = self._find(path, first, last)
        if found is None:
            self._start(HTTPStatus.NOT_FOUND, 0)
            self.end_headers()
            return
        content, size = found
        is_part = "Range" in self.headers
        self._start(HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK, len(content))
        if is_part:
            start = max(0, size + first) if first < 0 else first
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/json" if path.endswith(".json") else "application/octet-stream")
        self.end_headers()
        if send_body:
            self.wfile.write(content)

    def _asked_range(self) -> tuple[int, int | None]:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or not (match[1] or match[2]):
            return 0, None
        if not match[1]:
            return -int(match[2]), None
        return int(match[1]), int(match[2]) if match[2] else None

    def _find(self, path: str, first: int, last: int | None) -> tuple[bytes, int] | None:
        match = re.fullmatch(r"/data/([^/]+)/(.+)", path)
        source = self.server.sources.get(match[1]) if match else None
        return source.read(match[2], first, last) if match and source else None

    def _start(self, status: HTTPStatus, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        origin = self.headers.get("Origin")
        if origin in self.server.allowed_origins:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Expose-Headers", "Content-Range")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the name that http.server gives
        """Say nothing: a line per chunk would bury what the command prints."""
