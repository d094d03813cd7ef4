"""Filter bank and trees on a torch device: `trees.TreePredictor` with the block sent to a GPU and back.

image block → device → features → probabilities → host, in parts that fit the device's memory. Probabilities equal
those of the compiled path within 1e-5, except where a feature lies closer to a threshold than float32 sums in
another order can tell: there a tree may decide otherwise. This file imports torch; `devices.py` decides whether it
is needed.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from features.bank import FilterBank
from features.torch_bank import compute_torch
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import UNIT, Region, Zyx, add, split_into_blocks
from voxclf.models.devices import free_gpu_bytes
from voxclf.models.forest_torch import TorchForest
from voxclf.models.packed_forest import PackedForest

if TYPE_CHECKING:
    from voxclf.metrics.calibration import CalibrationMap

HOST_PART_BYTES = 500_000_000
"""Device memory that a part of a block may take where the device does not tell what is free (a CPU)."""
FILTER_FLOATS = 40
"""Floats per voxel read that the filters hold beside their output, as `compute_torch` states."""

# One device, one block at a time; threads that wait have their next block read meanwhile. Steps are copied into
# worker processes, a lock cannot be, so it belongs to the module.
_TURN = threading.Lock()


@dataclass(frozen=True)
class TorchTreePredictor:
    """The step of a tree model on a torch device: image block (and probabilities of the round before) in, probabilities
    out.

    Safe to call from several threads; blocks take turns on the device.

    Parameters
    ----------
    stack : FeatureStack
        The features.
    forest : PackedForest
        The trees; copied to the device at the first block.
    device : str
        "cuda", "mps" or "cpu"; a CPU is much faster with `TreePredictor`.
    calibration : CalibrationMap, optional
        Corrects the probabilities, on the host.
    part_bytes : int, optional
        Device memory for one part of a block; half of what is free by default.
    """

    stack: FeatureStack
    forest: PackedForest
    device: str
    calibration: CalibrationMap | None = None
    part_bytes: int | None = None
    alignment: Zyx = UNIT

    @property
    def halo(self) -> Zyx:
        """The reach of the widest filter."""
        return self.stack.halo

    @property
    def out_channels(self) -> int:
        """Number of classes K."""
        return self.forest.n_classes

    def working_bytes(self, core_shape: Zyx) -> int:
        """Memory of the host: what is read, a part of it as float32, and the probabilities three times."""
        read = math.prod(add(core_shape, add(self.halo, self.halo)))
        n_channels = 1 + len(self.stack.class_names)
        return 8 * n_channels * read + 12 * self.out_channels * math.prod(core_shape)

    def device_bytes(self, core_shape: Zyx) -> int:
        """Memory of the device for a part with this core: features twice, what filters hold, probabilities."""
        read = math.prod(add(core_shape, add(self.halo, self.halo)))
        per_core_voxel = 2 * self.stack.n_features + 4 * self.out_channels
        filters = FILTER_FLOATS + len(self.stack.class_names)
        return 4 * (filters * read + per_core_voxel * math.prod(core_shape))

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Classify a block: (1, Z + 2h, …) and, with a context, (K, Z + 2h, …) to (K, Z, Y, X), summing to 1 over K."""
        z, y, x = (n - 2 * h for n, h in zip(arrays[0].shape[1:], self.halo, strict=True))
        out = np.empty((self.out_channels, z, y, x), np.float32)
        with _TURN, torch.inference_mode():
            part_shape = self._part_shape((z, y, x))
            for part in split_into_blocks((z, y, x), part_shape, self.halo):
                read = Region(add(part.read.start, self.halo), add(part.read.stop, self.halo))
                inputs = [array[(slice(None), *read.slices)] for array in arrays]
                out[(slice(None), *part.core.slices)] = self._predict_part(inputs)
        return out if self.calibration is None else self.calibration.apply(out)

    def _predict_part(self, arrays: list[np.ndarray]) -> np.ndarray:
        # Float32 before it travels: torch has no uint16 arithmetic on all devices. A copy, because blocks may be
        # read-only and torch would share their memory.
        image, *others = (torch.from_numpy(np.array(a, dtype=np.float32, order="C")).to(self.device) for a in arrays)
        features = [self._filter(self.stack.bank, image[0])]
        if self.stack.context is not None:
            (probabilities,) = others
            features += [self._filter(self.stack.context, channel) for channel in probabilities]
        joined = torch.cat(features)
        found = self._on_device.predict_probabilities(joined.flatten(1))
        array: np.ndarray = found.unflatten(1, joined.shape[1:]).cpu().numpy()
        return array

    def _filter(self, bank: FilterBank, block: torch.Tensor) -> torch.Tensor:
        """Features of one bank, from a block with the halo of the whole stack."""
        voxel_size_nm = self.stack.voxel_size_nm
        margin = (h - b for h, b in zip(self.halo, bank.halo(voxel_size_nm), strict=True))
        z, y, x = (slice(m, n - m) for m, n in zip(margin, block.shape, strict=True))
        return compute_torch(bank, block[z, y, x], voxel_size_nm)

    def _part_shape(self, core_shape: Zyx) -> Zyx:
        """Halve the longest side until a part fits; halos make small parts dear, so no smaller than needed."""
        free = free_gpu_bytes(self.device) if self.device == "cuda" else 2 * HOST_PART_BYTES
        budget = self.part_bytes or free // 2
        z, y, x = core_shape
        while self.device_bytes((z, y, x)) > budget and max(z, y, x) > 1:
            sides = [z, y, x]
            longest = sides.index(max(sides))
            sides[longest] = -(-sides[longest] // 2)
            z, y, x = sides
        return (z, y, x)

    @cached_property
    def _on_device(self) -> TorchForest:
        return TorchForest(self.forest, self.device)

    def __getstate__(self) -> dict[str, Any]:
        # What lies on the device stays behind; another process puts its own copy there.
        return {key: value for key, value in self.__dict__.items() if key != "_on_device"}
