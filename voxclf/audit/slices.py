"""Labelled slices that fit the image better a slice or two further on: labels saved under the wrong number.

Every labelled slice is compared with the out-of-fold probabilities of its own plane and of those one and two before
and after. The log probability of its labels is averaged over cells of the plane, because neighbouring voxels err
together; a shift is reported where the cells agree that it is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.audit.regions import FLOOR, neighbours_inside, plane_stack
from voxclf.geometry import Block
from voxclf.labels import LabelSet
from voxclf.probabilities import dequantise

REACH = 2
"""Furthest shift looked for, slices."""
CELL = 64
"""Side of the cells, voxels."""
LEAST_CELLS = 6
LEAST_T = 4.0
"""Mean gain over its standard error, from cell to cell. Several slices and shifts are tried, so 2 would be too few."""
LEAST_GAIN = 0.25
"""Least gain as a share of what a shift of one slice costs the other slices, so that a slice that was imaged a bit
sharper than its neighbour is not taken for theirs."""


@dataclass(frozen=True)
class SliceFit:
    """How well the labels of one slice fit each plane around it.

    Parameters
    ----------
    axis, position : int
        Which slice.
    n_voxels : int
        Labelled voxels.
    cells : ndarray of float64, shape (2 REACH + 1, cells)
        Mean log probability of the labels in each cell, for shifts of -REACH .. REACH; NaN outside the volume.
    """

    axis: int
    position: int
    n_voxels: int
    cells: NDArray[np.float64]

    @property
    def gains(self) -> NDArray[np.float64]:
        """Mean gain in log probability of each shift, nats per voxel, shape (2 REACH + 1,)."""
        return (self.cells - self.cells[REACH]).mean(axis=1)

    @property
    def t(self) -> NDArray[np.float64]:
        """Gain over its standard error; 0 for no shift."""
        difference = self.cells - self.cells[REACH]
        error = difference.std(axis=1, ddof=1) / np.sqrt(difference.shape[1])
        return np.divide(difference.mean(axis=1), error, out=np.zeros(len(error)), where=error > 0)


@dataclass(frozen=True)
class SliceShift:
    """A slice that lies elsewhere.

    Parameters
    ----------
    axis, position : int
        Where its labels stand.
    shift : int
        How many slices further they belong, -2 to 2.
    gain : float
        Nats per voxel that the labels fit better there.
    t : float
        The gain over its standard error.
    n_voxels : int
        Labelled voxels.
    """

    axis: int
    position: int
    shift: int
    gain: float
    t: float
    n_voxels: int

    @property
    def evidence(self) -> float:
        """On the scale of a region's evidence: gain times the root of the size."""
        return float(self.gain * np.sqrt(self.n_voxels))


@dataclass(frozen=True)
class SliceFold:
    """Compares one tile of a slice with the planes around it."""

    label_set: LabelSet
    axis: int
    size: int

    def __call__(self, block: Block, labels: NDArray[Any], probabilities: NDArray[Any]) -> tuple[SliceFit, ...]:
        """Arrays are (C, Z, Y, X), 2 REACH + 1 planes thick."""
        classes = self.label_set.remap_to_indices(plane_stack(labels, self.axis)[0, REACH])
        stored = plane_stack(probabilities, self.axis)
        predicted = stored.any(axis=(0, 1)) & (classes >= 0)
        rows, columns = (np.arange(n) // CELL for n in classes.shape)
        cell = rows[:, None] * (columns[-1] + 1) + columns
        counts = np.bincount(cell[predicted], minlength=1)
        full = np.flatnonzero(counts >= CELL)
        means = np.full((2 * REACH + 1, len(full)), np.nan)
        for i, inside in enumerate(neighbours_inside(block, self.axis, self.size)):
            if inside and len(full):
                chosen = np.take_along_axis(stored[:, i], np.maximum(classes, 0)[None], axis=0)[0]
                fit = np.log(dequantise(chosen[predicted]) + FLOOR)
                means[i] = np.bincount(cell[predicted], weights=fit, minlength=len(counts))[full] / counts[full]
        return (SliceFit(self.axis, block.core.start[self.axis], int(predicted.sum()), means),)


def join_tiles(fits: Sequence[SliceFit]) -> list[SliceFit]:
    """Put the tiles of each slice together."""
    slices: dict[tuple[int, int], list[SliceFit]] = {}
    for fit in fits:
        slices.setdefault((fit.axis, fit.position), []).append(fit)
    return [
        SliceFit(axis, position, sum(f.n_voxels for f in tiles), np.concatenate([f.cells for f in tiles], axis=1))
        for (axis, position), tiles in slices.items()
    ]


def find_shifts(fits: Sequence[SliceFit]) -> list[SliceShift]:
    """Say which slices fit better elsewhere, and where.

    Notes
    -----
    Slices with fewer than six cells of labels are not judged: there is no telling luck from a shift.
    """
    judged = [fit for fit in fits if fit.cells.shape[1] >= LEAST_CELLS]
    if not judged:
        return []
    one_slice = [-fit.gains[REACH + step] for fit in judged for step in (-1, 1)]
    least_gain = LEAST_GAIN * max(float(np.nanmedian(one_slice)), 0.0)
    found = []
    for fit in judged:
        gains = np.where(np.isnan(fit.gains), -np.inf, fit.gains)
        best = int(gains.argmax())
        if best != REACH and fit.t[best] >= LEAST_T and gains[best] >= least_gain:
            found.append(
                SliceShift(fit.axis, fit.position, best - REACH, float(gains[best]), float(fit.t[best]), fit.n_voxels)
            )
    return found
