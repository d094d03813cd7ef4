"""Segmenters as steps of the engine: a block with its halo in, class probabilities out.

A segmenter gives the same result for two blocks only where both see far enough, and only if they start on the same
voxels of its coarsest level. So blocks start at multiples of the alignment, and read as far beyond their core as the
trained network looks (:mod:`voxclf.models.segmenter_reach`): a probability at a seam is off by at most the stated
tolerance. Peers blend overlapping predictions with Gaussian weights instead. That hides seams without bounding them,
computes every voxel several times, and needs a voxel's other predictions before it can be written; here one block's
core is written once, by one worker, and blocks can be resumed in any order. So there is no blending.

2D networks are segmenters whose alignment is 1, and whose reach is 0, across their sections; averaging over three
axes happens in the network (:mod:`voxclf.models.unet2d`). Nothing here knows which kind it runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from voxclf.geometry import Block, Region, Zyx, add, round_up, split_into_blocks
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models.devices import EXACT, Inference, free_gpu_bytes
from voxclf.models.memory_layout import use_channels_last
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.patch_classifier import NO_FLIPS, TURN, Flips, activation_bytes, choose_flips
from voxclf.models.segmenter import Segmenter
from voxclf.models.segmenter_reach import Reach, measure_reach
from voxclf.models.subnormal_numbers import subnormals_as_zero

if TYPE_CHECKING:
    from voxclf.models.network_model import NetworkModel

LARGEST_TILE = 256
"""Longest side of a tile, voxels; on a CPU a tile has at most as many voxels as a cube of half that side."""
SMALLEST_TILE = 16
"""Sides from which a tile is worth its margins, rounded up to the alignment."""
ACTIVATION_SHARE = 0.5
"""Of the memory budget, for the activations of tiles; the rest holds blocks."""
CPU_BATCH = 2
"""Tiles at a time on a CPU: torch's convolutions of a single 3D image take 1.5 to 2.7 times as long per voxel."""
REACH_KEY = "reach"
"""Where a model's ``training`` facts hold the measured :class:`Reach`."""


def make_segmenter_step(model: NetworkModel, device: str = "cpu", inference: Inference = EXACT) -> SegmenterStep:
    """Build the step of a fitted segmenter: the reach measured when it was fitted, or measured now on noise.

    Raises
    ------
    ValueError
        If the smallest tile does not fit the memory budget.
    """
    network = model.network.to(device)
    assert isinstance(network, Segmenter)
    stored = model.training.get(REACH_KEY)
    reach = Reach.from_dict(stored) if stored else measure_reach(network, device=device)
    free = free_gpu_bytes(device) if device == "cuda" else inference.memory_bytes
    step = SegmenterStep(
        network,
        model.inputs,
        reach,
        int(ACTIVATION_SHARE * free),
        device,
        choose_flips(model.voxel_size_nm) if inference.flips else NO_FLIPS,
        model.calibration,
        inference.precision == "bf16",
        inference.n_callers,
    )
    step.check_tile_budget()
    return step


@dataclass(frozen=True, eq=False)
class SegmenterStep:
    """A segmenter on a block: (1, Z + 2h, Y + 2h, X + 2h) to (K, Z, Y, X), summing to 1 over K.

    Results of blocks of any shape agree within ``reach.tolerance``. Safe to call from several threads; blocks take
    turns.

    Parameters
    ----------
    network : Segmenter
        Trained, in eval mode, on ``device``.
    inputs : NetworkInput
        Makes its channels from grey values.
    reach : Reach
        The margin that it needs.
    tile_budget : int
        Bytes for the activations of the tiles computed at a time. A block is cut into those tiles that fit it and
        compute the fewest voxels, margins included: flat ones where the block or the margin is.
    device : str
        Where the network is.
    flips : tuple of tuple of int
        Mirror images whose probabilities are averaged.
    calibration : CalibrationMap, optional
        Corrects the probabilities.
    is_bf16 : bool
        Whether convolutions run in bfloat16.
    n_callers : int
        Threads that share this step; each holds a block, but only one computes.
    """

    network: Segmenter
    inputs: NetworkInput
    reach: Reach
    tile_budget: int
    device: str = "cpu"
    flips: Flips = NO_FLIPS
    calibration: CalibrationMap | None = None
    is_bf16: bool = False
    n_callers: int = 1

    def __post_init__(self) -> None:
        self.network.eval()
        if self.device == "cpu":
            use_channels_last(self.network)  # with two tiles at a time it halves the time of 3D networks

    @property
    def alignment(self) -> Zyx:
        """The product of the network's strides: where blocks may start."""
        return self.network.alignment

    @property
    def margin(self) -> Zyx:
        """What the network reads beyond a core, in whole alignments, so that the grid of its levels stays in place."""
        return self._align(self.reach.margin)

    @property
    def halo(self) -> Zyx:
        """The margin, with what the input channels need, each in whole alignments."""
        return add(self.margin, self._align(self.inputs.halo))

    @property
    def out_channels(self) -> int:
        """Number of classes K."""
        return self.network.n_classes

    def working_bytes(self, core_shape: Zyx) -> int:
        """What is read, probabilities until they are stored, and this caller's share of the activations of tiles."""
        read = 4 * math.prod(add(core_shape, add(self.halo, self.halo)))
        stored = (12 * self.out_channels + 8) * math.prod(core_shape)
        return read + stored + self.tile_bytes(self._divide(core_shape)) // self.n_callers

    def check_tile_budget(self) -> None:
        """Refuse a budget that is too small for the smallest tile.

        Raises
        ------
        ValueError
            Saying what would be enough.
        """
        need = self.tile_bytes(self.smallest_tile)
        if need > self.tile_budget:
            raise ValueError(
                f"--memory leaves {self.tile_budget / 1e9:.2f} GB for a tile of {self.network.name}, too little even "
                f"for one of {self.smallest_tile} voxels and its margin {self.reach.margin}; give at least "
                f"{need / ACTIVATION_SHARE / 1e9:.1f} GB"
            )

    def tile_bytes(self, tile: Zyx) -> int:
        """Memory of the tiles that are computed at a time: their channels and the network's activations."""
        return self._batch * self._one_tile_bytes(tile)

    def _one_tile_bytes(self, tile: Zyx) -> int:
        size = add(tile, add(self.margin, self.margin))
        return self._voxel_bytes * math.prod(size) + self.inputs.working_bytes(size)

    @cached_property
    def _voxel_bytes(self) -> int:
        """Memory of the network's activations per voxel, as seen by running a small crop."""
        shape = [2 * a for a in self.alignment]
        return -(-activation_bytes(self.network, (1, self.inputs.n_channels, *shape), self.device) // math.prod(shape))

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Classify a block."""
        (image,) = arrays
        z, y, x = (n - 2 * h for n, h in zip(image.shape[1:], self.halo, strict=True))
        out = np.empty((self.out_channels, z, y, x), np.float32)
        tiles = iter(split_into_blocks((z, y, x), self._divide((z, y, x)), self.margin, self.alignment))
        with TURN:
            for batch in _batch_equal_shapes(tiles, self._batch):
                found = self._classify(np.stack([self._read_channels(image[0], tile) for tile in batch]))
                for tile, probabilities in zip(batch, found, strict=True):
                    out[(slice(None), *tile.core.slices)] = probabilities
        return out if self.calibration is None else self.calibration.apply(out)

    def _read_channels(self, image: np.ndarray, tile: Block) -> np.ndarray:
        """Channels of a tile and its margin, from the block's grey values."""
        # The image starts a halo before the block's core, which is where tiles count from.
        read = Region(add(tile.read.start, self.halo), add(tile.read.stop, self.halo)).grow(self.inputs.halo)
        return self.inputs.compute(image[read.slices])

    @subnormals_as_zero()
    def _classify(self, channels: np.ndarray) -> np.ndarray:
        """Probabilities (B, K, z, y, x) of tiles whose channels are (B, C, z + 2 margin, …), mirror images averaged."""
        tensor = torch.from_numpy(channels).to(self.device)
        if self.device == "cpu":
            tensor = tensor.contiguous(memory_format=torch.channels_last_3d)
        z, y, x = (slice(m, n - m) for m, n in zip(self.margin, tensor.shape[2:], strict=True))
        total: torch.Tensor | float = 0.0
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.is_bf16):
            for axes in self.flips:
                # Tiles and margins are whole alignments, so a mirror image has its levels on the same voxels.
                dimensions = [axis + 2 for axis in axes]
                logits = self.network(tensor.flip(dimensions)).flip(dimensions)
                total = total + logits[:, :, z, y, x].float().softmax(dim=1)
        assert isinstance(total, torch.Tensor)
        return (total / len(self.flips)).cpu().numpy()

    @cached_property
    def _batch(self) -> int:
        """Tiles computed at a time."""
        has_room = CPU_BATCH * self._one_tile_bytes(self.smallest_tile) <= self.tile_budget
        return CPU_BATCH if self.device == "cpu" and has_room else 1

    def _align(self, shape: Zyx) -> Zyx:
        z, y, x = (round_up(n, a) for n, a in zip(shape, self.alignment, strict=True))
        return z, y, x

    @property
    def smallest_tile(self) -> Zyx:
        """What a tile is never smaller than, unless the block is."""
        return self._align((SMALLEST_TILE,) * 3)

    def _divide(self, shape: Zyx) -> Zyx:
        """Cut a shape evenly, as far as the alignment allows, into tiles; gives the shape of one."""
        if shape not in self._divided:
            zs, ys, xs = (self._sides(axis, length) for axis, length in enumerate(shape))
            self._divided[shape] = min(itertools.product(zs, ys, xs), key=lambda tile: self._cost(shape, tile))
        return self._divided[shape]

    @cached_property
    def _divided(self) -> dict[Zyx, Zyx]:
        """Tiles of the block shapes met so far: a few."""
        return {}

    def _sides(self, axis: int, length: int) -> list[int]:
        """Sides that divide a length evenly, largest first."""
        step, smallest = self.alignment[axis], self.smallest_tile[axis]
        most = max(1, length // smallest)
        sides = {round_up(-(-length // count), step) for count in range(1, most + 1)}
        return sorted((n for n in sides if n <= max(LARGEST_TILE, smallest)), reverse=True)

    def _cost(self, shape: Zyx, tile: Zyx) -> tuple[bool, int]:
        """What to choose the tiles of a block by: first that they fit, then the voxels computed."""
        most = (LARGEST_TILE // 2) ** 3 if self.device == "cpu" else LARGEST_TILE**3
        need = self.tile_bytes(tile)
        if need > self.tile_budget or math.prod(tile) > most:
            return True, need
        n_tiles = math.prod(-(-n // t) for n, t in zip(shape, tile, strict=True))
        return False, n_tiles * math.prod(add(tile, add(self.margin, self.margin)))


def _batch_equal_shapes(tiles: Iterator[Block], largest: int) -> Iterator[Sequence[Block]]:
    """Neighbouring tiles of one shape together, at most ``largest`` of them."""
    batch: list[Block] = []
    for tile in tiles:
        if batch and (len(batch) == largest or tile.core.shape != batch[0].core.shape):
            yield batch
            batch = []
        batch.append(tile)
    if batch:
        yield batch
