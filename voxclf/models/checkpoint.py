"""Model folders: JSON and packed arrays, never a pickle, and a golden patch that proves the model still works.

::

    model/
      model.json     what the model is, its classes, voxel size, features, and a hash of every other file
      arrays.npz     the classifier as plain arrays (bounds are checked when it is loaded)
      booster.ubj    xgboost's own file, for use outside voxclf (xgboost only)
      golden.npz     a small piece of the training volume and the probabilities expected for it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from features.bank import FilterBank
from voxclf import __version__
from voxclf.errors import ModelError
from voxclf.labels import LabelSet
from voxclf.models.gaussian_mixture import GaussianMixture
from voxclf.models.packed_forest import PackedForest
from voxclf.models.trees import Classifier, TreeModel
from voxclf.provenance import IntensityStatistics

FORMAT = "voxclf-model"
FORMAT_VERSION = 1
CLASSIFIERS: dict[str, Any] = {"packed_forest": PackedForest, "gaussian_mixture": GaussianMixture}
GOLDEN_TOLERANCE = 1e-4
"""Largest change of a golden probability that other CPUs and library versions may cause by rounding."""


def save_model(model: TreeModel, golden_image: np.ndarray, folder: Path, booster: bytes | None = None) -> None:
    """Write a model folder; an older one at the same place is replaced only once the new one is complete.

    Parameters
    ----------
    model : TreeModel
        What to save.
    golden_image : ndarray, shape (1, z + 2h, y + 2h, x + 2h)
        A real piece of the training volume with its halo; the model's own answer to it is stored too.
    folder : Path
        Created; its parent as well.
    booster : bytes, optional
        xgboost's UBJ serialisation.
    """
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    arrays: dict[str, Any] = model.classifier.to_arrays()
    np.savez(building / "arrays.npz", **arrays)
    np.savez_compressed(building / "golden.npz", image=golden_image, probabilities=model.step()(golden_image))
    if booster is not None:
        (building / "booster.ubj").write_bytes(booster)
    kinds = {kind: name for name, kind in CLASSIFIERS.items()}
    importances = model.feature_importances
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "voxclf_version": __version__,
        "name": model.name,
        "classifier": kinds[type(model.classifier)],
        "labels": model.label_set.to_dict(),
        "voxel_size_nm": list(model.voxel_size_nm),
        "bank": model.bank.to_dict(),
        "feature_names": list(model.feature_names),
        "feature_importances": None if importances is None else [float(value) for value in importances],
        "intensity": model.intensity.to_dict(),
        "hyperparameters": model.hyperparameters,
        "training": model.training,
        "files": {path.name: _hash_file(path) for path in sorted(building.iterdir())},
    }
    (building / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    building.replace(folder)


def load_model(folder: Path) -> TreeModel:
    """Read a model folder and check that it is whole and still gives its golden answer.

    Raises
    ------
    FileNotFoundError
        If there is no model folder at that path.
    ModelError
        If a file was changed or is damaged, the format is newer than this program, or the golden patch gives
        other probabilities here than where the model was trained.
    """
    description = _read_description(folder)
    for name, expected in description["files"].items():
        path = folder / name
        if not path.exists() or _hash_file(path) != expected:
            what = "has changed since it was saved" if path.exists() else "is missing"
            raise ModelError(
                f"{path} {what}; a model folder must stay as `voxclf fit` wrote it: copy it again or fit again"
            )
    try:
        model = TreeModel(
            name=description["name"],
            bank=FilterBank.from_dict(description["bank"]),
            classifier=_load_classifier(folder, description["classifier"]),
            label_set=LabelSet.from_dict(description["labels"]),
            voxel_size_nm=tuple(description["voxel_size_nm"]),
            intensity=IntensityStatistics.from_dict(description["intensity"]),
            hyperparameters=description["hyperparameters"],
            feature_importances=_optional_array(description["feature_importances"]),
            training=description["training"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'model.json'} is damaged ({error!r}); copy it again or fit again") from error
    _check_consistent(model, folder)
    _check_golden(model, folder)
    return model


def model_fingerprint(folder: Path) -> str:
    """Hash that names a model: equal only for the same weights, classes and features."""
    return _hash_file(folder / "model.json")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a model folder (no model.json); give one that `voxclf fit` wrote")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        known = description["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); copy it again or fit again") from error
    if not known:
        raise ModelError(f"{path} says format {description['format']!r}, not {FORMAT!r}; give a voxclf model folder")
    if description["format_version"] > FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {description['format_version']}; this voxclf {__version__} reads up to "
            f"{FORMAT_VERSION}: update voxclf"
        )
    if not isinstance(description.get("files"), dict) or "arrays.npz" not in description["files"]:
        raise ModelError(f"{path} does not list its files; copy the model again or fit again")
    return dict(description)


def _load_classifier(folder: Path, kind: str) -> Classifier:
    if kind not in CLASSIFIERS:
        raise ModelError(f"{folder} holds a classifier {kind!r}; this voxclf knows {', '.join(CLASSIFIERS)}")
    try:
        with np.load(folder / "arrays.npz", allow_pickle=False) as archive:
            arrays = dict(archive)
    except (ValueError, OSError, EOFError) as error:
        raise ModelError(f"{folder / 'arrays.npz'} cannot be read ({error}); copy it again or fit again") from error
    classifier: Classifier = CLASSIFIERS[kind].from_arrays(arrays)
    return classifier


def _check_consistent(model: TreeModel, folder: Path) -> None:
    counts = {
        "features": (model.bank.n_features, model.classifier.n_features),
        "classes": (model.label_set.n_classes, model.classifier.n_classes),
    }
    for what, (declared, packed) in counts.items():
        if declared != packed:
            raise ModelError(
                f"{folder}: model.json declares {declared} {what}, arrays.npz has {packed}; the two files do not "
                "belong together: copy the model again or fit again"
            )


def _check_golden(model: TreeModel, folder: Path) -> None:
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        found = model.step()(golden["image"])
        expected = golden["probabilities"]
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not difference <= GOLDEN_TOLERANCE:
        raise ModelError(
            f"{folder} gives other probabilities on this machine than where it was trained (golden patch differs by "
            f"{difference:.2g}, allowed {GOLDEN_TOLERANCE:g}); a library changed: fit again, or use the versions in "
            "model.json"
        )


def _optional_array(values: list[float] | None) -> np.ndarray | None:
    return None if values is None else np.array(values)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
