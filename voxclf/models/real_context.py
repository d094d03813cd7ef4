"""A padded patch network without its padding: each voxel sees what is really around its patch (``--real-context``).

Inside a volume a patch is surrounded by voxels, not by the zeros that the network was trained with. Taking the padding
away and making the patch larger by what it stood for gives a network with the same weights that is exact at every
voxel, so it can be evaluated densely. It is *another* function than the one that was trained: how much its answers
suffer, only labels tell.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from voxclf.geometry import ORIGIN, UNIT, Zyx, add
from voxclf.models.convnext3d import Block
from voxclf.models.dense import InexactNetworkError, inspect_geometry
from voxclf.models.patch_cnn import Concat, Residual


class CroppedBlock(nn.Module):
    """A ConvNeXt block whose depthwise convolution does not pad: its input is cropped before it is added."""

    def __init__(self, block: Block, margin: Zyx) -> None:
        super().__init__()
        self.layers = block.layers
        self.scale = block.scale
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        """Input, cropped, plus what the layers add to it."""
        z, y, w = (slice(m, -m or None) for m in self.margin)
        return x[:, :, z, y, w] + self.scale * self.layers(x)


def remove_padding(network: nn.Module, patch: Zyx) -> tuple[nn.Module, Zyx]:
    """Copy a network without its padding; returns it and the larger patch that it decides from.

    Parameters
    ----------
    network : PatchNetwork
        With convolutions that keep the extent, residual blocks and pools.
    patch : (z, y, x)
        Its patch; the centre voxel of the larger one is the same voxel.

    Raises
    ------
    InexactNetworkError
        If it is not its padding that forbids dense evaluation.
    ValueError
        If it has no padding.
    """
    bare = deepcopy(network)
    removed, _ = _strip(bare.get_submodule("backbone"), UNIT)
    if removed == ORIGIN:
        raise ValueError("--real-context was given, but the network has no padding to replace: leave it out")
    larger = add(patch, add(removed, removed))
    geometry = inspect_geometry(bare, larger)
    if not geometry.is_exact:
        raise InexactNetworkError(f"without padding it is not exact either: {'; '.join(geometry.problems)}")
    return bare, larger


def _strip(module: nn.Module, spacing: Zyx) -> tuple[Zyx, Zyx]:
    """Remove the padding within a module, in place.

    Returns
    -------
    removed : (z, y, x)
        Voxels of the volume that it stood for, on each side.
    spacing : (z, y, x)
        Distance in the volume between neighbouring voxels of the module's result.
    """
    if isinstance(module, nn.Conv3d):
        padding = (0, 0, 0) if isinstance(module.padding, str) else module.padding
        removed = _multiply((padding[0], padding[1], padding[2]), spacing)
        module.padding = ORIGIN
        return removed, _multiply(spacing, _triple(module.stride))
    if isinstance(module, (nn.MaxPool3d, nn.AvgPool3d)):
        return ORIGIN, _multiply(spacing, _triple(module.stride))
    if isinstance(module, Residual):
        removed, _ = _strip(module.main, spacing)
        z, y, x = (m + r // s for m, r, s in zip(module.margin, removed, spacing, strict=True))
        module.margin = (z, y, x)
        return removed, spacing
    if isinstance(module, Concat):
        return ORIGIN, spacing  # the networks that have one do not pad
    total = ORIGIN
    for name, child in module.named_children():
        if isinstance(child, Block):
            removed, _ = _strip(child.layers, spacing)
            z, y, x = (r // s for r, s in zip(removed, spacing, strict=True))
            setattr(module, name, CroppedBlock(child, (z, y, x)))
        else:
            removed, spacing = _strip(child, spacing)
        total = add(total, removed)
    return total, spacing


def _multiply(a: Zyx, b: Zyx) -> Zyx:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def _triple(value: int | tuple[int, ...]) -> Zyx:
    return (value, value, value) if isinstance(value, int) else (value[0], value[1], value[2])
