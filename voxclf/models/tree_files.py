"""The files of a tree model: its classifiers as plain arrays, whose bounds are checked when they are loaded.

::

    arrays.npz     classifiers of every round and the calibration, under names that say which
    booster.ubj    xgboost's own file, for use outside voxclf (xgboost only)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from features.bank import FilterBank
from voxclf.errors import ModelError
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models.gaussian_mixture import GaussianMixture
from voxclf.models.packed_forest import PackedForest
from voxclf.models.trees import Classifier, TreeModel

CLASSIFIERS: dict[str, Any] = {"packed_forest": PackedForest, "gaussian_mixture": GaussianMixture}
NEEDED_FILES = ("arrays.npz",)


def write_files(model: TreeModel, folder: Path) -> dict[str, Any]:
    """Write the arrays of a model; returns what ``model.json`` must say about them."""
    np.savez(folder / "arrays.npz", **_collect_arrays(model))
    kinds = {kind: name for name, kind in CLASSIFIERS.items()}
    importances = model.feature_importances
    return {
        "classifier": kinds[type(model.classifier)],
        "n_rounds": model.n_rounds,
        "context": None if model.context is None else model.context.to_dict(),
        "is_calibrated": model.calibration is not None,
        "bank": model.bank.to_dict(),
        "feature_names": list(model.feature_names),
        "feature_importances": None if importances is None else [float(value) for value in importances],
    }


def read_files(folder: Path, description: dict[str, Any], shared: dict[str, Any]) -> TreeModel:
    """Rebuild the model; ``shared`` are the fields that models of every kind have.

    Raises
    ------
    ModelError
        If the arrays are damaged or do not belong to the description.
    """
    arrays = _load_arrays(folder)
    importances = description["feature_importances"]
    model = TreeModel(
        bank=FilterBank.from_dict(description["bank"]),
        classifiers=tuple(_load_classifiers(folder, arrays, description)),
        context=None if description["context"] is None else FilterBank.from_dict(description["context"]),
        calibration=_load_calibration(arrays) if description["is_calibrated"] else None,
        feature_importances=None if importances is None else np.array(importances),
        **shared,
    )
    _check_consistent(model, folder)
    return model


def _collect_arrays(model: TreeModel) -> dict[str, Any]:
    """All arrays of a model under names that say which round they belong to."""
    arrays = {
        f"round_{i}.{name}": array
        for i, classifier in enumerate(model.classifiers)
        for name, array in classifier.to_arrays().items()
    }
    if model.calibration is not None:
        arrays |= {f"calibration.{name}": array for name, array in model.calibration.to_arrays().items()}
    return arrays


def _select_arrays(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _load_arrays(folder: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(folder / "arrays.npz", allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError) as error:
        raise ModelError(f"{folder / 'arrays.npz'} cannot be read ({error}); copy it again or fit again") from error


def _load_classifiers(folder: Path, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> Iterator[Classifier]:
    kind = description["classifier"]
    if kind not in CLASSIFIERS:
        raise ModelError(f"{folder} holds a classifier {kind!r}; this voxclf knows {', '.join(CLASSIFIERS)}")
    for i in range(description["n_rounds"]):
        yield CLASSIFIERS[kind].from_arrays(_select_arrays(arrays, f"round_{i}."))


def _load_calibration(arrays: dict[str, np.ndarray]) -> CalibrationMap:
    return CalibrationMap.from_arrays(_select_arrays(arrays, "calibration."))


def _check_consistent(model: TreeModel, folder: Path) -> None:
    for i, classifier in enumerate(model.classifiers):
        counts = {
            "features": (model.stack(i).n_features, classifier.n_features),
            "classes": (model.label_set.n_classes, classifier.n_classes),
        }
        for what, (declared, packed) in counts.items():
            if declared != packed:
                raise ModelError(
                    f"{folder}: model.json declares {declared} {what}, arrays.npz has {packed}; the two files do not "
                    "belong together: copy the model again or fit again"
                )
