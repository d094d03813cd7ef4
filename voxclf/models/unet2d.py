"""``unet2d``: a 2D UNet that segments a volume section by section, with any encoder of segmentation-models-pytorch.

Encoders of the reports: resnest14d, resnet34, resnest50d, resnet101, resnest200e; vgg16, vgg19; and ``plain``, the
UNet of Ronneberger et al. (MICCAI 2015) with batch norm and padding, at 384² in the report. Encoders start from
ImageNet weights, which the library fetches; ``plain`` has none and always starts at random.

Sections are the planes of equal voxel size. With ``three_axes`` the same network also runs on the sections along the
other two axes, and the probabilities are averaged, voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, cat, nn
from torch.nn import functional

from voxclf.errors import ModelError
from voxclf.geometry import VoxelSize
from voxclf.models.segmenter import Segmenter, scale_channels
from voxclf.models.torchvision_import import prepare_torchvision

PLAIN_CHANNELS = (64, 128, 256, 512, 1024)
DECODER_CHANNELS = (256, 128, 64, 32, 16)
RESNESTS = ("resnest14d", "resnest26d", "resnest50d", "resnest101e", "resnest200e", "resnest269e")
ENCODER_ALIASES = {name: f"timm-{name}" for name in RESNESTS}
"""The reports' names of encoders → the library's, where they differ."""


class UNet2D(Segmenter):
    """2D UNet over the sections of a volume.

    Parameters
    ----------
    name, n_classes, in_channels
        See :class:`Segmenter`.
    voxel_size_nm : (z, y, x)
        Sections are across the axis of the longest voxels, z where all are equal.
    width : float
        Factor on the channels of ``plain`` and of the decoder; an encoder's own are those of its weights.
    encoder : str
        "plain", a report's name (``resnest14d``), or any name that segmentation-models-pytorch knows.
    encoder_weights : str
        "imagenet", another set of weights that the library has, or "none" for a random start.
    three_axes : bool
        Average the probabilities of sections along all axes; for isotropic voxels.

    Raises
    ------
    ModelError
        If the library is missing, does not know the encoder, or cannot get the weights.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        in_channels: int = 1,
        voxel_size_nm: VoxelSize = (1.0, 1.0, 1.0),
        width: float = 1.0,
        encoder: str = "resnet34",
        encoder_weights: str = "imagenet",
        three_axes: bool = False,
    ) -> None:
        section_axis = max(range(3), key=lambda axis: (voxel_size_nm[axis], -axis))
        section_axes = (0, 1, 2) if three_axes else (section_axis,)
        n_levels = len(PLAIN_CHANNELS) - 1 if encoder == "plain" else len(DECODER_CHANNELS)
        stride = 2**n_levels
        z, y, x = (1 if section_axes == (axis,) else stride for axis in range(3))
        super().__init__(name, n_classes, in_channels, (z, y, x))
        self.section_axes = section_axes
        if not three_axes:
            # Sections say nothing about each other: a crop is one, so that sparse labels fill it.
            z, y, x = (1 if axis == section_axis else n for axis, n in enumerate(self.patch))
            self.patch = (z, y, x)
        self.encoder_name = encoder
        self.sections: nn.Module
        if encoder == "plain":
            self.sections = PlainUNet2D(in_channels, n_classes, scale_channels(PLAIN_CHANNELS, width))
        else:
            decoder = scale_channels(DECODER_CHANNELS, width)
            self.sections = build_library_unet(encoder, encoder_weights, in_channels, n_classes, decoder)

    def segment(self, x: Tensor) -> Tensor:
        """See :class:`Segmenter`; with three axes the logits are logarithms of the averaged probabilities."""
        if len(self.section_axes) == 1:
            return self._segment_along(x, self.section_axes[0])
        log_p = [functional.log_softmax(self._segment_along(x, axis), dim=1) for axis in self.section_axes]
        return torch.logsumexp(torch.stack(log_p), dim=0)

    def _segment_along(self, x: Tensor, axis: int) -> Tensor:
        """Sections across ``axis`` become the batch of the 2D network, and go back."""
        sections = x.movedim(axis + 2, 1)  # (B, sections, C, rows, columns)
        logits = self.sections(sections.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return logits.unflatten(0, sections.shape[:2]).movedim(1, axis + 2)


class PlainUNet2D(nn.Module):
    """The UNet of Ronneberger et al.: two 3² convolutions per level, max pooling, transposed convolutions."""

    def __init__(self, in_channels: int, n_classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_double_convolution(a, b) for a, b in pairwise((in_channels, *channels)))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(channels))
        self.decoder = nn.ModuleList(_double_convolution(2 * a, a) for a in channels[:-1])
        self.head = nn.Conv2d(channels[0], n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) to (B, K, Y, X); both sizes multiples of 16."""
        skips = []
        for block in self.encoder[:-1]:
            x = block(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)  # (B, 64 · 2^l, Y/2^l, X/2^l)
        x = self.encoder[-1](x)
        for up, block in zip(reversed(self.ups), reversed(self.decoder), strict=True):
            x = block(cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def _double_convolution(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            layer
            for a, b in ((n_in, n_out), (n_out, n_out))
            for layer in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        )
    )


def build_library_unet(
    encoder: str, weights: str, in_channels: int, n_classes: int, decoder_channels: Sequence[int]
) -> nn.Module:
    """Build ``segmentation_models_pytorch.Unet``, with its encoder's weights or a clear error.

    Raises
    ------
    ModelError
        See :class:`UNet2D`.
    """
    smp = _import_library()
    name = ENCODER_ALIASES.get(encoder, encoder)
    options: dict[str, Any] = {
        "in_channels": in_channels,
        "classes": n_classes,
        "decoder_channels": tuple(decoder_channels),
    }
    # Built without weights first: what fails after that is the weights.
    try:
        network = smp.Unet(name, encoder_weights=None, **options)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"encoder {encoder!r} could not be built by segmentation-models-pytorch ({_first_line(error)}); choose "
            f"plain, {', '.join(ENCODER_ALIASES)}, resnet34, resnet101, vgg16, vgg19 or another of its encoders"
        ) from error
    if weights == "none":
        return network
    try:
        return smp.Unet(name, encoder_weights=weights, **options)
    except Exception as error:
        # The library raises whatever its downloads raise: URLError, OSError, errors of the hub, KeyError.
        raise ModelError(
            f"encoder weights {weights!r} of {encoder!r} could not be loaded ({_first_line(error)}); run once where "
            "the network can be reached (they are kept in the user's cache), or pass --encoder-weights none to train "
            "the encoder from a random start"
        ) from error


def _import_library() -> Any:
    prepare_torchvision()
    try:
        return import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise ModelError(
            f"model 'unet2d' needs segmentation-models-pytorch for its encoders ({_first_line(error)}); install "
            "voxclf[unet2d], or use --encoder plain, which needs nothing"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:160]}"
