"""The compiled multi-scale set per slice: the passes of ``kernels.py`` without those along z."""

from __future__ import annotations

from numba import njit
from numpy.typing import NDArray

from features import eigenvalues, simd
from features.kernels import (
    DIFFERENCE,
    GAUSSIAN,
    GRADIENT,
    HESSIAN,
    LAPLACIAN,
    LINE,
    TENSOR,
    Halves,
    Target,
    Tile,
    derivative_rows,
    even,
    even_column,
    even_row,
    odd,
    odd_column,
    part_size,
    put,
    round_up,
)
from features.simd import WIDE

# Rows of 512 and their neighbours in y fit in the second-level cache up to a sigma of about 10 voxels.
TILE_SHAPE = (64, 512)


@njit(nogil=True, cache=True)
def scratch_sizes_2d(
    core: tuple[int, int, int], derivatives: Halves, margin: tuple[int, int], shape: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Floats for the pass along x, the gradient, the narrow Gaussian, and rows."""
    ty, tx = min(shape[0], core[1]), min(shape[1], core[2])
    ny, ry = ty + 2 * margin[0], derivatives[0].shape[1] - 1
    pitch = round_up(round_up(margin[1], LINE) + tx + margin[1], WIDE)
    return (
        part_size(3 * (ny + 2 * ry) * pitch),
        part_size(2 * ny * pitch),
        part_size(ty * round_up(tx, WIDE)),
        part_size(4 * pitch),
    )


@njit(nogil=True, cache=True)
def multiscale_2d(
    source: NDArray,
    origin: int,
    pitches: tuple[int, int],
    core: tuple[int, int, int],
    derivatives: Halves,
    outer: Halves,
    inner: Halves,
    tile_shape: tuple[int, int],
    out: NDArray,
    voxels: int,
    channels: tuple[int, ...],
    scratch: NDArray,
) -> None:
    """Compute all filters of one sigma on every slice of the core.

    Parameters are those of :func:`features.kernels.multiscale_3d`; ``derivatives``, ``outer``, ``inner`` and
    ``tile_shape`` have an entry for y and one for x.
    """
    wants_tensor = channels[TENSOR] >= 0
    margin = (len(outer[0]) - 1, len(outer[1]) - 1)
    full = (min(tile_shape[0], core[1]), min(tile_shape[1], core[2]))
    lead = round_up(margin[1], LINE)
    pitch, core_pitch = round_up(lead + full[1] + margin[1], WIDE), round_up(full[1], WIDE)
    sizes = scratch_sizes_2d(core, derivatives, margin, tile_shape)
    plane, scratch = scratch[: sizes[0]], scratch[sizes[0] :]
    gradient, scratch = scratch[: sizes[1]], scratch[sizes[1] :]
    narrow, rows = scratch[: sizes[2]], scratch[sizes[2] :]
    for z in range(core[0]):
        for y in range(0, core[1], full[0]):
            for x in range(0, core[2], full[1]):
                size = (min(full[0], core[1] - y), min(full[1], core[2] - x))
                tile = Tile(size, margin, lead, pitch, core_pitch)
                target = Target(out, (z * core[1] + y) * core[2] + x, core, voxels)
                at = origin + z * pitches[0] + y * pitches[1] + x
                if channels[DIFFERENCE] >= 0:
                    _smooth_tile(source, at, pitches[1], inner, tile, plane, narrow)
                _gradient_tile(source, at, pitches[1], derivatives, tile, plane, gradient)
                _pointwise_tile(plane, gradient, narrow, derivatives[0], tile, rows, target, channels)
                if wants_tensor:
                    _tensor_tile(gradient, outer, tile, plane, rows, target, channels[TENSOR])


@njit(nogil=True, cache=True)
def _smooth_tile(
    source: NDArray, at: int, source_pitch: int, inner: Halves, tile: Tile, plane: NDArray, narrow: NDArray
) -> None:
    """Write the narrower Gaussian, laid out (y, x)."""
    ry, pitch = len(inner[0]) - 1, tile.core_pitch
    for y in range(tile.size[0] + 2 * ry):
        even_row(source, at + (y - ry) * source_pitch, 1, inner[1], tile.size[1], plane, y * pitch)
    for x in range(0, tile.size[1], WIDE):
        even_column(plane, ry * pitch + x, pitch, inner[0], tile.size[0], narrow, x, pitch)


@njit(nogil=True, cache=True)
def _gradient_tile(
    source: NDArray,
    at: int,
    source_pitch: int,
    derivatives: Halves,
    tile: Tile,
    plane: NDArray,
    gradient: NDArray,
) -> None:
    """Write orders 0, 1, 2 along x (3, y, x), and from them first derivatives along y and x (2, y, x)."""
    halves_y, halves_x = derivatives
    ry, pitch = halves_y.shape[1] - 1, tile.pitch
    ny, nx = tile.size[0] + 2 * tile.margin[0], tile.lead + tile.size[1] + tile.margin[1]
    step = (ny + 2 * ry) * pitch
    for y in range(ny + 2 * ry):
        row = at + (y - tile.margin[0] - ry) * source_pitch - tile.lead
        derivative_rows(source, row, halves_x, nx, plane, y * pitch, step)
    for x in range(0, nx, WIDE):
        p = ry * pitch + x
        odd_column(plane, p, pitch, halves_y[1], ny, gradient, x, pitch)
        even_column(plane, p + step, pitch, halves_y[0], ny, gradient, x + ny * pitch, pitch)


@njit(nogil=True, cache=True)
def _pointwise_tile(
    plane: NDArray,
    gradient: NDArray,
    narrow: NDArray,
    halves_y: NDArray,
    tile: Tile,
    rows: NDArray,
    target: Target,
    channels: tuple[int, ...],
) -> None:
    """Second derivatives along y, and all that needs no neighbours any more."""
    ry, pitch, ey = halves_y.shape[1] - 1, tile.pitch, tile.margin[0]
    ny = tile.size[0] + 2 * ey
    step = (ny + 2 * ry) * pitch
    for x in range(0, tile.size[1], WIDE):
        left = tile.size[1] - x
        for y in range(tile.size[0]):
            p, g = (y + ey + ry) * pitch + tile.lead + x, (y + ey) * pitch + tile.lead + x
            to = target.at + y * target.core[2] + x
            smooth = even(plane, p, pitch, halves_y[0])
            xx = even(plane, p + 2 * step, pitch, halves_y[0])
            yy = even(plane, p, pitch, halves_y[2])
            simd.store(rows, 0, xx)
            simd.store(rows, WIDE, yy)
            simd.store(rows, 2 * WIDE, odd(plane, p + step, pitch, halves_y[1]))
            dy, dx = simd.load_wide(gradient, g), simd.load_wide(gradient, g + ny * pitch)
            inner = simd.load_wide(narrow, y * tile.core_pitch + x)
            put(target, channels[GAUSSIAN], to, smooth, left)
            put(target, channels[LAPLACIAN], to, xx + yy, left)
            put(target, channels[GRADIENT], to, simd.sqrt(simd.fma(dx, dx, dy * dy)), left)
            put(target, channels[DIFFERENCE], to, smooth - inner, left)
            if channels[HESSIAN] >= 0:
                to += channels[HESSIAN] * target.voxels
                eigenvalues.eigenvalue_rows_2(rows, WIDE, min(WIDE, left), target.values, to, target.voxels)


@njit(nogil=True, cache=True)
def _product_rows(gradient: NDArray, at: int, step: int, n: int, rows: NDArray, pitch: int) -> None:
    """Write the three products of first derivatives as rows xx, yy, xy."""
    for x in range(0, n, WIDE):
        dy, dx = simd.load_wide(gradient, at + x), simd.load_wide(gradient, at + x + step)
        simd.store(rows, x, dx * dx)
        simd.store(rows, x + pitch, dy * dy)
        simd.store(rows, x + 2 * pitch, dx * dy)


@njit(nogil=True, cache=True)
def _tensor_tile(
    gradient: NDArray,
    outer: Halves,
    tile: Tile,
    plane: NDArray,
    rows: NDArray,
    target: Target,
    channel: int,
) -> None:
    """The structure tensor, smoothed along x and y, and its eigenvalues."""
    ey, ex = tile.margin
    ty, tx = tile.size
    ny, pitch, core_pitch = ty + 2 * ey, tile.pitch, tile.core_pitch
    step = ny * core_pitch
    for y in range(ny):
        _product_rows(gradient, y * pitch, ny * pitch, tile.lead + tx + ex, rows, pitch)
        for i in range(3):
            even_row(rows, i * pitch + tile.lead, 1, outer[1], tx, plane, i * step + y * core_pitch)
    for x in range(0, tx, WIDE):
        for y in range(ty):
            for i in range(3):
                p = i * step + (y + ey) * core_pitch + x
                simd.store(rows, i * WIDE, even(plane, p, core_pitch, outer[0]))
            to = target.at + y * target.core[2] + x + channel * target.voxels
            eigenvalues.eigenvalue_rows_2(rows, WIDE, min(WIDE, tx - x), target.values, to, target.voxels)
