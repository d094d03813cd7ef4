"""Model folders: JSON and packed arrays, never a pickle, and a golden patch that proves the model still works.

::

    model/
      model.json     what the model is, its classes, voxel size, features, and a hash of every other file
      arrays.npz     the classifier as plain arrays (bounds are checked when it is loaded)
      booster.ubj    xgboost's own file, for use outside voxclf (xgboost only)
      golden.npz     a small piece of the training volume and the probabilities expected for it, in each round
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from features.bank import FilterBank
from voxclf import __version__
from voxclf.errors import ModelError
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import CalibrationMap
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
        A real piece of the training volume with the halo of the last round; the model's own answers to it are
        stored too.
    folder : Path
        Created; its parent as well.
    booster : bytes, optional
        xgboost's UBJ serialisation.
    """
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    np.savez(building / "arrays.npz", **_collect_arrays(model))
    golden = {"image": golden_image, **_golden_answers(model, golden_image)}
    np.savez_compressed(building / "golden.npz", **golden)
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
        "n_rounds": model.n_rounds,
        "context": None if model.context is None else model.context.to_dict(),
        "is_calibrated": model.calibration is not None,
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
    # The old model stands until the new one can take its place.
    retired = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.replace(retired)
    building.replace(folder)
    shutil.rmtree(retired, ignore_errors=True)


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
    arrays = _load_arrays(folder)
    try:
        model = TreeModel(
            name=description["name"],
            bank=FilterBank.from_dict(description["bank"]),
            classifiers=tuple(_load_classifiers(folder, arrays, description)),
            label_set=LabelSet.from_dict(description["labels"]),
            voxel_size_nm=tuple(description["voxel_size_nm"]),
            intensity=IntensityStatistics.from_dict(description["intensity"]),
            hyperparameters=description["hyperparameters"],
            context=None if description["context"] is None else FilterBank.from_dict(description["context"]),
            calibration=_load_calibration(arrays) if description["is_calibrated"] else None,
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


def _golden_answers(model: TreeModel, image: np.ndarray) -> dict[str, Any]:
    """Each round's answer to the golden image; what later rounds read as probabilities is drawn from a fixed seed."""
    drawn = np.random.default_rng(0).integers(0, 256, (model.label_set.n_classes, *image.shape[1:]), dtype=np.uint8)
    answers = {}
    for i in range(model.n_rounds):
        step = model.step(i)
        margin = [h - own for h, own in zip(model.step().halo, step.halo, strict=True)]
        z, y, x = (slice(m, n - m) for m, n in zip(margin, image.shape[1:], strict=True))
        inputs = [image, drawn][: 1 if i == 0 else 2]
        answers[f"probabilities_{i}"] = step(*(array[:, z, y, x] for array in inputs))
    return answers


def _check_golden(model: TreeModel, folder: Path) -> None:
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        expected = dict(golden)
    found = _golden_answers(model, expected.pop("image"))
    difference = max(
        float(np.abs(found[name] - expected[name]).max()) if found[name].shape == expected[name].shape else np.inf
        for name in found
    )
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
