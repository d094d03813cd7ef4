"""``denseunet569``: 3D-DenseUNet-569, deep and light: dense blocks of depthwise-separable convolutions.

After Alalwan et al., "Efficient 3D deep learning model for medical image semantic segmentation", Alexandria
Engineering Journal 2021: stem of 96 channels with a 7³ kernel and stride 2, dense blocks of 4, 12, 24 and 36 layers
(growth 32, bottleneck 128), transitions that halve channels, five trilinear upsamplings with skips. Every
downsampling is a strided convolution in place of a pooling. Decoder widths are those of H-DenseUNet (Li et al., TMI
2018), which the paper builds on. The paper's own parameter counts contradict each other (3.6 and 36 million).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat, nn

from voxclf.geometry import UNIT, VoxelSize, Zyx
from voxclf.models.segmenter import (
    ConvNormAct,
    Segmenter,
    multiply_strides,
    plan_strides,
    scale_channels,
    upsample,
)

STEM_CHANNELS = 96
GROWTH = 32
BOTTLENECK = 128
LAYERS = (4, 12, 24, 36)
DECODER_CHANNELS = (64, 96, 192, 224, 504)
"""From the finest level to the coarsest."""


class DenseUNet(Segmenter):
    """3D-DenseUNet-569.

    Parameters
    ----------
    name, n_classes, in_channels, voxel_size_nm, width
        See :class:`Segmenter`.
    layers : sequence of four int
        Layers of the dense blocks.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        in_channels: int = 1,
        voxel_size_nm: VoxelSize = (1.0, 1.0, 1.0),
        width: float = 1.0,
        layers: Sequence[int] = LAYERS,
    ) -> None:
        strides = plan_strides(voxel_size_nm, len(DECODER_CHANNELS))
        super().__init__(name, n_classes, in_channels, multiply_strides(strides))
        self.strides = strides
        stem, growth, bottleneck = scale_channels((STEM_CHANNELS, GROWTH, BOTTLENECK), width)
        self.stem = ConvNormAct(in_channels, stem, (7, 7, 7), stride=strides[0])
        downs: list[nn.Module] = []
        blocks: list[nn.Module] = []
        skips, n = [stem], stem
        for n_layers, stride in zip(layers, strides[1:], strict=True):
            # The first step down follows the stem and keeps its channels; transitions between blocks halve them.
            n_out = n if not blocks else n // 2
            downs.append(SeparableConv(n, n_out, stride))
            blocks.append(DenseBlock(n_out, n_layers, growth, bottleneck))
            n = n_out + n_layers * growth
            skips.append(n)
        self.downs, self.blocks = nn.ModuleList(downs), nn.ModuleList(blocks)
        widths = scale_channels(DECODER_CHANNELS, width)
        inputs = [below + skip for below, skip in zip((*widths[1:], skips.pop()), (0, *skips), strict=True)]
        self.decoder = nn.ModuleList(SeparableConv(a, b) for a, b in zip(inputs, widths, strict=True))
        self.head = nn.Conv3d(widths[0], n_classes, 1)

    def segment(self, x: Tensor) -> Tensor:
        """See :class:`Segmenter`."""
        x = self.stem(x)  # (B, 96, Z/2, Y/2, X/2)
        skips = [x]
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(x))
            skips.append(x)
        skips.pop()
        for level in reversed(range(len(self.strides))):
            x = upsample(x, self.strides[level])
            # No features of the full resolution exist to be joined at the last step.
            x = self.decoder[level](cat([x, skips.pop()], dim=1) if skips else x)
        return self.head(x)


class DenseBlock(nn.Module):
    """Layers that each see the outputs of all before: 1³ to the bottleneck, then a separable 3³ to ``growth``."""

    def __init__(self, n_in: int, n_layers: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(n_in + i * growth, bottleneck, UNIT),
                SeparableConv(bottleneck, growth),
            )
            for i in range(n_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, …) to (B, n + layers · growth, …)."""
        for layer in self.layers:
            x = cat([x, layer(x)], dim=1)
        return x


class SeparableConv(nn.Sequential):
    """Depthwise-separable convolution: a 3³ kernel per channel, with the stride, then 1³ across channels."""

    def __init__(self, n_in: int, n_out: int, stride: Zyx = UNIT) -> None:
        super().__init__(
            nn.Conv3d(n_in, n_in, 3, stride, padding=1, groups=n_in, bias=False),
            ConvNormAct(n_in, n_out, UNIT),
        )
