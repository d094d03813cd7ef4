"""``unet3d``: the 3D UNet, the first network to beat when labels are dense.

Encoder of convolutions and max pooling, decoder of upsampling and convolutions, skips by concatenation. Widths are
those of Çiçek et al., "3D U-Net: learning dense volumetric segmentation from sparse annotation", MICCAI 2016; the
comparison of 3D networks on the EPFL volume (crops of 128³) names none. Pooling follows the voxel size.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, cat, nn

from voxclf.geometry import VoxelSize
from voxclf.models.segmenter import (
    ConvNormAct,
    Segmenter,
    multiply_strides,
    plan_strides,
    scale_channels,
    upsample,
)

CHANNELS = (32, 64, 128, 256)


class UNet3D(Segmenter):
    """3D UNet; parameters as in :class:`Segmenter`."""

    def __init__(
        self,
        name: str,
        n_classes: int,
        in_channels: int = 1,
        voxel_size_nm: VoxelSize = (1.0, 1.0, 1.0),
        width: float = 1.0,
    ) -> None:
        channels = scale_channels(CHANNELS, width)
        strides = plan_strides(voxel_size_nm, len(channels) - 1)
        super().__init__(name, n_classes, in_channels, multiply_strides(strides))
        self.strides = strides
        self.encoder = nn.ModuleList(
            _double_convolution(n_in, n_out) for n_in, n_out in zip((in_channels, *channels), channels, strict=False)
        )
        self.pools = nn.ModuleList(nn.MaxPool3d(stride, stride) for stride in self.strides)
        self.decoder = nn.ModuleList(_double_convolution(below + skip, skip) for skip, below in pairwise(channels))
        self.head = nn.Conv3d(channels[0], n_classes, 1)

    def segment(self, x: Tensor) -> Tensor:
        """See :class:`Segmenter`."""
        skips = []
        for block, pool in zip(self.encoder, self.pools, strict=False):
            x = block(x)
            skips.append(x)
            x = pool(x)  # (B, 2^l width, Z/2^l, Y/2^l, X/2^l)
        x = self.encoder[-1](x)
        for level in reversed(range(len(skips))):
            x = self.decoder[level](cat([upsample(x, self.strides[level]), skips.pop()], dim=1))
        return self.head(x)


def _double_convolution(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(n_in, n_out), ConvNormAct(n_out, n_out))
