"""Model folders: JSON and plain arrays, never a pickle, and a golden patch that proves the model still works.

::

    model/
      model.json     what the model is, its classes, voxel size, features, and a hash of every other file
      golden.npz     a small piece of the training volume and the probabilities expected for it
      ...            the model itself: `tree_files.py` and `network_files.py` say which files
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from voxclf import __version__
from voxclf.errors import ModelError
from voxclf.labels import LabelSet
from voxclf.models.model import Model
from voxclf.provenance import IntensityStatistics

FORMAT = "voxclf-model"
FORMAT_VERSION = 1
GOLDEN_TOLERANCE = 1e-4
"""Largest change of a golden probability that other CPUs and library versions may cause by rounding."""
FILES_OF_KIND = {"trees": "voxclf.models.tree_files", "network": "voxclf.models.network_files"}
"""Which module reads and writes the files of a kind of model; imported when needed, because networks need torch."""


def save_model(
    model: Model, golden_image: np.ndarray, folder: Path, extra_files: Mapping[str, bytes | None] | None = None
) -> None:
    """Write a model folder; an older one at the same place is replaced only once the new one is complete.

    Parameters
    ----------
    model : Model
        What to save.
    golden_image : ndarray, shape (1, z + 2h, y + 2h, x + 2h)
        A real piece of the training volume with the model's ``golden_halo``; the model's own answers to it are
        stored too.
    folder : Path
        Created; its parent as well.
    extra_files : mapping of str to bytes, optional
        Kept in the folder under these names, such as xgboost's own serialisation; None is left out.
    """
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    own = import_module(FILES_OF_KIND[model.kind]).write_files(model, building)
    golden: dict[str, Any] = {"image": golden_image, **model.golden_answers(golden_image)}
    np.savez_compressed(building / "golden.npz", **golden)
    for name, content in (extra_files or {}).items():
        if content is not None:
            (building / name).write_bytes(content)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "voxclf_version": __version__,
        "kind": model.kind,
        "name": model.name,
        "labels": model.label_set.to_dict(),
        "voxel_size_nm": list(model.voxel_size_nm),
        "intensity": model.intensity.to_dict(),
        "hyperparameters": model.hyperparameters,
        **own,
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


def load_model(folder: Path) -> Model:
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
    reader = import_module(FILES_OF_KIND[description.get("kind", "trees")])
    _check_files(folder, description, reader.NEEDED_FILES)
    try:
        shared = {
            "name": description["name"],
            "label_set": LabelSet.from_dict(description["labels"]),
            "voxel_size_nm": tuple(description["voxel_size_nm"]),
            "intensity": IntensityStatistics.from_dict(description["intensity"]),
            "hyperparameters": description["hyperparameters"],
            "training": description["training"],
        }
        model: Model = reader.read_files(folder, description, shared)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'model.json'} is damaged ({error!r}); copy it again or fit again") from error
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
    if description.get("kind", "trees") not in FILES_OF_KIND:
        raise ModelError(
            f"{path} is a model of kind {description['kind']!r}, unknown to voxclf {__version__}: update it"
        )
    return dict(description)


def _check_files(folder: Path, description: dict[str, Any], needed: tuple[str, ...]) -> None:
    """Refuse files that are missing or other than when the model was saved."""
    files = description.get("files")
    if not isinstance(files, dict) or not {"golden.npz", *needed} <= set(files):
        raise ModelError(f"{folder / 'model.json'} does not list its files; copy the model again or fit again")
    for name, expected in files.items():
        path = folder / name
        if not path.exists() or _hash_file(path) != expected:
            what = "has changed since it was saved" if path.exists() else "is missing"
            raise ModelError(
                f"{path} {what}; a model folder must stay as `voxclf fit` wrote it: copy it again or fit again"
            )


def _check_golden(model: Model, folder: Path) -> None:
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        expected = dict(golden)
    found = model.golden_answers(expected.pop("image"))
    difference = max(
        float(np.abs(found[name] - expected[name]).max())
        if name in expected and found[name].shape == expected[name].shape
        else np.inf
        for name in found
    )
    if not difference <= GOLDEN_TOLERANCE:
        raise ModelError(
            f"{folder} gives other probabilities on this machine than where it was trained (golden patch differs by "
            f"{difference:.2g}, allowed {GOLDEN_TOLERANCE:g}); a library changed: fit again, or use the versions in "
            "model.json"
        )


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
