"""The second half of the bilateral filter on the CPU: read the blurred grid at the voxels, the transpose of gathering.

See `gather_kernels.py` for the strategy and the shapes.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from crf.gather_kernels import TILE, load_bumps, terms_at_once
from crf.simd import LANES, add, add_product, load, multiply, splat, store
from crf.voxel_kernels import COMPILE, UNSIGNED, Float, mix_rows, row_stride


@njit(**COMPILE)
def _interpolate_line(
    grid: Float, node_z: int, node_y: int, start: int, taps: Float, phase: int, length: int, line: Float
) -> None:
    """Rows of nodes between the planes of nodes along Z."""
    first = UNSIGNED(start)
    if taps.shape[1] == 1:
        for k in range(UNSIGNED(length)):
            line[k] = grid[node_z, node_y, first + k]
        return
    w0, w1, w2, w3 = taps[phase, 0], taps[phase, 1], taps[phase, 2], taps[phase, 3]
    for k in range(UNSIGNED(length)):
        low = w0 * grid[node_z, node_y, first + k] + w1 * grid[node_z + 1, node_y, first + k]
        line[k] = low + w2 * grid[node_z + 2, node_y, first + k] + w3 * grid[node_z + 3, node_y, first + k]


@njit(**COMPILE)
def _expand_rows(line: Float, n_rows: int, n_x: int, stride: int, taps: Float, nodes: Float, first_row: int) -> None:
    """Rows of nodes read at the voxels along X; the transpose of `_contract_rows`."""
    pitch, n_taps = taps.shape
    n_cells = n_x // pitch
    n_nodes = n_cells + n_taps - 1
    for row in range(n_rows):
        base = (first_row + row) * stride
        if n_taps == 1:
            for x in range(0, n_x, LANES):
                store(nodes, base + x, load(line, row * n_nodes + x))
            continue
        # Phases in rising order: what one writes beyond its end, the next overwrites.
        for p in range(pitch):
            a0, a1, a2, a3 = splat(taps[p, 0]), splat(taps[p, 1]), splat(taps[p, 2]), splat(taps[p, 3])
            for k in range(0, n_cells, LANES):
                at = row * n_nodes + k
                low = add_product(multiply(a0, load(line, at)), a1, load(line, at + 1))
                high = add_product(multiply(a2, load(line, at + 2)), a3, load(line, at + 3))
                store(nodes, base + p * n_cells + k, add(low, high))


@njit(**COMPILE)
def _read_4_rows(
    w: Float,
    taps: Float,
    j: int,
    cell: int,
    nodes: Float,
    n_terms: int,
    n_channels: int,
    n_x: int,
    stride: int,
    message: Float,
    y: int,
    Y: int,
) -> None:
    """message[c, y.., x] += sum_b W_b · (window over four node rows), for four rows of voxels."""
    a0, a1, a2, a3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    b0, b1, b2, b3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    c0, c1, c2, c3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    j += 1
    d0, d1, d2, d3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    slot = n_terms * n_channels * stride
    n0, n1, n2, n3 = (cell % 4) * slot, ((cell + 1) % 4) * slot, ((cell + 2) % 4) * slot, ((cell + 3) % 4) * slot
    for c in range(n_channels):
        for x in range(0, n_x, LANES):
            out = (c * Y + y) * stride + x
            m0, m1 = load(message, out), load(message, out + stride)
            m2, m3 = load(message, out + 2 * stride), load(message, out + 3 * stride)
            for b in range(n_terms):
                at = (b * n_channels + c) * stride + x
                s0, s1, s2, s3 = load(nodes, n0 + at), load(nodes, n1 + at), load(nodes, n2 + at), load(nodes, n3 + at)
                at = b * 4 * stride + x
                low, high = add_product(multiply(a0, s0), a1, s1), add_product(multiply(a2, s2), a3, s3)
                m0 = add_product(m0, load(w, at), add(low, high))
                low, high = add_product(multiply(b0, s0), b1, s1), add_product(multiply(b2, s2), b3, s3)
                m1 = add_product(m1, load(w, at + stride), add(low, high))
                low, high = add_product(multiply(c0, s0), c1, s1), add_product(multiply(c2, s2), c3, s3)
                m2 = add_product(m2, load(w, at + 2 * stride), add(low, high))
                low, high = add_product(multiply(d0, s0), d1, s1), add_product(multiply(d2, s2), d3, s3)
                m3 = add_product(m3, load(w, at + 3 * stride), add(low, high))
            store(message, out, m0)
            store(message, out + stride, m1)
            store(message, out + 2 * stride, m2)
            store(message, out + 3 * stride, m3)


@njit(**COMPILE)
def _read_row(
    w: Float,
    row: int,
    taps: Float,
    j: int,
    cell: int,
    nodes: Float,
    n_terms: int,
    n_channels: int,
    n_x: int,
    stride: int,
    message: Float,
    y: int,
    Y: int,
) -> None:
    """The same for a single row of voxels, whose weights are row `row` of w."""
    a0, a1, a2, a3 = splat(taps[j, 0]), splat(taps[j, 1]), splat(taps[j, 2]), splat(taps[j, 3])
    slot = n_terms * n_channels * stride
    n0, n1, n2, n3 = (cell % 4) * slot, ((cell + 1) % 4) * slot, ((cell + 2) % 4) * slot, ((cell + 3) % 4) * slot
    for c in range(n_channels):
        for x in range(0, n_x, LANES):
            out = (c * Y + y) * stride + x
            m0 = load(message, out)
            for b in range(n_terms):
                at = (b * n_channels + c) * stride + x
                low = add_product(multiply(a0, load(nodes, n0 + at)), a1, load(nodes, n1 + at))
                high = add_product(multiply(a2, load(nodes, n2 + at)), a3, load(nodes, n3 + at))
                m0 = add_product(m0, load(w, (b * 4 + row) * stride + x), add(low, high))
            store(message, out, m0)


@njit(**COMPILE)
def _read_exact_row(
    w: Float, nodes: Float, n_terms: int, n_channels: int, n_x: int, stride: int, message: Float, y: int, Y: int
) -> None:
    for c in range(n_channels):
        for x in range(0, n_x, LANES):
            out = (c * Y + y) * stride + x
            m0 = load(message, out)
            for b in range(n_terms):
                value = load(nodes, (b * n_channels + c) * stride + x)
                m0 = add_product(m0, load(w, b * 4 * stride + x), value)
            store(message, out, m0)


@njit(**COMPILE)
def read_back(
    grid: Float,
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
    matrix: Float,
    self_share: np.float32,
    target: Float,
    z_start: int,
    z_stop: int,
) -> None:
    """target += matrix · scale · (sum_b W_b · grid read at the voxels - self_share · scale · belief).

    matrix (C, C) mixes the channels of the message on the way, so that no separate message is stored;
    self_share is 1 to leave out what a voxel sends to itself, once per iteration, and 0 otherwise.
    """
    _, n_channels, Y, X = target.shape
    pitch_z, pitch_y, pitch_x = taps_z.shape[0], taps_y.shape[0], taps_x.shape[0]
    n_taps, more_nodes = taps_y.shape[1], taps_x.shape[1] - 1
    tile = max(1, TILE // pitch_x) * pitch_x
    for x0 in range(0, X, tile):
        n_x = min(tile, X - x0)
        stride = row_stride(n_x)
        n_nodes = n_x // pitch_x + more_nodes
        tile_start = n_terms * n_channels * (x0 // pitch_x + x0 // tile * more_nodes)
        group = terms_at_once(n_terms, n_channels, stride)
        weights = np.zeros(group * 4 * stride, np.float32)
        nodes = np.empty(n_taps * group * n_channels * stride, np.float32)
        line = np.empty(group * n_channels * n_nodes + 2 * LANES, np.float32)
        message = np.empty(n_channels * Y * stride, np.float32)
        mixed = np.empty(stride, np.float32)
        for z in range(z_start, z_stop):
            node_z, phase_z = z // pitch_z, z % pitch_z
            message[:] = 0.0
            for first in range(0, n_terms, group):
                n_group = min(group, n_terms - first)
                n_rows_read = n_group * n_channels
                start = tile_start + first * n_channels * n_nodes
                for node in range(n_taps - 1 + (Y + pitch_y - 1) // pitch_y):
                    _interpolate_line(grid, node_z, node, start, taps_z, phase_z, n_rows_read * n_nodes, line)
                    _expand_rows(line, n_rows_read, n_x, stride, taps_x, nodes, node % n_taps * n_rows_read)
                    cell = node - n_taps + 1
                    y = max(cell, 0) * pitch_y
                    y_stop = min((cell + 1) * pitch_y, Y)
                    while y < y_stop:
                        n_rows = min(4, y_stop - y)
                        j = y - cell * pitch_y
                        load_bumps(
                            levels, z, y, x0, n_x, tables, terms, first_term + first, n_group, n_rows, weights, stride
                        )
                        if n_taps == 1:
                            _read_exact_row(weights, nodes, n_group, n_channels, n_x, stride, message, y, Y)
                        elif n_rows == 4:
                            _read_4_rows(
                                weights, taps_y, j, cell, nodes, n_group, n_channels, n_x, stride, message, y, Y
                            )
                        else:
                            for row in range(n_rows):
                                _read_row(
                                    weights, row, taps_y, j + row, cell, nodes, n_group, n_channels, n_x, stride,
                                    message, y + row, Y,
                                )  # fmt: skip
                        y += n_rows
            for y in range(Y):
                _mix_row(message, mixed, n_x, stride, belief, scale, matrix, self_share, target, z, y, x0)


@njit(**COMPILE)
def _mix_row(
    message: Float,
    mixed: Float,
    n_x: int,
    stride: int,
    belief: Float,
    scale: Float,
    matrix: Float,
    self_share: np.float32,
    target: Float,
    z: int,
    y: int,
    x0: int,
) -> None:
    n_channels, Y = target.shape[1], target.shape[2]
    u0 = UNSIGNED(x0)
    for d in range(n_channels):
        at = UNSIGNED((d * Y + y) * stride)
        for x in range(UNSIGNED(n_x)):
            n = scale[z, y, u0 + x]
            message[at + x] = n * (message[at + x] - self_share * n * belief[z, d, y, u0 + x])
    for c in range(n_channels):
        mix_rows(message, y * stride, Y * stride, n_channels, n_x, matrix, c, mixed)
        for x in range(UNSIGNED(n_x)):
            target[z, c, y, u0 + x] += mixed[x]
