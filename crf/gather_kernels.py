"""The first half of the bilateral filter on the CPU: gather voxels onto the grid and blur it.

Strategy: per plane, whole rows of voxels are multiplied by a bump W_b and summed over Y into the four node rows
around them (`gather`); a finished node row is summed along X and added to the grid at the four nodes around
its plane. `read_back` is the transpose. Along X the voxels are stored phase by phase (`compiled.PhaseLayout`), so
that all of this is arithmetic on contiguous rows, sixteen voxels at a time (`simd.py`). Some terms are handled
per pass over a plane, as many as keep their running sums in the cache.

Shapes: belief (Z, C, Y, X); levels (channels, Z, Y, X); taps (pitch, 4), or (1, 1) for an axis without a grid;
grid (Nz, Ny, L), where a row holds, tile by tile along X, n_terms · C rows of nodes.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from crf.simd import LANES, add, add_product, load, multiply, splat, store
from crf.voxel_kernels import COMPILE, UNSIGNED, Float, filter_columns, row_stride, weighted_sum

TILE = 256
"""Voxels along X handled at once, rounded down to whole cells."""

CACHE_BYTES = 100_000
"""Room for the running sums of the terms handled together, a small part of a usual second-level cache (measured)."""


@njit(**COMPILE)
def terms_at_once(n_terms: int, n_channels: int, stride: int) -> int:
    """How many terms' running sums (four rows of nodes per channel) fit into `CACHE_BYTES`."""
    return max(1, min(n_terms, CACHE_BYTES // (16 * n_channels * stride)))


@njit(**COMPILE)
def load_bumps(
    levels: NDArray,
    z: int,
    y: int,
    x0: int,
    n_x: int,
    tables: Float,
    terms: NDArray,
    first_term: int,
    n_terms: int,
    n_rows: int,
    weights: Float,
    stride: int,
) -> None:
    """weights[b, j, x] = W_b(I) for the next few rows of voxels, the product over image channels."""
    u0 = UNSIGNED(x0)
    for b in range(n_terms):
        table = tables[0, terms[first_term + b, 0]]
        for j in range(n_rows):
            start = UNSIGNED((b * 4 + j) * stride)
            for x in range(UNSIGNED(n_x)):
                weights[start + x] = table[levels[0, z, y + j, u0 + x]]
    for channel in range(1, levels.shape[0]):
        for b in range(n_terms):
            table = tables[channel, terms[first_term + b, channel]]
            for j in range(n_rows):
                start = UNSIGNED((b * 4 + j) * stride)
                for x in range(UNSIGNED(n_x)):
                    weights[start + x] *= table[levels[channel, z, y + j, u0 + x]]


# ------------------------------------------------------------------------------------------------------ gather


@njit(**COMPILE)
def _load_beliefs(
    belief: Float, scale: Float, z: int, y: int, x0: int, n_x: int, n_rows: int, rows: Float, stride: int
) -> None:
    u0 = UNSIGNED(x0)
    for c in range(belief.shape[1]):
        for j in range(n_rows):
            start = UNSIGNED((c * 4 + j) * stride)
            for x in range(UNSIGNED(n_x)):
                rows[start + x] = belief[z, c, y + j, u0 + x] * scale[z, y + j, u0 + x]


@njit(**COMPILE)
def _add_4_rows(
    w: Float,
    q: Float,
    taps: Float,
    j: int,
    cell: int,
    n_terms: int,
    n_channels: int,
    n_x: int,
    stride: int,
    sums: Float,
) -> None:
    """Add four rows w·q, each times its four window weights, to the running sums of four nodes."""
    a0, a1, a2, a3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    b0, b1, b2, b3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    c0, c1, c2, c3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    d0, d1, d2, d3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    slot = n_terms * n_channels * stride
    n0, n1, n2, n3 = (cell % 4) * slot, ((cell + 1) % 4) * slot, ((cell + 2) % 4) * slot, ((cell + 3) % 4) * slot
    for b in range(n_terms):
        for x in range(0, n_x, LANES):
            first = b * 4 * stride + x
            w0, w1 = load(w, first), load(w, first + stride)
            w2, w3 = load(w, first + 2 * stride), load(w, first + 3 * stride)
            for c in range(n_channels):
                first = c * 4 * stride + x
                p0, p1 = multiply(w0, load(q, first)), multiply(w1, load(q, first + stride))
                p2, p3 = multiply(w2, load(q, first + 2 * stride)), multiply(w3, load(q, first + 3 * stride))
                at = (b * n_channels + c) * stride + x
                half = add_product(add_product(load(sums, n0 + at), a0, p0), b0, p1)
                store(sums, n0 + at, add_product(add_product(half, c0, p2), d0, p3))
                half = add_product(add_product(load(sums, n1 + at), a1, p0), b1, p1)
                store(sums, n1 + at, add_product(add_product(half, c1, p2), d1, p3))
                half = add_product(add_product(load(sums, n2 + at), a2, p0), b2, p1)
                store(sums, n2 + at, add_product(add_product(half, c2, p2), d2, p3))
                half = add_product(add_product(load(sums, n3 + at), a3, p0), b3, p1)
                store(sums, n3 + at, add_product(add_product(half, c3, p2), d3, p3))


@njit(**COMPILE)
def _add_row(
    w: Float,
    q: Float,
    row: int,
    taps: Float,
    j: int,
    cell: int,
    n_terms: int,
    n_channels: int,
    n_x: int,
    stride: int,
    sums: Float,
) -> None:
    """The same for a single row: cells of two voxels, or the ragged end of the volume."""
    a0, a1, a2, a3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    slot = n_terms * n_channels * stride
    n0, n1, n2, n3 = (cell % 4) * slot, ((cell + 1) % 4) * slot, ((cell + 2) % 4) * slot, ((cell + 3) % 4) * slot
    for b in range(n_terms):
        for x in range(0, n_x, LANES):
            w0 = load(w, (b * 4 + row) * stride + x)
            for c in range(n_channels):
                p0 = multiply(w0, load(q, (c * 4 + row) * stride + x))
                at = (b * n_channels + c) * stride + x
                store(sums, n0 + at, add_product(load(sums, n0 + at), a0, p0))
                store(sums, n1 + at, add_product(load(sums, n1 + at), a1, p0))
                store(sums, n2 + at, add_product(load(sums, n2 + at), a2, p0))
                store(sums, n3 + at, add_product(load(sums, n3 + at), a3, p0))


@njit(**COMPILE)
def _add_2_rows(
    w: Float,
    q: Float,
    taps: Float,
    j: int,
    cell: int,
    n_terms: int,
    n_channels: int,
    n_x: int,
    stride: int,
    sums: Float,
) -> None:
    a0, a1, a2, a3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    b0, b1, b2, b3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    slot = n_terms * n_channels * stride
    n0, n1, n2, n3 = (cell % 4) * slot, ((cell + 1) % 4) * slot, ((cell + 2) % 4) * slot, ((cell + 3) % 4) * slot
    for b in range(n_terms):
        for x in range(0, n_x, LANES):
            first = b * 4 * stride + x
            w0, w1 = load(w, first), load(w, first + stride)
            for c in range(n_channels):
                first = c * 4 * stride + x
                p0, p1 = multiply(w0, load(q, first)), multiply(w1, load(q, first + stride))
                at = (b * n_channels + c) * stride + x
                store(sums, n0 + at, add_product(add_product(load(sums, n0 + at), a0, p0), b0, p1))
                store(sums, n1 + at, add_product(add_product(load(sums, n1 + at), a1, p0), b1, p1))
                store(sums, n2 + at, add_product(add_product(load(sums, n2 + at), a2, p0), b2, p1))
                store(sums, n3 + at, add_product(add_product(load(sums, n3 + at), a3, p0), b3, p1))


@njit(**COMPILE)
def _set_exact_row(w: Float, q: Float, n_terms: int, n_channels: int, n_x: int, stride: int, sums: Float) -> None:
    """An axis without a grid: the node is the voxel."""
    for b in range(n_terms):
        for c in range(n_channels):
            for x in range(0, n_x, LANES):
                at = (b * n_channels + c) * stride + x
                store(sums, at, multiply(load(w, b * 4 * stride + x), load(q, c * 4 * stride + x)))


@njit(**COMPILE)
def _contract_rows(
    sums: Float, first_row: int, n_rows: int, n_x: int, stride: int, taps: Float, parts: Float, line: Float
) -> None:
    """Sum rows of voxels along X onto their nodes, rows of nodes end to end in `line`.

    parts holds four rows, one per tap, each with a vector of zeros before and after it.
    """
    pitch, n_taps = taps.shape
    n_cells = n_x // pitch
    n_nodes = n_cells + n_taps - 1
    zero = splat(np.float32(0.0))
    part = n_cells + 3 * LANES
    for row in range(n_rows):
        base = (first_row + row) * stride
        if n_taps == 1:
            for x in range(0, n_x, LANES):
                store(line, row * n_nodes + x, load(sums, base + x))
            continue
        for k in range(0, n_cells, LANES):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for p in range(pitch):
                value = load(sums, base + p * n_cells + k)
                s0 = add_product(s0, splat(taps[p, 0]), value)
                s1 = add_product(s1, splat(taps[p, 1]), value)
                s2 = add_product(s2, splat(taps[p, 2]), value)
                s3 = add_product(s3, splat(taps[p, 3]), value)
            store(parts, LANES + k, s0)
            store(parts, part + LANES + k, s1)
            store(parts, 2 * part + LANES + k, s2)
            store(parts, 3 * part + LANES + k, s3)
        for t in range(4):
            store(parts, t * part + LANES + n_cells, zero)
        # A vector that runs over the end of this row of nodes is overwritten by the next row.
        for k in range(0, n_nodes, LANES):
            at = LANES + k
            low = add(load(parts, at), load(parts, part + at - 1))
            high = add(load(parts, 2 * part + at - 2), load(parts, 3 * part + at - 3))
            store(line, row * n_nodes + k, add(low, high))


@njit(**COMPILE)
def _add_line(
    line: Float, length: int, taps: Float, phase: int, grid: Float, node_z: int, node_y: int, start: int
) -> None:
    """Add finished node rows to the nodes around their plane along Z."""
    first = UNSIGNED(start)
    for t in range(taps.shape[1]):
        weight = taps[phase, t]
        for k in range(UNSIGNED(length)):
            grid[node_z + t, node_y, first + k] += weight * line[k]


@njit(**COMPILE)
def gather(
    belief: Float,
    scale: Float,
    levels: NDArray,
    tables: Float,
    terms: NDArray,
    first_term: int,
    n_terms: int,
    taps_z: Float,
    taps_y: Float,
    taps_x: Float,
    grid: Float,
    z_start: int,
    z_stop: int,
) -> None:
    """Add planes z_start..z_stop-1 of W_b · scale · belief to the grid, for n_terms bumps from first_term on."""
    _, n_channels, Y, X = belief.shape
    pitch_z, pitch_y, pitch_x = taps_z.shape[0], taps_y.shape[0], taps_x.shape[0]
    n_taps, more_nodes = taps_y.shape[1], taps_x.shape[1] - 1
    n_cells = (Y + pitch_y - 1) // pitch_y
    tile = max(1, TILE // pitch_x) * pitch_x
    for x0 in range(0, X, tile):
        n_x = min(tile, X - x0)
        stride = row_stride(n_x)
        n_nodes = n_x // pitch_x + more_nodes
        tile_start = n_terms * n_channels * (x0 // pitch_x + x0 // tile * more_nodes)
        group = terms_at_once(n_terms, n_channels, stride)
        weights = np.zeros(group * 4 * stride, np.float32)
        rows = np.zeros(n_channels * 4 * stride, np.float32)
        parts = np.zeros(4 * (n_x // pitch_x + 3 * LANES), np.float32)
        line = np.empty(group * n_channels * n_nodes + LANES, np.float32)
        for z in range(z_start, z_stop):
            for first in range(0, n_terms, group):
                n_group = min(group, n_terms - first)
                n_rows_done = n_group * n_channels
                sums = np.zeros(n_taps * n_rows_done * stride, np.float32)
                for cell in range(n_cells + n_taps - 1):
                    y = cell * pitch_y
                    y_stop = min(y + pitch_y, Y)
                    while y < y_stop:
                        n_rows = min(4, y_stop - y)
                        j = y - cell * pitch_y
                        load_bumps(
                            levels, z, y, x0, n_x, tables, terms, first_term + first, n_group, n_rows, weights, stride
                        )
                        _load_beliefs(belief, scale, z, y, x0, n_x, n_rows, rows, stride)
                        if n_taps == 1:
                            _set_exact_row(weights, rows, n_group, n_channels, n_x, stride, sums)
                        elif n_rows == 4:
                            _add_4_rows(weights, rows, taps_y, j, cell, n_group, n_channels, n_x, stride, sums)
                        elif n_rows == 2:
                            _add_2_rows(weights, rows, taps_y, j, cell, n_group, n_channels, n_x, stride, sums)
                        else:
                            for row in range(n_rows):
                                _add_row(
                                    weights, rows, row, taps_y, j + row, cell, n_group, n_channels, n_x, stride, sums
                                )
                        y += n_rows
                    slot = cell % n_taps * n_rows_done
                    _contract_rows(sums, slot, n_rows_done, n_x, stride, taps_x, parts, line)
                    start = tile_start + first * n_channels * n_nodes
                    _add_line(line, n_rows_done * n_nodes, taps_z, z % pitch_z, grid, z // pitch_z, cell, start)
                    sums[slot * stride : (slot + n_rows_done) * stride] = 0.0


# -------------------------------------------------------------------------------------------------------- blur


@njit(**COMPILE)
def blur_planes(
    grid: Float,
    taps_y: Float,
    taps_x: Float,
    n_rows: int,
    n_nodes: int,
    tile_cells: int,
    n_shared: int,
    z_start: int,
    z_stop: int,
) -> None:
    """Blur node planes along X and Y, in place.

    n_rows is terms × channels, n_nodes the length of the whole X axis, tile_cells the cells of a full tile; the
    n_shared nodes that two tiles have in common are summed first and written back to both.
    """
    n_y, length = grid.shape[1], grid.shape[2]
    ones = np.ones(n_y, np.float32)
    radius = taps_x.shape[0] // 2
    # Rows are laid end to end with zeros between, so that they are filtered in a few long loops.
    step = n_nodes + radius
    padded = np.zeros(row_stride(n_rows * step + 2 * radius), np.float32)
    blurred = np.empty(row_stride(n_rows * step), np.float32)
    for z in range(z_start, z_stop):
        for y in range(n_y):
            padded[:] = 0.0
            _visit_tiles(grid[z, y], padded, radius, step, n_rows, n_nodes, tile_cells, n_shared, True)
            weighted_sum(padded, 0, 1, taps_x, 0, taps_x.shape[0], blurred, n_rows * step)
            _visit_tiles(grid[z, y], blurred, 0, step, n_rows, n_nodes, tile_cells, n_shared, False)
        filter_columns(grid[z], grid[z], taps_y, ones, 0, length)


@njit(**COMPILE)
def _visit_tiles(
    row: Float,
    whole: Float,
    first: int,
    step: int,
    n_rows: int,
    n_nodes: int,
    tile_cells: int,
    n_shared: int,
    is_reading: bool,
) -> None:
    """Sum the tiles of a row of the grid into whole rows, or copy whole rows back into the tiles."""
    start, node = 0, 0
    while start < row.shape[0]:
        n_tile = min(tile_cells + n_shared, n_nodes - node)
        for r in range(n_rows):
            at, tile_at = UNSIGNED(first + r * step + node), UNSIGNED(start + r * n_tile)
            if is_reading:
                for k in range(UNSIGNED(n_tile)):
                    whole[at + k] += row[tile_at + k]
            else:
                for k in range(UNSIGNED(n_tile)):
                    row[tile_at + k] = whole[at + k]
        start += n_rows * n_tile
        node += tile_cells
