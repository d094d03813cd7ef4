"""The dense CRF as a step: an image block and its stored probabilities in, refined probabilities out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crf import DenseCRF
from voxclf.geometry import UNIT, VoxelSize, Zyx, add
from voxclf.probabilities import UINT8_LEVELS, dequantise
from voxclf.provenance import IntensityStatistics
from voxclf.volume import Volume

UINT16_MAX = 65535
SUM_TOLERANCE = 1e-2
"""How far stored probabilities may be from summing to one, beside what rounding to 8 bits does."""


def measure_intensity_window(volume: Volume) -> tuple[float, float] | None:
    """Intensities that count as 0 and 1: None, the whole range, for 8 bits; else the middle 98 % of the volume.

    Measured once in samples of the whole volume and never in a block, so that blocks of any size agree.
    """
    if volume.dtype == np.uint8:
        return None
    statistics = IntensityStatistics.measure(volume)
    low, high = statistics.percentile_1, statistics.percentile_99
    return (low, high) if high > low else (low, low + 1.0)


@dataclass(frozen=True)
class CrfRefiner:
    """The step of the dense CRF; two inputs, image (1, Z, Y, X) and probabilities (K, Z, Y, X) as they are stored.

    Mean field is never exactly local: a block equals the whole volume but for a fraction ``tolerance`` of labels,
    for which :meth:`crf.DenseCRF.halo` gives the halo. Beyond the edge of the volume the engine mirrors image and
    probabilities, where ``DenseCRF.refine`` on a whole array sees nothing.

    Parameters
    ----------
    crf : DenseCRF
        The model; widths in nm.
    n_classes : int
        K.
    voxel_size_nm : (z, y, x)
        Of the image.
    tolerance : float
        Fraction of labels that may differ from those of the whole volume refined at once.
    intensity_window : (low, high), optional
        See :func:`measure_intensity_window`; None for 8-bit images.
    n_threads : int
        For one block; the result does not depend on it.
    device : str
        "cpu" or "cuda".
    """

    crf: DenseCRF
    n_classes: int
    voxel_size_nm: VoxelSize
    tolerance: float = 1e-4
    intensity_window: tuple[float, float] | None = None
    n_threads: int = 1
    device: str = "cpu"
    alignment: Zyx = UNIT

    @property
    def halo(self) -> Zyx:
        """Voxels on each side that settle all labels but the tolerated fraction."""
        return self.crf.halo(self.tolerance, self.voxel_size_nm)

    @property
    def out_channels(self) -> int:
        """Number of classes K."""
        return self.n_classes

    def working_bytes(self, core_shape: Zyx) -> int:
        """What the CRF announces for core and halo, and its inputs as read (4 bytes at most) and as prepared."""
        read = add(core_shape, add(self.halo, self.halo))
        inputs = (4 + 4 * self.n_classes) + (2 + 4 * self.n_classes)
        return inputs * math.prod(read) + self.crf.memory_bytes(read, self.n_classes, self.voxel_size_nm)

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Refine a block: (1, Z + 2h, …) and (K, Z + 2h, …) to float32 (K, Z, Y, X), summing to 1 over K.

        Raises
        ------
        ValueError
            If the probabilities of a voxel do not sum to one, or a voxel of the core has none.
        """
        image, stored = arrays
        z, y, x = (slice(h, n - h) for h, n in zip(self.halo, image.shape[1:], strict=True))
        refined = self.crf.refine(
            self._scale_intensity(image[0]),
            _as_probabilities(stored, (z, y, x)),
            self.voxel_size_nm,
            backend="compiled" if self.device == "cpu" else "torch",
            n_threads=self.n_threads,
            device=self.device,
        )
        return refined[:, z, y, x]

    def _scale_intensity(self, image: np.ndarray) -> np.ndarray:
        if self.intensity_window is None:
            return image
        low, high = self.intensity_window
        # Sixteen bits are finer than any intensity width that the CRF allows, and half of a float.
        scale = np.float32(UINT16_MAX / (high - low))
        return np.rint(np.clip((image - np.float32(low)) * scale, 0, UINT16_MAX)).astype(np.uint16)


def _as_probabilities(stored: np.ndarray, core: tuple[slice, slice, slice]) -> np.ndarray:
    """Stored probabilities as float32 that sum to one; where a halo was not predicted, all classes are as likely.

    A prediction of a region holds zeros around it, and what the CRF sees there must not be mistaken for a class.
    """
    probabilities = dequantise(stored)
    if probabilities is stored:
        probabilities = stored.copy()  # the block that was read is not ours to change
    total = probabilities.sum(axis=0)
    is_missing = total == 0
    if is_missing[core].any():
        raise ValueError(
            f"probabilities are 0 for every class at {int(is_missing[core].sum()):,} voxels; these were never "
            "predicted: finish `voxclf predict`, or refine only the --region that was predicted"
        )
    rounding = len(stored) * 0.5 / UINT8_LEVELS if stored.dtype == np.uint8 else 0.0
    off = np.abs(total[~is_missing] - 1)
    if off.size and not off.max() <= SUM_TOLERANCE + rounding:
        raise ValueError(
            f"probabilities of a voxel sum to a value {off.max():.3g} away from 1, allowed is "
            f"{SUM_TOLERANCE + rounding:.3g}; give probabilities as `voxclf predict` writes them: float, or uint8 with "
            "255 meaning 1"
        )
    if is_missing.any():
        total[is_missing] = 1.0
        probabilities[:, is_missing] = 1.0 / len(stored)
    probabilities /= total
    return probabilities
