"""One array form for every tree model: decision tree to gradient boosting, from scikit-learn or xgboost.

A `PackedForest` is made from a trained model once (`forest_import.py`), stored as plain arrays, checked when it is
loaded, and evaluated by `forest_kernels.py` on a CPU or `forest_torch.py` on any device. Its probabilities equal
those of the library that trained the model: thresholds are rounded so that every float32 value falls on the same
side, and leaf values are added in the library's own order and precision.

A row walks from a tree's first node to a leaf: left where ``feature value <= threshold``, else right. Each leaf adds
a vector over all outputs (forests) or one number to one output (boosting); the sums become probabilities by
``link(sums / divisor)``. Values must be finite: NaN is neither checked for nor routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from voxclf.errors import ModelError
from voxclf.models import forest_bytes, forest_kernels
from voxclf.models.forest_bytes import ByteTables
from voxclf.models.forest_kernels import SumTables, WalkTables

# The walk keeps node and feature of a split in 32 bits; the largest feature count leaves room for real trees.
MAX_FEATURES = 32767
MAX_CLASSES = 65535
FORMAT_VERSION = 1
LINKS = {
    "identity": forest_kernels.IDENTITY,
    "softmax": forest_kernels.SOFTMAX,
    "logistic": forest_kernels.LOGISTIC,
}


@dataclass(frozen=True, eq=False)
class PackedForest:
    """A trained tree model as plain arrays; usable the moment it exists, because it is checked when it is made.

    Parameters
    ----------
    n_features : int
        Features (F) each row must have, 1 to 32767.
    n_classes : int
        Classes (K) of the output, 2 to 65535.
    classes : ndarray of int32, shape (n_model_classes,)
        Which of the K classes each of the model's own classes is; the others get probability 0.
    feature : ndarray of int16, shape (M,)
        Feature that a node compares, or -1 for a leaf. All trees lie one behind another.
    threshold : ndarray of float32, shape (M,)
        Rows with ``value <= threshold`` go left. 0 for leaves.
    child : ndarray of int32, shape (M,)
        Inner node: index of its left child (the right one follows). Leaf: its row in `leaf_values`.
    tree_start : ndarray of int64, shape (n_trees + 1,)
        First node of each tree, and the total.
    tree_output : ndarray of int32, shape (n_trees,)
        Output that a tree's leaf values are added to, or -1 where leaves hold a value for every output.
    leaf_values : ndarray of float32 or float64, shape (L, n_outputs) or (L, 1)
        What leaves add. The dtype is the precision that sums are kept in.
    base : ndarray, shape (n_outputs,)
        Where the sums start.
    divisor, slope : float
        Sums are divided by `divisor`; `slope` multiplies the argument of softmax and logistic links.
    link : {"identity", "softmax", "logistic"}
        From sums to probabilities. "logistic" has one output and two classes.

    Raises
    ------
    ModelError
        If the arrays do not describe a forest that can be walked safely.
    """

    n_features: int
    n_classes: int
    classes: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    child: np.ndarray
    tree_start: np.ndarray
    tree_output: np.ndarray
    leaf_values: np.ndarray
    base: np.ndarray
    divisor: float
    slope: float
    link: str
    _tables: ByteTables | WalkTables = field(init=False, repr=False)
    _sums: SumTables = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_forest(self)
        object.__setattr__(self, "_tables", _walk_tables(self))
        object.__setattr__(self, "_sums", _sum_tables(self))
        for array in self.to_arrays().values():
            array.flags.writeable = False

    @classmethod
    def from_sklearn(cls, model: Any, n_classes: int | None = None) -> PackedForest:
        """Pack a fitted scikit-learn tree model; its probabilities stay what they were.

        Parameters
        ----------
        model : fitted classifier
            DecisionTree, RandomForest, ExtraTrees, AdaBoost over decision trees, GradientBoosting or
            HistGradientBoosting classifier, with one target and numerical features.
        n_classes : int, optional
            Classes (K) of the output. The model's classes must then be integers 0 to K-1, and a class it never
            saw gets probability 0. Left out, output k is the model's ``classes_[k]``.

        Raises
        ------
        TypeError
            If the model is of another kind.
        ValueError
            If it is not fitted, or uses what cannot be packed (several targets, categories).
        """
        from voxclf.models.forest_import import import_sklearn

        return cls(**import_sklearn(model, n_classes))

    @classmethod
    def from_xgboost(cls, model: Any, n_classes: int | None = None, classes: Any = None) -> PackedForest:
        """Pack a fitted xgboost classifier or Booster; its probabilities stay what they were.

        Parameters
        ----------
        model : xgboost.Booster or XGBClassifier
            Trained with ``multi:softprob``, ``multi:softmax`` or ``binary:logistic`` and numerical features.
            A classifier that stopped early is packed up to its best iteration, as its own ``predict_proba`` does.
        n_classes : int, optional
            Classes (K) of the output; left out, as many as the model has.
        classes : sequence of int, optional
            Which of the K classes each of the model's classes is; left out, 0, 1, 2 …

        Raises
        ------
        TypeError
            If the model is no xgboost model.
        ValueError
            If its booster or objective cannot be packed.
        """
        from voxclf.models.forest_import import import_xgboost

        return cls(**import_xgboost(model, n_classes, classes))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PackedForest:
        """Rebuild a forest from `to_arrays`, checking every array before anything is walked.

        Raises
        ------
        ModelError
            If an array is missing, has another kind or shape, or points outside the forest.
        """
        missing = [name for name in _ARRAY_KINDS if name not in arrays]
        if missing:
            raise ModelError(f"the forest lacks the arrays {missing}; the model file is damaged, fit the model again")
        for name, (kinds, n_axes) in _ARRAY_KINDS.items():
            array = np.asarray(arrays[name])
            if array.dtype.name not in kinds or array.ndim != n_axes:
                raise ModelError(
                    f"the forest's array {name!r} is {array.dtype.name} with {array.ndim} axes, but must be "
                    f"{' or '.join(kinds)} with {n_axes}; the model file is damaged, fit the model again"
                )
        version = int(arrays["format_version"])
        if version != FORMAT_VERSION:
            raise ModelError(
                f"the forest has format version {version}, and this voxclf reads {FORMAT_VERSION}; "
                "install the voxclf that wrote it, or fit the model again"
            )
        scalars: dict[str, Any] = {name: np.asarray(arrays[name]).item() for name in _SCALARS}
        code = scalars.pop("link")
        if not 0 <= code < len(LINKS):
            raise ModelError(f"the forest's link is {code}, but must be 0 to {len(LINKS) - 1}; fit the model again")
        link = list(LINKS)[code]
        vectors: dict[str, Any] = {name: _native(arrays[name]) for name in _VECTORS}
        return cls(**vectors, **scalars, link=link)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything needed to rebuild the forest, as plain arrays that ``numpy.savez`` stores without pickle."""
        arrays = {name: getattr(self, name) for name in _VECTORS}
        arrays["n_features"] = np.array(self.n_features, dtype=np.int64)
        arrays["n_classes"] = np.array(self.n_classes, dtype=np.int64)
        arrays["divisor"] = np.array(self.divisor, dtype=np.float64)
        arrays["slope"] = np.array(self.slope, dtype=np.float64)
        arrays["link"] = np.array(LINKS[self.link], dtype=np.int64)
        arrays["format_version"] = np.array(FORMAT_VERSION, dtype=np.int64)
        return arrays

    @property
    def n_trees(self) -> int:
        """Number of trees; boosting has one per round and output."""
        return int(self.tree_output.size)

    @property
    def n_nodes(self) -> int:
        """Number of nodes of all trees, leaves included."""
        return int(self.feature.size)

    @property
    def max_depth(self) -> int:
        """Longest walk, in comparisons."""
        return int(forest_kernels.node_depths(self.feature, self.child).max())

    def predict_probabilities(self, features: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Class probabilities of every row (voxel), equal to those of the library that trained the model.

        Parameters
        ----------
        features : ndarray of float32, shape (F, N), C-contiguous
            Feature-major, as a filter bank yields them: ``block.reshape(F, -1)``. Finite.
        out : ndarray of float32, shape (K, N), C-contiguous, optional
            Where to write; left out, a new array.

        Returns
        -------
        ndarray of float32, shape (K, N)
            Within 1e-6 of the library's probabilities, with the same argmax; sums to 1 over K.

        Notes
        -----
        Runs on the calling thread with the interpreter lock released, so blocks can run on as many threads.
        Scratch memory is one batch of at most 16384 rows, whatever N is.
        """
        _check_features(features, self.n_features)
        shape = (self.n_classes, features.shape[1])
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(
                f"out has shape {out.shape} and dtype {out.dtype}, but must be C-contiguous float32 {shape}; "
                "leave it out to get a new array"
            )
        if self.classes.size < self.n_classes:
            out[:] = 0
        if isinstance(self._tables, ByteTables):
            forest_bytes.walk_bytes(features, self._tables, self._sums, out)
        else:
            forest_kernels.walk_forest(features.view(np.int32), self._tables, self._sums, out)
        return out


_VECTORS = ("classes", "feature", "threshold", "child", "tree_start", "tree_output", "leaf_values", "base")
_SCALARS = ("n_features", "n_classes", "divisor", "slope", "link")
_ARRAY_KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "classes": (("int32",), 1),
    "feature": (("int16",), 1),
    "threshold": (("float32",), 1),
    "child": (("int32",), 1),
    "tree_start": (("int64",), 1),
    "tree_output": (("int32",), 1),
    "leaf_values": (("float32", "float64"), 2),
    "base": (("float32", "float64"), 1),
    "n_features": (("int64",), 0),
    "n_classes": (("int64",), 0),
    "divisor": (("float64",), 0),
    "slope": (("float64",), 0),
    "link": (("int64",), 0),
    "format_version": (("int64",), 0),
}


def _native(array: np.ndarray) -> np.ndarray:
    """A contiguous copy in this machine's byte order, which files of another machine may not have."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _check_features(features: np.ndarray, n_features: int) -> None:
    """Refuse features that the compiled walk would misread."""
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.shape[0] != n_features:
        raise ValueError(
            f"features has shape {np.shape(features)}, but the model needs ({n_features}, N): "
            "one row per feature, one column per voxel"
        )
    if features.dtype != np.float32 or not features.flags.c_contiguous:
        raise ValueError(
            f"features has dtype {features.dtype} and C-contiguous is {features.flags.c_contiguous}, "
            "but must be C-contiguous float32; use np.ascontiguousarray(features, dtype=np.float32)"
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ModelError(f"{message}; the model file is damaged or was changed by hand, fit the model again")


def _check_forest(forest: PackedForest) -> None:
    """Check that a walk through these arrays ends, and never leaves them."""
    _require(1 <= forest.n_features <= MAX_FEATURES, f"n_features is {forest.n_features}, not 1 to {MAX_FEATURES}")
    _require(2 <= forest.n_classes <= MAX_CLASSES, f"n_classes is {forest.n_classes}, not 2 to {MAX_CLASSES}")
    _require(forest.link in LINKS, f"link is {forest.link!r}, not one of {list(LINKS)}")
    _require(
        bool(np.isfinite([forest.divisor, forest.slope]).all()) and forest.divisor > 0 and forest.slope > 0,
        f"divisor {forest.divisor} and slope {forest.slope} must be positive and finite",
    )
    _check_outputs(forest)
    _check_trees(forest)


def _check_outputs(forest: PackedForest) -> None:
    classes, base, values, output = forest.classes, forest.base, forest.leaf_values, forest.tree_output
    in_range = bool(((classes >= 0) & (classes < forest.n_classes)).all()) and np.unique(classes).size == classes.size
    _require(
        in_range and classes.size >= 1,
        f"classes {classes.tolist()} must be distinct, 0 to {forest.n_classes - 1}",
    )
    n_outputs = 1 if forest.link == "logistic" else classes.size
    _require(forest.link != "logistic" or classes.size == 2, "a logistic link needs exactly two classes")
    _require(base.shape == (n_outputs,), f"base has shape {base.shape}, but there are {n_outputs} outputs")
    _require(base.dtype == values.dtype, f"base is {base.dtype}, but leaf_values is {values.dtype}")
    _require(bool(np.isfinite(base).all() and np.isfinite(values).all()), "base or leaf_values is not finite")
    is_vector = bool((output == -1).all())
    width = n_outputs if is_vector else 1
    _require(values.ndim == 2 and values.shape[1] == width, f"leaf_values {values.shape} must have {width} columns")
    _require(
        is_vector or bool(((output >= 0) & (output < n_outputs)).all()),
        f"tree_output must be -1 for all trees, or 0 to {n_outputs - 1}",
    )


def _check_trees(forest: PackedForest) -> None:
    feature, child, start = forest.feature, forest.child, forest.tree_start
    n_nodes = feature.size
    _require(
        forest.threshold.shape == child.shape == feature.shape and n_nodes >= 1,
        f"feature {feature.shape}, threshold {forest.threshold.shape} and child {child.shape} must be equally long",
    )
    _require(bool(np.isfinite(forest.threshold).all()), "threshold is not finite")
    _require(
        start.shape == (forest.n_trees + 1,) and forest.n_trees >= 1,
        f"tree_start {start.shape} must be n_trees + 1",
    )
    _require(
        start[0] == 0 and start[-1] == n_nodes and bool((np.diff(start) > 0).all()),
        f"tree_start must rise from 0 to the {n_nodes} nodes",
    )
    _require(
        bool(((feature >= -1) & (feature < forest.n_features)).all()),
        f"feature must be -1 (leaf) or 0 to {forest.n_features - 1}",
    )
    is_leaf = feature < 0
    _require(
        bool(((child[is_leaf] >= 0) & (child[is_leaf] < forest.leaf_values.shape[0])).all()),
        f"a leaf points outside the {forest.leaf_values.shape[0]} rows of leaf_values",
    )
    # Children behind their parent and inside its tree: no walk can run in a circle or into another tree.
    inner = np.flatnonzero(~is_leaf)
    left = child[inner].astype(np.int64)
    end_of_tree = np.repeat(start[1:], np.diff(start))[inner]
    _require(
        bool(((left > inner) & (left + 1 < end_of_tree)).all()),
        "a node's children are not behind it in its tree",
    )
    bits = _feature_bits(forest.n_features)
    _require(int(np.diff(start).max()) <= 1 << (32 - bits), f"a tree has over {1 << (32 - bits)} nodes")


def _feature_bits(n_features: int) -> int:
    """Bits that hold any feature index."""
    return max(1, (n_features - 1).bit_length())


def _walk_tables(forest: PackedForest) -> ByteTables | WalkTables:
    """The forest as the faster of the two walks that it fits reads it."""
    arrays = (forest.feature, forest.threshold, forest.child, forest.tree_start)
    tables = forest_bytes.make_byte_tables(*arrays, forest.n_features)
    if tables is not None:
        return tables
    bits = _feature_bits(forest.n_features)
    return WalkTables(
        nodes=forest_kernels.pack_nodes(*arrays, bits),
        leaf_row=np.where(forest.feature < 0, forest.child, 0).astype(np.int32),
        tree_start=forest.tree_start,
        feature_bits=bits,
    )


def _sum_tables(forest: PackedForest) -> SumTables:
    return SumTables(
        leaf_values=np.ascontiguousarray(forest.leaf_values.T),
        tree_output=forest.tree_output,
        base=forest.base,
        divisor=float(forest.divisor),
        slope=float(forest.slope),
        link=LINKS[forest.link],
        columns=forest.classes,
    )
