"""Which scales a volume is stored at: each level halves the finer one along the axes where voxels are small."""

from __future__ import annotations

import math
from dataclasses import dataclass

from voxclf.geometry import UNIT, VoxelSize, Zyx


@dataclass(frozen=True)
class Level:
    """One scale of a pyramid; level 0 is the volume itself.

    Parameters
    ----------
    index : int
        0 is the finest.
    factors : (z, y, x)
        Voxels of the next finer level per voxel of this one, each 1 or 2.
    shape : (Z, Y, X)
        Voxels of this level; a last odd voxel of the finer level becomes one voxel here.
    voxel_size_nm : (z, y, x)
        Size of this level's voxels.
    """

    index: int
    factors: Zyx
    shape: Zyx
    voxel_size_nm: VoxelSize


def pyramid_levels(shape: Zyx, voxel_size_nm: VoxelSize, chunk_shape: Zyx) -> tuple[Level, ...]:
    """Plan the levels of a volume, until one chunk holds the coarsest.

    Only the axes whose voxels are within a factor sqrt(2) of the shortest are halved, so a volume of thick
    sections shrinks in the plane first, until its voxels are nearly cubes.

    Examples
    --------
    >>> for level in pyramid_levels((20, 1024, 1024), (50.0, 4.6, 4.6), (20, 256, 256)):
    ...     print(level.factors, level.shape, level.voxel_size_nm)
    (1, 1, 1) (20, 1024, 1024) (50.0, 4.6, 4.6)
    (1, 2, 2) (20, 512, 512) (50.0, 9.2, 9.2)
    (1, 2, 2) (20, 256, 256) (50.0, 18.4, 18.4)
    """
    levels = [Level(0, UNIT, shape, voxel_size_nm)]
    while any(n > c for n, c in zip(levels[-1].shape, chunk_shape, strict=True)):
        levels.append(_next_level(levels[-1]))
    return tuple(levels)


def _next_level(finer: Level) -> Level:
    divisible = [axis for axis in range(3) if finer.shape[axis] > 1]
    shortest = min(finer.voxel_size_nm[axis] for axis in divisible)
    factors = [1, 1, 1]
    for axis in divisible:
        if finer.voxel_size_nm[axis] <= math.sqrt(2) * shortest:
            factors[axis] = 2
    fz, fy, fx = factors
    (z, y, x), (dz, dy, dx) = finer.shape, finer.voxel_size_nm
    shape = (-(-z // fz), -(-y // fy), -(-x // fx))
    return Level(finer.index + 1, (fz, fy, fx), shape, (dz * fz, dy * fy, dx * fx))
