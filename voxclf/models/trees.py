"""Filter bank and trees as one model: the features of a block go straight into the packed trees.

The feature volume is never written anywhere; it exists for one block at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from features.bank import FilterBank
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import UNIT, VoxelSize, Zyx, add
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models.model import ModelKind
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
        The features of the image it was trained on.
    classifiers : tuple of Classifier
        Packed trees or Gaussian mixture, one per round: the first reads the image's features, each further one also
        the probabilities of the round before (autocontext).
    label_set : LabelSet
        Class index k of the probabilities is ``label_set.ids[k]``.
    voxel_size_nm : (z, y, x)
        Of the volume it was trained on.
    intensity : IntensityStatistics
        Of the volume it was trained on.
    hyperparameters, training : dict
        What was asked for, and where the labels came from; JSON-able.
    context : FilterBank, optional
        The filters of probabilities that rounds after the first read.
    calibration : CalibrationMap, optional
        Corrects the probabilities of the last round.
    feature_importances : ndarray of float, shape (F,), optional
        Share of each feature in the decisions of the last round.
    """

    name: str
    bank: FilterBank
    classifiers: tuple[Classifier, ...]
    label_set: LabelSet
    voxel_size_nm: VoxelSize
    intensity: IntensityStatistics
    hyperparameters: dict[str, Any]
    context: FilterBank | None = None
    calibration: CalibrationMap | None = None
    feature_importances: np.ndarray | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> ModelKind:
        """Which files its folder has."""
        return "trees"

    @property
    def n_rounds(self) -> int:
        """1, or more with autocontext."""
        return len(self.classifiers)

    @property
    def classifier(self) -> Classifier:
        """The classifier of the last round."""
        return self.classifiers[-1]

    def stack(self, round_index: int) -> FeatureStack:
        """The features that a round reads, 0 being the first."""
        if round_index == 0:
            return FeatureStack(self.bank, self.voxel_size_nm)
        return FeatureStack(self.bank, self.voxel_size_nm, self.context, self.label_set.names)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features of the last round."""
        return self.stack(self.n_rounds - 1).names

    def step(self, round_index: int | None = None) -> TreePredictor:
        """The step that predicts blocks in one round, the last by default; 0 is the first."""
        index = self.n_rounds - 1 if round_index is None else round_index
        is_last = index == self.n_rounds - 1
        return TreePredictor(self.stack(index), self.classifiers[index], self.calibration if is_last else None)

    @property
    def golden_halo(self) -> Zyx:
        """Halo of the last round, the widest."""
        return self.step().halo

    def golden_answers(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Each round's answer to a piece of the volume; what later rounds read is drawn from a fixed seed."""
        drawn = np.random.default_rng(0).integers(0, 256, (self.label_set.n_classes, *image.shape[1:]), dtype=np.uint8)
        answers = {}
        for i in range(self.n_rounds):
            step = self.step(i)
            margin = [h - own for h, own in zip(self.golden_halo, step.halo, strict=True)]
            z, y, x = (slice(m, n - m) for m, n in zip(margin, image.shape[1:], strict=True))
            inputs = [image, drawn][: 1 if i == 0 else 2]
            answers[f"probabilities_{i}"] = step(*(array[:, z, y, x] for array in inputs))
        return answers


@dataclass(frozen=True)
class TreePredictor:
    """The step of a tree model: image block (and probabilities of the round before) in, probabilities out."""

    stack: FeatureStack
    classifier: Classifier
    calibration: CalibrationMap | None = None
    alignment: Zyx = UNIT

    @property
    def halo(self) -> Zyx:
        """The reach of the widest filter."""
        return self.stack.halo

    @property
    def out_channels(self) -> int:
        """Number of classes K."""
        return self.classifier.n_classes

    def working_bytes(self, core_shape: Zyx) -> int:
        """What is read (as float32 at most), features, filters' scratch, and probabilities until they are stored."""
        n_inputs = 1 if self.stack.context is None else 1 + self.out_channels
        read = math.prod(add(core_shape, add(self.halo, self.halo)))
        stored = (12 * self.out_channels + 8) * math.prod(core_shape)
        return 4 * read + (n_inputs - 1) * read + self.stack.working_bytes(core_shape) + stored

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Classify a block: (1, Z + 2h, …) and, with a context, (K, Z + 2h, …) to (K, Z, Y, X), summing to 1 over K."""
        image, *probabilities = arrays
        features = self.stack.compute(image[0], *probabilities)
        found = self.classifier.predict_probabilities(features.reshape(len(features), -1))
        if self.calibration is not None:
            found = self.calibration.apply(found)
        return found.reshape(-1, *features.shape[1:])
