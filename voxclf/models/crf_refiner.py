"""The dense CRF as a step: blocks of images and stored probabilities in, refined probabilities out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crf import DenseCRF
from voxclf.geometry import ORIGIN, UNIT, VoxelSize, Zyx, add, subtract
from voxclf.models.crf_parameters import CrfParameters
from voxclf.probabilities import UINT8_LEVELS, dequantise
from voxclf.provenance import sample_boxes
from voxclf.volume import Volume

UINT16_MAX = 65535
SUM_TOLERANCE = 1e-2
"""How far stored probabilities may be from summing to one, beside what rounding to 8 bits does."""

SMOOTHING_REACH = 3.0
"""Widths after which the Gaussian that smooths the image ends."""

Window = tuple[float, float]
"""Intensities that count as 0 and 1; beyond them they are cut off."""


def measure_intensity_windows(images: Sequence[Volume]) -> tuple[Window, ...] | None:
    """Intensities that count as 0 and 1 in each channel: the middle 98 % of the volume, or None, 0 and 255.

    None where all is 8-bit. Measured once in samples of the whole volume and never in a block, so that blocks of any
    size agree.
    """
    if all(volume.dtype == np.uint8 for volume in images):
        return None
    windows: list[Window] = []
    for volume in images:
        if volume.dtype == np.uint8:
            windows += [(0.0, 255.0)] * volume.n_channels
            continue
        samples = [volume.read(box.start, box.stop) for box in sample_boxes(volume.shape)]
        channels = np.concatenate([sample.reshape(volume.n_channels, -1) for sample in samples], axis=1)
        for low, high in np.percentile(channels.astype(np.float64), [1, 99], axis=1).T.tolist():
            windows.append((low, high) if high > low else (low, low + 1.0))
    return tuple(windows)


@dataclass(frozen=True)
class CrfRefiner:
    """The step of the dense CRF: volumes of image channels, (C, Z, Y, X) each, then probabilities (K, Z, Y, X).

    All are read as they are stored. Mean field is never exactly local: a block equals the whole volume but for a
    fraction ``tolerance`` of labels, for which :meth:`crf.DenseCRF.halo` gives the halo. Beyond the edge of the volume
    the CRF sees nothing, and :meth:`at_edge` says so: the edge of the volume is then the edge of the arrays.

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
    intensity_windows : tuple of (low, high), optional
        One per image channel, see :func:`measure_intensity_windows`; None for 8-bit images.
    n_threads : int
        For one block; the result does not depend on it.
    device : str
        "cpu" or "cuda".
    n_channels : int
        Channels of all images together.
    image_sigma_nm : float
        Width of the Gaussian that smooths the images first; 0 for none.
    volume_shape : (z, y, x), optional
        Of the whole volume, beyond which no halo reaches.
    outside : (before, after)
        Voxels of the halo beyond the edge of the volume, which the arrays lack, on either side of each axis.
    """

    crf: DenseCRF
    n_classes: int
    voxel_size_nm: VoxelSize
    tolerance: float = 1e-4
    intensity_windows: tuple[Window, ...] | None = None
    n_threads: int = 1
    device: str = "cpu"
    n_channels: int = 1
    image_sigma_nm: float = 0.0
    volume_shape: Zyx | None = None
    outside: tuple[Zyx, Zyx] = (ORIGIN, ORIGIN)
    alignment: Zyx = UNIT

    @property
    def halo(self) -> Zyx:
        """Voxels on each side that settle all labels but the tolerated fraction."""
        return add(self.crf.halo(self.tolerance, self.voxel_size_nm), self._smoothing_radius)

    @property
    def _smoothing_radius(self) -> Zyx:
        z, y, x = (math.ceil(SMOOTHING_REACH * self.image_sigma_nm / size) for size in self.voxel_size_nm)
        return z, y, x

    @property
    def out_channels(self) -> int:
        """Number of classes K."""
        return self.n_classes

    def working_bytes(self, core_shape: Zyx) -> int:
        """What the CRF announces for core and halo, and its inputs as read (4 bytes at most) and as prepared."""
        read = add(core_shape, add(self.halo, self.halo))
        if self.volume_shape is not None:
            z, y, x = (min(n, most) for n, most in zip(read, self.volume_shape, strict=True))
            read = (z, y, x)
        # Beside what is read and prepared, smoothing holds one channel as float, and its result.
        smoothing = 8 if self.image_sigma_nm else 0
        inputs = 4 * (self.n_channels + self.n_classes) + 2 * self.n_channels + 4 * self.n_classes + smoothing
        crf_bytes = self.crf.memory_bytes(read, self.n_classes, self.voxel_size_nm, self.n_channels)
        return inputs * math.prod(read) + crf_bytes

    def at_edge(self, outside: tuple[Zyx, Zyx]) -> CrfRefiner:
        """The step for a block whose halo lacks so many voxels, before it and after it, for they are outside."""
        return replace(self, outside=outside)

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Refine a block: images (C, Z + 2h, …) and probabilities (K, Z + 2h, …) to float32 (K, Z, Y, X).

        The result sums to 1 over K.

        Raises
        ------
        ValueError
            If the probabilities of a voxel do not sum to one, or a voxel of the core has none.
        """
        before, after = (subtract(self.halo, outside) for outside in self.outside)
        z, y, x = (slice(a, n - b) for a, b, n in zip(before, after, arrays[0].shape[1:], strict=True))
        return self.refine(arrays, (z, y, x))

    def refine(self, arrays: Sequence[np.ndarray], core: tuple[slice, slice, slice]) -> np.ndarray:
        """Refine whole arrays as if there were nothing around them, and return a part of the result."""
        *images, stored = arrays
        refined = self.crf.refine(
            self._smooth(self._scale_intensities(images)),
            _as_probabilities(stored, core),
            self.voxel_size_nm,
            backend="compiled" if self.device == "cpu" else "torch",
            n_threads=self.n_threads,
            device=self.device,
        )
        return refined[:, *core]

    def _smooth(self, image: np.ndarray) -> np.ndarray:
        if not self.image_sigma_nm:
            return image
        from scipy.ndimage import gaussian_filter

        sigma = [self.image_sigma_nm / size for size in self.voxel_size_nm]
        smoothed = np.empty_like(image)
        for channel, out in zip(image, smoothed, strict=True):
            out[:] = np.rint(gaussian_filter(channel, sigma, output=np.float32, radius=self._smoothing_radius))
        return smoothed

    def _scale_intensities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        if self.intensity_windows is None:
            return images[0] if len(images) == 1 else np.concatenate(images)
        scaled = np.empty((self.n_channels, *images[0].shape[1:]), np.uint16)
        channels = (channel for image in images for channel in image)
        for out, channel, (low, high) in zip(scaled, channels, self.intensity_windows, strict=True):
            # Sixteen bits are finer than any intensity width that the CRF allows, and half of a float.
            scale = np.float32(UINT16_MAX / (high - low))
            out[:] = np.rint(np.clip((channel - np.float32(low)) * scale, 0, UINT16_MAX))
        return scaled


def make_refiner(
    parameters: CrfParameters, n_classes: int, voxel_size_nm: VoxelSize, tolerance: float = 1e-4, **options: Any
) -> CrfRefiner:
    """The step of some parameters; ``options`` are the other fields of :class:`CrfRefiner`."""
    return CrfRefiner(
        parameters.make_crf(),
        n_classes,
        voxel_size_nm,
        tolerance,
        parameters.intensity_windows,
        image_sigma_nm=parameters.image_sigma_nm,
        **options,
    )


def _as_probabilities(stored: np.ndarray, core: tuple[slice, slice, slice]) -> np.ndarray:
    """Stored probabilities as float32 that sum to one; where a halo was not predicted, all classes are as likely.

    A prediction of a region holds zeros around it, and what the CRF sees there must not be mistaken for a class.
    """
    probabilities = dequantise(stored)
    if np.shares_memory(probabilities, stored):
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
