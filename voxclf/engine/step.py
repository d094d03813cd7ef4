"""The contract between what computes (trees, networks, the CRF) and what moves data (the engine).

A step *declares* four facts and the engine obeys: it never asks what kind of step it runs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from voxclf.geometry import ORIGIN, UNIT, Zyx


class Step(Protocol):
    """Block in, smaller block out: ``(C, Z + 2h, Y + 2h, X + 2h) → (K, Z, Y, X)``, same voxel in the middle.

    Attributes
    ----------
    halo : (z, y, x)
        Voxels needed on *each side*. Receptive field = 2·halo + 1 where the alignment is 1.
    alignment : (z, y, x)
        Block starts must be multiples of this.
    out_channels : int
        K, so that the output volume can be created before any worker starts.
    """

    @property
    def halo(self) -> Zyx: ...  # noqa: D102

    @property
    def alignment(self) -> Zyx: ...  # noqa: D102

    @property
    def out_channels(self) -> int: ...  # noqa: D102

    def working_bytes(self, core_shape: Zyx) -> int:
        """Memory that one call needs for a core of this shape, its input and output included."""
        ...

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Compute the block; one array per input volume, each (C, Z + 2h, Y + 2h, X + 2h)."""
        ...


@runtime_checkable
class EdgeAwareStep(Step, Protocol):
    """A step that is given nothing beyond the edge of the volume, where others are given its mirror image."""

    def at_edge(self, outside: tuple[Zyx, Zyx]) -> Step:
        """The step for a block whose halo lacks so many voxels, before it and after it, for they are outside."""
        ...


class CopyStep:
    """Hands its input on unchanged: conversion between formats and the levels of a pyramid."""

    halo: Zyx = ORIGIN
    alignment: Zyx = UNIT

    def __init__(self, n_channels: int, itemsize: int = 4) -> None:
        self.out_channels = n_channels
        self._itemsize = itemsize

    def working_bytes(self, core_shape: Zyx) -> int:
        """Input and output of one block; a pyramid level reads up to eight times what it writes."""
        return int(np.prod(core_shape)) * self.out_channels * self._itemsize * 9

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Return the only input."""
        (array,) = arrays
        return array
