"""The classes of a label volume: which integer means what, under which name and in which colour.

Label files may hold any integers; inside voxclf the classes are numbered 0 .. K-1 in ascending order of their
ids ("class indices") and an unlabelled voxel is -1. This file is the only place where one becomes the other.
"""

from __future__ import annotations

import colorsys
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Class index of a voxel without a label. Negative, so it never names a class, and ``lut[-1]`` is a lut's
#: last entry.
UNLABELLED_INDEX = -1

#: Twelve colours that stay apart on grey images and on white paper. The first six are Paul Tol's "bright"
#: set, which is safe for red-green blindness; the rest are from his other sets. No grey: the image is grey.
PALETTE: tuple[str, ...] = (
    "#4477AA",
    "#EE6677",
    "#228833",
    "#CCBB44",
    "#66CCEE",
    "#AA3377",
    "#EE7733",
    "#332288",
    "#44AA99",
    "#882255",
    "#DDAA33",
    "#999933",
)

_UNKNOWN = -2
# Past this span a lookup table costs more than it saves, and ids are found by bisection instead.
_LARGEST_LUT = 1 << 22
_HEX_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")


def default_colours(ids: Sequence[int]) -> tuple[str, ...]:
    """Give every class a colour that depends on its id, so it is the same in every figure.

    Id 1 gets the first colour of :data:`PALETTE`, id 2 the second and so on; an id whose colour is taken
    gets the next free one. Beyond twelve classes, colours are spread over the hue circle by the golden angle.
    """
    taken: dict[int, str] = {}
    colours = []
    for class_id in ids:
        slot = (class_id - 1) % len(PALETTE)
        if len(taken) < len(PALETTE):
            while slot in taken:
                slot = (slot + 1) % len(PALETTE)
            taken[slot] = PALETTE[slot]
            colours.append(PALETTE[slot])
        else:
            colours.append(_golden_angle_colour(len(colours)))
    return tuple(colours)


def _golden_angle_colour(number: int) -> str:
    lightness = (0.40, 0.55, 0.70)[number % 3]
    rgb = colorsys.hls_to_rgb((number * 0.381966) % 1.0, lightness, 0.65)
    return "#" + "".join(f"{round(255 * channel):02X}" for channel in rgb)


@dataclass(frozen=True)
class LabelSet:
    """The classes a researcher drew: their ids in the label file, their names and their colours.

    Parameters
    ----------
    ids : tuple of int
        What stands in the label file, ascending, all >= 0, without `unlabelled`. Class index ``k`` is
        ``ids[k]``.
    names : tuple of str
        One per class, all different; shown in reports and stored beside outputs.
    colours : tuple of str
        One ``#RRGGBB`` per class.
    unlabelled : int
        The value of voxels nobody labelled (default 0). They are never trained on and never scored. A
        negative value, or one that does not occur, means that every voxel is labelled.

    Examples
    --------
    >>> labels = LabelSet.from_ids([1, 7], names=["membrane", "mitochondrion"])
    >>> labels.remap_to_indices(np.array([7, 0, 1], np.uint8))
    array([ 1, -1,  0], dtype=int16)
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    colours: tuple[str, ...]
    unlabelled: int = 0

    def __post_init__(self) -> None:
        _check_ids(self.ids, self.unlabelled)
        for field, values in (("names", self.names), ("colours", self.colours)):
            if len(values) != len(self.ids):
                raise ValueError(
                    f"{field} has {len(values)} entries {list(values)} but there are {len(self.ids)} "
                    f"classes with ids {_shorten(self.ids)}; give one per class, in ascending order of the "
                    "ids"
                )
        if "" in self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must all be different and not empty, got {list(self.names)}; rename some")
        for colour in self.colours:
            if not _HEX_COLOUR.fullmatch(colour):
                raise ValueError(f"colours must look like '#4477AA', got {colour!r}; write six hexadecimal digits")

    @classmethod
    def from_ids(
        cls,
        ids: Iterable[int],
        names: Sequence[str] | None = None,
        colours: Sequence[str] | None = None,
        unlabelled: int = 0,
    ) -> LabelSet:
        """Make a label set from the ids found in a volume; names and colours are filled in where not given.

        `ids` may come in any order and with `unlabelled` among them (as ``numpy.unique`` gives them);
        `names` and `colours` follow the ids in ascending order. Unnamed classes are called "class <id>".
        """
        kept = tuple(sorted({int(value) for value in ids} - {int(unlabelled)}))
        return cls(
            ids=kept,
            names=tuple(names) if names is not None else tuple(f"class {value}" for value in kept),
            colours=tuple(colours) if colours is not None else default_colours(kept),
            unlabelled=int(unlabelled),
        )

    @property
    def n_classes(self) -> int:
        """Number of classes K, the unlabelled value not counted."""
        return len(self.ids)

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """The class colours as numbers, ndarray of uint8, shape (K, 3)."""
        return np.array([list(bytes.fromhex(colour[1:])) for colour in self.colours], np.uint8)

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest integer type that holds every id and the unlabelled value."""
        low, high = min(self.unlabelled, 0), max(*self.ids, self.unlabelled)
        unsigned, signed = np.min_scalar_type(high), np.min_scalar_type(min(low, -high - 1))
        return unsigned if low == 0 else signed

    def remap_to_indices(self, labels: NDArray[np.integer]) -> NDArray[np.int16]:
        """Turn label ids into class indices 0 .. K-1; unlabelled voxels become -1.

        Parameters
        ----------
        labels : ndarray of any integer or boolean type, any shape
            Values as they stand in the label file.

        Returns
        -------
        ndarray of int16, same shape

        Raises
        ------
        TypeError
            If `labels` are not integers.
        ValueError
            If an id occurs that is neither a class nor `unlabelled`; the message lists such ids.
        """
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iub":
            raise TypeError(
                f"labels must be integers, got dtype {labels.dtype}; store them as uint8 or uint16 (a "
                "class has a whole number as its id)"
            )
        if labels.dtype.kind == "b":
            labels = labels.view(np.uint8)
        if labels.size == 0:
            return np.empty(labels.shape, np.int16)
        lowest, highest = min(*self.ids, self.unlabelled), max(*self.ids, self.unlabelled)
        outside = int(labels.min()) < lowest or int(labels.max()) > highest
        if outside:
            self._raise_unknown(labels)
        indices = self._look_up(labels, lowest, highest)
        if (indices == _UNKNOWN).any():
            self._raise_unknown(labels)
        return indices

    def _look_up(self, labels: NDArray[np.integer], lowest: int, highest: int) -> NDArray[np.int16]:
        """Map values known to lie in lowest .. highest; `_UNKNOWN` where a value is no id."""
        known = np.array([*self.ids, self.unlabelled], np.int64)
        targets = np.array([*range(self.n_classes), UNLABELLED_INDEX], np.int16)
        if highest - lowest >= _LARGEST_LUT:
            order = np.argsort(known)
            wide = labels.astype(np.int64, copy=False)
            place = order[np.searchsorted(known, wide, sorter=order)]
            return np.where(known[place] == wide, targets[place], np.int16(_UNKNOWN))
        lut = np.full(highest - lowest + 1, _UNKNOWN, np.int16)
        lut[known - lowest] = targets
        if lowest == 0:
            return lut[labels]
        # The shift is made in int64: in the labels' own small type it could wrap around.
        return lut[labels.astype(np.int64) - lowest]

    def _raise_unknown(self, labels: NDArray[np.integer]) -> None:
        values, counts = np.unique(labels, return_counts=True)
        unknown = ~np.isin(values, np.array([*self.ids, self.unlabelled]))
        listed = ", ".join(
            f"{value} ({count} voxels)" for value, count in zip(values[unknown][:8], counts[unknown][:8], strict=True)
        )
        more = int(unknown.sum()) - 8
        raise ValueError(
            f"labels hold ids that are no class: {listed}{f' and {more} more' if more > 0 else ''}; known "
            f"are {_shorten(self.ids)} and {self.unlabelled} = unlabelled; add them to the classes "
            "(for example --classes '1=membrane,3=mitochondrion') or set them to the unlabelled value"
        )

    def remap_to_ids(self, indices: NDArray[np.integer]) -> NDArray[np.integer]:
        """Turn class indices back into the ids of the label file; -1 becomes the unlabelled value.

        Parameters
        ----------
        indices : ndarray of any integer type, any shape
            Values -1 .. K-1.

        Returns
        -------
        ndarray of :attr:`id_dtype`, same shape

        Raises
        ------
        ValueError
            If an index lies outside -1 .. K-1.
        """
        indices = np.asarray(indices)
        if indices.size and (int(indices.min()) < UNLABELLED_INDEX or int(indices.max()) >= self.n_classes):
            raise ValueError(
                f"indices run from {indices.min()} to {indices.max()}, allowed are -1 (unlabelled) to "
                f"{self.n_classes - 1}; pass class indices, not label ids"
            )
        return np.array([*self.ids, self.unlabelled], self.id_dtype)[indices]

    def check_counts(self, counts: Sequence[int] | NDArray[np.integer]) -> None:
        """Refuse labels that nothing can be learned from: fewer than two classes with labelled voxels.

        Parameters
        ----------
        counts : sequence of int, length K
            Labelled voxels per class.

        Raises
        ------
        ValueError
            If fewer than two classes have any voxel.
        """
        present = [k for k in range(self.n_classes) if counts[k] > 0]
        if len(present) >= 2:
            return
        if not present:
            raise ValueError(
                f"labels hold no labelled voxel: every voxel is {self.unlabelled} (unlabelled); label some "
                "voxels of at least two classes, or say with --unlabelled which value means unlabelled"
            )
        only = present[0]
        raise ValueError(
            f"labels hold only one class, {self.names[only]!r} (id {self.ids[only]}, {counts[only]} "
            "voxels); a classifier needs at least two: label voxels of another class as well (for example "
            f"'background'), or say with --unlabelled which value means unlabelled if {self.unlabelled} is "
            "a class in this file"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the set as plain values for JSON or TOML; :meth:`from_dict` reads them back."""
        classes = [
            {"id": i, "name": n, "colour": c} for i, n, c in zip(self.ids, self.names, self.colours, strict=True)
        ]
        return {"unlabelled": self.unlabelled, "classes": classes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelSet:
        """Read a label set from plain values.

        `values["classes"]` is either a list of ``{"id": 1, "name": "membrane", "colour": "#4477AA"}``, where
        name and colour may be left out, or a short mapping of id to name. `values["unlabelled"]` is optional.

        Raises
        ------
        ValueError
            If "classes" is missing, an id is no whole number or occurs twice, or a field is unknown.
        """
        unknown = set(values) - {"classes", "unlabelled"}
        if unknown or "classes" not in values:
            raise ValueError(
                f"a label set has the fields 'classes' and, optionally, 'unlabelled'; got "
                f"{sorted(values)}; see LabelSet.from_dict for the form"
            )
        entries = [_read_class(entry) for entry in _class_entries(values["classes"])]
        entries.sort(key=lambda entry: entry[0])
        ids = [entry[0] for entry in entries]
        if len(set(ids)) != len(ids):
            raise ValueError(f"classes name an id twice: {ids}; give every class its own id")
        filled = default_colours(ids)
        return cls(
            ids=tuple(ids),
            names=tuple(name if name is not None else f"class {class_id}" for class_id, name, _ in entries),
            colours=tuple(c if c is not None else filled[k] for k, (_, _, c) in enumerate(entries)),
            unlabelled=_as_id(values.get("unlabelled", 0)),
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> LabelSet | None:
        """Read the classes that a volume carries beside its voxels; None where it carries none."""
        if "classes" not in metadata:
            return None
        return cls.from_dict({key: metadata[key] for key in ("classes", "unlabelled") if key in metadata})


def _check_ids(ids: tuple[int, ...], unlabelled: int) -> None:
    if not ids:
        raise ValueError(f"ids is empty: every voxel is {unlabelled} (unlabelled); label at least two classes")
    if list(ids) != sorted(set(ids)) or ids[0] < 0:
        raise ValueError(
            f"ids must be different whole numbers >= 0 in ascending order, got {_shorten(ids)}; "
            "LabelSet.from_ids sorts them for you"
        )
    if unlabelled in ids:
        raise ValueError(
            f"ids {_shorten(ids)} contain {unlabelled}, which means unlabelled; take it out, or choose "
            "another unlabelled value (-1 if every voxel is labelled)"
        )
    if len(ids) > 1024:
        raise ValueError(
            f"ids has {len(ids)} entries, at most 1024 classes are allowed; this looks like an instance "
            "segmentation (one id per object), not a class label volume: map its objects to classes first"
        )


def _shorten(ids: Sequence[int]) -> str:
    listed = ", ".join(str(value) for value in ids[:12])
    return f"[{listed}{', …' if len(ids) > 12 else ''}]"


def _as_id(value: object) -> int:
    """Read a whole number that may come as text (JSON and TOML keys are text)."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"a class id must be a whole number, got {value!r}; write for example 3 or '3=mitochondrion'")


def _class_entries(classes: object) -> list[dict[str, Any]]:
    if isinstance(classes, Mapping):
        return [{"id": class_id, "name": name} for class_id, name in classes.items()]
    if isinstance(classes, Sequence) and all(isinstance(entry, Mapping) for entry in classes):
        return [dict(entry) for entry in classes]
    raise ValueError(
        f"classes must be a list of tables with id, name and colour, or a table of id to name; got {classes!r}"
    )


def _read_class(entry: dict[str, Any]) -> tuple[int, str | None, str | None]:
    unknown = set(entry) - {"id", "name", "colour"}
    if unknown or "id" not in entry:
        raise ValueError(f"a class has the fields id, name and colour, got {sorted(entry)}; correct the entry {entry}")
    name, colour = entry.get("name"), entry.get("colour")
    return _as_id(entry["id"]), None if name is None else str(name), None if colour is None else str(colour)


def parse_classes(text: str, ids: Iterable[int] | None = None, unlabelled: int = 0) -> LabelSet:
    """Read the classes from what a user types after ``--classes``.

    Either ``"cytoplasm,cell membrane,mitochondrion"``: names for `ids` in ascending order, or for 1, 2, 3 …
    when `ids` is not given; or ``"1=membrane,3=mitochondrion"``: ids and names, in any order.

    Parameters
    ----------
    text : str
        Comma-separated names, or comma-separated ``id=name``.
    ids : iterable of int, optional
        The ids found in the label volume, used by the first form only.
    unlabelled : int
        The value that means unlabelled; counting 1, 2, 3 … skips it.

    Raises
    ------
    ValueError
        If the forms are mixed, an id is no number or given twice, or the number of names does not fit `ids`.
    """
    parts = [part.strip() for part in text.split(",")]
    numbered = ["=" in part for part in parts]
    if any(numbered) and not all(numbered):
        raise ValueError(
            f"classes {text!r} mix 'name' and 'id=name'; use one form, for example "
            "'membrane,mitochondrion' or '1=membrane,3=mitochondrion'"
        )
    if all(numbered):
        pairs = [part.split("=", 1) for part in parts]
        entries = [{"id": class_id.strip(), "name": name.strip()} for class_id, name in pairs]
        return LabelSet.from_dict({"classes": entries, "unlabelled": unlabelled})
    if ids is None:
        ids = [value for value in range(1, len(parts) + 2) if value != unlabelled][: len(parts)]
    return LabelSet.from_ids(ids, names=parts, unlabelled=unlabelled)


def load_label_set(path: str | Path) -> LabelSet:
    """Read class names and colours from a small TOML or JSON file kept beside the labels.

    The TOML form::

        unlabelled = 0

        [[classes]]
        id = 1
        name = "membrane"
        colour = "#4477AA"

    or, shorter, a ``[classes]`` table with lines like ``1 = "membrane"``. JSON has the same fields.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is neither TOML nor JSON, cannot be parsed, or does not describe classes; the message names the
        file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"class file {path} does not exist; give the path of a .toml or .json file")
    if path.suffix.lower() not in {".toml", ".json"}:
        raise ValueError(
            f"class file {path} ends in {path.suffix!r}, allowed are .toml and .json; rename or convert it"
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("the file must hold a table with 'classes'")
        return LabelSet.from_dict(values)
    except ValueError as error:
        raise ValueError(f"class file {path} cannot be used: {error}") from error
