"""The 3 x 3 (x 3) set in one pass over a block, equal to ``filters.py`` to float32 rounding.

All of it is made of three things per row of voxels: the difference of the left and right neighbour, and the two
smoothings [1, 2, 1] and [1, 1, 1].  Every voxel is read once from memory and every feature written once, which
is what limits the speed: the arithmetic hides behind the writing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from features import simd
from features.simd import WIDE

Vector = Any  # a simd.FloatVector inside compiled code

# Positions in ``channels``: the output channel of each filter, or -1 where it is not wanted.
(
    INTENSITY,
    SOBEL_X,
    SOBEL_Y,
    SOBEL_Z,
    SOBEL_MAGNITUDE,
    LAPLACE,
    PREWITT_X,
    PREWITT_Y,
    PREWITT_Z,
    PREWITT_MAGNITUDE,
) = range(10)


@njit(nogil=True, cache=True)
def _put(out: NDArray, channels: tuple[int, ...], name: int, voxels: int, at: int, value: Vector, count: int) -> None:
    if channels[name] >= 0:
        simd.store_at_most(out, channels[name] * voxels + at, value, count)


@njit(nogil=True, cache=True)
def _left_right(source: NDArray, at: int) -> tuple[Vector, Vector, Vector]:
    """Difference, [1, 2, 1] and [1, 1, 1] along x."""
    left, centre = simd.load_wide(source, at - 1), simd.load_wide(source, at)
    right = simd.load_wide(source, at + 1)
    three = left + centre + right
    return right - left, three + centre, three


@njit(nogil=True, cache=True)
def edges_2d(source: NDArray, core: tuple[int, int, int], voxels: int, out: NDArray, channels: tuple[int, ...]) -> None:
    """Compute the set on every slice.

    Parameters
    ----------
    source : flat array, any real dtype, shape (Z, Y + 2, X + 2) flattened
        The block; where X < 32, readable for 32 elements more.
    core : (z, y, x)
        Size of the output.
    voxels : int
        Distance between two channels of ``out``.
    out : flat float32
    channels : ten ints
        Channel of each filter, -1 where it is not wanted.
    """
    pitch = core[2] + 2
    for z in range(core[0]):
        for y in range(core[1]):
            row = (z * (core[1] + 2) + y + 1) * pitch + 1
            to = (z * core[1] + y) * core[2]
            for start in range(0, core[2], WIDE):
                # The last vector of a row is moved back to end with it, so that nothing behind is read.
                x = max(0, min(start, core[2] - WIDE))
                _edges_2d_at(source, row + x, pitch, out, to + x, voxels, channels, core[2] - x)


@njit(nogil=True, cache=True)
def _edges_2d_at(
    source: NDArray, at: int, pitch: int, out: NDArray, to: int, voxels: int, channels: tuple[int, ...], count: int
) -> None:
    above, here, below = (
        _left_right(source, at - pitch),
        _left_right(source, at),
        _left_right(source, at + pitch),
    )
    centre = simd.load_wide(source, at)
    prewitt_x = above[0] + here[0] + below[0]
    sobel_x = prewitt_x + here[0]
    sobel_y, prewitt_y = below[1] - above[1], below[2] - above[2]
    up_down = simd.load_wide(source, at - pitch) + simd.load_wide(source, at + pitch)
    laplace = up_down + here[2] - simd.splat_like(5.0, centre) * centre
    _put(out, channels, INTENSITY, voxels, to, centre, count)
    _put(out, channels, SOBEL_X, voxels, to, sobel_x, count)
    _put(out, channels, SOBEL_Y, voxels, to, sobel_y, count)
    sobel_length = simd.sqrt(simd.fma(sobel_x, sobel_x, sobel_y * sobel_y))
    _put(out, channels, SOBEL_MAGNITUDE, voxels, to, sobel_length, count)
    _put(out, channels, LAPLACE, voxels, to, laplace, count)
    _put(out, channels, PREWITT_X, voxels, to, prewitt_x, count)
    _put(out, channels, PREWITT_Y, voxels, to, prewitt_y, count)
    prewitt_length = simd.sqrt(simd.fma(prewitt_x, prewitt_x, prewitt_y * prewitt_y))
    _put(out, channels, PREWITT_MAGNITUDE, voxels, to, prewitt_length, count)


@njit(nogil=True, cache=True)
def edges_3d(source: NDArray, core: tuple[int, int, int], voxels: int, out: NDArray, channels: tuple[int, ...]) -> None:
    """Compute the set on the volume: :func:`edges_2d` for a block of shape (Z + 2, Y + 2, X + 2)."""
    pitch = core[2] + 2
    plane = (core[1] + 2) * pitch
    row_pitch = core[2] + WIDE
    # Six sums over z and x for each of the last three rows: y is then three loads away.
    sums = np.empty(18 * row_pitch, np.float32)
    for z in range(core[0]):
        for y in range(core[1] + 2):
            row = (z + 1) * plane + y * pitch + 1
            _sum_over_zx(source, row, plane, core[2], sums, y % 3 * 6 * row_pitch, row_pitch)
            if y >= 2:
                oldest, middle, newest = (y - 2) % 3, (y - 1) % 3, y % 3
                _edges_3d_row(
                    source, row - pitch, pitch, plane, core[2], sums, row_pitch,
                    (6 * oldest * row_pitch, 6 * middle * row_pitch, 6 * newest * row_pitch),
                    out, (z * core[1] + y - 2) * core[2], voxels, channels,
                )  # fmt: skip


@njit(nogil=True, cache=True)
def _sum_over_zx(source: NDArray, row: int, plane: int, n: int, sums: NDArray, to: int, pitch: int) -> None:
    """Six rows: difference along x smoothed along z (twice), smoothed along both, difference along z."""
    for start in range(0, n, WIDE):
        x = max(0, min(start, n - WIDE))
        before = _left_right(source, row + x - plane)
        here = _left_right(source, row + x)
        after = _left_right(source, row + x + plane)
        prewitt_x = before[0] + here[0] + after[0]
        simd.store(sums, to + x, prewitt_x + here[0])
        simd.store(sums, to + x + pitch, prewitt_x)
        simd.store(sums, to + x + 2 * pitch, before[1] + here[1] + here[1] + after[1])
        simd.store(sums, to + x + 3 * pitch, before[2] + here[2] + after[2])
        simd.store(sums, to + x + 4 * pitch, after[1] - before[1])
        simd.store(sums, to + x + 5 * pitch, after[2] - before[2])


@njit(nogil=True, cache=True)
def _edges_3d_row(
    source: NDArray,
    row: int,
    pitch: int,
    plane: int,
    n: int,
    sums: NDArray,
    step: int,
    slots: tuple[int, int, int],
    out: NDArray,
    to: int,
    voxels: int,
    channels: tuple[int, ...],
) -> None:
    above, here, below = slots
    for start in range(0, n, WIDE):
        x = max(0, min(start, n - WIDE))
        left, at, o = n - x, row + x, to + x
        sobel_x = _smooth_sobel(sums, above + x, here + x, below + x)
        prewitt_x = _smooth_prewitt(sums, above + x + step, here + x + step, below + x + step)
        y_2, y_3 = x + 2 * step, x + 3 * step
        sobel_y = simd.load_wide(sums, below + y_2) - simd.load_wide(sums, above + y_2)
        prewitt_y = simd.load_wide(sums, below + y_3) - simd.load_wide(sums, above + y_3)
        z_4, z_5 = x + 4 * step, x + 5 * step
        sobel_z = _smooth_sobel(sums, above + z_4, here + z_4, below + z_4)
        prewitt_z = _smooth_prewitt(sums, above + z_5, here + z_5, below + z_5)
        centre = simd.load_wide(source, at)
        neighbours = (
            (simd.load_wide(source, at - 1) + simd.load_wide(source, at + 1))
            + (simd.load_wide(source, at - pitch) + simd.load_wide(source, at + pitch))
            + (simd.load_wide(source, at - plane) + simd.load_wide(source, at + plane))
        )
        _put(out, channels, INTENSITY, voxels, o, centre, left)
        _put(out, channels, SOBEL_X, voxels, o, sobel_x, left)
        _put(out, channels, SOBEL_Y, voxels, o, sobel_y, left)
        _put(out, channels, SOBEL_Z, voxels, o, sobel_z, left)
        _put(out, channels, SOBEL_MAGNITUDE, voxels, o, _length(sobel_x, sobel_y, sobel_z), left)
        laplace = neighbours - simd.splat_like(6.0, centre) * centre
        _put(out, channels, LAPLACE, voxels, o, laplace, left)
        _put(out, channels, PREWITT_X, voxels, o, prewitt_x, left)
        _put(out, channels, PREWITT_Y, voxels, o, prewitt_y, left)
        _put(out, channels, PREWITT_Z, voxels, o, prewitt_z, left)
        _put(out, channels, PREWITT_MAGNITUDE, voxels, o, _length(prewitt_x, prewitt_y, prewitt_z), left)


@njit(nogil=True, cache=True)
def _smooth_sobel(sums: NDArray, above: int, here: int, below: int) -> Vector:
    middle = simd.load_wide(sums, here)
    return simd.load_wide(sums, above) + (middle + middle) + simd.load_wide(sums, below)


@njit(nogil=True, cache=True)
def _smooth_prewitt(sums: NDArray, above: int, here: int, below: int) -> Vector:
    return simd.load_wide(sums, above) + simd.load_wide(sums, here) + simd.load_wide(sums, below)


@njit(nogil=True, cache=True)
def _length(x: Vector, y: Vector, z: Vector) -> Vector:
    return simd.sqrt(simd.fma(x, x, simd.fma(y, y, z * z)))
