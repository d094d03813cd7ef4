"""The compiled multi-scale set in 3D, equal to ``filters.py`` to float32 rounding.

Strategy.  The filters of one sigma are computed tile by tile, so that what lies between the passes stays in the
processor's cache.  For a tile, with margins for the taps of the passes that follow:

1. along x, from every row of the block: smoothed, first and second derivative (3 rows);
2. along y, from those: the six combinations of orders (0,0) (0,1) (1,0) (0,2) (1,1) (2,0) in (y, x);
3. along z: first derivatives on the tile plus the outer margin, kept for the structure tensor; on the tile
   itself also the Gaussian and the second derivatives, which go straight on to Laplacian, gradient magnitude
   and Hessian eigenvalues without being stored;
4. the products of first derivatives, smoothed along x, y, z, and their eigenvalues;
5. the narrower Gaussian of the difference of Gaussians, along x, y, z.

Every kernel is symmetric or antisymmetric, so two taps share one multiplication, and the sum runs from the
centre outwards: the same operations for every voxel, whatever the block.  Passes along y and z go down columns
of one vector's width, whose rows stay in the first-level cache: 30 % less time at a radius of 35 than row by
row.  All arrays are flat and float32; rows of scratch are ``pitch`` apart, a multiple of the vector width.
Lanes beyond the end of a row hold garbage that is computed and never stored to the output.

Kernels are single-threaded and release the GIL: parallelism is over blocks.  ``slice_kernels.py`` has the same
per slice, ``edge_kernels.py`` the 3 x 3 (x 3) set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from features import eigenvalues, simd
from features.simd import WIDE

Vector = Any  # a simd.FloatVector inside compiled code
Halves = tuple[NDArray[np.float32], ...]

LINE = 16  # floats in a cache line of 64 bytes, and in an AVX-512 register
# Readable floats that must lie before and after a block, because whole vectors are loaded.
MARGIN = 2 * WIDE

# Positions in ``channels``: the first output channel of each filter, or -1 where it is not wanted.
GAUSSIAN, LAPLACIAN, GRADIENT, DIFFERENCE, TENSOR, HESSIAN = range(6)


class Tile(NamedTuple):
    """What is computed at a time, and how its scratch is laid out."""

    size: tuple[int, ...]  # of the output, per filtered axis
    margin: tuple[int, ...]  # around it, for the smoothing of the structure tensor
    lead: int  # the output starts here in every scratch row, on a cache line
    pitch: int  # distance of rows with the margin
    core_pitch: int  # distance of rows without it


class Target(NamedTuple):
    """Where a tile's features go."""

    values: NDArray[np.float32]  # flat, every channel one C-contiguous core
    at: int  # first voxel of the tile in channel 0
    core: tuple[int, int, int]
    voxels: int  # distance of channels


# --- one row ---


@njit(nogil=True, cache=True)
def even(source: NDArray, at: int, stride: int, half: NDArray) -> Vector:
    """Symmetric correlation at 32 neighbouring voxels; ``half[k]`` weighs the taps at -k and +k."""
    centre = simd.load_wide(source, at)
    total = centre * simd.splat_like(half[0], centre)
    for k in range(1, len(half)):
        pair = simd.load_wide(source, at + k * stride) + simd.load_wide(source, at - k * stride)
        total = simd.fma(simd.splat_like(half[k], pair), pair, total)
    return total


@njit(nogil=True, cache=True)
def odd(source: NDArray, at: int, stride: int, half: NDArray) -> Vector:
    """Antisymmetric correlation at 32 neighbouring voxels; ``half[k]`` weighs the tap at +k."""
    pair = simd.load_wide(source, at + stride) - simd.load_wide(source, at - stride)
    total = pair * simd.splat_like(half[1], pair)
    for k in range(2, len(half)):
        pair = simd.load_wide(source, at + k * stride) - simd.load_wide(source, at - k * stride)
        total = simd.fma(simd.splat_like(half[k], pair), pair, total)
    return total


@njit(nogil=True, cache=True)
def even_row(source: NDArray, at: int, stride: int, half: NDArray, n: int, target: NDArray, to: int) -> None:
    """Write a row of :func:`even`."""
    for x in range(0, n, WIDE):
        simd.store(target, to + x, even(source, at + x, stride, half))


@njit(nogil=True, cache=True)
def even_column(
    source: NDArray, at: int, stride: int, half: NDArray, n: int, target: NDArray, to: int, step: int
) -> None:
    """Write :func:`even` for n places ``stride`` apart, 32 voxels wide, to places ``step`` apart.

    Going down a narrow column, all rows that the taps reach stay in the first-level cache.
    """
    for i in range(n):
        simd.store(target, to + i * step, even(source, at + i * stride, stride, half))


@njit(nogil=True, cache=True)
def odd_column(
    source: NDArray, at: int, stride: int, half: NDArray, n: int, target: NDArray, to: int, step: int
) -> None:
    """Write :func:`odd`, as :func:`even_column` does."""
    for i in range(n):
        simd.store(target, to + i * step, odd(source, at + i * stride, stride, half))


@njit(nogil=True, cache=True)
def derivative_rows(source: NDArray, at: int, halves: NDArray, n: int, target: NDArray, to: int, step: int) -> None:
    """Write orders 0, 1 and 2 along x, which share every load, as three rows ``step`` apart."""
    for x in range(0, n, WIDE):
        centre = simd.load_wide(source, at + x)
        smooth = centre * simd.splat_like(halves[0, 0], centre)
        second = centre * simd.splat_like(halves[2, 0], centre)
        first = simd.splat_like(0.0, centre)
        for k in range(1, halves.shape[1]):
            after = simd.load_wide(source, at + x + k)
            before = simd.load_wide(source, at + x - k)
            pair = after + before
            smooth = simd.fma(simd.splat_like(halves[0, k], pair), pair, smooth)
            second = simd.fma(simd.splat_like(halves[2, k], pair), pair, second)
            first = simd.fma(simd.splat_like(halves[1, k], pair), after - before, first)
        simd.store(target, to + x, smooth)
        simd.store(target, to + x + step, first)
        simd.store(target, to + x + 2 * step, second)


# --- scratch ---


@njit(nogil=True, cache=True)
def round_up(n: int, multiple: int) -> int:
    """Smallest multiple that is not less than n."""
    return (n + multiple - 1) // multiple * multiple


@njit(nogil=True, cache=True)
def part_size(n: int) -> int:
    """Length of a part of the workspace that holds n floats, with a readable margin behind them."""
    return round_up(n, LINE) + MARGIN


@njit(nogil=True, cache=True)
def scratch_sizes_3d(
    core: tuple[int, int, int], derivatives: Halves, margin: tuple[int, int, int], shape: tuple[int, int, int]
) -> tuple[int, int, int, int, int]:
    """Floats for the planes of passes 1 and 2, what they make, the gradient, the narrow Gaussian, and rows."""
    tz, ty, tx = min(shape[0], core[0]), min(shape[1], core[1]), min(shape[2], core[2])
    nz, ny = tz + 2 * margin[0], ty + 2 * margin[1]
    rz, ry = derivatives[0].shape[1] - 1, derivatives[1].shape[1] - 1
    pitch = round_up(round_up(margin[2], LINE) + tx + margin[2], WIDE)
    return (
        part_size(6 * (ny + 2 * ry) * pitch),
        part_size(6 * (nz + 2 * rz) * ny * pitch),
        part_size(3 * nz * ny * pitch),
        part_size(tz * ty * round_up(tx, WIDE)),
        part_size(7 * pitch),
    )


# --- the set ---


@njit(nogil=True, cache=True)
def multiscale_3d(
    source: NDArray,
    origin: int,
    pitches: tuple[int, int],
    core: tuple[int, int, int],
    derivatives: Halves,
    outer: Halves,
    inner: Halves,
    tile_shape: tuple[int, int, int],
    out: NDArray,
    voxels: int,
    channels: tuple[int, ...],
    scratch: NDArray,
) -> None:
    """Compute all filters of one sigma on the core of a block.

    Parameters
    ----------
    source : flat float32
        The block, with ``MARGIN`` readable floats before and after it.
    origin : int
        Offset of the first voxel of the core.
    pitches : (z, y)
        Distance in ``source`` between neighbouring slices and rows.
    core : (z, y, x)
        Size of the output.
    derivatives : three arrays, shape (3, r + 1)
        For z, y, x: the halves k = 0 ... r of the kernels of order 0, 1, 2, scale normalised.
    outer, inner : three arrays, shape (r + 1,)
        The same for the smoothing of the structure tensor and for the narrower of the two Gaussians.
    tile_shape : (z, y, x)
        How much of the core is computed at a time; changes speed, not values.
    out : flat float32
        Every channel is one C-contiguous core.
    voxels : int
        Distance between two channels of ``out``.
    channels : six ints
        First channel of each filter, -1 where it is not wanted.
    scratch : flat float32, aligned to a cache line
        As long as :func:`scratch_sizes_3d` add up to.
    """
    wants_tensor = channels[TENSOR] >= 0
    margin = (len(outer[0]) - 1, len(outer[1]) - 1, len(outer[2]) - 1)
    full = (min(tile_shape[0], core[0]), min(tile_shape[1], core[1]), min(tile_shape[2], core[2]))
    lead = round_up(margin[2], LINE)
    pitch, core_pitch = round_up(lead + full[2] + margin[2], WIDE), round_up(full[2], WIDE)
    sizes = scratch_sizes_3d(core, derivatives, margin, tile_shape)
    plane, scratch = scratch[: sizes[0]], scratch[sizes[0] :]
    mixed, scratch = scratch[: sizes[1]], scratch[sizes[1] :]
    gradient, scratch = scratch[: sizes[2]], scratch[sizes[2] :]
    narrow, rows = scratch[: sizes[3]], scratch[sizes[3] :]
    for z in range(0, core[0], full[0]):
        for y in range(0, core[1], full[1]):
            for x in range(0, core[2], full[2]):
                size = (min(full[0], core[0] - z), min(full[1], core[1] - y), min(full[2], core[2] - x))
                tile = Tile(size, margin, lead, pitch, core_pitch)
                target = Target(out, (z * core[1] + y) * core[2] + x, core, voxels)
                at = origin + z * pitches[0] + y * pitches[1] + x
                if channels[DIFFERENCE] >= 0:
                    _smooth_tile(source, at, pitches, inner, tile, plane, mixed, narrow)
                _mix_orders(source, at, pitches, derivatives, tile, plane, mixed)
                _gradient_tile(mixed, derivatives[0], tile, gradient)
                _pointwise_tile(mixed, gradient, narrow, derivatives[0], tile, rows, target, channels)
                if wants_tensor:
                    _tensor_tile(gradient, outer, tile, plane, mixed, rows, target, channels[TENSOR])


@njit(nogil=True, cache=True)
def _mix_orders(
    source: NDArray,
    at: int,
    pitches: tuple[int, int],
    derivatives: Halves,
    tile: Tile,
    plane: NDArray,
    mixed: NDArray,
) -> None:
    """Passes 1 and 2.

    ``mixed`` is laid out (y, 6, z, x): the taps of pass 3 are then neighbouring rows.  The six are, as orders
    in (y, x): 0 (0,0), 1 (0,1), 2 (1,0), 3 (0,2), 4 (1,1), 5 (2,0).
    """
    halves_z, halves_y, halves_x = derivatives
    rz, ry = halves_z.shape[1] - 1, halves_y.shape[1] - 1
    ez, ey, ex = tile.margin
    tz, ty, tx = tile.size
    nz, ny, nx = tz + 2 * (ez + rz), ty + 2 * ey, tile.lead + tx + ex
    pitch, step, slab = tile.pitch, (ny + 2 * ry) * tile.pitch, nz * tile.pitch
    for z in range(nz):
        for y in range(ny + 2 * ry):
            row = at + (z - ez - rz) * pitches[0] + (y - ey - ry) * pitches[1] - tile.lead
            derivative_rows(source, row, halves_x, nx, plane, y * pitch, step)
        for x in range(0, nx, WIDE):
            p, q = ry * pitch + x, z * pitch + x
            even_column(plane, p, pitch, halves_y[0], ny, mixed, q, 6 * slab)
            even_column(plane, p + step, pitch, halves_y[0], ny, mixed, q + slab, 6 * slab)
            odd_column(plane, p, pitch, halves_y[1], ny, mixed, q + 2 * slab, 6 * slab)
            # Second derivatives are wanted on the tile alone, not on the margin of the structure tensor.
            if ez <= z < nz - ez:
                p, q = p + ey * pitch, q + 6 * ey * slab
                even_column(plane, p + 2 * step, pitch, halves_y[0], ty, mixed, q + 3 * slab, 6 * slab)
                odd_column(plane, p + step, pitch, halves_y[1], ty, mixed, q + 4 * slab, 6 * slab)
                even_column(plane, p, pitch, halves_y[2], ty, mixed, q + 5 * slab, 6 * slab)


@njit(nogil=True, cache=True)
def _gradient_tile(mixed: NDArray, halves_z: NDArray, tile: Tile, gradient: NDArray) -> None:
    """Pass 3 with the margin: first derivatives along z, y and x, laid out (3, z, y, x)."""
    rz, pitch = halves_z.shape[1] - 1, tile.pitch
    nz, ny = tile.size[0] + 2 * tile.margin[0], tile.size[1] + 2 * tile.margin[1]
    nx = tile.lead + tile.size[2] + tile.margin[2]
    slab, step = (nz + 2 * rz) * pitch, nz * ny * pitch
    for y in range(ny):
        for x in range(0, nx, WIDE):
            p, q = 6 * y * slab + rz * pitch + x, y * pitch + x
            odd_column(mixed, p, pitch, halves_z[1], nz, gradient, q, ny * pitch)
            even_column(mixed, p + 2 * slab, pitch, halves_z[0], nz, gradient, q + step, ny * pitch)
            even_column(mixed, p + slab, pitch, halves_z[0], nz, gradient, q + 2 * step, ny * pitch)


@njit(nogil=True, cache=True)
def _pointwise_tile(
    mixed: NDArray,
    gradient: NDArray,
    narrow: NDArray,
    halves_z: NDArray,
    tile: Tile,
    rows: NDArray,
    target: Target,
    channels: tuple[int, ...],
) -> None:
    """Pass 3 on the tile, and all that needs no neighbours any more."""
    rz, pitch = halves_z.shape[1] - 1, tile.pitch
    ez, ey, _ = tile.margin
    nz, ny = tile.size[0] + 2 * ez, tile.size[1] + 2 * ey
    slab, step = (nz + 2 * rz) * pitch, nz * ny * pitch
    for y in range(tile.size[1]):
        for x in range(0, tile.size[2], WIDE):
            left = tile.size[2] - x
            for z in range(tile.size[0]):
                p = 6 * (y + ey) * slab + (z + ez + rz) * pitch + tile.lead + x
                g = ((z + ez) * ny + y + ey) * pitch + tile.lead + x
                to = target.at + (z * target.core[1] + y) * target.core[2] + x
                smooth = even(mixed, p, pitch, halves_z[0])
                trace = _hessian(mixed, p, pitch, slab, halves_z, rows)
                inner = simd.load_wide(narrow, (z * tile.size[1] + y) * tile.core_pitch + x)
                put(target, channels[GAUSSIAN], to, smooth, left)
                put(target, channels[LAPLACIAN], to, trace, left)
                put(target, channels[GRADIENT], to, _length(gradient, g, step), left)
                put(target, channels[DIFFERENCE], to, smooth - inner, left)
                if channels[HESSIAN] >= 0:
                    to += channels[HESSIAN] * target.voxels
                    eigenvalues.eigenvalue_rows_3(rows, WIDE, min(WIDE, left), target.values, to, target.voxels)


@njit(nogil=True, cache=True)
def put(target: Target, channel: int, at: int, value: Vector, count: int) -> None:
    """Store the first ``count`` lanes to a channel, if that is wanted."""
    if channel >= 0:
        simd.store_at_most(target.values, channel * target.voxels + at, value, count)


@njit(nogil=True, cache=True)
def _hessian(mixed: NDArray, at: int, pitch: int, slab: int, halves_z: NDArray, rows: NDArray) -> Vector:
    """Write second derivatives to rows xx, yy, zz, xy, xz, yz; return the sum of the first three."""
    xx = even(mixed, at + 3 * slab, pitch, halves_z[0])
    yy = even(mixed, at + 5 * slab, pitch, halves_z[0])
    zz = even(mixed, at, pitch, halves_z[2])
    simd.store(rows, 0, xx)
    simd.store(rows, WIDE, yy)
    simd.store(rows, 2 * WIDE, zz)
    simd.store(rows, 3 * WIDE, even(mixed, at + 4 * slab, pitch, halves_z[0]))
    simd.store(rows, 4 * WIDE, odd(mixed, at + slab, pitch, halves_z[1]))
    simd.store(rows, 5 * WIDE, odd(mixed, at + 2 * slab, pitch, halves_z[1]))
    return xx + yy + zz


@njit(nogil=True, cache=True)
def _length(gradient: NDArray, at: int, step: int) -> Vector:
    dz, dy = simd.load_wide(gradient, at), simd.load_wide(gradient, at + step)
    dx = simd.load_wide(gradient, at + 2 * step)
    return simd.sqrt(simd.fma(dx, dx, simd.fma(dy, dy, dz * dz)))


@njit(nogil=True, cache=True)
def _product_rows(gradient: NDArray, at: int, step: int, n: int, rows: NDArray, pitch: int) -> None:
    """Write the six products of first derivatives as rows xx, yy, zz, xy, xz, yz."""
    for x in range(0, n, WIDE):
        dz, dy = simd.load_wide(gradient, at + x), simd.load_wide(gradient, at + x + step)
        dx = simd.load_wide(gradient, at + x + 2 * step)
        simd.store(rows, x, dx * dx)
        simd.store(rows, x + pitch, dy * dy)
        simd.store(rows, x + 2 * pitch, dz * dz)
        simd.store(rows, x + 3 * pitch, dx * dy)
        simd.store(rows, x + 4 * pitch, dx * dz)
        simd.store(rows, x + 5 * pitch, dy * dz)


@njit(nogil=True, cache=True)
def _tensor_tile(
    gradient: NDArray,
    outer: Halves,
    tile: Tile,
    plane: NDArray,
    mixed: NDArray,
    rows: NDArray,
    target: Target,
    channel: int,
) -> None:
    """Pass 4: the structure tensor, smoothed, and its eigenvalues."""
    ez, ey, ex = tile.margin
    tz, ty, tx = tile.size
    nz, ny, pitch, core_pitch = tz + 2 * ez, ty + 2 * ey, tile.pitch, tile.core_pitch
    step, slab = ny * core_pitch, nz * core_pitch
    for z in range(nz):
        for y in range(ny):
            _product_rows(gradient, (z * ny + y) * pitch, nz * ny * pitch, tile.lead + tx + ex, rows, pitch)
            for i in range(6):
                even_row(rows, i * pitch + tile.lead, 1, outer[2], tx, plane, i * step + y * core_pitch)
        for i in range(6):
            for x in range(0, tx, WIDE):
                p, q = i * step + ey * core_pitch + x, i * slab + z * core_pitch + x
                even_column(plane, p, core_pitch, outer[1], ty, mixed, q, 6 * slab)
    for y in range(ty):
        for x in range(0, tx, WIDE):
            for z in range(tz):
                for i in range(6):
                    p = (6 * y + i) * slab + (z + ez) * core_pitch + x
                    simd.store(rows, i * WIDE, even(mixed, p, core_pitch, outer[0]))
                to = target.at + (z * target.core[1] + y) * target.core[2] + x + channel * target.voxels
                eigenvalues.eigenvalue_rows_3(rows, WIDE, min(WIDE, tx - x), target.values, to, target.voxels)


@njit(nogil=True, cache=True)
def _smooth_tile(
    source: NDArray,
    at: int,
    pitches: tuple[int, int],
    inner: Halves,
    tile: Tile,
    plane: NDArray,
    mixed: NDArray,
    narrow: NDArray,
) -> None:
    """Pass 5, computed first: a Gaussian on the tile, laid out (z, y, x)."""
    tz, ty, tx = tile.size
    rz, ry, pitch = len(inner[0]) - 1, len(inner[1]) - 1, tile.core_pitch
    slab = (tz + 2 * rz) * pitch
    for z in range(tz + 2 * rz):
        for y in range(ty + 2 * ry):
            row = at + (z - rz) * pitches[0] + (y - ry) * pitches[1]
            even_row(source, row, 1, inner[2], tx, plane, y * pitch)
        for x in range(0, tx, WIDE):
            even_column(plane, ry * pitch + x, pitch, inner[1], ty, mixed, z * pitch + x, slab)
    for y in range(ty):
        for x in range(0, tx, WIDE):
            p, q = y * slab + rz * pitch + x, y * pitch + x
            even_column(mixed, p, pitch, inner[0], tz, narrow, q, ty * pitch)
