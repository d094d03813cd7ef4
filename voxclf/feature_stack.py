"""All that a tree sees of a voxel: filter-bank features of the image and, with autocontext, of class probabilities."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np

from features.bank import FilterBank
from voxclf.geometry import VoxelSize, Zyx

# Scales of the context in in-plane voxels: from the voxel's own probability to the size of an organelle.
CONTEXT_SIGMAS: dict[int, tuple[float, ...]] = {2: (1.0, 2.0, 4.0, 8.0, 16.0), 3: (0.7, 1.6, 3.5, 5.0)}


def make_context_bank(bank: FilterBank, voxel_size_nm: VoxelSize) -> FilterBank:
    """Build the filters that describe the probabilities around a voxel: Gaussians, in the dimensions of the image's."""
    in_plane = min(voxel_size_nm[1:])
    sigmas = tuple(float(f"{sigma * in_plane:.3g}") for sigma in CONTEXT_SIGMAS[bank.dimensions])
    return FilterBank("multiscale", bank.dimensions, sigmas, ("gaussian",), neighbours=bank.dimensions == 2)


@dataclass(frozen=True)
class FeatureStack:
    """Which features a model reads, in order.

    Parameters
    ----------
    bank : FilterBank
        Filters of the image.
    voxel_size_nm : (z, y, x)
    context : FilterBank, optional
        Filters of each class's probability in the round before (autocontext); None in the first round.
    class_names : tuple of str, length K
        Names the context features; empty without a context.
    """

    bank: FilterBank
    voxel_size_nm: VoxelSize
    context: FilterBank | None = None
    class_names: tuple[str, ...] = ()

    @property
    def halo(self) -> Zyx:
        """Voxels (z, y, x) needed on each side of a block, of the image and of the probabilities alike."""
        image = self.bank.halo(self.voxel_size_nm)
        if self.context is None:
            return image
        z, y, x = (max(a, b) for a, b in zip(image, self.context.halo(self.voxel_size_nm), strict=True))
        return z, y, x

    @property
    def n_features(self) -> int:
        """Number of features F."""
        per_class = self.context.n_features if self.context else 0
        return self.bank.n_features + per_class * len(self.class_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of every feature, in order."""
        own = self.bank.names(self.voxel_size_nm)
        if self.context is None:
            return own
        context = self.context.names(self.voxel_size_nm)
        return (*own, *(f"p({label}): {name}" for label in self.class_names for name in context))

    def working_bytes(self, core: Zyx) -> int:
        """Memory that :meth:`compute` holds for a core of this shape: features, and what the filters need meanwhile."""
        banks = [self.bank, self.context] if self.context else [self.bank]
        scratch = max(bank.working_bytes(core, self.voxel_size_nm) for bank in banks)
        return 4 * self.n_features * math.prod(core) + scratch

    def compute(self, image: np.ndarray, probabilities: np.ndarray | None = None) -> np.ndarray:
        """Compute the features of a block.

        Parameters
        ----------
        image : ndarray, shape (Z + 2 hz, Y + 2 hy, X + 2 hx)
            Grey values with a margin of :attr:`halo`.
        probabilities : ndarray of uint8, shape (K, Z + 2 hz, Y + 2 hy, X + 2 hx), optional
            Of the round before, with the same margin; needed with a context.

        Returns
        -------
        ndarray of float32, shape (F, Z, Y, X)
            In memory that the calling thread's next call uses again: copy what must last.
        """
        core = tuple(n - 2 * h for n, h in zip(image.shape, self.halo, strict=True))
        features = _borrow((self.n_features, *core))
        n = self.bank.n_features
        self.bank.compute(self._trim(image, self.bank), self.voxel_size_nm, out=features[:n])
        if self.context is not None:
            assert probabilities is not None, "a stack with a context needs the probabilities of the round before"
            for channel in probabilities:
                end = n + self.context.n_features
                self.context.compute(self._trim(channel, self.context), self.voxel_size_nm, out=features[n:end])
                n = end
        return features

    def _trim(self, array: np.ndarray, bank: FilterBank) -> np.ndarray:
        """Cut the common margin down to what one bank needs."""
        margins = (h - b for h, b in zip(self.halo, bank.halo(self.voxel_size_nm), strict=True))
        z, y, x = (slice(m, n - m) for m, n in zip(margins, array.shape, strict=True))
        return array[z, y, x]


_memory = threading.local()


def _borrow(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for features, kept by each thread from block to block.

    Pages of fresh memory cost more to touch (0.04-0.2 s per 100 MB) than filling them with features.
    """
    size = int(np.prod(shape))
    if getattr(_memory, "floats", None) is None or _memory.floats.size < size:
        _memory.floats = None  # given back before more is asked for
        _memory.floats = np.empty(size, np.float32)
    floats: np.ndarray = _memory.floats
    return floats[:size].reshape(shape)
