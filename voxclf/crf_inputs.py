"""What the CRF reads: a prediction, the volume it was made from and, if wanted, channels of another volume to guide it.

Everything is opened here and checked to belong together, for ``crf-refine`` and ``crf-tune`` alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.config import CrfInput
from voxclf.errors import FormatError
from voxclf.formats.source import SourceInfo
from voxclf.geometry import Region, Zyx, parse_region
from voxclf.labels import LabelSet
from voxclf.models.crf_volumes import CrfVolumes
from voxclf.predict import LABELS, PROBABILITIES
from voxclf.provenance import describe_input
from voxclf.volume import Volume, open_volume

VOXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference of voxel sizes that rounding in a file explains; both describe the same voxels."""
MOST_CHANNELS = 3
"""Each channel multiplies the CRF's work by some 1.25 / intensity width: three of width 0.2 take 200 times one's."""


@dataclass(frozen=True)
class PredictedVolumes(CrfVolumes):
    """The volumes of a CRF, and the ``region`` that was predicted."""

    region: Region

    def describe(self) -> dict[str, dict[str, Any]]:
        """Path, geometry and fingerprint of each, for provenance."""
        named = dict(zip(("volume", "guide"), self.images, strict=False))
        return {name: describe_input(volume) for name, volume in {"prediction": self.probabilities, **named}.items()}


def open_crf_volumes(config: CrfInput) -> PredictedVolumes:
    """Open the volumes of a CRF and check that they belong together.

    The image's voxel size may be missing: the prediction states it.

    Raises
    ------
    FileNotFoundError
        If one does not exist.
    FormatError
        If the prediction holds labels but no probabilities.
    ValueError
        If shapes or voxel sizes differ, or there are too many channels.
    """
    probabilities = _open_probabilities(config.prediction)
    image = open_volume(config.volume, config.voxel_size, require_voxel_size=False)
    _check_belongs(image, probabilities, "give the volume that was predicted")
    if not image.has_voxel_size:
        image = replace(image, voxel_size_nm=probabilities.voxel_size_nm)
    images = (image, *_open_guide(config, probabilities))
    n_channels = sum(volume.n_channels for volume in images)
    if n_channels > MOST_CHANNELS:
        raise ValueError(
            f"{' and '.join(volume.path for volume in images)} have {n_channels} channels; the CRF follows the edges "
            f"of at most {MOST_CHANNELS}, because each multiplies its work: choose channels with --guide-channels, or "
            "save those of interest as a volume of their own"
        )
    label_set = LabelSet.from_metadata(probabilities.metadata) or LabelSet.from_ids(
        range(1, probabilities.n_channels + 1), probabilities.channel_names or None
    )
    # A prediction of a region is 0 around it, which is no probability.
    predicted = probabilities.metadata.get("provenance", {}).get("region")
    region = parse_region(predicted, image.shape) if predicted else Region((0, 0, 0), image.shape)
    return PredictedVolumes(images, probabilities, label_set, region)


def _open_probabilities(path: str) -> Volume:
    folder = Path(path)
    if (folder / PROBABILITIES).exists():
        path = str(folder / PROBABILITIES)
    elif (folder / LABELS).exists():
        raise FormatError(
            f"{folder} holds labels but no probabilities (voxclf predict --probabilities none); the CRF refines "
            "probabilities: predict again with --probabilities uint8"
        )
    volume = open_volume(path)
    is_labels = volume.metadata.get("kind") == "labels" or volume.n_channels < 2
    if is_labels or not (volume.dtype == np.uint8 or volume.dtype.kind == "f"):
        raise FormatError(
            f"{path} holds {volume.n_channels} channel(s) of {volume.dtype}: labels or an image. Probabilities "
            "have a channel per class, uint8 or float: give a folder from voxclf predict, or its probabilities.zarr"
        )
    return volume


def _check_belongs(volume: Volume, probabilities: Volume, advice: str) -> None:
    if volume.shape != probabilities.shape:
        raise ValueError(
            f"{volume.path} has shape {volume.shape} but {probabilities.path} has {probabilities.shape} (z, y, x); "
            f"they must agree: {advice}"
        )
    if not volume.has_voxel_size:
        return
    sizes = volume.voxel_size_nm, probabilities.voxel_size_nm
    if np.abs(np.array(sizes[0]) / np.array(sizes[1]) - 1).max() > VOXEL_SIZE_TOLERANCE:
        raise ValueError(
            f"{volume.path} has voxel size {sizes[0]} nm but {probabilities.path} has {sizes[1]} nm (z, y, x); they "
            f"must agree, because widths are in nm: {advice}, or correct --voxel-size"
        )


# ------------------------------------------------------------------------------------------------------- guide


def _open_guide(config: CrfInput, probabilities: Volume) -> tuple[Volume, ...]:
    if config.guide is None:
        if config.guide_channels is not None:
            raise ValueError(
                f"--guide-channels was {config.guide_channels}, but there is no --guide to choose them from; give "
                "--guide VOLUME, for example from `voxclf features`"
            )
        return ()
    guide = open_volume(config.guide, require_voxel_size=False)
    _check_belongs(guide, probabilities, "make the guide from the volume that was predicted")
    if config.guide_channels is None:
        return (guide,)
    return (select_channels(guide, [name.strip() for name in config.guide_channels.split(",")]),)


def select_channels(volume: Volume, names: Sequence[str]) -> Volume:
    """A view of some channels of a volume, by name or by number from 0.

    Raises
    ------
    ValueError
        If there is no such channel.
    """
    known = {**{str(i): i for i in range(volume.n_channels)}, **{n: i for i, n in enumerate(volume.channel_names)}}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"--guide-channels was {','.join(names)}, but {volume.path} has no channel {unknown[0]!r}; it has "
            f"{', '.join(volume.channel_names) or f'0 to {volume.n_channels - 1}'}: choose some of these"
        )
    chosen = tuple(known[name] for name in names)
    source = _ChosenChannels(volume, chosen)
    return replace(volume, info=source.info, opener=partial(_ChosenChannels, volume, chosen))


@dataclass(frozen=True)
class _ChosenChannels:
    """An open volume of which only some channels are seen."""

    whole: Volume
    chosen: tuple[int, ...]

    @cached_property
    def info(self) -> SourceInfo:
        names = tuple(self.whole.channel_names[i] for i in self.chosen) if self.whole.channel_names else ()
        shape = (len(self.chosen), *self.whole.shape)
        return replace(self.whole.info, shape=shape, channel_names=names, write_shape=None)

    def read(self, start: Zyx, stop: Zyx) -> NDArray:
        return self.whole.read(start, stop)[list(self.chosen)]
