"""A fitted network with all that is needed to use it on another volume; the counterpart of `trees.TreeModel`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from voxclf.engine.step import Step
from voxclf.geometry import VoxelSize, Zyx
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models.model import ModelKind
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.patch_classifier import PatchClassifier
from voxclf.models.registry import NETWORKS, NetworkInfo
from voxclf.provenance import IntensityStatistics

SEGMENTER_HALO: Zyx = (12, 12, 12)
"""Around a core of 8, so that a segmenter's folder is tested with a block of 32."""


@dataclass(frozen=True, eq=False)
class NetworkModel:
    """A fitted network. Fields that trees have too mean the same: see `voxclf.models.model.Model`.

    Parameters
    ----------
    architecture : dict
        Arguments of `registry.build` beside the name, JSON-able: classes, channels, patch and the network's options.
    network : nn.Module
        With its weights; put into eval mode here.
    inputs : NetworkInput
        What it reads of a volume.
    """

    name: str
    architecture: dict[str, Any]
    network: nn.Module
    inputs: NetworkInput
    label_set: LabelSet
    voxel_size_nm: VoxelSize
    intensity: IntensityStatistics
    hyperparameters: dict[str, Any]
    calibration: CalibrationMap | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network.eval()

    @property
    def kind(self) -> ModelKind:
        """Which files its folder has."""
        return "network"

    @property
    def n_rounds(self) -> int:
        """Networks read the image only: one round."""
        return 1

    @property
    def info(self) -> NetworkInfo:
        """What the registry tells about it."""
        return NETWORKS[self.name]

    @property
    def patch(self) -> Zyx:
        """Shape of its patches; segmenters have none."""
        z, y, x = self.architecture["patch"]
        return z, y, x

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The channels of its input."""
        return self.inputs.names

    @property
    def feature_importances(self) -> None:
        """Not known for networks."""
        return None

    @cached_property
    def patches(self) -> PatchClassifier:
        """The plain network on single patches, on the CPU."""
        return PatchClassifier(self.network, self.patch, self.inputs)

    def step(self, round_index: int | None = None) -> Step:
        """The step that predicts blocks on the CPU in float32, exactly.

        Raises
        ------
        InexactNetworkError
            If the network pads, so that a voxel's result depends on the patch it lies in.
        """
        from voxclf.models.network_step import make_network_step

        return make_network_step(self)

    @property
    def golden_halo(self) -> Zyx:
        """What a patch around a voxel needs on each side; for a segmenter, enough for a small block."""
        return SEGMENTER_HALO if self.info.kind == "segmenter" else self.patches.halo

    def golden_answers(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Probabilities (8, K) of the corners of a piece of the volume, patch by patch; a segmenter's of all of it."""
        if self.info.kind == "segmenter":
            channels = torch.from_numpy(self.inputs.compute(image[0]))
            with torch.inference_mode():
                return {"probabilities": self.network(channels[None]).softmax(dim=1)[0].numpy()}
        shape = [n - 2 * h for n, h in zip(image.shape[1:], self.golden_halo, strict=True)]
        windows = [
            image[:, *(slice(a, a + 2 * h + 1) for a, h in zip(corner, self.golden_halo, strict=True))]
            for corner in product(*((0, n - 1) for n in shape))
        ]
        return {"probabilities": self.patches.classify_windows(np.stack(windows))}
