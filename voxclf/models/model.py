"""What every fitted model has, whatever its kind: the contract that predict, report and the model folder rely on."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from voxclf.engine.step import Step
from voxclf.geometry import VoxelSize, Zyx
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import CalibrationMap
from voxclf.provenance import IntensityStatistics

ModelKind = Literal["trees", "network"]


class Model(Protocol):
    """A fitted model with all that is needed to use it on another volume: trees or a network.

    Attributes
    ----------
    kind : "trees" or "network"
        Which files its folder has.
    name : str
        As ``voxclf models`` lists it.
    label_set : LabelSet
        Class index k of the probabilities is ``label_set.ids[k]``.
    voxel_size_nm, intensity
        Of the volume it was trained on.
    hyperparameters, training : dict
        What was asked for, and where the labels came from; JSON-able.
    calibration : CalibrationMap or None
        Corrects the probabilities of the last round.
    n_rounds : int
        1, or more where a model reads the probabilities of the round before (autocontext).
    feature_names : tuple of str
        What it reads of a voxel, in the last round.
    feature_importances : ndarray of float or None
        Share of each feature in its decisions, where that is known.
    golden_halo : (z, y, x)
        Margin of the piece of the volume that its folder is tested with.
    """

    @property
    def kind(self) -> ModelKind: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def label_set(self) -> LabelSet: ...  # noqa: D102
    @property
    def voxel_size_nm(self) -> VoxelSize: ...  # noqa: D102
    @property
    def intensity(self) -> IntensityStatistics: ...  # noqa: D102
    @property
    def hyperparameters(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def training(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def calibration(self) -> CalibrationMap | None: ...  # noqa: D102
    @property
    def n_rounds(self) -> int: ...  # noqa: D102
    @property
    def feature_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def feature_importances(self) -> np.ndarray | None: ...  # noqa: D102
    @property
    def golden_halo(self) -> Zyx: ...  # noqa: D102

    def step(self, round_index: int | None = None) -> Step:
        """The step that predicts blocks on the CPU in one round, the last by default."""
        ...

    def golden_answers(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Named probabilities for a piece of the volume, (1, z + 2h, …) with :attr:`golden_halo`."""
        ...
