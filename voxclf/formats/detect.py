"""Which format a path holds, told by what is in it rather than by its name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from voxclf.errors import FormatError
from voxclf.formats.source import ArraySource, Opener

SUPPORTED = (
    "TIFF (a stack, or a folder of slices), OME-Zarr and Zarr 2 or 3, HDF5 (file.h5:/path/to/dataset), MRC, N5, "
    "neuroglancer precomputed, NumPy .npy"
)
_HDF5_PATH = re.compile(r"^(?P<file>.+\.(?:h5|hdf5|hdf|he5|ilp|n5h|mat|nwb))(?::(?P<dataset>.*))?$", re.IGNORECASE)


def split_hdf5_path(path: str) -> tuple[str, str | None]:
    """Split ``file.h5:/raw`` into file and dataset; the dataset is None where none is named.

    Examples
    --------
    >>> split_hdf5_path("a/b.h5:/volumes/raw")
    ('a/b.h5', '/volumes/raw')
    >>> split_hdf5_path("stack.tif")
    ('stack.tif', None)
    """
    match = _HDF5_PATH.match(path)
    return (match["file"], match["dataset"] or None) if match else (path, None)


def detect_format(path: str) -> str:
    """Return the name of the format that a path holds.

    Returns
    -------
    str
        One of "tiff", "tiff folder", "zarr", "hdf5", "mrc", "n5", "precomputed", "npy".

    Raises
    ------
    FileNotFoundError
        If there is nothing at the path.
    FormatError
        If it is of no kind that voxclf reads; the message lists those it does.
    """
    file = Path(split_hdf5_path(path)[0])
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; check the path (current folder: {Path.cwd()})")
    return _detect_folder(file) if file.is_dir() else _detect_file(file)


def _detect_folder(folder: Path) -> str:
    from voxclf.formats.tiff_folder import list_slices
    from voxclf.formats.zarr import MARKERS

    if any((folder / marker).is_file() for marker in MARKERS):
        return "zarr"
    if (folder / "attributes.json").is_file():
        return "n5"
    if (folder / "info").is_file():
        return "precomputed"
    if list_slices(str(folder)):
        return "tiff folder"
    # Groups inside an N5 container need not have attributes of their own.
    if any((parent / "attributes.json").is_file() for parent in folder.absolute().parents):
        return "n5"
    raise FormatError(f"{folder} is a folder without a volume that voxclf knows; it reads {SUPPORTED}")


def _detect_file(file: Path) -> str:
    with file.open("rb") as opened:
        head = opened.read(212)
    if head[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return "tiff"
    if head[:8] == b"\x89HDF\r\n\x1a\n" or split_hdf5_path(file.name)[0] != file.name:
        return "hdf5"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[208:211] == b"MAP":
        return "mrc"
    state = "is empty" if not head else f"begins with {head[:8]!r}, as none of these do"
    raise FormatError(f"{file} {state}; voxclf reads {SUPPORTED}: check how it was written, or convert it")


def open_source(path: str) -> ArraySource:
    """Open a path for the first time: find its format, and find out whether it is whole.

    Raises
    ------
    FileNotFoundError
        If there is nothing at the path.
    FormatError
        If it is damaged, truncated or of a kind that voxclf does not read.
    """
    opener = find_opener(path)
    try:
        return opener()
    except (FormatError, OSError, MemoryError):
        raise
    except Exception as error:  # damaged files fail inside the libraries in any way they like
        raise FormatError(
            f"{path} is damaged or of a variant that voxclf does not read: {error}; copy or export it again"
        ) from error


def find_opener(path: str, *, check: bool = True) -> Opener:
    """Return the function that opens a path for reading; with ``check``, it looks for truncated files first."""
    return _OPENER_OF_FORMAT[detect_format(path)](path, check)


# One function per format, so that opening a TIFF imports no TensorStore, and the other way round.


def _tiff(path: str, check: bool) -> Opener:
    from voxclf.formats.tiff import TiffSource

    return functools.partial(TiffSource, path, check=check)


def _tiff_folder(path: str, check: bool) -> Opener:
    from voxclf.formats.tiff_folder import TiffFolderSource

    return functools.partial(TiffFolderSource, path, check=check)


def _zarr(path: str, check: bool) -> Opener:
    from voxclf.formats.zarr import open_zarr

    return functools.partial(open_zarr, path)


def _hdf5(path: str, check: bool) -> Opener:
    from voxclf.formats.hdf5 import Hdf5Source

    return functools.partial(Hdf5Source, *split_hdf5_path(path))


def _mrc(path: str, check: bool) -> Opener:
    from voxclf.formats.mrc import MrcSource

    return functools.partial(MrcSource, path)


def _npy(path: str, check: bool) -> Opener:
    from voxclf.formats.npy import NpySource

    return functools.partial(NpySource, path)


def _n5(path: str, check: bool) -> Opener:
    from voxclf.formats.n5 import open_n5

    return functools.partial(open_n5, path)


def _precomputed(path: str, check: bool) -> Opener:
    from voxclf.formats.precomputed import open_precomputed

    return functools.partial(open_precomputed, path)


_OPENER_OF_FORMAT: dict[str, Callable[[str, bool], Opener]] = {
    "tiff": _tiff,
    "tiff folder": _tiff_folder,
    "zarr": _zarr,
    "hdf5": _hdf5,
    "mrc": _mrc,
    "npy": _npy,
    "n5": _n5,
    "precomputed": _precomputed,
}
