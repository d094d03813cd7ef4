"""``res_unet_r`` and ``res_unet_h``: residual UNets for thick sections, with class and boundary outputs.

The MitoEM challenge winner: Li et al., "Advanced deep networks for 3D mitochondria instance segmentation", 2021
(arXiv:2104.07961). Embedding 1×5×5; four steps down in the plane of the sections by strided 1×3×3 convolutions;
trilinear upsampling; skips summed, as in Lee et al., arXiv:1706.00120, whose widths are kept; ELU everywhere. ``r``
has one decoder with both outputs, ``h`` one decoder for each. The block is a parameter, as in the paper's ablation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxclf.geometry import UNIT, VoxelSize, Zyx, zyx
from voxclf.models.segmenter import (
    ISOTROPIC_WITHIN,
    ConvNormAct,
    Segmenter,
    multiply_strides,
    scale_channels,
    upsample,
)

CHANNELS = (28, 36, 48, 64, 80)
BlockName = Literal["acb", "res", "se", "eca"]
ATTENTION_WINDOW: Zyx = (32, 256, 256)
"""Voxels over which attention averages: the crops that the published network was trained on."""


class View(NamedTuple):
    """Over what attention averages at one level of the network.

    Parameters
    ----------
    cell : (z, y, x)
        Voxels of the level that are averaged first.
    window : (z, y, x)
        Cells around each cell whose mean counts.
    """

    cell: Zyx
    window: Zyx

    @classmethod
    def at_level(cls, level: int, n_levels: int, stride: Zyx) -> View:
        """Cells are those of the coarsest level, so they lie in the same places however a volume is cut."""
        cell = zyx(s ** (n_levels - level) for s in stride)
        window = zyx(max(1, w // s**n_levels) for w, s in zip(ATTENTION_WINDOW, stride, strict=True))
        return cls(cell, window)


class ResUNet(Segmenter):
    """Residual UNet with one decoder (``res_unet_r``) or one per output (``res_unet_h``).

    Parameters
    ----------
    name, n_classes, in_channels, width
        See :class:`Segmenter`.
    voxel_size_nm : (z, y, x)
        Steps down and flat kernels leave the coarsest axis out, as published for sections; where voxels are
        isotropic there is no such axis, and both take all three.
    block : "acb", "res", "se" or "eca"
        See :data:`BLOCKS`.
    """

    has_boundary = True

    def __init__(
        self,
        name: str,
        n_classes: int,
        in_channels: int = 1,
        voxel_size_nm: VoxelSize = (1.0, 1.0, 1.0),
        width: float = 1.0,
        block: BlockName = "acb",
    ) -> None:
        if block not in BLOCKS:
            raise ValueError(f"block was {block!r}; choose one of {', '.join(get_args(BlockName))}")
        channels = scale_channels(CHANNELS, width)
        stride = flat_triple(voxel_size_nm, 2)
        strides = (stride,) * (len(channels) - 1)
        super().__init__(name, n_classes, in_channels, multiply_strides(strides))
        self.stride = stride
        flat = flat_triple(voxel_size_nm, 3)
        self.embedding = ConvNormAct(in_channels, channels[0], flat_triple(voxel_size_nm, 5), activation=nn.ELU)
        views = [View.at_level(level, len(channels) - 1, stride) for level in range(len(channels))]
        self.downs = nn.ModuleList(
            ConvNormAct(n_in, n_out, flat, stride, activation=nn.ELU) for n_in, n_out in pairwise(channels)
        )
        self.encoder = nn.ModuleList(BLOCKS[block](n, flat, view) for n, view in zip(channels, views, strict=True))
        outputs = (n_classes, 1) if name == "res_unet_h" else (n_classes + 1,)
        self.decoders = nn.ModuleList(Decoder(channels, stride, flat, block, views, n_out) for n_out in outputs)

    def segment(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Segmenter`."""
        x = self.encoder[0](self.embedding(x))
        features = [x]
        for down, block in zip(self.downs, self.encoder[1:], strict=True):
            x = block(down(x))  # halved in the plane
            features.append(x)
        found = torch.cat([decoder(features) for decoder in self.decoders], dim=1)
        return found[:, :-1], found[:, -1:]


class Decoder(nn.Module):
    """The way up: 1³ convolution to the skip's width, upsampling, sum with the skip, block; then the output."""

    def __init__(
        self,
        channels: tuple[int, ...],
        stride: Zyx,
        flat: Zyx,
        block: BlockName,
        views: list[View],
        n_out: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.narrow = nn.ModuleList(ConvNormAct(b, a, UNIT, activation=nn.ELU) for a, b in pairwise(channels))
        self.blocks = nn.ModuleList(BLOCKS[block](n, flat, v) for n, v in zip(channels[:-1], views[:-1], strict=True))
        self.head = nn.Conv3d(channels[0], n_out, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features from fine to coarse, each (B, n, …), to logits at the finest."""
        *skips, x = features
        for narrow, block, skip in zip(reversed(self.narrow), reversed(self.blocks), reversed(skips), strict=True):
            # Narrowing first gives the same result as narrowing after linear upsampling would, at an eighth of the
            # work; only batch norm and ELU see coarser voxels.
            x = block(upsample(narrow(x), self.stride) + skip)
        return self.head(x)


class AnisotropicBlock(nn.Module):
    """ACB: a flat convolution (1×3×3), then two 3³ convolutions with a skip across those two."""

    def __init__(self, n: int, flat: Zyx, view: View) -> None:
        super().__init__()
        self.flat = ConvNormAct(n, n, flat, activation=nn.ELU)
        self.residual = ResidualBlock(n, flat, view)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, …) to the same shape."""
        return self.residual(self.flat(x))


class ResidualBlock(nn.Module):
    """Two 3³ convolutions with a skip across; what attention does to them is defined by subclasses."""

    def __init__(self, n: int, flat: Zyx, view: View) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNormAct(n, n, activation=nn.ELU),
            nn.Conv3d(n, n, 3, padding=1, bias=False),
            nn.BatchNorm3d(n),
        )
        self.attention = self.build_attention(n, view)

    def build_attention(self, n: int, view: View) -> nn.Module:
        """Factors on channels."""
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, …) to the same shape."""
        return functional.elu(self.attention(self.body(x)) + x)


class SqueezeExcitationBlock(ResidualBlock):
    """Residual block whose channels are weighted by two linear layers of their means (Hu et al., CVPR 2018)."""

    def build_attention(self, n: int, view: View) -> nn.Module:
        """See :class:`ResidualBlock`."""
        hidden = max(2, n // 4)
        weigh = nn.Sequential(nn.Conv3d(n, hidden, 1), nn.ReLU(), nn.Conv3d(hidden, n, 1), nn.Sigmoid())
        return ChannelAttention(weigh, view)


class EfficientAttentionBlock(ResidualBlock):
    """Residual block whose channels are weighted by a convolution across their means (ECA, Wang et al., CVPR 2020)."""

    def build_attention(self, n: int, view: View) -> nn.Module:
        """See :class:`ResidualBlock`."""
        return ChannelAttention(AcrossChannels(3), view)


class AcrossChannels(nn.Module):
    """A short convolution along the channel axis, then a sigmoid."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 1, (kernel, 1, 1), padding=(kernel // 2, 0, 0), bias=False)

    def forward(self, means: Tensor) -> Tensor:
        """(B, n, Z, Y, X) to the same shape, between 0 and 1."""
        flat = means.flatten(2)[:, None, :, :, None]  # (B, 1, n, Z·Y·X, 1)
        return torch.sigmoid(self.convolution(flat)).reshape(means.shape)


class ChannelAttention(nn.Module):
    """Weigh channels by a function of their means over a window around each voxel.

    The papers average over the whole crop. In a volume cut into blocks that would make probabilities depend on the
    blocks, so in evaluation mode the mean is local, over a window of the size of a training crop: Chu et al.,
    "Improving image restoration by revisiting global information aggregation", ECCV 2022. For crops of up to half
    the window the two are the same.

    Local means hardly change from voxel to voxel. They are taken between cells as large as the network's strides, and
    the factors interpolated.
    """

    def __init__(self, weigh: nn.Module, view: View) -> None:
        super().__init__()
        self.weigh = weigh
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, …) to the same shape; in evaluation mode sizes must be multiples of the cell's."""
        if self.training:
            return x * self.weigh(x.mean(dim=(2, 3, 4), keepdim=True))
        cells = functional.avg_pool3d(x, self.view.cell)
        return x * upsample(self.weigh(local_mean(cells, self.view.window)), self.view.cell)


def local_mean(x: Tensor, window: Zyx) -> Tensor:
    """Mean over a box centred on each voxel, cut off at the edges; (B, C, Z, Y, X) to the same shape.

    One running sum per axis, so the cost does not grow with the window.
    """
    for axis, size in enumerate(window, start=2):
        n, radius = x.shape[axis], size // 2
        if radius >= n - 1:
            x = x.mean(dim=axis, keepdim=True).expand_as(x)
            continue
        # The sum is of deviations from the mean of the block, or its rounding would grow along the block.
        middle = x.mean(dim=axis, keepdim=True)
        total = functional.pad((x - middle).cumsum(dim=axis), [0, 0] * (4 - axis) + [1, 0])
        positions = torch.arange(n, device=x.device)
        last, first = (positions + radius + 1).clamp_max(n), (positions - radius).clamp_min(0)
        counts = (last - first).view(-1, *[1] * (4 - axis))
        x = (total.index_select(axis, last) - total.index_select(axis, first)) / counts + middle
    return x


BLOCKS: dict[str, type[nn.Module]] = {
    "acb": AnisotropicBlock,
    "res": ResidualBlock,
    "se": SqueezeExcitationBlock,
    "eca": EfficientAttentionBlock,
}
"""Block name → its class; all take channels, the flat kernel, and the window of attention."""


def flat_triple(voxel_size_nm: VoxelSize, value: int) -> Zyx:
    """``value`` along every axis, but 1 along the one whose voxels are clearly longest (30×8×8 nm: 1×3×3)."""
    coarsest = max(voxel_size_nm)
    is_flat = coarsest >= ISOTROPIC_WITHIN * min(voxel_size_nm)
    z, y, x = (1 if is_flat and size == coarsest else value for size in voxel_size_nm)
    return z, y, x
