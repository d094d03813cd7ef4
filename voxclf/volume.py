"""Volumes: 3D data on disk with a voxel size, whatever the file format; where the corridor begins and ends.

``open_volume`` settles once what every later step trusts: (C, Z, Y, X), a voxel size in nm, integers or
floats. ``create_volume`` makes the OME-Zarr that blocks are written to. A :class:`Volume` sent to another
process carries its path and these facts, not its data; the file is opened again at the first read.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from voxclf.errors import FormatError, OutputExistsError
from voxclf.formats.detect import find_opener, open_source
from voxclf.formats.multiscale import Level, pyramid_levels
from voxclf.formats.ome_metadata import Kind
from voxclf.formats.source import ArraySource, KnownVoxelSize, Opener, SourceInfo, WritableSource
from voxclf.geometry import UNIT, Region, VoxelSize, Zyx
from voxclf.progress import Progress, silent

#: Voxels per chunk axis of a new volume: 256 kB at one byte, a good size for viewers and disks alike.
DEFAULT_CHUNK: Zyx = (64, 64, 64)

#: What an export reads at once; chunks thicker than this allows are read more than once.
_SLAB_BYTES = 2**29

_VOXEL_SIZE_ADVICE = "give it in nm as z,y,x: --voxel-size 50,4.6,4.6 (voxel_size_nm=(50, 4.6, 4.6) in Python)"
#: Files round what they state; a difference below this share is not worth a warning.
_VOXEL_SIZE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume on disk: what is known about it, and its voxels box by box.

    Safe to read from several threads, and to send to other processes.

    Parameters
    ----------
    path : str
        Where it is, as the user would write it.
    info : SourceInfo
        Shape, dtype, chunks and metadata.
    voxel_size_nm : (z, y, x)
        Nanometres; all NaN only if it was opened with ``require_voxel_size=False`` and nobody states it.
    opener : callable
        Opens the file; called at the first read in each process.
    """

    path: str
    info: SourceInfo
    voxel_size_nm: VoxelSize
    opener: Opener

    @property
    def shape(self) -> Zyx:
        """Voxels along z, y, x."""
        return self.info.shape[1:]

    @property
    def n_channels(self) -> int:
        """Number of channels C; 1 for a grey image or labels."""
        return self.info.shape[0]

    @property
    def dtype(self) -> np.dtype:
        """Type of the voxels as ``read`` returns them."""
        return self.info.dtype

    @property
    def chunk_shape(self) -> Zyx:
        """The file's natural read unit along z, y, x; reading less costs as much."""
        return self.info.chunk_shape

    @property
    def write_shape(self) -> Zyx:
        """Unit along z, y, x that no two writers may share: the shard if there is one, else the chunk."""
        if self.info.write_shape is None:
            raise FormatError(f"{self.path} is open for reading only; create_volume makes one that can be written")
        return self.info.write_shape

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What voxclf stored beside the voxels (kind, provenance, classes); empty for other files."""
        return self.info.metadata

    @property
    def channel_names(self) -> tuple[str, ...]:
        """One name per channel, or empty where the file has none."""
        return self.info.channel_names

    @property
    def labelled_boxes(self) -> tuple[Region, ...] | None:
        """Boxes outside which every voxel is 0, where that is known (slice labels); else None."""
        return self.info.labelled_boxes

    @property
    def has_voxel_size(self) -> bool:
        """Whether the voxel size is known."""
        return not any(math.isnan(v) for v in self.voxel_size_nm)

    @functools.cached_property
    def _source(self) -> ArraySource:
        return self.opener()

    def __getstate__(self) -> dict[str, Any]:
        # The open file stays behind; the receiving process opens its own.
        return {key: value for key, value in self.__dict__.items() if key != "_source"}

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read the box ``start <= voxel < stop``.

        Parameters
        ----------
        start, stop : (z, y, x)
            Half-open, inside the volume.

        Returns
        -------
        ndarray of the volume's dtype, shape (C, z, y, x)
            A new array; memory is the box's, plus a bounded cache of decoded chunks or pages.

        Raises
        ------
        ValueError
            If the box is empty or sticks out of the volume.
        FormatError
            If the data there are damaged.
        """
        self._check_box(start, stop)
        return self._source.read(start, stop)

    def write(self, start: Zyx, array: NDArray[Any]) -> None:
        """Replace the box that begins at ``start`` by an array; on return it is on disk.

        Two processes must not write boxes that share a unit of ``write_shape``.

        Parameters
        ----------
        start : (z, y, x)
            First voxel of the box.
        array : ndarray of the volume's dtype, shape (C, z, y, x)
            All channels.

        Raises
        ------
        ValueError, TypeError
            If the array does not fit the volume in place, channels or dtype.
        OSError
            If the disk is full or the file may not be written.
        """
        if self.info.write_shape is None:
            raise FormatError(f"{self.path} is open for reading only; create_volume makes one that can be written")
        if array.ndim != 4 or array.shape[0] != self.n_channels:
            raise ValueError(
                f"array for {self.path} has shape {array.shape}; it needs (C, z, y, x) with C = {self.n_channels}"
            )
        if array.dtype != self.dtype:
            raise TypeError(f"array for {self.path} has type {array.dtype}; convert it to {self.dtype} first")
        z, y, x = (s + n for s, n in zip(start, array.shape[1:], strict=True))
        self._check_box(start, (z, y, x))
        cast(WritableSource, self._source).write(start, array)

    def _check_box(self, start: Zyx, stop: Zyx) -> None:
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise ValueError(
                f"the box from {start} to {stop} is empty or sticks out of {self.path}, whose shape is {self.shape}"
            )


def open_volume(
    path: str | Path,
    voxel_size_nm: VoxelSize | None = None,
    *,
    require_voxel_size: bool = True,
    kind: Literal["image", "labels"] = "image",
) -> Volume:
    """Open a volume of any supported format; nothing but its header is read.

    Parameters
    ----------
    path : str or Path
        A file, a folder, or ``file.h5:/path/to/dataset``.
    voxel_size_nm : (z, y, x), optional
        Size of a voxel in nm. Needed where the file does not state it; where both do and differ, this one
        holds and a warning names both.
    require_voxel_size : bool
        If False, a voxel size that nobody states is NaN instead of an error.
    kind : {"image", "labels"}
        An image holds 8- or 16-bit integers or floats; labels hold integers of any size.

    Returns
    -------
    Volume
        For reading.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    FormatError
        If the file is truncated, damaged or of a kind that voxclf does not read.
    ValueError
        If the voxel size is missing or not three positive numbers.
    """
    path = str(path)
    info = open_source(path).info
    _check_dtype(path, info, kind)
    voxel_size = _settle_voxel_size(path, info.voxel_size_nm, voxel_size_nm, require_voxel_size)
    return Volume(path, info, voxel_size, find_opener(path, check=False))


def open_labels(path: str | Path, volume_shape: Zyx) -> Volume:
    """Open the labels that belong to a volume.

    Parameters
    ----------
    path : str or Path
        A label volume in any supported format, or a TOML listing of labelled slices (see
        :mod:`voxclf.formats.slice_labels`). 0 where nothing is labelled.
    volume_shape : (Z, Y, X)
        Shape of the volume they label.

    Returns
    -------
    Volume
        One channel of integers, of the volume's shape. Its voxel size is NaN where the file states none: the
        volume's own holds.

    Raises
    ------
    FormatError
        If the labels are not one channel of whole numbers, or a listed slice does not fit.
    ValueError
        If their shape is not the volume's.
    """
    path = str(path)
    if path.lower().endswith(".toml"):
        return _open_slice_labels(path, volume_shape)
    labels = open_volume(path, require_voxel_size=False, kind="labels")
    if labels.n_channels != 1:
        raise FormatError(
            f"labels {path} have {labels.n_channels} channels; save one channel in which each class is a number"
        )
    if labels.shape != volume_shape:
        raise ValueError(
            f"labels {path} have shape {labels.shape} but the volume has {volume_shape} (z, y, x); they must agree: if "
            "the labels cover only a part, place them with a TOML listing of slices, else check that both belong "
            "together and that neither was cropped, scaled or transposed"
        )
    return labels


def _open_slice_labels(path: str, volume_shape: Zyx) -> Volume:
    from voxclf.formats.slice_labels import SliceLabelsSource

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path (current folder: {Path.cwd()})")
    opener = functools.partial(SliceLabelsSource, path, volume_shape)
    return Volume(path, opener().info, (math.nan, math.nan, math.nan), opener)


def open_level(path: str | Path, level: int, *, writable: bool = False) -> Volume:
    """Open one scale of an OME-Zarr volume: level 0 is the volume itself, higher ones are coarser.

    Parameters
    ----------
    path : str or Path
        The volume, as given to :func:`create_volume`.
    level : int
        Which scale.
    writable : bool
        Open it for writing as well.

    Raises
    ------
    FileNotFoundError
        If the volume has no such level.
    """
    from voxclf.formats.zarr import open_zarr

    folder = Path(path) / str(level)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} has no level {level}; levels are the numbered folders inside it")
    opener = functools.partial(open_zarr, str(folder), writable=writable)
    info = opener().info
    return Volume(str(folder), info, _settle_voxel_size(str(folder), info.voxel_size_nm, None, True), opener)


def create_volume(
    path: str | Path,
    shape: Zyx,
    n_channels: int,
    dtype: DTypeLike,
    voxel_size_nm: VoxelSize,
    chunk_shape: Zyx | None = None,
    shard_shape: Zyx | None = None,
    *,
    kind: Kind,
    attributes: Mapping[str, Any] | None = None,
    channel_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Volume:
    """Create an OME-Zarr 0.5 volume of zeros with all its pyramid levels, and open level 0 for writing.

    Parameters
    ----------
    path : str or Path
        A new folder, usually ending in .zarr.
    shape : (Z, Y, X)
        Voxels.
    n_channels : int
        Channels C. A single channel of labels or image is stored as zyx, everything else as czyx.
    dtype : dtype
        Integer (8 to 64 bit) or float (16 to 64 bit).
    voxel_size_nm : (z, y, x)
        Nanometres.
    chunk_shape : (z, y, x), optional
        Unit of storage; :data:`DEFAULT_CHUNK` by default, cut to the volume.
    shard_shape : (z, y, x), optional
        Put this many voxels into one file, for volumes of millions of chunks; a multiple of the chunk. No two
        writers may then share a shard.
    kind : {"probabilities", "labels", "features", "image"}
        Decides how coarser levels are made and what viewers are told.
    attributes : mapping, optional
        Anything JSON can hold; kept under "voxclf" and returned as ``Volume.metadata``. ``classes``, a list of
        ``{"id", "name", "colour"}``, also colours a label volume in viewers.
    channel_names : sequence of str, optional
        One per channel.
    overwrite : bool
        Replace an existing Zarr folder. Anything else at the path is never removed.

    Raises
    ------
    ValueError, TypeError
        If a size, shape or dtype is not allowed.
    OutputExistsError
        If the path exists and may not be replaced.
    OSError
        If the disk is full or the folder may not be written.
    """
    from voxclf.formats.zarr import create_zarr

    path, dtype = str(path), np.dtype(dtype)
    chunk = chunk_shape or DEFAULT_CHUNK
    _check_new_volume(shape, n_channels, dtype, chunk, shard_shape, channel_names)
    size = _parse_voxel_size(voxel_size_nm)
    levels = pyramid_levels(shape, size, chunk)
    create_zarr(
        path, levels, n_channels, dtype, chunk, shard_shape, kind, attributes or {}, channel_names or (), overwrite
    )
    # Named by the volume's own path, so messages say what the user typed.
    level_0 = open_level(path, 0, writable=True)
    return Volume(path, level_0.info, size, level_0.opener)


def export_tiff(volume: Volume, path: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> None:
    """Write a volume as one TIFF stack that Fiji opens with its voxel size, never holding more than a slab.

    Up to 4 GB it is an ImageJ hyperstack; above, or for types that ImageJ does not know, a BigTIFF with OME
    metadata. Labels are compressed. float16 becomes float32, because few programs read it.

    Parameters
    ----------
    volume : Volume
        In any format.
    path : str or Path
        The file to write; it appears only when complete.
    overwrite : bool
        Replace an existing file.
    progress : Progress
        Told of every page.

    Raises
    ------
    OutputExistsError
        If the file exists and ``overwrite`` is not set.
    OSError
        If the disk is full or the folder may not be written.
    """
    from voxclf.formats.tiff_write import write_tiff

    path = Path(path)
    if path.exists() and (path.is_dir() or not overwrite):
        raise OutputExistsError(f"{path} exists already; choose another output, or overwrite it (--overwrite)")
    dtype = np.dtype(np.float32) if volume.dtype == np.float16 else volume.dtype
    n_pages = volume.n_channels * volume.shape[0]
    write_tiff(
        str(path),
        progress("export", _pages(volume, dtype), n_pages, "page"),
        (volume.n_channels, *volume.shape),
        dtype,
        volume.voxel_size_nm if volume.has_voxel_size else None,
        volume.channel_names,
        compress=volume.metadata.get("kind") == "labels",
    )


def _pages(volume: Volume, dtype: np.dtype) -> Iterator[NDArray[Any]]:
    """Yield (Y, X) pages, channels of a slice after one another, reading as many slices at once as is bounded."""
    n_slices, height, width = volume.shape
    plane_bytes = volume.n_channels * height * width * volume.dtype.itemsize
    step = max(1, min(volume.chunk_shape[0], _SLAB_BYTES // plane_bytes))
    for first in range(0, n_slices, step):
        slab = volume.read((first, 0, 0), (min(first + step, n_slices), height, width))
        for z in range(slab.shape[1]):
            for channel in slab[:, z]:
                yield channel.astype(dtype, copy=False)


def list_levels(path: str | Path) -> tuple[Level, ...]:
    """Return the pyramid levels of a volume that :func:`create_volume` made, finest first."""
    levels: list[Level] = []
    while (Path(path) / str(len(levels))).is_dir():
        volume = open_level(path, len(levels))
        factors = UNIT
        if levels:
            finer = levels[-1].voxel_size_nm
            z, y, x = (round(c / f) for c, f in zip(volume.voxel_size_nm, finer, strict=True))
            factors = (z, y, x)
        levels.append(Level(len(levels), factors, volume.shape, volume.voxel_size_nm))
    return tuple(levels)


def _check_dtype(path: str, info: SourceInfo, kind: str) -> None:
    dtype = info.dtype
    if kind == "labels" or info.metadata.get("kind") == "labels":
        if dtype.kind not in "iu":
            raise FormatError(f"{path} holds {dtype} voxels; labels are whole numbers: save them as uint8 or uint16")
    elif dtype.kind in "iu" and dtype.itemsize > 2:
        raise FormatError(
            f"{path} holds {dtype} voxels; an image has 8- or 16-bit integers or floats: convert it to uint8, uint16 "
            "or float32 (is it a label volume?)"
        )


def _parse_voxel_size(given: Sequence[float]) -> VoxelSize:
    try:
        z, y, x = (float(v) for v in given)
    except (TypeError, ValueError):
        raise ValueError(f"voxel_size_nm was {given!r}; {_VOXEL_SIZE_ADVICE}") from None
    if not all(math.isfinite(v) and v > 0 for v in (z, y, x)):
        raise ValueError(f"voxel_size_nm was {(z, y, x)}; all three must be above 0: {_VOXEL_SIZE_ADVICE}")
    return z, y, x


def _settle_voxel_size(path: str, stated: KnownVoxelSize, given: VoxelSize | None, is_required: bool) -> VoxelSize:
    """Decide between what the file states and what the user gives; refuse to guess."""
    if given is not None:
        size = _parse_voxel_size(given)
        if any(s is not None and abs(s - g) > _VOXEL_SIZE_TOLERANCE * g for s, g in zip(stated, size, strict=True)):
            warnings.warn(
                f"{path} states a voxel size of {_describe(stated)} (z, y, x), but {size} nm was given; the given one "
                "is used",
                stacklevel=3,
            )
        return size
    z, y, x = stated
    if z is not None and y is not None and x is not None:
        return z, y, x
    if not is_required:
        return math.nan, math.nan, math.nan
    found = "no voxel size" if not any(stated) else f"only a part of the voxel size, {_describe(stated)} (z, y, x)"
    raise ValueError(f"{path} states {found}; {_VOXEL_SIZE_ADVICE}")


def _describe(size: KnownVoxelSize) -> str:
    return "(" + ", ".join("unknown" if v is None else f"{v:g}" for v in size) + ") nm"


def _check_new_volume(
    shape: Zyx, n_channels: int, dtype: np.dtype, chunk: Zyx, shard: Zyx | None, names: Sequence[str] | None
) -> None:
    for name, triple in (("shape", shape), ("chunk_shape", chunk), ("shard_shape", shard or UNIT)):
        if len(triple) != 3 or min(triple) < 1:
            raise ValueError(f"{name} was {triple}; it needs three whole numbers above 0 (z, y, x)")
    if n_channels < 1 or (names and len(names) != n_channels):
        raise ValueError(f"n_channels was {n_channels} with channel_names {names}; give one name per channel")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise TypeError(f"dtype was {dtype}; choose an integer or float of at most 64 bit")
    if shard and any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise ValueError(f"shard_shape {shard} must be a multiple of chunk_shape {chunk} along every axis")
