"""Gaussian kernels as short sums and short filters, with a stated error.

The bilateral kernel  exp(-|c_i - c_j|² / 2θα² - (I_i - I_j)² / 2θβ²)  is split in two, then applied in time
linear in the number of voxels:

1. *Intensity* (`IntensityBasis`). exp(-(x-y)² / 2s²) = sum_b W_b(x) W_b(y) (1 + r), where W_b is a Gaussian bump
   exp(-(x-t_b)² / s²) around one of a few grey levels t_b. The product of two bumps is the wanted kernel times
   exp(-2 (t_b - (x+y)/2)² / s²), so the error r depends on the mean grey level only and is a *relative* one, the
   same for frequent and for rare levels. All weights are positive. (An eigenbasis has a third fewer terms, but
   its error is absolute: where the image is of another brightness all around, a voxel's small true sum drowns.)
2. *Space* (`AxisGrid`). For each b, W_b·Q is gathered per axis onto nodes `pitch` voxels apart with a window
   four nodes wide, blurred there, and read back with the same window: P G P^T. G is fitted by least squares, so the
   error oscillates around zero from voxel to voxel and cancels in sums. Narrow kernels have pitch 1: G is exact.

The spatial kernel exp(-|c_i - c_j|² / 2θγ²) is a product of three exact banded filters (`AxisBand`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PITCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Voxels per grid node that are tried; even, because the compiled loops take two phases of a cell at once."""

MAX_LEVELS = 16384
"""Grey levels a float image is rounded to, at most."""

MAX_TERMS = 512
"""Products of intensity bumps allowed; beyond it a many-channel or very narrow kernel takes hours."""


def kernel_radius(sigma: float, tolerance: float) -> int:
    """Distance in voxels beyond which a Gaussian is left out: its value there is below `tolerance` / 5."""
    return math.ceil(sigma * math.sqrt(2.0 * math.log(5.0 / tolerance)))


def gaussian(distance: NDArray, sigma: float) -> NDArray[np.float64]:
    """exp(-d² / 2 sigma²): one at distance zero, not normalised."""
    return np.exp(-0.5 * (np.asarray(distance, dtype=np.float64) / sigma) ** 2)


# ---------------------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True)
class IntensityBasis:
    """Look-up tables of the bumps W_b, one row per bump, for every image channel.

    Attributes
    ----------
    tables : ndarray of float32, shape (n_channels, n_bumps, n_levels)
        W_b of each grey level; channels with fewer bumps are padded with zeros.
    terms : ndarray of int64, shape (B, n_channels)
        Which bump of each channel the b-th term multiplies. One channel: simply 0..B-1.
    """

    tables: NDArray[np.float32]
    terms: NDArray[np.int64]

    @property
    def n_terms(self) -> int:
        """Number of products B; time grows with it."""
        return len(self.terms)


@lru_cache(maxsize=64)
def _bumps(length: float, tolerance: float) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Centres and weights of the fewest bumps on [0, length] (in widths) with relative error <= tolerance."""
    means = np.linspace(0.0, length, int(10 * length) + 21)
    # Ripple of an infinite row of bumps with pitch h is 2 exp(-pi² / 2h²) (Poisson summation).
    pitch = math.pi / math.sqrt(2.0 * math.log(2.0 / tolerance))
    n = max(2, int(length / pitch))
    while True:
        best_error = math.inf
        for overhang in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2):
            centres = np.linspace(-overhang, length + overhang, n)
            design = np.exp(-2.0 * (means[:, None] - centres) ** 2)
            weights = np.linalg.solve(design.T @ design, design.sum(axis=0))
            error = float(np.abs(design @ weights - 1.0).max())
            if error < best_error and weights.min() > 0.0:
                best_error, best = error, (centres, weights)
        if best_error <= tolerance:
            return (*best, best_error)
        n += 1


def intensity_basis(
    sigmas: tuple[float, ...], ranges: tuple[float, ...], n_levels: int, tolerance: float
) -> IntensityBasis:
    """Build the bumps for images whose levels 0..n_levels-1 span `ranges` of intensity.

    Parameters
    ----------
    sigmas : tuple of float
        Kernel width per image channel, unit of the intensity.
    ranges : tuple of float
        Intensity between the lowest and the highest level, per channel.
    n_levels : int
    tolerance : float
        Largest relative error of the kernel between any two levels, over all channels.

    Returns
    -------
    IntensityBasis

    Raises
    ------
    ValueError
        More than `MAX_TERMS` products would be needed.
    """
    each = tolerance / len(sigmas)
    designs = []
    for sigma, span in zip(sigmas, ranges, strict=True):
        _check_term_count(span / sigma, sigma, span)
        designs.append(_bumps(round(span / sigma, 6), each))
    counts = [len(centres) for centres, _, _ in designs]
    n_terms = math.prod(counts)
    if n_terms > MAX_TERMS:
        raise ValueError(
            f"intensity_sigma {sigmas} over intensity ranges {ranges} needs {n_terms} products of intensity bumps "
            f"({' × '.join(map(str, counts))}); at most {MAX_TERMS} are allowed. Use wider sigmas, fewer image "
            "channels, or a larger tolerance."
        )
    tables = np.zeros((len(sigmas), max(counts), n_levels), dtype=np.float32)
    for channel, ((centres, weights, _), sigma, span) in enumerate(zip(designs, sigmas, ranges, strict=True)):
        position = np.linspace(0.0, span / sigma, n_levels)
        table = np.sqrt(weights)[:, None] * np.exp(-((position - centres[:, None]) ** 2))
        tables[channel, : len(centres)] = table
    # Products of tails must not become subnormal numbers, each of which costs a hundred cycles. Bumps reach four
    # and a half widths then; pairs nine widths apart, whose kernel is 1e-18, are the first to be left out.
    tables[tables < 1e-9] = 0.0
    terms = np.stack(np.meshgrid(*[np.arange(n) for n in counts], indexing="ij"), axis=-1).reshape(n_terms, -1)
    return IntensityBasis(tables, terms.astype(np.int64))


def _check_term_count(length: float, sigma: float, span: float) -> None:
    if length > MAX_TERMS:
        raise ValueError(
            f"intensity_sigma {sigma:g} is {length:.0f} times narrower than the image's intensity range {span:g}; "
            f"at most {MAX_TERMS} times is supported. Integer images are scaled to 0..1 by their type's maximum; "
            "scale float images so that sigma and range match, for example to 0..1."
        )


def float_levels(range_over_sigma: float, tolerance: float) -> int:
    """How many levels a float image is rounded to so that rounding costs less than the tolerance.

    Rounding both intensities by up to half a step changes a kernel value by at most 0.61 · step / sigma, in either
    direction, and over a neighbourhood the changes average out. Steps as fine as the tolerance would need tables
    that no cache holds, so a step of sigma · sqrt(tolerance) / 8 is used: 0.6 % for a single pair at the default,
    and messages within the tolerance (`test_messages_are_within_the_tolerance_over_the_parameter_range`).
    """
    steps = range_over_sigma * 8.0 / math.sqrt(tolerance)
    return int(min(MAX_LEVELS, max(256, math.ceil(steps) + 1)))


# -------------------------------------------------------------------------------------------------------- space


@dataclass(frozen=True)
class AxisGrid:
    """A Gaussian along one axis as gather → blur → read back on nodes `pitch` voxels apart.

    Voxel x lies in cell x // pitch and touches nodes cell .. cell + n_taps - 1 with weights taps[x % pitch].

    Attributes
    ----------
    size : int
        Voxels along the axis.
    pitch : int
        Voxels per node; with pitch 1 nodes are voxels and the filter is exact.
    taps : ndarray of float32, shape (pitch, n_taps)
    blur : ndarray of float32, shape (2 · radius + 1,)
        Symmetric filter along the nodes.
    """

    size: int
    pitch: int
    taps: NDArray[np.float32]
    blur: NDArray[np.float32]

    @property
    def n_nodes(self) -> int:
        """Length of the coarse axis."""
        return -(-self.size // self.pitch) + self.taps.shape[1] - 1

    def matrix(self) -> NDArray[np.float32]:
        """The window as a dense matrix P, shape (size, n_nodes)."""
        matrix = np.zeros((self.size, self.n_nodes), dtype=np.float32)
        voxel = np.arange(self.size)
        for tap in range(self.taps.shape[1]):
            matrix[voxel, voxel // self.pitch + tap] = self.taps[voxel % self.pitch, tap]
        return matrix

    def blur_matrix(self) -> NDArray[np.float32]:
        """The blur as a dense matrix G, shape (n_nodes, n_nodes)."""
        radius = len(self.blur) // 2
        offset = np.arange(self.n_nodes)[None, :] - np.arange(self.n_nodes)[:, None]
        weights = self.blur[np.clip(offset + radius, 0, 2 * radius)]
        return np.where(np.abs(offset) <= radius, weights, 0).astype(np.float32)


def axis_grid(size: int, sigma: float, tolerance: float) -> AxisGrid:
    """The coarsest grid on which a Gaussian of width `sigma` voxels has an error below `tolerance`.

    Parameters
    ----------
    size : int
        Voxels along the axis.
    sigma : float
        Width in voxels.
    tolerance : float
        Largest absolute error of the one-dimensional kernel, whose peak is one.

    Returns
    -------
    AxisGrid
    """
    pitch, taps, blur = _design_axis(float(sigma), float(tolerance))
    return AxisGrid(size, pitch, taps, blur)


@lru_cache(maxsize=64)
def _design_axis(sigma: float, tolerance: float) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
    radius = kernel_radius(sigma, tolerance)
    # A grid pays from two voxels per node on; the error passes 1 % at a pitch of one sigma.
    for pitch in reversed([p for p in PITCHES if 1 < p <= sigma]):
        taps = _window_taps(pitch, sigma)
        blur, error = _fit_blur(taps, sigma, radius)
        if error <= tolerance:
            return pitch, taps.astype(np.float32), blur.astype(np.float32)
    exact = gaussian(np.arange(-radius, radius + 1), sigma)
    return 1, np.ones((1, 1), dtype=np.float32), exact.astype(np.float32)


def _window_taps(pitch: int, sigma: float) -> NDArray[np.float64]:
    """Weight of each voxel of a cell at the four nodes around the cell, shape (pitch, 4).

    A Kaiser-Bessel window, the usual one for gridding (Jackson et al. 1991), whose shape parameter was fitted for
    the smallest largest error between pitches of 0.4 and 0.8 sigma; three times better than a cubic B-spline.
    """
    voxel = (np.arange(pitch) - (pitch - 1) / 2) / pitch
    distance = np.abs(voxel[:, None] - (np.arange(4) - 1.5)) / 2.0
    shape = 13.0 - 5.6 * pitch / sigma
    taps = np.i0(shape * np.sqrt(1.0 - distance**2))
    # The weights of a voxel sum to one, so that sums over smooth surroundings are right: errors cancel there.
    return taps / taps.sum(axis=1, keepdims=True)


def _fit_blur(taps: NDArray[np.float64], sigma: float, radius: int) -> tuple[NDArray[np.float64], float]:
    """The symmetric node filter G that makes P G P^T closest to the Gaussian, and the largest error left."""
    pitch, n_taps = taps.shape
    reach = radius // pitch + 1
    n_cells = reach + n_taps  # cells to each side at which P G P^T can differ from zero or the kernel matters
    cells = np.arange(-n_cells, n_cells + 1)
    # spread[d + n_taps - 1, j, k]: summed products of taps of phases j and k whose nodes lie d apart.
    spread = np.stack(
        [sum(np.outer(taps[:, t], taps[:, t + d]) for t in range(n_taps) if 0 <= t + d < n_taps)
         for d in range(1 - n_taps, n_taps)]
    )  # fmt: skip
    design = np.zeros((len(cells), pitch, pitch, reach + 1))
    for row, cell in enumerate(cells):
        for d in range(1 - n_taps, n_taps):
            node_distance = abs(cell + d)
            if node_distance <= reach:
                design[row, :, :, node_distance] += spread[d + n_taps - 1]
    phase = np.arange(pitch)
    distance = cells[:, None, None] * pitch + phase[None, None, :] - phase[None, :, None]
    wanted = gaussian(distance, sigma)
    rows = design.reshape(-1, reach + 1)
    half = np.linalg.solve(rows.T @ rows, rows.T @ wanted.ravel())
    error = float(np.abs(design @ half - wanted).max())
    return np.concatenate([half[:0:-1], half]), error


@dataclass(frozen=True)
class AxisBand:
    """A normalised Gaussian along one axis, exact up to its radius: diag(scale) K diag(scale).

    Attributes
    ----------
    taps : ndarray of float32, shape (2 · radius + 1,)
        The Gaussian around each voxel; voxels outside the volume count as zero.
    scale : ndarray of float32, shape (size,)
        n_x = (sum_y k_xy)^-1/2. The three axes' scales multiply to the spatial kernel's normalisation.
    """

    taps: NDArray[np.float32]
    scale: NDArray[np.float32]

    def matrix(self) -> NDArray[np.float32]:
        """The filter as a dense matrix, shape (size, size)."""
        radius = len(self.taps) // 2
        offset = np.arange(len(self.scale)) - np.arange(len(self.scale))[:, None]
        kernel = np.where(np.abs(offset) <= radius, self.taps[np.clip(offset + radius, 0, 2 * radius)], 0)
        return self.scale[:, None] * kernel * self.scale


def axis_band(size: int, sigma: float, tolerance: float) -> AxisBand:
    """The rows of a normalised Gaussian of `sigma` voxels on an axis of `size` voxels.

    Parameters
    ----------
    size : int
    sigma : float
        Width in voxels.
    tolerance : float
        The kernel is cut where it is below a fifth of this.

    Returns
    -------
    AxisBand
    """
    radius = min(kernel_radius(sigma, tolerance), size - 1)
    taps = gaussian(np.arange(-radius, radius + 1), sigma)
    total = np.concatenate([[0.0], np.cumsum(taps)])
    voxel = np.arange(size)
    first = np.maximum(radius - voxel, 0)
    last = np.minimum(radius + size - voxel, 2 * radius + 1)
    scale = 1.0 / np.sqrt(total[last] - total[first])
    return AxisBand(taps.astype(np.float32), scale.astype(np.float32))
