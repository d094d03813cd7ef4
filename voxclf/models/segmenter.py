"""What all segmenters share: they map (B, C, Z, Y, X) to class logits (B, K, Z, Y, X) of the same size.

A segmenter halves its resolution several times and comes back. Here stands the rule by which it halves along each
axis, so that anisotropic voxels become isotropic on the way down, and the padding that lets it take any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from voxclf.geometry import UNIT, VoxelSize, Zyx, round_up

ISOTROPIC_WITHIN = math.sqrt(2)
"""Voxels whose longest edge is at most this many times the shortest cannot be made more isotropic by halving."""

CROP_EDGE = 64
"""Edge of a crop for training on two cores; published ones (128³, 32×256×256, 384²) are asked for by option."""

SegmenterOutput: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


class Segmenter(nn.Module):
    """A network for whole crops; subclasses define :meth:`segment` for sizes that are multiples of the divisor.

    Parameters
    ----------
    name : str
        As in the registry.
    n_classes, in_channels : int
        K and C; the channels are 1 for the image alone.
    alignment : (z, y, x)
        Product of the strides along each axis. A crop that starts elsewhere by a multiple of it gives the same
        logits, away from the crop's edges.
    divisor : (z, y, x), optional
        What sizes must be multiples of, where that is less: crops are padded to it.

    Subclasses are built by the registry and take, beside name, classes and channels:

    voxel_size_nm : (z, y, x)
        Decides which axes the network halves, by :func:`plan_strides` unless the subclass says how.
    width : float
        Factor on the published channel numbers.

    Attributes
    ----------
    patch : (z, y, x)
        Crop to train on where none is asked for: 64 voxels along an axis, or two divisors if those are more.
    has_boundary : bool
        Whether there is a second output, the logits of class boundaries. It is handed over while training only.
    """

    has_boundary = False

    def __init__(self, name: str, n_classes: int, in_channels: int, alignment: Zyx, divisor: Zyx | None = None) -> None:
        super().__init__()
        self.name = name
        self.in_channels = in_channels
        self.n_classes = n_classes
        self.alignment = alignment
        self.divisor = divisor or alignment
        self.patch = plan_crop(self.divisor)

    def segment(self, x: Tensor) -> SegmenterOutput:
        """Return class logits, or class and boundary logits, for a size that is a multiple of the divisor."""
        raise NotImplementedError

    def segment_any_size(self, x: Tensor) -> SegmenterOutput:
        """Pad at the far ends by repeating the edge, segment, crop."""
        shape = x.shape[2:]
        padding = [round_up(n, a) - n for n, a in zip(shape, self.divisor, strict=True)]
        if any(padding):
            x = functional.pad(x, [n for p in reversed(padding) for n in (0, p)], mode="replicate")
        found = self.segment(x)
        z, y, x_size = shape
        if isinstance(found, tuple):
            return found[0][..., :z, :y, :x_size], found[1][..., :z, :y, :x_size]
        return found[..., :z, :y, :x_size]

    def forward(self, x: Tensor) -> SegmenterOutput:
        """Class logits (B, K, Z, Y, X) of normalised images (B, C, Z, Y, X) of any size.

        While training, networks with a boundary output return the pair (class logits, boundary logits (B, 1, …)).
        """
        found = self.segment_any_size(x)
        return found[0] if isinstance(found, tuple) and not self.training else found

    def boundaries(self, x: Tensor) -> Tensor:
        """Boundary logits (B, 1, Z, Y, X) of a network that has them.

        Raises
        ------
        TypeError
            If it has none.
        """
        found = self.segment_any_size(x)
        if not isinstance(found, tuple):
            raise TypeError(f"network {self.name!r} has no boundary output; use 'res_unet_r' or 'res_unet_h'")
        return found[1]


def plan_strides(voxel_size_nm: VoxelSize, n_levels: int) -> tuple[Zyx, ...]:
    """Plan along which axes to halve at each of ``n_levels`` steps down.

    Only the finer axes are halved until voxels are as isotropic as halving can make them, then all.

    Examples
    --------
    >>> plan_strides((30, 8, 8), 3)
    ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    """
    sizes = list(voxel_size_nm)
    plan = []
    for _ in range(n_levels):
        is_finer = [size * ISOTROPIC_WITHIN <= max(sizes) for size in sizes]
        z, y, x = (2 if finer or not any(is_finer) else 1 for finer in is_finer)
        sizes = [size * s for size, s in zip(sizes, (z, y, x), strict=True)]
        plan.append((z, y, x))
    return tuple(plan)


def plan_crop(alignment: Zyx) -> Zyx:
    """Crop to train on: :data:`CROP_EDGE`, but at least two voxels at the coarsest level, and whole alignments.

    Along an axis that a network halves less, voxels are longer, and the crop has fewer, down to 16.
    """
    finest = max(alignment)
    z, y, x = (max(2 * a, CROP_EDGE * a // finest, 16) for a in alignment)
    return z, y, x


def multiply_strides(strides: Sequence[Zyx]) -> Zyx:
    """Product of strides along each axis: the alignment of a network."""
    z, y, x = UNIT
    for a, b, c in strides:
        z, y, x = z * a, y * b, x * c
    return z, y, x


def scale_channels(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """Published channel numbers times ``width``, at least 4 each.

    Raises
    ------
    ValueError
        If ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width was {width}; it must be positive: 1 is the published network, 0.25 suits two cores")
    return tuple(max(4, round(n * width)) for n in channels)


def upsample(x: Tensor, stride: Zyx) -> Tensor:
    """Trilinear upsampling by a whole factor per axis; voxel centres stay where they are, so it is local."""
    scale = [float(s) for s in stride]
    return functional.interpolate(x, scale_factor=scale, mode="trilinear", align_corners=False)


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the size (or divides it by the stride), batch norm, activation.

    Batch norm in place of instance norm, wherever a report leaves the choice: the statistics of an instance are
    those of a block, and probabilities would depend on how the volume is cut.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: Zyx = (3, 3, 3),
        stride: Zyx = UNIT,
        groups: int = 1,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        z, y, x = (k // 2 for k in kernel)
        super().__init__(
            nn.Conv3d(n_in, n_out, kernel, stride, padding=(z, y, x), groups=groups, bias=False),
            nn.BatchNorm3d(n_out),
            activation(),
        )


def count_parameters(network: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
