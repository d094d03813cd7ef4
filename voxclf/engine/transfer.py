"""Between volumes and arrays: all padding and all cropping of the project happens in these two functions."""

from __future__ import annotations

import hashlib

import numpy as np

from voxclf.geometry import Block, Region, Zyx, add
from voxclf.volume import Volume


def mirror_indices(start: int, stop: int, size: int) -> np.ndarray:
    """Map positions ``start..stop``, which may lie outside ``0..size``, to the voxels that stand in for them.

    The volume is mirrored with its edge voxel repeated, ``c b a | a b c | c b a``, as often as needed: SciPy's
    ``mode="reflect"`` and NumPy's ``"symmetric"``.
    """
    folded = np.arange(start, stop) % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)


def read_block(volume: Volume, block: Block) -> np.ndarray:
    """Read what a step needs for one block, mirrored where that lies outside the volume.

    Returns
    -------
    ndarray, shape (C, Z + 2h, Y + 2h, X + 2h)
        In the volume's own dtype.

    Notes
    -----
    Which voxel stands in for which depends only on the position in the volume, never on the block, so blocks
    of any size see the same values.
    """
    read = block.read
    indices = [mirror_indices(a, b, n) for a, b, n in zip(read.start, read.stop, volume.shape, strict=True)]
    start: Zyx = (int(indices[0].min()), int(indices[1].min()), int(indices[2].min()))
    stop: Zyx = (int(indices[0].max()) + 1, int(indices[1].max()) + 1, int(indices[2].max()) + 1)
    array = volume.read(start, stop)
    for axis, (index, first, a, b) in enumerate(zip(indices, start, read.start, read.stop, strict=True), start=1):
        if (first, len(index)) != (a, array.shape[axis]) or index[-1] != b - 1:
            array = array.take(index - first, axis=axis)
    return array


def read_inside(volume: Volume, block: Block) -> np.ndarray:
    """Read what a step needs for one block as far as the volume goes, for steps that want no mirror image."""
    inside = block.read.intersect(region_of(volume))
    return volume.read(inside.start, inside.stop)


def crop_to_core(array: np.ndarray, block: Block) -> np.ndarray:
    """Drop what a step computed beyond the core because of its alignment."""
    expected = block.computed.shape
    assert array.shape[1:] == expected, f"step returned {array.shape[1:]} for a block of {expected}"
    return array[(slice(None), *block.core_in_computed.slices)]


def write_core(volume: Volume, block: Block, array: np.ndarray) -> str:
    """Write a block's core and return the hash of what was written.

    Parameters
    ----------
    array : ndarray, shape (C, z, y, x) of the core, in the volume's dtype
    """
    array = np.ascontiguousarray(array)
    volume.write(block.core.start, array)
    return hashlib.blake2b(array.data, digest_size=16).hexdigest()


def check_write_grid(core_shape: Zyx, volume: Volume) -> None:
    """Refuse blocks that would make two workers write into one chunk or shard.

    Two writers of one shard lose each other's voxels silently, so this is checked before any work starts.

    Raises
    ------
    ValueError
        If a core ends inside a chunk (other than at the volume's edge).
    """
    for core, unit, size in zip(core_shape, volume.write_shape, volume.shape, strict=True):
        if core % unit and core < size:
            suggestion = tuple(-(-c // u) * u for c, u in zip(core_shape, volume.write_shape, strict=True))
            raise ValueError(
                f"core_shape {core_shape} must be a multiple of the chunks (shards) {volume.write_shape} of "
                f"{volume.path}; use {suggestion} or create the output with other chunks"
            )


def find_nonfinite(array: np.ndarray, origin: Zyx) -> Zyx | None:
    """Return the position of the first NaN or infinity of a (C, Z, Y, X) array, or None."""
    if array.dtype.kind != "f" or np.isfinite(array.sum(dtype=np.float64)):
        return None
    bad = np.argwhere(~np.isfinite(array))
    if not len(bad):
        return None
    return add(origin, (int(bad[0, 1]), int(bad[0, 2]), int(bad[0, 3])))


def region_of(volume: Volume) -> Region:
    """The whole volume as a box."""
    return Region((0, 0, 0), volume.shape)
