"""Compiled loops over voxels on the CPU: the spatial kernel's separable filters and the softmax update.

Every function works on the part of the volume that its arguments name, releases the GIL and allocates only small
scratch, so `compiled.py` can run it on several threads. Inner loops run along X over contiguous rows, several
rows per pass, which the compiler turns into vector instructions.

Shapes: belief, penalty, log_odds (Z, C, Y, X) with C = K - 1 channels.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from crf.simd import LANES, add_product, load, multiply, splat, store

Float = NDArray[np.float32]

COMPILE = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}

UNSIGNED = np.uint64
"""Index type of inner loops with an offset: a signed sum might be negative, which Python counts from the end, and
the compiler would load every element by its own address."""

SMALLEST_LOG = np.float32(-20.7)
"""Beliefs are not let below 1e-9: far smaller ones, times kernel tails, would be slow subnormal numbers."""

UPDATED = 1024
"""Voxels whose classes are normalised together."""

COLUMNS = 256
"""Neighbouring columns filtered together along Y or Z."""


@njit(**COMPILE)
def row_stride(n: int) -> int:
    """Length of a scratch row of n values: a vector may begin at the last of them."""
    return (n + 2 * (LANES - 1)) // LANES * LANES


@njit(**COMPILE)
def weighted_sum(
    source: Float, first: int, step: int, taps: Float, first_tap: int, n_taps: int, out: Float, n: int
) -> None:
    """out[x] = sum_k taps[first_tap + k] · source[first + k · step + x] for x < n, on padded scratch.

    Four vectors of sums stay in registers while the taps go by; step 1 filters along a row, a row's stride
    filters across rows.
    """
    zero = splat(np.float32(0.0))
    x = 0
    while x + 4 * LANES <= n:
        s0, s1, s2, s3 = zero, zero, zero, zero
        at = first + x
        for k in range(n_taps):
            t = splat(taps[first_tap + k])
            s0 = add_product(s0, t, load(source, at))
            s1 = add_product(s1, t, load(source, at + LANES))
            s2 = add_product(s2, t, load(source, at + 2 * LANES))
            s3 = add_product(s3, t, load(source, at + 3 * LANES))
            at += step
        store(out, x, s0)
        store(out, x + LANES, s1)
        store(out, x + 2 * LANES, s2)
        store(out, x + 3 * LANES, s3)
        x += 4 * LANES
    while x < n:
        s0 = zero
        at = first + x
        for k in range(n_taps):
            s0 = add_product(s0, splat(taps[first_tap + k]), load(source, at))
            at += step
        store(out, x, s0)
        x += LANES


@njit(**COMPILE)
def filter_columns(source: Float, target: Float, taps: Float, scale: Float, start: int, stop: int) -> None:
    """Filter columns start..stop-1 of (n, L) along n: target = diag(scale) K diag(scale) source; may be in place."""
    n = source.shape[0]
    radius = taps.shape[0] // 2
    stride = row_stride(min(COLUMNS, stop - start))
    # A copy also moves rows that lie a power of two apart to different lines of the cache.
    block = np.zeros(n * stride, np.float32)
    out = np.empty(stride, np.float32)
    for first in range(start, stop, COLUMNS):
        width = UNSIGNED(min(COLUMNS, stop - first))
        u = UNSIGNED(first)
        for row in range(n):
            at = UNSIGNED(row * stride)
            for x in range(width):
                block[at + x] = source[row, u + x] * scale[row]
        for row in range(n):
            low = max(0, row - radius)
            high = min(n, row + radius + 1)
            weighted_sum(block, low * stride, stride, taps, low - row + radius, high - low, out, np.int64(width))
            for x in range(width):
                target[row, u + x] = out[x] * scale[row]


@njit(**COMPILE)
def finish_spatial(
    volume: Float, belief: Float, taps_y: Float, taps_x: Float, scales: tuple[Float, Float, Float], pitch: int,
    tile: int, matrix: Float, self_share: np.float32, z_start: int, z_stop: int,
) -> None:  # fmt: skip
    """Filter planes of (Z, C, Y, X) along Y and X, leave out the self terms and mix by matrix, in place.

    Columns are stored as `compiled.PhaseLayout` has them, with its pitch and its tile; scales are n_z, n_y, n_x.
    """
    _, n_channels, Y, X = volume.shape
    scale_z, scale_y, scale_x = scales
    # The neighbour of a voxel t columns away has another phase, but in that phase it lies the same way from its
    # neighbours: a row is filtered as it is stored, phase by phase, from `offsets` on.
    n_taps, n_cells = taps_x.shape[0], X // pitch
    reach = n_taps // 2 // pitch + 1
    n_vectors = (n_cells + LANES - 1) // LANES
    padded_stride = reach + n_vectors * LANES + reach
    offsets = np.empty((pitch, n_taps), np.int64)
    for p in range(pitch):
        for t in range(n_taps):
            x = p + t - n_taps // 2
            offsets[p, t] = x % pitch * padded_stride + reach + x // pitch
    padded = np.zeros(pitch * padded_stride, np.float32)
    row = np.empty(max(pitch * n_vectors * LANES, row_stride(X)), np.float32)
    stride = row_stride(X)
    message = np.empty(n_channels * stride, np.float32)
    for z in range(z_start, z_stop):
        for c in range(n_channels):
            plane = volume[z, c]
            filter_columns(plane, plane, taps_y, scale_y, 0, X)
        for y in range(Y):
            share = self_share * (scale_z[z] * scale_y[y]) ** 2
            for c in range(n_channels):
                for start in range(0, X, tile):
                    n, cell = min(tile, X - start) // pitch, start // pitch
                    for p in range(pitch):
                        at, x = UNSIGNED(p * padded_stride + reach + cell), UNSIGNED(start + p * n)
                        for k in range(UNSIGNED(n)):
                            padded[at + k] = volume[z, c, y, x + k] * scale_x[x + k]
                _filter_phases(padded, offsets, taps_x, n_vectors, row)
                for start in range(0, X, tile):
                    n, cell = min(tile, X - start) // pitch, start // pitch
                    for p in range(pitch):
                        at, x = UNSIGNED(p * n_vectors * LANES + cell), UNSIGNED(start + p * n)
                        out = UNSIGNED(c * stride) + x
                        for k in range(UNSIGNED(n)):
                            s = scale_x[x + k]
                            message[out + k] = s * (row[at + k] - share * s * belief[z, c, y, x + k])
            for c in range(n_channels):
                mix_rows(message, 0, stride, n_channels, X, matrix, c, row)
                for x in range(UNSIGNED(X)):
                    volume[z, c, y, x] = row[x]


@njit(**COMPILE)
def _filter_phases(source: Float, offsets: NDArray, taps: Float, n_vectors: int, out: Float) -> None:
    """out[p, k] = sum_t taps[t] · source[offsets[p, t] + k], both as vectors one after the other, four at a time."""
    zero = splat(np.float32(0.0))
    last = offsets.shape[0] * n_vectors - 1
    for v0 in range(0, last + 1, 4):
        v1, v2, v3 = min(v0 + 1, last), min(v0 + 2, last), min(v0 + 3, last)
        p0, p1, p2, p3 = v0 // n_vectors, v1 // n_vectors, v2 // n_vectors, v3 // n_vectors
        k0, k1 = (v0 - p0 * n_vectors) * LANES, (v1 - p1 * n_vectors) * LANES
        k2, k3 = (v2 - p2 * n_vectors) * LANES, (v3 - p3 * n_vectors) * LANES
        s0, s1, s2, s3 = zero, zero, zero, zero
        for t in range(taps.shape[0]):
            tap = splat(taps[t])
            s0 = add_product(s0, tap, load(source, offsets[p0, t] + k0))
            s1 = add_product(s1, tap, load(source, offsets[p1, t] + k1))
            s2 = add_product(s2, tap, load(source, offsets[p2, t] + k2))
            s3 = add_product(s3, tap, load(source, offsets[p3, t] + k3))
        store(out, v0 * LANES, s0)
        store(out, v1 * LANES, s1)
        store(out, v2 * LANES, s2)
        store(out, v3 * LANES, s3)


@njit(**COMPILE)
def mix_rows(message: Float, first: int, step: int, n_channels: int, n: int, matrix: Float, c: int, out: Float) -> None:
    """out[x] = sum_d matrix[c, d] · message[first + d · step + x] for x < n, on padded scratch."""
    for x in range(0, n, LANES):
        total = multiply(splat(matrix[c, 0]), load(message, first + x))
        for d in range(1, n_channels):
            total = add_product(total, splat(matrix[c, d]), load(message, first + d * step + x))
        store(out, x, total)


@njit(**COMPILE)
def _exp_row(value: Float, whole: NDArray, out: Float) -> None:
    """out = exp(value) to 3e-7, for value <= 0 and from `SMALLEST_LOG` up; whole is an int32 view of out's memory.

    The library function is one call per value; this is 2^n, written as the exponent field of a float, times a
    polynomial for the fraction (Cephes expf, with ln 2 in two parts).
    """
    for x in range(out.shape[0]):
        v = max(value[x], SMALLEST_LOG)
        n = np.floor(v * np.float32(1.44269504088896341) + np.float32(0.5))
        whole[x] = (np.int32(n) + np.int32(127)) << np.int32(23)
        value[x] = (v - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    for x in range(out.shape[0]):
        f = value[x]
        p = np.float32(1.9875691500e-4) * f + np.float32(1.3981999507e-3)
        p = p * f + np.float32(8.3334519073e-3)
        p = p * f + np.float32(4.1665795894e-2)
        p = p * f + np.float32(1.6666665459e-1)
        p = p * f + np.float32(5.0000001201e-1)
        out[x] *= p * f * f + f + np.float32(1.0)


@njit(**COMPILE)
def update(belief: Float, log_odds: Float, penalty: Float, start: int, stop: int) -> np.float32:
    """belief = softmax(log_odds - penalty) for planes start..stop-1 of (Z, C, Y·X); returns the largest change.

    Class K is not stored; its log-odds and its penalty are zero.
    """
    _, n_channels, n_columns = belief.shape
    score = np.empty((n_channels + 1, UPDATED), np.float32)
    exponential = np.empty((n_channels + 1, UPDATED), np.float32)
    whole = exponential.view(np.int32)
    total = np.empty(UPDATED, np.float32)
    # One maximum per column: a single one would be a chain of comparisons that wait for each other.
    change = np.zeros(UPDATED, np.float32)
    gain = np.empty(UPDATED, np.float32)
    for z in range(start, stop):
        for first in range(0, n_columns, UPDATED):
            u, n = UNSIGNED(first), UNSIGNED(min(UPDATED, n_columns - first))
            for x in range(n):
                total[x] = 0.0
            for c in range(n_channels):
                for x in range(n):
                    score[c, x] = log_odds[z, c, u + x] - penalty[z, c, u + x]
                    total[x] = max(total[x], score[c, x])
            for x in range(n):
                score[n_channels, x] = -total[x]
            for c in range(n_channels):
                for x in range(n):
                    score[c, x] -= total[x]
            for c in range(n_channels + 1):
                _exp_row(score[c, :n], whole[c, :n], exponential[c, :n])
            for x in range(n):
                total[x] = exponential[n_channels, x]
            for c in range(n_channels):
                for x in range(n):
                    total[x] += exponential[c, x]
            for x in range(n):
                total[x] = np.float32(1.0) / total[x]
                gain[x] = 0.0
            for c in range(n_channels):
                for x in range(n):
                    new = exponential[c, x] * total[x]
                    step = new - belief[z, c, u + x]
                    change[x] = max(change[x], abs(step))
                    gain[x] += step
                    belief[z, c, u + x] = new
            # What the other classes gain, class K loses.
            for x in range(n):
                change[x] = max(change[x], abs(gain[x]))
    return change.max()
