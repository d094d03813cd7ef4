"""What a network reads of a volume: its intensities and, if asked for, filter-bank features, each channel normalised.

Mean and standard deviation of every channel are those of the *training volume* and are kept with the model.
Normalising each block by its own statistics would make a voxel's probabilities depend on how the volume is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.bank import FilterBank
from voxclf.engine.transfer import read_block
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import ORIGIN, Zyx, add, make_block
from voxclf.provenance import IntensityStatistics, sample_boxes
from voxclf.volume import Volume

LEAST_STD = 1e-6
"""Channels that hardly vary are only centred: dividing by rounding noise would make noise of them."""


@dataclass(frozen=True)
class NetworkInput:
    """Turns a piece of a volume into the channels of a network.

    Parameters
    ----------
    mean, std : tuple of float, length C
        What each channel is centred and divided by.
    stack : FeatureStack, optional
        Features given beside the intensities; channel 0 is the intensity either way.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    stack: FeatureStack | None = None

    def __post_init__(self) -> None:
        expected = 1 + (self.stack.n_features if self.stack else 0)
        if len(self.mean) != expected or len(self.std) != expected or not min(self.std) > 0:
            raise ValueError(
                f"mean and std have {len(self.mean)} and {len(self.std)} entries; {expected} are needed, std above 0: "
                "measure them on the training volume"
            )

    @classmethod
    def measure(cls, volume: Volume, stack: FeatureStack | None = None) -> NetworkInput:
        """Measure the normalisation on 27 small boxes spread over a volume."""
        intensity = IntensityStatistics.measure(volume)
        means, stds = [intensity.mean], [intensity.std]
        if stack is not None:
            moments = []
            for index, box in enumerate(sample_boxes(volume.shape)):
                rows = stack.compute(read_block(volume, make_block(index, box, stack.halo))[0]).astype(np.float64)
                moments.append((box.n_voxels, rows.mean(axis=(1, 2, 3)), rows.var(axis=(1, 2, 3))))
            counts, centres, variances = (np.array(part) for part in zip(*moments, strict=True))
            mean = np.average(centres, axis=0, weights=counts)
            means += mean.tolist()
            stds += np.sqrt(np.average(variances + (centres - mean) ** 2, axis=0, weights=counts)).tolist()
        return cls(tuple(means), tuple(std if std > LEAST_STD else 1.0 for std in stds), stack)

    @property
    def n_channels(self) -> int:
        """Channels C of the network's input."""
        return len(self.mean)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of every channel."""
        return ("intensity",) if self.stack is None else ("intensity", *self.stack.names)

    @property
    def halo(self) -> Zyx:
        """Voxels (z, y, x) that :meth:`compute` needs beyond what it returns, on each side."""
        return ORIGIN if self.stack is None else self.stack.halo

    def compute(self, image: np.ndarray) -> np.ndarray:
        """Compute the channels of a piece of the volume.

        Parameters
        ----------
        image : ndarray, shape (Z + 2 hz, Y + 2 hy, X + 2 hx)
            Grey values with a margin of :attr:`halo`.

        Returns
        -------
        ndarray of float32, shape (C, Z, Y, X)
            The caller's own.
        """
        z, y, x = (slice(h, n - h) for h, n in zip(self.halo, image.shape, strict=True))
        inner = image[z, y, x]
        channels = np.empty((self.n_channels, *inner.shape), np.float32)
        channels[0] = inner
        if self.stack is not None:
            channels[1:] = self.stack.compute(image)
        for channel, mean, std in zip(channels, self.mean, self.std, strict=True):
            channel -= np.float32(mean)
            channel /= np.float32(std)
        return channels

    def working_bytes(self, core: Zyx) -> int:
        """Memory of :meth:`compute` for a result of this shape: the channels, and what the filters hold meanwhile."""
        own = 4 * self.n_channels * math.prod(core)
        return own if self.stack is None else own + self.stack.working_bytes(core)

    def read_bytes(self, core: Zyx) -> int:
        """Memory of the grey values read for a result of this shape, as float32 at most."""
        return 4 * math.prod(add(core, add(self.halo, self.halo)))

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        stack = self.stack
        bank = None if stack is None else {"bank": stack.bank.to_dict(), "voxel_size_nm": list(stack.voxel_size_nm)}
        return {"mean": list(self.mean), "std": list(self.std), "stack": bank}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkInput:
        """Read back what :meth:`to_dict` gave."""
        stored = values["stack"]
        stack = None
        if stored is not None:
            z, y, x = stored["voxel_size_nm"]
            stack = FeatureStack(FilterBank.from_dict(stored["bank"]), (z, y, x))
        return cls(tuple(values["mean"]), tuple(values["std"]), stack)
