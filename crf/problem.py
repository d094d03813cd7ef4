"""One refinement, checked: image, probabilities and a model whose lengths are in voxels of this image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from crf.gaussian import float_levels
from crf.potentials import against_last_class


@dataclass(frozen=True)
class Problem:
    """What every backend needs and nothing else.

    Attributes
    ----------
    image : ndarray, shape (C, Z, Y, X)
        uint8, uint16 or floating point.
    probabilities : ndarray of float, shape (K, Z, Y, X)
    bilateral_sigma, spatial_sigma : tuple of 3 floats
        Kernel widths in voxels (z, y, x).
    intensity_sigma : tuple of C floats
    penalties : pair of ndarray of float64, shape (K, K)
        Bilateral and spatial penalty matrices; all zero switches a kernel off.
    n_iterations : int
    include_self : bool
    tolerance, stop_change : float
    """

    image: NDArray
    probabilities: NDArray
    bilateral_sigma: tuple[float, float, float]
    intensity_sigma: tuple[float, ...]
    spatial_sigma: tuple[float, float, float]
    penalties: tuple[NDArray[np.float64], NDArray[np.float64]]
    n_iterations: int
    include_self: bool
    tolerance: float
    stop_change: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (Z, Y, X)."""
        return self.image.shape[1:]

    @property
    def n_classes(self) -> int:
        """Number of classes K."""
        return len(self.probabilities)

    def intensity(self) -> NDArray[np.float64]:
        """The image in the unit of `intensity_sigma`, shape (C, Z, Y, X): integers over their type's maximum."""
        if np.issubdtype(self.image.dtype, np.integer):
            return self.image / float(np.iinfo(self.image.dtype).max)
        return self.image.astype(np.float64)

    @cached_property
    def intensity_ranges(self) -> tuple[float, ...]:
        """Width of the intensity range of each channel; 0..1 wherever that holds the image, so that blocks agree."""
        return tuple(high - low for low, high in self._float_bounds)

    @cached_property
    def _float_bounds(self) -> tuple[tuple[float, float], ...]:
        if np.issubdtype(self.image.dtype, np.integer):
            return ((0.0, 1.0),) * len(self.image)
        return tuple(_float_range(float(channel.min()), float(channel.max())) for channel in self.image)

    def levels(self) -> tuple[NDArray[np.uint8] | NDArray[np.uint16], int]:
        """The image as grey levels for look-up tables, and how many levels there are.

        Returns
        -------
        levels : ndarray of uint8 or uint16, shape (C, Z, Y, X)
            uint8 images are used without a copy; others are rounded finely enough for `tolerance`.
        n_levels : int
        """
        if self.image.dtype == np.uint8:
            return np.ascontiguousarray(self.image), 256
        widest = max(span / sigma for span, sigma in zip(self.intensity_ranges, self.intensity_sigma, strict=True))
        n_levels = float_levels(widest, self.tolerance)
        is_integer = np.issubdtype(self.image.dtype, np.integer)
        levels = np.empty(self.image.shape, dtype=np.uint16)
        for channel, (low, high) in enumerate(self._float_bounds):
            unit = float(np.iinfo(self.image.dtype).max) if is_integer else 1.0
            factor = (n_levels - 1) / (max(high - low, 1e-30) * unit)
            for z in range(self.shape[0]):
                plane = (self.image[channel, z].astype(np.float64) - low * unit) * factor
                levels[channel, z] = np.rint(plane)
        return levels, n_levels

    def reduced_penalties(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Bilateral and spatial penalties measured against the last class, see `against_last_class`."""
        reduced = [against_last_class(matrix) for matrix in self.penalties]
        return [(matrix.astype(np.float32), offset.astype(np.float32)) for matrix, offset in reduced]


def _float_range(low: float, high: float) -> tuple[float, float]:
    """0..1 as far as that holds the image, else the image's own range."""
    is_near_unit = low >= -1.0 and high <= 2.0
    return (min(low, 0.0), max(high, 1.0)) if is_near_unit else (low, high)
