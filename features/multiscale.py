"""Hands a block, its kernels and this thread's memory to the compiled multi-scale set, one sigma at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features import filters, kernels, slice_kernels
from features.kernels import LINE, MARGIN, Halves


def compute_multiscale(
    block: NDArray,
    sigmas: Sequence[Sequence[float]],
    halo: tuple[int, int, int],
    channels: tuple[int, ...],
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with the features of a block, sigma by sigma.

    Parameters
    ----------
    block : ndarray, shape (Z + 2 hz, Y + 2 hy, X + 2 hx)
        Grey values with their halo.
    sigmas : sequence of (z, y, x) or (y, x)
        Widths in voxels; three entries filter the volume, two filter each slice.
    halo : (z, y, x)
        Margin of the block; at least what the widest filter needs.
    channels : six ints
        First channel, within one sigma, of each filter in the order of ``kernels.py``; -1 leaves it out.
    out : ndarray of float32, shape (F, Z, Y, X)
        Every channel C-contiguous.
    """
    _, rows, columns = block.shape
    core, pitches = out.shape[1:], (rows * columns, columns)
    origin = MARGIN + (halo[0] * rows + halo[1]) * columns + halo[2]
    compute = kernels.multiscale_3d if len(sigmas[0]) == 3 else slice_kernels.multiscale_2d
    plans = [_plan(sigma, core, channels[kernels.TENSOR] >= 0) for sigma in sigmas]
    n_scratch = max(n for _, _, n in plans)
    memory = _workspace(n_scratch + MARGIN + block.size + MARGIN)
    scratch, source = memory[:n_scratch], memory[n_scratch:]
    source[MARGIN:-MARGIN].reshape(block.shape)[...] = block
    for part, (weights, tile, _) in zip(np.split(out, len(sigmas)), plans, strict=True):
        voxels = part.strides[0] // part.itemsize
        compute(source, origin, pitches, core, *weights, tile, flat(part), voxels, channels, scratch)


def scratch_bytes(
    block_shape: Sequence[int], sigmas: Sequence[Sequence[float]], core: tuple[int, ...], wants_tensor: bool
) -> int:
    """Memory that the calling thread holds while it filters a block of this shape, its output not included."""
    n_scratch = max(_plan(sigma, core, wants_tensor)[2] for sigma in sigmas)
    return 4 * (n_scratch + math.prod(block_shape) + 2 * MARGIN + LINE)


def flat(channels: NDArray[np.float32]) -> NDArray[np.float32]:
    """View the memory of all channels as one axis; channels may be further apart than their size."""
    n_elements = (len(channels) - 1) * (channels.strides[0] // channels.itemsize) + channels[0].size
    return np.lib.stride_tricks.as_strided(channels, (n_elements,), (channels.itemsize,))


def _plan(
    sigma: Sequence[float], core: tuple[int, ...], wants_tensor: bool
) -> tuple[tuple[Halves, Halves, Halves], tuple[int, ...], int]:
    """Kernels, tile shape and floats of scratch for one sigma."""
    weights = _weights(sigma, wants_tensor)
    margin = tuple(len(half) - 1 for half in weights[1])
    tile = _tile_shape(sigma)
    sizes = kernels.scratch_sizes_3d if len(sigma) == 3 else slice_kernels.scratch_sizes_2d
    return weights, tile, sum(sizes(core, weights[0], margin, tile))


def _weights(sigma: Sequence[float], wants_tensor: bool) -> tuple[Halves, Halves, Halves]:
    """Derivatives, outer and inner smoothing, as the compiled loops take them: half a kernel for each axis.

    Without the structure tensor its smoothing is the identity, so that no tile gets a margin for it.
    """
    derivatives = tuple(np.stack([_half(s, order) * s**order for order in range(3)]) for s in sigma)
    outer = [_half(filters.STRUCTURE_TENSOR_OUTER * s) if wants_tensor else np.ones(1) for s in sigma]
    inner = [_half(filters.DIFFERENCE_OF_GAUSSIANS_INNER * s) for s in sigma]
    return _as_float32(derivatives), _as_float32(outer), _as_float32(inner)


def _half(sigma: float, order: int = 0) -> NDArray[np.float64]:
    return filters.gaussian_kernel(sigma, order)[filters.gaussian_radius(sigma) :]


def _as_float32(halves: Sequence[NDArray[np.float64]]) -> Halves:
    return tuple(half.astype(np.float32) for half in halves)


def _tile_shape(sigma: Sequence[float]) -> tuple[int, ...]:
    """Choose a tile: small enough for the cache, large enough that margins do not dominate.

    Measured at 128^3 in 3D: small tiles win up to a radius of 13.  Beyond, tiles of 128 x 128 rows would be
    another 10 % faster than 128 x 64, at nearly twice the scratch (245 MB at a sigma of 10 voxels).
    """
    if len(sigma) == 2:
        return slice_kernels.TILE_SHAPE
    return (32, 32, 128) if max(map(filters.gaussian_radius, sigma)) <= 13 else (128, 64, 128)


class _Workspace(threading.local):
    """Memory that each thread keeps from block to block.

    Touching fresh pages costs as much as the arithmetic on them: 0.04 to 0.2 s per 100 MB where it was measured.
    """

    memory: NDArray[np.float32] = np.empty(0, np.float32)


_kept = _Workspace()


def _workspace(n: int) -> NDArray[np.float32]:
    """Return n uninitialised floats that start on a cache line, valid until this thread asks again."""
    if len(_kept.memory) < n + LINE:
        _kept.memory = np.empty(n + LINE, np.float32)
    start = -(_kept.memory.ctypes.data // _kept.memory.itemsize) % LINE
    return _kept.memory[start : start + n]
