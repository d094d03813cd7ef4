"""Filter bank and trees as one model: the features of a block go straight into the packed trees.

The feature volume is never written anywhere; it exists for one block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from features.bank import FilterBank
from voxclf.geometry import UNIT, VoxelSize, Zyx, add
from voxclf.labels import LabelSet
from voxclf.provenance import IntensityStatistics


class Classifier(Protocol):
    """Rows of features to class probabilities: packed trees or a Gaussian mixture."""

    @property
    def n_features(self) -> int: ...  # noqa: D102

    @property
    def n_classes(self) -> int: ...  # noqa: D102

    def predict_probabilities(self, features: np.ndarray) -> np.ndarray:
        """Map features (F, N) of float32 to probabilities (K, N) of float32."""
        ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The whole classifier as plain arrays."""
        ...


@dataclass(frozen=True)
class TreeModel:
    """A fitted model with all that is needed to use it on another volume.

    Parameters
    ----------
    name : str
        Kind of model, as ``voxclf models`` lists it.
    bank : FilterBank
        The features it was trained on.
    classifier : Classifier
        Packed trees or Gaussian mixture.
    label_set : LabelSet
        Class index k of the probabilities is ``label_set.ids[k]``.
    voxel_size_nm : (z, y, x)
        Of the volume it was trained on.
    intensity : IntensityStatistics
        Of the volume it was trained on.
    hyperparameters, training : dict
        What was asked for, and where the labels came from; JSON-able.
    feature_importances : ndarray of float, shape (F,), optional
        Share of each feature in the decisions.
    """

    name: str
    bank: FilterBank
    classifier: Classifier
    label_set: LabelSet
    voxel_size_nm: VoxelSize
    intensity: IntensityStatistics
    hyperparameters: dict[str, Any]
    feature_importances: np.ndarray | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features at the model's voxel size."""
        return self.bank.names(self.voxel_size_nm)

    def step(self) -> TreePredictor:
        """The step that predicts blocks of a volume."""
        return TreePredictor(self.bank, self.classifier, self.voxel_size_nm)


@dataclass(frozen=True)
class TreePredictor:
    """The step of a tree model: image block in, probabilities out, features only in between."""

    bank: FilterBank
    classifier: Classifier
    voxel_size_nm: VoxelSize
    alignment: Zyx = UNIT

    @property
    def halo(self) -> Zyx:
        """The reach of the widest filter."""
        return self.bank.halo(self.voxel_size_nm)

    @property
    def out_channels(self) -> int:
        """Number of classes K."""
        return self.classifier.n_classes

    def working_bytes(self, core_shape: Zyx) -> int:
        """Features and probabilities of the core, and a few float32 copies of what is read."""
        read = int(np.prod(add(core_shape, add(self.halo, self.halo))))
        n_floats = (self.bank.n_features + 2 * self.out_channels) * int(np.prod(core_shape)) + 5 * read
        return 4 * n_floats

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Classify a block: (1, Z + 2h, Y + 2h, X + 2h) to (K, Z, Y, X) float32, summing to 1 over K."""
        (image,) = arrays
        features = self.bank.compute(image[0], self.voxel_size_nm)
        probabilities = self.classifier.predict_probabilities(features.reshape(len(features), -1))
        return probabilities.reshape(-1, *features.shape[1:])
