"""Networks that classify the centre voxel of a patch: the published ones, and one more that is exact at every voxel.

Each network is a list of layers in ``NETWORKS``, as one would write it on paper. A layer is built for what is left of
the patch at its place, axis by axis, so the same list serves cubes and the flat patches of anisotropic volumes:

- a kernel of 3 needs 3 voxels; along an axis with fewer it is 1;
- a dilation is the largest up to the published one that fits;
- a pool leaves out axes that are at most half as long as the longest, so that z catches up: a patch of 9, 32, 32 voxels
  of 30 x 8 x 8 nm is pooled in the plane only, until the voxels are about as wide as thick;
- the head is a linear layer on whatever is left at the end, most often one voxel.

For a cube of the published size this gives the published network. The centre is voxel ``patch // 2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxclf.geometry import Zyx
from voxclf.models.dense_graph import triple

NormName = Literal["batch", "layer"]


@dataclass(frozen=True)
class Style:
    """What all layers of a network have in common.

    Parameters
    ----------
    activation : type of nn.Module
        After every norm.
    norm : "batch" or "layer"
        Batch norm, or layer norm over the channels of each voxel.
    padded : bool
        Whether convolutions keep the extent by padding with zeros. A patch inside a volume is surrounded by voxels,
        not by zeros, so such a network is not exact at every voxel.
    width : float
        Factor on all channel numbers.
    """

    activation: type[nn.Module]
    norm: NormName = "batch"
    padded: bool = False
    width: float = 1.0

    def channels(self, published: int) -> int:
        """Channel number of this network where the published one has so many."""
        return max(1, round(published * self.width))


@dataclass(frozen=True)
class Shape:
    """What a layer receives: channels, and the extent that a patch has there."""

    channels: int
    extent: Zyx


class Layer(Protocol):
    """An entry of ``NETWORKS``: builds itself for what it receives, and tells what it hands on."""

    def build(self, shape: Shape, style: Style) -> tuple[nn.Module, Shape]:
        """Module and what it hands on."""
        ...


# --- modules ---


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of each voxel: no voxel knows of another.

    Parameters
    ----------
    channels : int
        Channels of its input, (B, C, Z, Y, X).
    """

    acts_per_voxel = True

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of each voxel."""
        x = functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class Residual(nn.Module):
    """Adds its input to what its layers make of it; valid convolutions need the input cropped to their result."""

    def __init__(self, main: nn.Sequential, margin: Zyx) -> None:
        super().__init__()
        self.main = main
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        """Input, cropped, plus the layers' result."""
        z, y, w = (slice(m, -m or None) for m in self.margin)
        return x[:, :, z, y, w] + self.main(x)


class Concat(nn.Module):
    """Channels of several branches, one after the other."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' results, joined along the channels."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class PatchNetwork(nn.Module):
    """A backbone and a linear head: (B, C, *patch) to (B, K), the logits of the patch's centre voxel.

    Parameters
    ----------
    name : str
        Name of the architecture.
    patch : (z, y, x)
        Shape of its patches, voxels.
    in_channels : int
        Channels of its input; 1 for the image alone.
    n_classes : int
        K.
    backbone : nn.Sequential
        All layers but the head.
    left : Shape
        What the backbone hands on for one patch.
    """

    def __init__(
        self, name: str, patch: Zyx, in_channels: int, n_classes: int, backbone: nn.Sequential, left: Shape
    ) -> None:
        super().__init__()
        self.name = name
        self.patch = patch
        self.in_channels = in_channels
        self.n_classes = n_classes
        self.backbone_shape = left
        self.backbone = backbone
        self.head = nn.Conv3d(left.channels, n_classes, left.extent)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the patch's centre voxel."""
        return self.head(self.backbone(x)).squeeze((2, 3, 4))  # (B, K)


# --- layers ---


def _kernel(size: int, extent: Zyx, style: Style) -> Zyx:
    """Kernel along each axis: as given, or 1 where fewer voxels are left; padded, no taps that only ever see zeros."""
    if style.padded:
        z, y, x = (min(size, 2 * n - 1) for n in extent)
    else:
        z, y, x = (size if n >= size else 1 for n in extent)
    return z, y, x


def _after(extent: Zyx, kernel: Zyx, dilation: Zyx, style: Style) -> Zyx:
    if style.padded:
        return extent
    z, y, x = (n - d * (k - 1) for n, k, d in zip(extent, kernel, dilation, strict=True))
    return z, y, x


@dataclass(frozen=True)
class Conv:
    """Convolution, norm, activation.

    Parameters
    ----------
    channels : int
        Of its result, before `Style.width`.
    size : int
        Of the kernel, voxels.
    """

    channels: int
    size: int = 3

    def build(self, shape: Shape, style: Style) -> tuple[nn.Module, Shape]:
        """Build it for one place of a network."""
        kernel = _kernel(self.size, shape.extent, style)
        return _convolution(shape, style, style.channels(self.channels), kernel, (1, 1, 1))


def _convolution(
    shape: Shape, style: Style, channels: int, kernel: Zyx, dilation: Zyx, is_plain: bool = False
) -> tuple[nn.Module, Shape]:
    padding = tuple(d * (k - 1) // 2 if style.padded else 0 for k, d in zip(kernel, dilation, strict=True))
    after = Shape(channels, _after(shape.extent, kernel, dilation, style))
    # Batch norm subtracts the mean, and with it any bias before it.
    has_bias = is_plain or style.norm == "layer"
    conv = nn.Conv3d(shape.channels, channels, kernel, padding=padding, dilation=dilation, bias=has_bias)
    if is_plain:
        return conv, after
    norm = nn.BatchNorm3d(channels) if style.norm == "batch" else ChannelLayerNorm(channels)
    return nn.Sequential(conv, norm, style.activation()), after


@dataclass(frozen=True)
class Res:
    """Two convolutions of the channels at hand, added to their input."""

    def build(self, shape: Shape, style: Style) -> tuple[nn.Module, Shape]:
        """Build it for one place of a network."""
        same = replace(style, width=1.0)  # its channels are already scaled
        first, between = Conv(shape.channels).build(shape, same)
        second, after = Conv(shape.channels).build(between, same)
        z, y, x = ((n - m) // 2 for n, m in zip(shape.extent, after.extent, strict=True))
        return Residual(nn.Sequential(first, second), (z, y, x)), after


@dataclass(frozen=True)
class DilatedRes:
    """Two dilated convolutions of the channels at hand, added to their input; valid.

    Parameters
    ----------
    dilation : int
        Largest dilation along an axis; where not even 1 fits, the pair only mixes channels.
    """

    dilation: int

    def build(self, shape: Shape, style: Style) -> tuple[nn.Module, Shape]:
        """Build it for one place of a network."""
        kernel, dilation = _fit_two(3, self.dilation, shape.extent)
        first, between = _convolution(shape, style, shape.channels, kernel, dilation)
        second, after = _convolution(between, style, shape.channels, kernel, dilation)
        z, y, x = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return Residual(nn.Sequential(first, second), (z, y, x)), after


def _fit_two(size: int, dilation: int, extent: Zyx) -> tuple[Zyx, Zyx]:
    """Kernel and dilation with which two convolutions of 3, or one of 5, fit along each axis."""
    fits = tuple(min(dilation, (n - 1) // 4) for n in extent)
    return triple(size if d else 1 for d in fits), triple(max(1, d) for d in fits)


@dataclass(frozen=True)
class DilatedConcat:
    """Two dilated convolutions of 3 after each other, beside one plain convolution of 5 with the same reach.

    Parameters
    ----------
    channels : int
        Of each branch's result, before `Style.width`.
    dilation : int
        Largest dilation along an axis.
    """

    channels: int
    dilation: int

    def build(self, shape: Shape, style: Style) -> tuple[nn.Module, Shape]:
        """Build it for one place of a network."""
        channels = style.channels(self.channels)
        small, dilation = _fit_two(3, self.dilation, shape.extent)
        large, _ = _fit_two(5, self.dilation, shape.extent)
        first, between = _convolution(shape, style, channels, small, dilation)
        second, after = _convolution(between, style, channels, small, dilation)
        beside, _ = _convolution(shape, style, channels, large, dilation, is_plain=True)
        return Concat([nn.Sequential(first, second), beside]), Shape(2 * channels, after.extent)


@dataclass(frozen=True)
class Pool:
    """Pool of 2 with stride 2, along the axes that are long enough.

    Parameters
    ----------
    kind : type of nn.Module
        nn.MaxPool3d or nn.AvgPool3d.
    leaves : int
        Voxels that an axis must keep to be pooled.
    """

    kind: type[nn.MaxPool3d] | type[nn.AvgPool3d]
    leaves: int = 1

    def build(self, shape: Shape, style: Style) -> tuple[nn.Module, Shape]:
        """Build it for one place of a network."""
        longest = max(shape.extent)
        size = triple(2 if n >= 2 * self.leaves and 2 * n > longest else 1 for n in shape.extent)
        after = triple(n // s for n, s in zip(shape.extent, size, strict=True))
        return self.kind(size), Shape(shape.channels, after)


def max_pool(leaves: int = 1) -> Pool:
    """Maximum of 2 x 2 x 2 voxels."""
    return Pool(nn.MaxPool3d, leaves)


def average_pool() -> Pool:
    """Mean of 2 x 2 x 2 voxels."""
    return Pool(nn.AvgPool3d)


# --- networks ---

RES_LAYERS = (
    *(Conv(16), max_pool()),
    *(Conv(32), Res(), max_pool()),
    *(Conv(64), Res(), max_pool()),
    *(Conv(128), Res(), average_pool()),
)

NETWORKS: Mapping[str, tuple[Style, Sequence[Layer]]] = {
    "3layer": (Style(nn.ReLU), [Conv(16), Conv(32), Conv(64), average_pool()]),
    "4conv": (
        Style(nn.GELU),
        [Conv(16), max_pool(), Conv(32), max_pool(), Conv(64), Conv(128), average_pool()],
    ),
    "4res": (Style(nn.GELU, padded=True), RES_LAYERS),
    "4res_ln": (Style(nn.GELU, norm="layer", padded=True), RES_LAYERS),
    # The dilated part needs 13 voxels, so the pool before it is left out of a patch of 16, as published.
    "dil": (Style(nn.ReLU), [Conv(16), max_pool(leaves=13), DilatedConcat(32, dilation=3), average_pool()]),
    # Valid convolutions use up the patch, so one early pool instead of three, and the deep layers see more detail.
    # With a patch of 32 the last pair of convolutions has one voxel left and mixes channels; from 42 on it has 3³.
    "4res_valid": (
        Style(nn.GELU),
        [Conv(16), max_pool(), Conv(32), Res(), Conv(64), Res(), Conv(128), Res(), average_pool()],
    ),
    # Ours: no pool blurs a boundary of two voxels, and the cropped skips carry the centre voxel through unchanged.
    # A patch of 32 has room for dilations 1, 2 and 4, one of 64 for 8 as well.
    "dilres": (
        Style(nn.GELU),
        [Conv(32), DilatedRes(1), DilatedRes(2), DilatedRes(4), DilatedRes(8), Conv(64, size=1)],
    ),
}


def build_patch_cnn(name: str, n_classes: int, patch: Zyx, in_channels: int = 1, width: float = 1.0) -> PatchNetwork:
    """Build one of ``NETWORKS``.

    Parameters
    ----------
    name : str
        Its name.
    n_classes : int
        Classes to tell apart.
    patch : (z, y, x)
        Shape of its patches, voxels.
    in_channels : int
        Channels of its input.
    width : float
        Factor on all channel numbers; 0.5 costs about a quarter.
    """
    style, layers = NETWORKS[name]
    style = replace(style, width=width)
    modules, shape = [], Shape(in_channels, patch)
    for layer in layers:
        module, shape = layer.build(shape, style)
        modules.append(module)
    return PatchNetwork(name, patch, in_channels, n_classes, nn.Sequential(*modules), shape)
