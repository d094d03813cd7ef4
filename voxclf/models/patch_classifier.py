"""Patch by patch: the plain network on single patches, the slow definition that everything faster is measured by.

It classifies the voxels that a seam certificate compares, those of a model folder's golden patch, and the coarse grid
of a preview. Always in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from torch import nn

from voxclf.geometry import VoxelSize, Zyx, add
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.subnormal_numbers import subnormals_as_zero

TURN = threading.Lock()
"""Held by whoever computes with a network: one block at a time on all cores, or on the GPU. Threads that wait have
their next block read meanwhile. Steps are copied into other processes, which a lock cannot be, so it stands here."""

Flips = tuple[tuple[int, ...], ...]
"""Sets of axes to mirror, 0 being z; the empty set is the volume as it is."""
NO_FLIPS: Flips = ((),)
SAME_SIZE = 1.05
"""Ratio up to which voxel sizes along two axes count as equal."""
BATCH_BYTES = 300_000_000
LARGEST_BATCH = 64


def choose_flips(voxel_size_nm: VoxelSize) -> Flips:
    """Mirror images to average over: of all axes along which voxels are finest, in all combinations.

    Thick slices are not mirrored: what a section looks like from below is not what it looks like from above.
    """
    finest = min(voxel_size_nm)
    axes = [axis for axis in range(3) if voxel_size_nm[axis] <= SAME_SIZE * finest]
    return tuple(chosen for n in range(len(axes) + 1) for chosen in combinations(axes, n))


@dataclass(frozen=True)
class PatchClassifier:
    """Class probabilities of single voxels from the patches around them.

    Parameters
    ----------
    network : nn.Module
        (B, C, *patch) to logits (B, K), in eval mode, on ``device``.
    patch : (z, y, x)
        Its patches; their centre voxel is number patch // 2.
    inputs : NetworkInput
        Makes its channels from grey values.
    device : str
        Where it runs.
    flips : tuple of tuple of int
        Mirror images whose probabilities are averaged.
    calibration : CalibrationMap, optional
        Corrects the probabilities.
    """

    network: nn.Module
    patch: Zyx
    inputs: NetworkInput
    device: str = "cpu"
    flips: Flips = NO_FLIPS
    calibration: CalibrationMap | None = None

    @property
    def margin(self) -> Zyx:
        """Voxels on each side of a voxel that its patch, or a mirror image of it, reaches."""
        z, y, x = (n // 2 for n in self.patch)
        return z, y, x

    @property
    def halo(self) -> Zyx:
        """As :attr:`margin`, with what the channels themselves need."""
        return add(self.margin, self.inputs.halo)

    def classify_windows(self, windows: np.ndarray) -> np.ndarray:
        """Map grey values (B, 1, 1 + 2 hz, 1 + 2 hy, 1 + 2 hx) around B voxels to probabilities (B, K)."""
        channels = np.stack([self.inputs.compute(window[0]) for window in windows])
        with TURN:
            parts = [
                self.classify_channels(torch.from_numpy(channels[i : i + self.batch]))
                for i in range(0, len(channels), self.batch)
            ]
        return self.calibrate(torch.cat(parts).numpy().T).T

    @subnormals_as_zero()
    def classify_channels(self, windows: torch.Tensor) -> torch.Tensor:
        """Map channels (B, C, 1 + 2 margin, …) to probabilities (B, K), on the host and not calibrated."""
        z, y, x = self.patch
        windows = windows.to(self.device)
        with torch.inference_mode():
            total: torch.Tensor | float = 0.0
            for axes in self.flips:
                patches = windows.flip([axis + 2 for axis in axes])[..., :z, :y, :x]
                total = total + self.network(patches).float().softmax(dim=1)
            assert isinstance(total, torch.Tensor)
            return (total / len(self.flips)).cpu()

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Correct probabilities (K, …) if the model knows how."""
        return probabilities if self.calibration is None else self.calibration.apply(probabilities)

    @cached_property
    def patch_bytes(self) -> int:
        """Memory that the activations of one patch take, as seen by running one."""
        return activation_bytes(self.network, (1, self.inputs.n_channels, *self.patch), self.device)

    @property
    def batch(self) -> int:
        """Patches classified at once."""
        return max(1, min(LARGEST_BATCH, BATCH_BYTES // self.patch_bytes))


def activation_bytes(network: nn.Module, shape: Sequence[int], device: str) -> int:
    """Upper bound of what a forward pass holds: three times the largest layer's input and output together.

    Three, because a residual branch keeps its start while it runs, and convolutions reorder their input.
    """
    largest = 0

    def watch(module: nn.Module, arguments: tuple, result: object) -> None:
        nonlocal largest
        tensors = [item for item in (*arguments, result) if isinstance(item, torch.Tensor)]
        largest = max(largest, sum(tensor.numel() for tensor in tensors))

    hooks = [module.register_forward_hook(watch) for module in network.modules()]
    try:
        with torch.inference_mode():
            network(torch.zeros(tuple(shape), device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return 12 * largest
