"""``dynunet`` and ``swin_unetr``: today's reference segmenters, as MONAI builds them, behind our interface.

DynUNet is the network of nnU-Net (Isensee et al., Nature Methods 2021): strided convolutions and transposed ones,
with kernels and strides planned from the voxel size. SwinUNETR (Hatamizadeh et al., 2022) has a transformer with
shifted windows as its encoder. MONAI is imported when one is built.

Both get batch norm where MONAI's default is instance norm, whose statistics would be those of a block.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

from torch import Tensor

from voxclf.errors import ModelError
from voxclf.geometry import VoxelSize, Zyx
from voxclf.models.segmenter import Segmenter, multiply_strides, plan_strides, scale_channels

DYNUNET_CHANNELS = (32, 64, 128, 256, 320)
"""nnU-Net's, which stops at 320 in 3D."""

SWIN_FEATURES = 48
SWIN_HEADS = (3, 6, 12, 24)
SWIN_PATCH = 2
SWIN_DIVISOR = SWIN_PATCH**5
"""MONAI's SwinUNETR halves five times along every axis, whatever the voxel size."""

NORM = ("batch", {"affine": True})


class DynUNet(Segmenter):
    """nnU-Net's 3D network; parameters as in :class:`Segmenter`.

    Along an axis that a level does not halve, voxels are still coarse and its kernels are 1 long.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        in_channels: int = 1,
        voxel_size_nm: VoxelSize = (1.0, 1.0, 1.0),
        width: float = 1.0,
    ) -> None:
        from monai.networks.nets import DynUNet as MonaiDynUNet

        channels = scale_channels(DYNUNET_CHANNELS, width)
        steps = plan_strides(voxel_size_nm, len(channels) - 1)
        super().__init__(name, n_classes, in_channels, multiply_strides(steps))
        self.network = MonaiDynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=n_classes,
            kernel_size=[_kernel_of(stride) for stride in (*steps, (2, 2, 2))],
            strides=[1, *steps],
            upsample_kernel_size=list(steps),
            filters=channels,
            norm_name=NORM,
        )
        # MONAI registers all its blocks a second time, nested in each other. Weights of two names cannot be saved.
        nested = self.network.skip_layers
        del self.network.skip_layers
        object.__setattr__(self.network, "skip_layers", nested)

    def segment(self, x: Tensor) -> Tensor:
        """See :class:`Segmenter`."""
        return self.network(x)


class SwinUNETR(Segmenter):
    """SwinUNETR with a window of 4, so that its windows tile blocks of a practical size.

    Parameters
    ----------
    name, n_classes, in_channels
        See :class:`Segmenter`.
    width : float
        Factor on the published 48 features, rounded to a multiple of 12.
    window : int
        Edge of the attention windows; the published 7 makes the alignment 224 voxels.

    Raises
    ------
    ModelError
        If einops is missing.

    Notes
    -----
    Windows of the coarsest attention span ``16 · window`` voxels, and a voxel's result depends on where windows
    begin. The alignment is the least common multiple of that and of MONAI's own divisor.
    """

    def __init__(self, name: str, n_classes: int, in_channels: int = 1, width: float = 1.0, window: int = 4) -> None:
        from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

        if window < 2:
            raise ValueError(f"window was {window}; it must be at least 2: 4 is the default, 7 as published")
        edge = math.lcm(SWIN_DIVISOR, SWIN_PATCH ** len(SWIN_HEADS) * window)
        if find_spec("einops") is None:
            raise ModelError(f"network {name!r} needs einops, which MONAI imports for it; run `pip install einops`")
        super().__init__(name, n_classes, in_channels, (edge, edge, edge), (SWIN_DIVISOR,) * 3)
        (features,) = scale_channels((SWIN_FEATURES,), width)
        self.network = MonaiSwinUNETR(
            in_channels=in_channels,
            out_channels=n_classes,
            feature_size=max(12, round(features / 12) * 12),
            num_heads=SWIN_HEADS,
            window_size=window,
            norm_name=NORM,
        )

    def segment(self, x: Tensor) -> Tensor:
        """See :class:`Segmenter`."""
        return self.network(x)


def _kernel_of(stride: Zyx) -> Zyx:
    z, y, x = (3 if s == 2 else 1 for s in stride)
    return z, y, x
