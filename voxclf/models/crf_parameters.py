"""Parameters of the dense CRF as a small TOML file, written by ``voxclf crf-tune`` or by hand."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from crf import DenseCRF
from voxclf.engine.ledger import write_atomically
from voxclf.labels import LabelSet

Weight = float | tuple[tuple[float, ...], ...]
Windows = tuple[tuple[float, float], ...]

FILE = "crf.toml"
"""Name of the parameters inside a model folder, where `predict` and `run` look for them."""

TUNING = "tuning"
"""Table of the file that says where the parameters come from; reading ignores it."""


@dataclass(frozen=True)
class CrfParameters:
    """What decides a refinement, apart from image and probabilities; lengths in nm, so it serves any voxel size.

    Parameters
    ----------
    bilateral_sigma_nm, intensity_sigma, spatial_sigma_nm, bilateral_weight, spatial_weight, n_iterations
        As in :class:`crf.DenseCRF`; intensities run from 0 to 1 over their window.
    image_sigma_nm : float
        Width of the Gaussian that smooths the image before intensities are compared; 0 leaves it as it is. Noise of
        a voxel is no edge, and a narrow ``intensity_sigma`` cannot tell one from the other.
    intensity_windows : tuple of (low, high), optional
        Intensities of each image channel that count as 0 and 1; beyond them they are cut off. None: 0 and 255 for
        8-bit volumes, else measured in the volume.
    classes : tuple of str
        Names of the classes that the rows of a matrix stand for; empty where that is not known.
    enabled : bool
        False if tuning found no significant gain: refining then leaves the prediction as it is.
    """

    bilateral_sigma_nm: tuple[float, ...]
    intensity_sigma: float | tuple[float, ...]
    spatial_sigma_nm: tuple[float, ...]
    bilateral_weight: Weight
    spatial_weight: Weight
    n_iterations: int = 10
    image_sigma_nm: float = 0.0
    intensity_windows: Windows | None = None
    classes: tuple[str, ...] = ()
    enabled: bool = True

    def make_crf(self) -> DenseCRF:
        """Build the model.

        Raises
        ------
        ValueError
            If a width is not positive or a weight is neither a number nor a square matrix.
        """
        if not 0 <= self.image_sigma_nm < float("inf"):
            raise ValueError(
                f"image_sigma_nm is {self.image_sigma_nm}; it must be 0, for no smoothing, or a width in nanometres"
            )
        return DenseCRF(
            bilateral_sigma_nm=_one_or_all(self.bilateral_sigma_nm),
            intensity_sigma=self.intensity_sigma,
            spatial_sigma_nm=_one_or_all(self.spatial_sigma_nm),
            bilateral_weight=self.bilateral_weight,
            spatial_weight=self.spatial_weight,
            n_iterations=self.n_iterations,
        )

    def check_classes(self, label_set: LabelSet) -> None:
        """Refuse parameters that belong to other classes than a prediction's.

        Raises
        ------
        ValueError
            If the names differ, or a matrix has another size than the number of classes.
        """
        if self.classes and self.classes != label_set.names:
            raise ValueError(
                f"parameters were tuned for the classes {list(self.classes)} but the prediction has "
                f"{list(label_set.names)}; tune on this prediction (voxclf crf-tune), or give each parameter by hand"
            )
        for name in ("bilateral_weight", "spatial_weight"):
            size = np.shape(getattr(self, name))
            if size and size != (label_set.n_classes, label_set.n_classes):
                raise ValueError(
                    f"{name} is a matrix of shape {size} but the prediction has {label_set.n_classes} classes "
                    f"({', '.join(label_set.names)}); give one row and one column per class, or one number"
                )

    def check_channels(self, n_channels: int) -> None:
        """Refuse an image of another number of channels than these parameters have, or too narrow a kernel for it.

        Raises
        ------
        ValueError
        """
        n_sigmas, n_windows = np.size(self.intensity_sigma), len(self.intensity_windows or ())
        for name, count, stands_for_all in (("intensity_sigma", n_sigmas, 1), ("intensity_windows", n_windows, 0)):
            if count not in (n_channels, stands_for_all):
                raise ValueError(
                    f"{name} has {count} entries but the image (with its guide) has {n_channels} channels; give one "
                    "per channel, or the image and guide that the parameters were tuned with"
                )
        self.make_crf().count_intensity_terms(n_channels)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON and TOML, without what is None."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: _as_lists(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CrfParameters:
        """Read what :meth:`to_dict` gave; a table named "tuning" is passed over.

        Raises
        ------
        ValueError
            If a field is unknown, missing or of the wrong kind.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name != TUNING}
        needed = {field.name for field in fields(cls)[:5]}
        if set(given) - known or needed - set(given):
            raise ValueError(
                f"fields are {sorted(given)}; needed are {sorted(needed)}, allowed besides {sorted(known - needed)}"
            )
        try:
            return cls(**{name: _READERS[name](value) for name, value in given.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a value is of the wrong kind ({error}); compare with a file from voxclf crf-tune"
            ) from None

    def save(self, path: Path, tuning: Mapping[str, Any] | None = None) -> None:
        """Write the file; ``tuning`` says where the parameters come from."""
        values = {**self.to_dict(), **({TUNING: dict(tuning)} if tuning else {})}
        header = f"# voxclf crf-refine PREDICTION VOLUME -o OUT --parameters {path.name}\n"
        write_atomically(path, header + "\n".join(_toml_lines(values)) + "\n")

    @classmethod
    def load(cls, path: Path) -> CrfParameters:
        """Read a parameter file, or the one in a model folder.

        Raises
        ------
        FileNotFoundError
            If it does not exist.
        ValueError
            If it is not TOML, lacks a parameter or holds one that is not allowed; the message names the file.
        """
        path = path / FILE if path.is_dir() else path
        try:
            parameters = cls.from_dict(_read_table(path))
            parameters.make_crf()
            return parameters
        except ValueError as error:
            raise ValueError(f"parameter file {path} cannot be used: {error}") from None


def read_weight(given: float | str, name: str) -> Weight:
    """Read a weight from what a user gave: a number, or the path of a TOML or JSON file with a matrix.

    The matrix stands under ``matrix`` or the name of the option; a JSON file may be nothing but the matrix.

    Raises
    ------
    FileNotFoundError
        If it is no number and no file.
    ValueError
        If the file holds no matrix of numbers.
    """
    try:
        return float(given)
    except ValueError:
        path = Path(str(given))
    if not path.is_file():
        raise FileNotFoundError(
            f"--{name.replace('_', '-')} was {given!r}, which is neither a number nor a file; give a number, or a TOML "
            "or JSON file with a matrix of one row and one column per class"
        )
    try:
        content = _read_table(path)
        found = content if isinstance(content, list) else content.get("matrix", content.get(name))
        if found is None:
            raise ValueError(f"it has neither 'matrix' nor {name!r}")
        return _as_weight(found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used for --{name.replace('_', '-')}: {error}; write matrix = [[0, 1], [1, 0]] with one "
            "row and one column per class"
        ) from None


def _read_table(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file from voxclf crf-tune, or one written by hand")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)


def _toml_lines(values: Mapping[str, Any], table: str = "") -> Iterator[str]:
    """A table as TOML with a matrix row on each line, which no writer does."""
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            rows = "".join(f"    {_toml_value(row)},\n" for row in value)
            yield f"{name} = [\n{rows}]"
        elif not isinstance(value, dict):
            yield f"{name} = {_toml_value(value)}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"\n[{table}{name}]"
            yield from _toml_lines(value, f"{table}{name}.")


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # Texts and numbers are written as in JSON, but for nan, which JSON has not.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _one_or_all(lengths: tuple[float, ...]) -> float | tuple[float, ...]:
    return lengths[0] if len(lengths) == 1 else lengths


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _as_weight(value: Any) -> Weight:
    if not isinstance(value, Sequence):
        return float(value)
    rows = tuple(tuple(float(v) for v in row) for row in value)
    if any(len(row) != len(rows) for row in rows):
        raise ValueError(f"a matrix of {len(rows)} rows has rows of {[len(row) for row in rows]} numbers")
    return rows


def _as_lengths(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)


def _as_one_or_many(value: Any) -> float | tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, Sequence) else float(value)


def _as_windows(value: Any) -> Windows:
    windows = tuple((float(low), float(high)) for low, high in value)
    for low, high in windows:
        if not low < high:
            raise ValueError(f"intensity_windows has {[low, high]}, whose first number must be the lower one")
    return windows


def _as_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"enabled is {value!r}, it must be true or false")
    return value


def _as_count(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"n_iterations is {value!r}, it must be a whole number")
    return value


def _as_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"classes is {value!r}, it must be a list of names")
    return tuple(value)


_READERS: dict[str, Any] = {
    "bilateral_sigma_nm": _as_lengths,
    "intensity_sigma": _as_one_or_many,
    "spatial_sigma_nm": _as_lengths,
    "bilateral_weight": _as_weight,
    "spatial_weight": _as_weight,
    "n_iterations": _as_count,
    "image_sigma_nm": float,
    "intensity_windows": _as_windows,
    "classes": _as_names,
    "enabled": _as_flag,
}
