"""Networks as steps of the engine: a block with its halo in, class probabilities out.

``PatchNetworkStep``   every voxel, exactly what its patch gives; or with padding removed (``--real-context``)
``CoarsePatchStep``    patches on a coarse grid, interpolated (``--output-stride``)

A block is cut into tiles that fit the memory for activations. Tiles are read with all they need and joined without
blending, because nothing at a tile's edge is wrong. This file imports torch; `devices.py` decides when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from voxclf.geometry import UNIT, Region, Zyx, add, round_up, split_into_blocks
from voxclf.models.dense import DenseNetwork, InexactNetworkError, inspect_geometry, tune_for_inference
from voxclf.models.devices import EXACT, PADDED_CHOICES, Inference, free_gpu_bytes
from voxclf.models.network_certificate import TOLERANCES
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.patch_classifier import NO_FLIPS, TURN, PatchClassifier, choose_flips
from voxclf.models.real_context import remove_padding

if TYPE_CHECKING:
    from voxclf.engine.step import Step
    from voxclf.models.network_model import NetworkModel

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
TILE_SIDES = (192, 160, 128, 112, 96, 80, 64, 48, 32, 24, 16, 8)
"""Sides of a tile that are tried, voxels. A GPU takes the largest that fits; 256 would pass 2^31 numbers in a layer,
which some kernels do not count."""
LARGEST_CPU_TILE = 128
"""On CPUs tiles from 96 on all run at the speed of a matrix product."""
ACTIVATION_SHARE = 0.5
"""Of the memory budget, for the activations of a tile; the rest holds blocks."""


def make_network_step(model: NetworkModel, device: str = "cpu", inference: Inference = EXACT) -> Step:
    """Build the step that predicts blocks with a network.

    Raises
    ------
    InexactNetworkError
        If every voxel is asked for exactly and the network pads; the message names the layer and what to do.
    ValueError
        If the smallest tile does not fit the memory budget.
    """
    if device == "cuda":
        # TF32 keeps 10 bits of the 23 that float32 has; "--precision 32" means float32.
        torch.backends.cudnn.allow_tf32 = False
    if device == "cpu" and inference.n_threads:
        torch.set_num_threads(inference.n_threads)
    if model.info.kind == "segmenter":
        from voxclf.models.segmenter_step import make_segmenter_step

        return make_segmenter_step(model, device, inference)
    flips = choose_flips(model.voxel_size_nm) if inference.flips else NO_FLIPS
    network, patch = model.network, model.patch
    if inference.real_context:
        network, patch = remove_padding(network, patch)
    elif inference.output_stride == 1:
        _check_exact(model)
    network = network.to(device)
    patches = PatchClassifier(network, patch, model.inputs, device, flips, model.calibration)
    n_classes = model.label_set.n_classes
    if inference.output_stride > 1:
        return CoarsePatchStep(patches, n_classes, inference.output_stride, inference.n_callers)
    dense = tune_for_inference(
        network,
        patch,
        device=device,
        dtype=DTYPES[inference.precision],
        # A resumed job must repeat its rounding, and a measurement could choose otherwise the second time.
        backend="a_trous" if device == "cpu" else "auto",
    )
    return PatchNetworkStep(
        dense,
        patches,
        n_classes,
        _choose_tile(dense, model.inputs, device, inference),
        TOLERANCES[inference.precision],
        DTYPES[inference.precision],
        inference.n_callers,
    )


def _check_exact(model: NetworkModel) -> None:
    geometry = inspect_geometry(model.network, model.patch)
    if not geometry.is_exact:
        raise InexactNetworkError(
            f"{model.name} cannot be evaluated exactly at every voxel: {geometry.problems[0]}. {PADDED_CHOICES}"
        )


def _choose_tile(dense: DenseNetwork, inputs: NetworkInput, device: str, inference: Inference) -> Zyx:
    """The largest cube whose activations fit the budget: of the job on a CPU, of what is free on a GPU."""
    budget = ACTIVATION_SHARE * (free_gpu_bytes(device) if device == "cuda" else inference.memory_bytes)
    sides = [side for side in TILE_SIDES if device == "cuda" or side <= LARGEST_CPU_TILE]
    for side in sides:
        tile = (side, side, side)
        if _tile_bytes(dense, inputs, tile) <= budget:
            return tile
    need = _tile_bytes(dense, inputs, tile) / ACTIVATION_SHARE
    raise ValueError(
        f"--memory leaves {budget / 1e9:.2f} GB for a tile of the network, too little even for one of {tile} voxels; "
        f"give at least {need / 1e9:.1f} GB"
    )


def _tile_bytes(dense: DenseNetwork, inputs: NetworkInput, tile: Zyx) -> int:
    before, after = margins(dense)
    return int(dense.working_bytes(tile)) + inputs.working_bytes(add(tile, add(before, after)))


def margins(dense: DenseNetwork) -> tuple[Zyx, Zyx]:
    """Voxels that a dense network needs before and after the centre voxel of a patch."""
    before = tuple(p // 2 for p in dense.patch)
    after = tuple(r - 1 - b for r, b in zip(dense.receptive_field, before, strict=True))
    return before, after  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class PatchNetworkStep:
    """A patch network at every voxel of a block: (1, Z + 2h, …) to (K, Z, Y, X), summing to 1 over K.

    Safe to call from several threads; blocks take turns, each on all cores or on the GPU.

    Parameters
    ----------
    dense : DenseNetwork
        Tuned for the device.
    reference : PatchClassifier
        The same answers the slow way, for the certificate.
    out_channels : int
        Number of classes K.
    tile_shape : (z, y, x)
        Most voxels computed at once.
    tolerance : float
        By how much rounding may move a probability from the reference's.
    dtype : torch.dtype
        Of the activations.
    n_callers : int
        Threads that share this step; each holds a block, but only one computes.
    """

    dense: DenseNetwork
    reference: PatchClassifier
    out_channels: int
    tile_shape: Zyx
    tolerance: float = TOLERANCES["32"]
    dtype: torch.dtype = torch.float32
    n_callers: int = 1
    alignment: Zyx = UNIT

    @property
    def stride(self) -> Zyx:
        """Every voxel can be compared with its patch."""
        return UNIT

    @property
    def margin(self) -> Zyx:
        """Voxels of the network's input needed on each side; the same on both, so that mirror images fit too."""
        before, after = margins(self.dense)
        z, y, x = (max(a, b) for a, b in zip(before, after, strict=True))
        return z, y, x

    @property
    def halo(self) -> Zyx:
        """The network's margin, with what its input channels need."""
        return add(self.margin, self.reference.inputs.halo)

    def working_bytes(self, core_shape: Zyx) -> int:
        """What is read, probabilities until they are stored, and this caller's share of the activations of a tile."""
        tile = _divide(core_shape, self.tile_shape)
        read = 4 * math.prod(add(core_shape, add(self.halo, self.halo)))
        stored = (12 * self.out_channels + 8) * math.prod(core_shape)
        tile_bytes = _tile_bytes(self.dense, self.reference.inputs, tile) + 12 * self.out_channels * math.prod(tile)
        return read + stored + tile_bytes // self.n_callers

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Classify a block."""
        (image,) = arrays
        z, y, x = (n - 2 * h for n, h in zip(image.shape[1:], self.halo, strict=True))
        out = np.empty((self.out_channels, z, y, x), np.float32)
        with TURN, torch.inference_mode():
            for tile in split_into_blocks((z, y, x), _divide((z, y, x), self.tile_shape), self.halo):
                read = Region(add(tile.read.start, self.halo), add(tile.read.stop, self.halo))
                channels = self.reference.inputs.compute(image[0][read.slices])
                out[(slice(None), *tile.core.slices)] = self._classify(torch.from_numpy(channels)[None]).numpy()
        return self.reference.calibrate(out)

    def _classify(self, channels: torch.Tensor) -> torch.Tensor:
        """Probabilities (K, z, y, x) of a tile whose channels are (1, C, z + 2 margin, …), mirror images averaged."""
        before, after = margins(self.dense)
        cut = tuple(
            slice(m - b, n - (m - a)) for m, b, a, n in zip(self.margin, before, after, channels.shape[2:], strict=True)
        )
        channels = channels.to(self.reference.device, self.dtype)
        total: torch.Tensor | float = 0.0
        for axes in self.reference.flips:
            mirrored = channels.flip([axis + 2 for axis in axes])[:, :, *cut]
            probabilities = self.dense(mirrored).float().softmax(dim=1)[0]
            total = total + probabilities.flip([axis + 1 for axis in axes])
        assert isinstance(total, torch.Tensor)
        return (total / len(self.reference.flips)).cpu()


@dataclass(frozen=True, eq=False)
class CoarsePatchStep:
    """Patches around every s-th voxel of the volume along each axis, and trilinear interpolation between them.

    Which voxels those are depends on the position in the volume alone, so blocks agree. For networks that pad, and for
    previews. 1 / s³ of the cost of all patches: for an exact network cheaper than every voxel only from s = 8 on.

    Parameters
    ----------
    reference : PatchClassifier
        Classifies the patches.
    out_channels : int
        Number of classes K.
    output_stride : int
        Distance s of the grid's voxels.
    n_callers : int
        Threads that share this step; each holds a block, but only one computes.
    """

    reference: PatchClassifier
    out_channels: int
    output_stride: int
    n_callers: int = 1
    tolerance: float = TOLERANCES["32"]

    @property
    def alignment(self) -> Zyx:
        """Blocks start on the grid."""
        return (self.output_stride,) * 3

    @property
    def stride(self) -> Zyx:
        """Only voxels of the grid can be compared with their patches."""
        return self.alignment

    @property
    def halo(self) -> Zyx:
        """A patch around the first voxel of the grid beyond the block, in multiples of the stride."""
        z, y, x = (round_up(h + 1, self.output_stride) for h in self.reference.halo)
        return z, y, x

    def working_bytes(self, core_shape: Zyx) -> int:
        """What is read and its channels, patches at work, and probabilities until they are stored."""
        inputs = self.reference.inputs
        size = add(core_shape, add(self.halo, self.halo))
        stored = (16 * self.out_channels + 8) * math.prod(core_shape)
        at_work = inputs.working_bytes(size) + self.reference.batch * self.reference.patch_bytes
        return 4 * math.prod(size) + stored + at_work // self.n_callers

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Classify the grid's voxels of a block and interpolate."""
        (image,) = arrays
        core = [n - 2 * h for n, h in zip(image.shape[1:], self.halo, strict=True)]
        with TURN:
            # One grid point beyond the core on the upper side: the last voxels lie between it and the one before.
            spare = [h - m for h, m in zip(self.halo, self.reference.halo, strict=True)]
            z, y, x = (slice(s, n - s + 1) for s, n in zip(spare, image.shape[1:], strict=True))
            channels = torch.from_numpy(self.reference.inputs.compute(image[0, z, y, x]))
            counts = [n // self.output_stride + 1 for n in core]
            grid = self._classify_grid(channels, counts)
        for axis in range(3):
            grid = _interpolate(grid, axis + 1, self.output_stride)
        return self.reference.calibrate(grid)

    def _classify_grid(self, channels: torch.Tensor, counts: list[int]) -> np.ndarray:
        """Probabilities (K, *counts) of the grid's voxels."""
        windows = channels
        for axis, margin in enumerate(self.reference.margin):
            windows = windows.unfold(axis + 1, 2 * margin + 1, self.output_stride)
        found = np.empty((math.prod(counts), self.out_channels), np.float32)
        for start in range(0, len(found), self.reference.batch):
            index = np.arange(start, min(start + self.reference.batch, len(found)))
            z, y, x = (torch.from_numpy(i) for i in np.unravel_index(index, counts))
            found[index] = self.reference.classify_channels(windows[:, z, y, x].movedim(1, 0)).numpy()
        return np.moveaxis(found.reshape(*counts, self.out_channels), -1, 0)


def _interpolate(grid: np.ndarray, axis: int, stride: int) -> np.ndarray:
    """Fill in linearly between grid points along one axis: n + 1 points become n · stride voxels."""
    n = (grid.shape[axis] - 1) * stride
    position = np.arange(n)
    shape = [1] * grid.ndim
    shape[axis] = n
    weight = ((position % stride) / np.float32(stride)).astype(np.float32).reshape(shape)
    low = grid.take(position // stride, axis=axis)
    return low + weight * (grid.take(position // stride + 1, axis=axis) - low)


def _divide(shape: Zyx, largest: Zyx) -> Zyx:
    """Cut a shape evenly into as few tiles as needed: 128 in tiles of at most 96 gives 64, not 96 and 32."""
    z, y, x = (-(-n // -(-n // most)) for n, most in zip(shape, largest, strict=True))
    return z, y, x
