"""HDF5: one dataset of a file, as ``file.h5:/path/to/dataset``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.mapped import DISK_PAGE_BYTES
from voxclf.formats.source import READ_CACHE_BYTES, UNKNOWN_VOXEL_SIZE, KnownVoxelSize, SourceInfo, native_dtype
from voxclf.formats.units import to_nanometres
from voxclf.geometry import Zyx

_CANDIDATES_LISTED = 12


class Hdf5Source:
    """One dataset of an HDF5 file as a (C, Z, Y, X) array.

    Axes are taken from ``axistags`` (ilastik) or dimension labels, else by number: yx, zyx, czyx, tczyx. The
    voxel size from ``element_size_um`` or, in nm, ``resolution`` or ``voxel_size``, all z, y, x.

    Parameters
    ----------
    file : str
        The HDF5 file.
    dataset : str, optional
        Path inside it; may be left out where the file holds a single dataset of two or more axes.

    Raises
    ------
    FormatError
        If the file is damaged, or the dataset is missing; the message lists those there are.
    """

    def __init__(self, file: str, dataset: str | None = None) -> None:
        self._path = f"{file}:{dataset or ''}"
        # One handle, one reader at a time: the HDF5 library is not thread-safe.
        self._lock = Lock()
        try:
            opened = h5py.File(file, "r", rdcc_nbytes=READ_CACHE_BYTES, rdcc_nslots=20_011)
        except OSError as error:
            raise FormatError(
                f"{file} is not a readable HDF5 file ({error}); it may be truncated: copy it again"
            ) from error
        name = _choose_dataset(opened, file, dataset)
        self._path = f"{file}:{name}"
        self._dataset = opened[name]
        self._axes = order_axes(_axis_names(self._dataset), self._dataset.shape, self._path)
        dtype = native_dtype(self._dataset.dtype, self._path)
        self._info = SourceInfo(
            shape=self._axes.shape,
            dtype=dtype,
            chunk_shape=self._chunk_shape(dtype),
            voxel_size_nm=_voxel_size(self._dataset.attrs),
        )

    @property
    def info(self) -> SourceInfo:
        """Shape, dtype, chunks and voxel size."""
        return self._info

    def _chunk_shape(self, dtype: np.dtype) -> Zyx:
        if self._dataset.chunks is None:
            return 1, 1, min(self._axes.shape[3], DISK_PAGE_BYTES // dtype.itemsize)
        z, y, x = self._axes.zyx(self._dataset.chunks, 1)
        return int(z), int(y), int(x)

    def read(self, start: Zyx, stop: Zyx) -> NDArray[Any]:
        """Read a box as (C, z, y, x)."""
        try:
            with self._lock:
                box = self._dataset[self._axes.index(start, stop)]
        except OSError as error:
            raise FormatError(
                f"{self._path} is damaged: voxels {start} to {stop} cannot be read ({error}); copy it again"
            ) from error
        return np.ascontiguousarray(self._axes.to_czyx(box), self._info.dtype)


def _choose_dataset(opened: Any, file: str, dataset: str | None) -> str:
    candidates: list[str] = []

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim >= 2:
            candidates.append(f"/{name}")

    if dataset is None or not isinstance(opened.get(dataset), h5py.Dataset):
        opened.visititems(note)
        if dataset is None and len(candidates) == 1:
            return candidates[0]
        shown = ", ".join(f"{name} {opened[name].shape}" for name in candidates[:_CANDIDATES_LISTED])
        problem = f"has no dataset {dataset!r}" if dataset else "holds several datasets"
        if not candidates:
            raise FormatError(f"{file} holds no array of two or more axes; check that it is the right file")
        raise FormatError(f"{file} {problem}; choose one as in {file}:{candidates[0]}. It holds {shown}")
    return dataset


def _axis_names(dataset: Any) -> Sequence[str] | None:
    tags = dataset.attrs.get("axistags")
    if tags is not None:
        try:
            return [axis["key"] for axis in json.loads(tags)["axes"]]
        except (ValueError, KeyError, TypeError):
            return None
    labels = [str(dimension.label).lower() for dimension in dataset.dims]
    return labels if all(labels) and set(labels) <= set("tczyx") else None


def _voxel_size(attributes: Mapping[str, Any]) -> KnownVoxelSize:
    for key, unit in (("element_size_um", "um"), ("voxel_size", "nm"), ("resolution", "nm")):
        values = np.ravel(attributes.get(key, ()))
        if len(values) == 3:
            z, y, x = (to_nanometres(v, unit) for v in values)
            return z, y, x
    return UNKNOWN_VOXEL_SIZE
