"""The CPU path: the compiled loops over slabs of the volume, on threads, within bounded memory.

The loops are in `gather_kernels.py` and `read_kernels.py` (bilateral kernel) and in `voxel_kernels.py` (spatial
kernel, softmax).

One iteration reads the beliefs Q of the last one and takes three steps, as far as it can plane by plane, so that a
plane of the penalty stays in the cache until it has been used up:

    penalty  =  spatial message of Q, mixed by its penalty matrix      (exact, separable)
    penalty +=  bilateral message of Q, mixed likewise                 (gather → blur → read back, some terms at a time)
    Q        =  softmax(log-odds - penalty + self terms)               (in place)

Only K - 1 classes are filtered and stored, the last one follows from the sum. Above the inputs this takes
4·(3·(K-1) + 1) bytes per voxel and `GRID_BYTES_PER_VOXEL` for the grid. Slabs depend on the shape alone and
neighbouring slabs never add to the grid at the same time, so the result is the same to the last bit for every
number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crf import gather_kernels, read_kernels, voxel_kernels
from crf.gaussian import AxisGrid, IntensityBasis, axis_band, axis_grid, intensity_basis
from crf.potentials import clip_probabilities
from crf.problem import Problem
from crf.reference import Filter

GRID_BYTES_PER_VOXEL = 40
"""Memory the grid may take; terms that do not fit are handled in further sweeps."""

SCRATCH_BYTES = 16_000_000
"""Room for rows and planes that the loops work on."""

CACHED_BYTES = 3_000_000
"""Penalties of the planes that are finished together, so that a core keeps them in its cache."""

Float = NDArray[np.float32]
Ranges = list[tuple[int, int]]
Work = Callable[[int, int], Any]
ForEach = Callable[[Work, Ranges], list[Any]]


@contextmanager
def _threads(n_threads: int | None) -> Iterator[ForEach]:
    """A function that applies another one to ranges, on n threads; one thread means the caller's own."""
    if n_threads is None:
        n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_threads < 1:
        raise ValueError(f"n_threads is {n_threads}; give at least 1, or None for one per core.")
    if n_threads == 1:
        yield lambda work, ranges: [work(start, stop) for start, stop in ranges]
        return
    with ThreadPoolExecutor(n_threads, thread_name_prefix="crf") as pool:
        yield lambda work, ranges: list(pool.map(lambda r: work(*r), ranges))


def _split(n: int, n_parts: int, unit: int = 1) -> Ranges:
    """Cut 0..n into at most n_parts ranges whose starts are multiples of `unit`."""
    size = max(1, -(-n // (n_parts * unit))) * unit
    return [(start, min(start + size, n)) for start in range(0, n, size)]


INTENSITY_SHARE = 0.3
SPACE_SHARE = 0.23
"""How the tolerance is shared between the intensity and each of the three axes."""


class PhaseLayout:
    """The order in which columns are stored along X, so that the grid's pitch never means strided access.

    With pitch 4 and two cells, voxels 0 1 2 3 | 4 5 6 7 are stored as 0 4 | 1 5 | 2 6 | 3 7: the voxels with the
    same place in their cell, which have the same window weights, are neighbours. Long rows are cut into tiles
    that are ordered one by one. Rows are filled up to whole cells with columns of normalisation zero.

    Attributes
    ----------
    order : ndarray of int64, shape (n_stored,)
        The x of every stored column; X and beyond for filling.
    pitch : int
    tile : int
        Columns of a full tile.
    n_tiles : int
    """

    def __init__(self, size: int, pitch: int) -> None:
        self.size, self.pitch = size, pitch
        n_stored = -(-size // pitch) * pitch
        self.tile = max(1, gather_kernels.TILE // pitch) * pitch
        tiles = [np.arange(start, min(start + self.tile, n_stored)) for start in range(0, n_stored, self.tile)]
        self.n_tiles = len(tiles)
        self.order = np.concatenate([x.reshape(-1, pitch).T.ravel() for x in tiles])
        self._source = np.minimum(self.order, size - 1)
        self._is_filling = self.order >= size
        self._voxels = np.argsort(self.order)[:size]

    def n_tile_nodes(self, axis: AxisGrid) -> int:
        """Nodes along X when every tile keeps its own copy of those it shares with the next."""
        return axis.n_nodes + (self.n_tiles - 1) * (axis.taps.shape[1] - 1)

    def store(self, rows: NDArray, filling: float) -> NDArray:
        """Reorder the last axis of an array and write `filling` into the columns that are not voxels."""
        if self.pitch == 1:
            return rows
        stored = np.take(rows, self._source, axis=-1)
        stored[..., self._is_filling] = filling
        return stored

    def restore(self, stored: NDArray) -> NDArray:
        """Put the last axis back into the order of the volume."""
        return stored if self.pitch == 1 else np.take(stored, self._voxels, axis=-1)


class BilateralFilter:
    """The bilateral kernel on a grid: adds mixed, normalised messages to a penalty volume."""

    def __init__(self, problem: Problem, n_channels: int, for_each: ForEach) -> None:
        self.for_each = for_each
        self.self_share = np.float32(0.0 if problem.include_self else 1.0)
        self.axes = [
            axis_grid(size, sigma, SPACE_SHARE * problem.tolerance)
            for size, sigma in zip(problem.shape, problem.bilateral_sigma, strict=True)
        ]
        self.layout = PhaseLayout(problem.shape[2], self.axes[2].pitch)
        levels, n_levels = problem.levels()
        self.levels = self.layout.store(levels, 0)
        self.basis: IntensityBasis = intensity_basis(
            problem.intensity_sigma, problem.intensity_ranges, n_levels, INTENSITY_SHARE * problem.tolerance
        )
        n_nodes = self.axes[0].n_nodes * self.axes[1].n_nodes * self.layout.n_tile_nodes(self.axes[2])
        budget = GRID_BYTES_PER_VOXEL * int(np.prod(problem.shape)) // (4 * n_nodes * n_channels)
        n_sweeps = -(-self.basis.n_terms // max(1, budget))
        self.terms_at_once = -(-self.basis.n_terms // n_sweeps)
        self._grid_memory = np.empty(0, dtype=np.float32)
        self.scale = self._measure_scale()

    def _measure_scale(self) -> Float:
        """n_i = (sum_j k_ij)^-1/2, the sum by the very filter that uses it."""
        Z, Y, X = self.levels.shape[1:]
        self.scale = self.layout.store(np.ones((Z, Y, self.layout.size), dtype=np.float32), 0.0)
        total = np.zeros((Z, 1, Y, X), dtype=np.float32)
        self.add_message(np.ones_like(total), np.ones((1, 1), np.float32), total, with_self=True)
        is_voxel, scale = self.scale, total[:, 0]

        def invert_root(start: int, stop: int) -> None:
            part = scale[start:stop]
            # The true sum is at least one because k_ii = 1.
            np.sqrt(np.maximum(part, 1.0, out=part), out=part)
            np.divide(is_voxel[start:stop], part, out=part)

        self.for_each(invert_root, _split(Z, 16))
        return scale

    @property
    def n_sweeps(self) -> int:
        """How often the grid is filled for one message."""
        return -(-self.basis.n_terms // self.terms_at_once)

    def add_message(self, belief: Float, matrix: Float, penalty: Float, with_self: bool = False) -> None:
        """penalty (Z, C, Y, X) += matrix · n · K (n · belief), without the self term unless asked."""
        for add_planes in self.sweeps(belief, matrix, penalty, with_self):
            self.for_each(add_planes, _split(len(belief), 16))

    def sweeps(self, belief: Float, matrix: Float, penalty: Float, with_self: bool = False) -> Iterator[Work]:
        """The same in parts: fills the grid and yields what adds its share to a range of planes of the penalty."""
        nodes = [axis.n_nodes for axis in self.axes]
        taps = [axis.taps for axis in self.axes]
        for first in range(0, self.basis.n_terms, self.terms_at_once):
            n_terms = min(self.terms_at_once, self.basis.n_terms - first)
            n_rows = n_terms * belief.shape[1]
            grid = self._empty_grid((nodes[0], nodes[1], n_rows * self.layout.n_tile_nodes(self.axes[2])))
            bumps = (self.scale, self.levels, self.basis.tables, self.basis.terms, first, n_terms)
            self._gather(belief, bumps, grid)
            self._blur(grid, n_rows)
            share = np.float32(0.0) if with_self or first > 0 else self.self_share
            yield partial(read_kernels.read_back, grid, belief, *bumps, *taps, matrix, share, penalty)

    def _empty_grid(self, shape: tuple[int, int, int]) -> Float:
        """Zeros in memory that is used again: the system takes longer to provide new pages than to fill old ones."""
        size = int(np.prod(shape))
        if len(self._grid_memory) < size:
            self._grid_memory = np.empty(size, dtype=np.float32)
        grid = self._grid_memory[:size].reshape(shape)
        self.for_each(lambda start, stop: grid[start:stop].fill(0.0), _split(shape[0], 16))
        return grid

    def _gather(self, belief: Float, bumps: tuple, grid: Float) -> None:
        pitch, n_taps = self.axes[0].taps.shape
        size, n_cells = len(belief), -(-len(belief) // pitch)
        taps = [axis.taps for axis in self.axes]

        def work(start: int, stop: int) -> None:
            gather_kernels.gather(belief, *bumps, *taps, grid, start * pitch, min(stop * pitch, size))

        # A slab reaches n_taps - 1 nodes into the next one, so every other slab may run at the same time.
        slabs = _split(n_cells, max(1, min(16, n_cells // max(1, n_taps - 1))))
        if len(slabs) > 1 and slabs[-1][1] - slabs[-1][0] < n_taps - 1:
            slabs[-2:] = [(slabs[-2][0], slabs[-1][1])]
        self.for_each(work, slabs[0::2])
        self.for_each(work, slabs[1::2])

    def _blur(self, grid: Float, n_rows: int) -> None:
        along_z, along_y, along_x = self.axes
        tile_cells, n_shared = self.layout.tile // along_x.pitch, along_x.taps.shape[1] - 1
        rows = (along_y.blur, along_x.blur, n_rows, along_x.n_nodes, tile_cells, n_shared)
        self.for_each(lambda *z: gather_kernels.blur_planes(grid, *rows, *z), _split(len(grid), 16))
        columns = grid.reshape(len(grid), -1)
        ones = np.ones(len(grid), dtype=np.float32)
        self.for_each(
            lambda start, stop: voxel_kernels.filter_columns(columns, columns, along_z.blur, ones, start, stop),
            _split(columns.shape[1], 16, voxel_kernels.COLUMNS),
        )


class SpatialFilter:
    """The spatial kernel, exact up to its radius: replaces a penalty volume by mixed, normalised messages."""

    def __init__(self, problem: Problem, layout: PhaseLayout, for_each: ForEach) -> None:
        self.for_each = for_each
        self.self_share = np.float32(0.0 if problem.include_self else 1.0)
        axes = [axis_band(n, s, problem.tolerance) for n, s in zip(problem.shape, problem.spatial_sigma, strict=True)]
        self.taps = [axis.taps for axis in axes]
        self.scales = (axes[0].scale, axes[1].scale, layout.store(axes[2].scale, 0.0))
        self.layout = layout

    def set_message(self, belief: Float, matrix: Float, penalty: Float) -> None:
        """penalty (Z, C, Y, X) = matrix · n · K (n · belief), without the self term unless the problem has it."""
        self.for_each(self.begin_message(belief, matrix, penalty), _split(len(belief), 16))

    def begin_message(self, belief: Float, matrix: Float, penalty: Float) -> Work:
        """Filter along Z; returns what finishes a range of planes of the penalty."""
        source, target = (volume.reshape(len(volume), -1) for volume in (belief, penalty))
        self.for_each(
            lambda start, stop: voxel_kernels.filter_columns(source, target, self.taps[0], self.scales[0], start, stop),
            _split(source.shape[1], 16, voxel_kernels.COLUMNS),
        )
        columns = (self.scales, self.layout.pitch, self.layout.tile)
        return partial(voxel_kernels.finish_spatial, penalty, belief, *self.taps[1:], *columns, matrix, self.self_share)


def peak_bytes(
    shape: tuple[int, int, int], n_classes: int, n_image_channels: int, sigma: tuple[float, ...], tolerance: float
) -> int:
    """Upper bound of what `refine_compiled` takes above its inputs.

    Parameters
    ----------
    shape : tuple of 3 ints
    n_classes, n_image_channels : int
    sigma : tuple of 3 floats
        Width of the bilateral kernel in voxels.
    tolerance : float

    Returns
    -------
    int
    """
    axes = [axis_grid(n, s, SPACE_SHARE * tolerance) for n, s in zip(shape, sigma, strict=True)]
    layout = PhaseLayout(shape[2], axes[2].pitch)
    n_stored = shape[0] * shape[1] * len(layout.order)
    n_nodes = axes[0].n_nodes * axes[1].n_nodes * layout.n_tile_nodes(axes[2])
    # At least one term must fit at a time, which on volumes thinner than the kernel takes more than the budget.
    grid = max(GRID_BYTES_PER_VOXEL * n_stored, 4 * n_nodes * (n_classes - 1))
    volumes = 4 * (3 * (n_classes - 1) + 1) + 2 * n_image_channels + 8
    result = 4 * (n_classes - 1) + 4 * n_classes
    return max(volumes * n_stored + grid, result * n_stored) + SCRATCH_BYTES


def refine_compiled(problem: Problem, n_threads: int | None = None) -> Float:
    """Refine on the CPU.

    Parameters
    ----------
    problem : Problem
    n_threads : int, optional
        Default: one per core this process may use.

    Returns
    -------
    ndarray of float32, shape (K, Z, Y, X)
    """
    n_channels = problem.n_classes - 1
    with _threads(n_threads) as for_each:
        bilateral = BilateralFilter(problem, n_channels, for_each) if problem.penalties[0].any() else None
        layout = bilateral.layout if bilateral is not None else PhaseLayout(problem.shape[2], 1)
        spatial = SpatialFilter(problem, layout, for_each) if problem.penalties[1].any() else None
        belief, log_odds = _start(problem, layout, for_each)
        _iterate(problem, bilateral, spatial, belief, log_odds, for_each)
        del log_odds
        return _all_classes(belief, layout, for_each)


def _start(problem: Problem, layout: PhaseLayout, for_each: ForEach) -> tuple[Float, Float]:
    """First beliefs and log-odds against the last class, both (Z, K - 1, Y, stored X)."""
    n_classes, Z, Y, _ = problem.probabilities.shape
    belief = np.empty((Z, n_classes - 1, Y, len(layout.order)), dtype=np.float32)
    log_odds = np.empty_like(belief)

    def work(start: int, stop: int) -> None:
        for z in range(start, stop):
            clipped = layout.store(clip_probabilities(problem.probabilities[:, z], dtype=np.float32), 1.0 / n_classes)
            belief[z] = clipped[:-1]
            np.log(clipped, out=clipped)
            np.subtract(clipped[:-1], clipped[-1], out=log_odds[z])

    for_each(work, _split(Z, 16))
    return belief, log_odds


def _iterate(
    problem: Problem,
    bilateral: BilateralFilter | None,
    spatial: SpatialFilter | None,
    belief: Float,
    log_odds: Float,
    for_each: ForEach,
) -> None:
    """Run the mean-field iterations on `belief`, in place."""
    (wide, wide_offset), (near, near_offset) = problem.reduced_penalties()
    _subtract_offsets(bilateral, wide_offset, spatial, near_offset, log_odds)
    # Unlike zeros_like, zeros leaves it to the threads to touch the pages first.
    penalty = np.zeros(belief.shape, dtype=np.float32)
    planes = [volume.reshape(*volume.shape[:2], -1) for volume in (belief, log_odds, penalty)]
    # What remains to be done is done plane by plane: each is read from memory once and stays in the cache.
    slabs = _split(len(belief), max(16, penalty.nbytes // CACHED_BYTES))
    for _ in range(problem.n_iterations):
        if spatial is not None:
            remaining = [spatial.begin_message(belief, near, penalty)]
        else:
            remaining = [lambda start, stop: penalty[start:stop].fill(0.0)]
        if bilateral is not None:
            for n_done, add_planes in enumerate(bilateral.sweeps(belief, wide, penalty), start=1):
                remaining.append(add_planes)
                if n_done < bilateral.n_sweeps:
                    for_each(_in_turn(remaining), slabs)
                    remaining = []
        remaining.append(partial(voxel_kernels.update, *planes))
        changes = for_each(_in_turn(remaining), slabs)
        if max(changes) < problem.stop_change:
            break


def _in_turn(works: list[Work]) -> Work:
    """One after the other on a range; gives what the last one gives."""

    def work(start: int, stop: int) -> Any:
        for each in works[:-1]:
            each(start, stop)
        return works[-1](start, stop)

    return work


def _subtract_offsets(
    bilateral: BilateralFilter | None,
    wide_offset: Float,
    spatial: SpatialFilter | None,
    near_offset: Float,
    log_odds: Float,
) -> None:
    """Take the part of the penalties that is the same in every iteration, offset · F(1), off the log-odds."""
    ones = np.ones((len(log_odds), 1, *log_odds.shape[2:]), dtype=np.float32)
    message = np.zeros(ones.shape, dtype=np.float32)
    if bilateral is not None:
        bilateral.add_message(ones, np.ones((1, 1), np.float32), message)
        _subtract_product(log_odds, wide_offset, message, bilateral.for_each)
    if spatial is not None:
        spatial.set_message(ones, np.ones((1, 1), np.float32), message)
        _subtract_product(log_odds, near_offset, message, spatial.for_each)


def _subtract_product(log_odds: Float, offset: Float, message: Float, for_each: ForEach) -> None:
    def work(start: int, stop: int) -> None:
        for z in range(start, stop):
            log_odds[z] -= offset[:, None, None] * message[z]

    for_each(work, _split(len(log_odds), 16))


def _all_classes(belief: Float, layout: PhaseLayout, for_each: ForEach) -> Float:
    """(Z, K - 1, Y, stored X) → (K, Z, Y, X), the last class being what the others leave of one."""
    Z, n_channels, Y, _ = belief.shape
    out = np.empty((n_channels + 1, Z, Y, layout.size), dtype=np.float32)

    def work(start: int, stop: int) -> None:
        for z in range(start, stop):
            out[:-1, z] = layout.restore(belief[z])
            out[-1, z] = np.maximum(1.0 - out[:-1, z].sum(axis=0), 0.0)

    for_each(work, _split(Z, 16))
    return out


@contextmanager
def compiled_filters(problem: Problem, n_threads: int | None = None) -> Iterator[tuple[Filter, Filter]]:
    """Both filters by themselves, for energies and tests: (K, Z, Y, X) → (K, Z, Y, X) in float64.

    Parameters
    ----------
    problem : Problem
    n_threads : int, optional

    Yields
    ------
    pair of callables
        Bilateral and spatial, normalised, without the self term unless the problem includes it.
    """
    with _threads(n_threads) as for_each:
        identity = np.eye(problem.n_classes, dtype=np.float32)
        wide = BilateralFilter(problem, problem.n_classes, for_each)
        near = SpatialFilter(problem, wide.layout, for_each)

        def bilateral(belief: NDArray[np.float64]) -> NDArray[np.float64]:
            source = _stored(belief)
            message = np.zeros_like(source)
            wide.add_message(source, identity, message)
            return _restored(message)

        def spatial(belief: NDArray[np.float64]) -> NDArray[np.float64]:
            source = _stored(belief)
            message = np.empty_like(source)
            near.set_message(source, identity, message)
            return _restored(message)

        def _stored(belief: NDArray[np.float64]) -> Float:
            return np.ascontiguousarray(wide.layout.store(belief.swapaxes(0, 1), 0.0), dtype=np.float32)

        def _restored(message: Float) -> NDArray[np.float64]:
            return wide.layout.restore(message).swapaxes(0, 1).astype(np.float64)

        yield bilateral, spatial
