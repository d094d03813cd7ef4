"""ConvNeXt-Tiny with 3D convolutions as a patch network, and a variant with dilations in place of strides.

After Liu et al. 2022, "A ConvNet for the 2020s", https://arxiv.org/abs/2201.03545: a stem that cuts the patch into
small cubes; stages of blocks (depthwise convolution of 7 → layer norm → linear to 4 x the channels → GELU → linear
back → learned scale → added to the input); between stages a layer norm and a convolution of 2 that halves the extent.

Its depthwise convolutions are padded, so it is not exact at every voxel. Along an axis with n voxels a padded kernel
touches at most 2 n - 1 of them, and the taps beyond only ever meet padding: they are left out, which changes no result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from voxclf.geometry import Zyx
from voxclf.models.dense_graph import triple
from voxclf.models.patch_cnn import ChannelLayerNorm, PatchNetwork, Shape

DEPTHWISE_SIZE = 7
STEM_LEAVES = 8
"""Voxels that the stem leaves of an axis: 32 / 4 or 16 / 2, as published; a shorter axis is cut less or not at all."""


class Block(nn.Module):
    """Depthwise convolution, then two linear layers on each voxel, scaled and added to the input.

    Parameters
    ----------
    channels : int
        Of its input and its result.
    extent : (z, y, x)
        Of its input when the network sees one patch.
    """

    def __init__(self, channels: int, extent: Zyx) -> None:
        super().__init__()
        kernel = [min(DEPTHWISE_SIZE, 2 * n - 1) for n in extent]
        self.layers = nn.Sequential(
            nn.Conv3d(channels, channels, kernel, padding=[k // 2 for k in kernel], groups=channels),
            ChannelLayerNorm(channels),
            nn.Conv3d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv3d(4 * channels, channels, 1),
        )
        self.scale = nn.Parameter(torch.full((channels, 1, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Input plus what the layers add to it."""
        return x + self.scale * self.layers(x)


def build_convnext(name: str, n_classes: int, patch: Zyx, in_channels: int = 1, width: float = 1.0) -> PatchNetwork:
    """Build ConvNeXt-Tiny: stem of stride 4 (2 for 16 voxels), stages of 3, 3, 9, 3 blocks, halved in between.

    Parameters are those of :func:`voxclf.models.patch_cnn.build_patch_cnn`.
    """
    channels = _scale((96, 192, 384, 768), width)
    stem = triple(max(1, min(4, n // STEM_LEAVES)) for n in patch)
    extent = triple(n // s for n, s in zip(patch, stem, strict=True))
    layers: list[nn.Module] = [nn.Conv3d(in_channels, channels[0], stem, stem), ChannelLayerNorm(channels[0])]
    for stage, depth in enumerate((3, 3, 9, 3)):
        if stage:
            # An axis at most half as long as the longest waits, as in `patch_cnn.Pool`.
            size = triple(2 if n >= 2 and 2 * n > max(extent) else 1 for n in extent)
            extent = triple(n // s for n, s in zip(extent, size, strict=True))
            before = channels[stage - 1]
            layers += [ChannelLayerNorm(before), nn.Conv3d(before, channels[stage], size, size)]
        layers += [Block(channels[stage], extent) for _ in range(depth)]
    return _finish(name, n_classes, patch, in_channels, layers, Shape(channels[-1], extent))


def build_dilated_convnext(
    name: str, n_classes: int, patch: Zyx, in_channels: int = 1, width: float = 1.0
) -> PatchNetwork:
    """Build the variant without strides: stem 4³ with dilation 4, seven stages of 3 blocks joined by 2³, dilation 3.

    It keeps the resolution to the end and costs some 100 GFLOP for a patch of 32. Parameters are those of
    :func:`voxclf.models.patch_cnn.build_patch_cnn`.
    """
    channels = _scale((96, 192, 384, 768, 768, 768, 1024), width)
    stem, extent = _dilated(in_channels, channels[0], 4, 4, patch)
    layers: list[nn.Module] = [stem, ChannelLayerNorm(channels[0])]
    for stage, n_channels in enumerate(channels):
        if stage:
            before = channels[stage - 1]
            down, extent = _dilated(before, n_channels, 2, 3, extent)
            layers += [ChannelLayerNorm(before), down]
        layers += [Block(n_channels, extent) for _ in range(3)]
    return _finish(name, n_classes, patch, in_channels, layers, Shape(channels[-1], extent))


def _dilated(before: int, after: int, size: int, dilation: int, extent: Zyx) -> tuple[nn.Conv3d, Zyx]:
    """Valid convolution with the largest dilation that fits along each axis, and the extent it leaves."""
    fits = [min(dilation, (n - 1) // (size - 1)) for n in extent]
    layer = nn.Conv3d(before, after, [size if d else 1 for d in fits], dilation=[max(1, d) for d in fits])
    return layer, triple(n - d * (size - 1) for n, d in zip(extent, fits, strict=True))


def _finish(
    name: str, n_classes: int, patch: Zyx, in_channels: int, layers: list[nn.Module], left: Shape
) -> PatchNetwork:
    backbone = nn.Sequential(*layers, ChannelLayerNorm(left.channels))
    return PatchNetwork(name, patch, in_channels, n_classes, backbone, left)


def _scale(channels: tuple[int, ...], width: float) -> list[int]:
    return [max(1, round(n * width)) for n in channels]
