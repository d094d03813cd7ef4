"""From a trained scikit-learn or xgboost model to the arrays of a `PackedForest`.

Only here is known how each library stores its trees and what it does with the sum of their leaves. Every function
returns the keyword arguments of `PackedForest`; neither library is imported, the models are read by their attributes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxclf.models.forest_kernels import lay_out_tree, unique_rows

_LARGEST = np.finfo(np.float32).max
# This many leaf vectors of eight float64 fill a quarter of an L2 cache of 1 MB.
_FEW_LEAVES = 4096


@dataclass(frozen=True)
class _Tree:
    """One tree as its library numbers it: ``left`` is -1 at leaves, ``values`` holds what a leaf adds."""

    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray  # float32, rows with value <= threshold go left
    weight: np.ndarray  # how many training rows came by: only shapes the layout
    values: np.ndarray  # (nodes, width)


def import_sklearn(model: Any, n_classes: int | None) -> dict[str, Any]:
    """Read a fitted scikit-learn classifier of any supported kind; see `PackedForest.from_sklearn`."""
    readers = {
        "DecisionTreeClassifier": _read_averaged,
        "ExtraTreeClassifier": _read_averaged,
        "RandomForestClassifier": _read_averaged,
        "ExtraTreesClassifier": _read_averaged,
        "AdaBoostClassifier": _read_adaboost,
        "GradientBoostingClassifier": _read_gradient_boosting,
        "HistGradientBoostingClassifier": _read_hist_gradient_boosting,
    }
    kind = type(model).__name__
    if kind not in readers:
        raise TypeError(f"model is a {kind}, but must be one of {sorted(readers)}; xgboost has its own from_xgboost")
    if not hasattr(model, "classes_"):
        raise ValueError(f"model is a {kind} that was never fitted; call its fit first")
    if getattr(model, "n_outputs_", 1) != 1:
        raise ValueError(f"model predicts {model.n_outputs_} targets, but only one can be packed; fit one model each")
    classes, n_classes = _place_classes(model.classes_, n_classes)
    return {
        "n_features": int(model.n_features_in_),
        "n_classes": n_classes,
        "classes": classes,
        **readers[kind](model),
    }


def import_xgboost(model: Any, n_classes: int | None, classes: Sequence[int] | None) -> dict[str, Any]:
    """Read a trained xgboost model from its own JSON; see `PackedForest.from_xgboost`."""
    if not hasattr(model, "get_booster") and not hasattr(model, "save_raw"):
        raise TypeError(f"model is a {type(model).__name__}, but must be an xgboost Booster or XGBClassifier")
    booster = model.get_booster() if hasattr(model, "get_booster") else model
    learner = json.loads(bytes(booster.save_raw(raw_format="json")))["learner"]
    objective = learner["objective"]["name"]
    if objective not in ("binary:logistic", "multi:softprob", "multi:softmax"):
        raise ValueError(
            f"the model's objective is {objective!r}, but probabilities need binary:logistic, multi:softprob or "
            "multi:softmax; train it with one of these"
        )
    if learner["gradient_booster"]["name"] != "gbtree":
        raise ValueError(
            f"the model's booster is {learner['gradient_booster']['name']!r}, but only 'gbtree' can be packed; "
            "train it with booster='gbtree'"
        )
    parameters = learner["learner_model_param"]
    is_binary = objective == "binary:logistic"
    n_model_classes = 2 if is_binary else int(parameters["num_class"])
    places, n_classes = _place_classes(np.arange(n_model_classes) if classes is None else classes, n_classes)
    ensemble = learner["gradient_booster"]["model"]
    n_kept = _trees_to_keep(model, ensemble)
    trees = [_read_xgboost_tree(tree) for tree in ensemble["trees"][:n_kept]]
    is_vector = trees[0].values.shape[1] > 1
    output = np.full(n_kept, -1) if is_vector else np.asarray(ensemble["tree_info"][:n_kept])
    return {
        "n_features": int(parameters["num_feature"]),
        "n_classes": n_classes,
        "classes": places,
        **_concatenate(trees, np.float32),
        "tree_output": output.astype(np.int32),
        "base": _xgboost_base(parameters["base_score"], 1 if is_binary else n_model_classes, is_binary),
        "divisor": 1.0,
        "slope": 1.0,
        "link": "logistic" if is_binary else "softmax",
    }


def floor_to_float32(threshold: np.ndarray) -> np.ndarray:
    """Largest finite float32 not above each float64 threshold: no float32 value changes sides.

    ``x <= t`` holds for a float32 ``x`` exactly when ``x <= floor_to_float32(t)``. Infinite thresholds, which
    libraries use where only missing values go right, become the largest finite number.
    """
    exact = np.clip(np.asarray(threshold, dtype=np.float64), -np.float64(_LARGEST), np.float64(_LARGEST))
    nearest = exact.astype(np.float32)
    with np.errstate(over="ignore"):  # below the most negative number, and then not taken
        below = np.nextafter(nearest, np.float32(-np.inf))
    return np.where(nearest.astype(np.float64) > exact, below, nearest).astype(np.float32)


def _place_classes(classes: Any, n_classes: int | None) -> tuple[np.ndarray, int]:
    """Output column of each of the model's classes, and the number of columns."""
    if n_classes is None:
        n_classes = len(classes)
        return np.arange(n_classes, dtype=np.int32), n_classes
    places = np.asarray(classes)
    is_index = np.issubdtype(places.dtype, np.integer) or bool(np.all(np.mod(places, 1) == 0))
    if not is_index or places.min() < 0 or places.max() >= n_classes:
        raise ValueError(
            f"the model's classes are {places.tolist()}, but with n_classes {n_classes} they must be integers "
            f"0 to {n_classes - 1}; train on class indices, or leave n_classes out"
        )
    return places.astype(np.int32), int(n_classes)


def _concatenate(trees: list[_Tree], dtype: type) -> dict[str, np.ndarray]:
    """Lay the trees one behind another in the order that the walk likes, and collect their leaves."""
    feature: list[np.ndarray] = []
    threshold: list[np.ndarray] = []
    child: list[np.ndarray] = []
    values: list[np.ndarray] = []
    start = np.zeros(len(trees) + 1, dtype=np.int64)
    n_leaves = 0
    for number, tree in enumerate(trees):
        position = lay_out_tree(tree.left.astype(np.int64), tree.right.astype(np.int64), tree.weight.astype(np.float64))
        source = np.argsort(np.where(position < 0, position.size, position), kind="stable")[: (position >= 0).sum()]
        is_leaf = tree.left[source] < 0
        leaf_row = n_leaves + np.cumsum(is_leaf) - 1
        left = position[np.where(is_leaf, 0, tree.left[source])] + start[number]
        feature.append(np.where(is_leaf, -1, tree.feature[source]).astype(np.int16))
        threshold.append(np.where(is_leaf, 0, tree.threshold[source]).astype(np.float32))
        child.append(np.where(is_leaf, leaf_row, left).astype(np.int32))
        values.append(tree.values[source[is_leaf]].astype(dtype))
        start[number + 1] = start[number] + source.size
        n_leaves += values[-1].shape[0]
    all_values = np.concatenate(values)
    all_child = np.concatenate(child)
    all_feature = np.concatenate(feature)
    if all_values.shape[1] > 1:
        tree_of_leaf = np.repeat(np.arange(len(trees)), [tree_values.shape[0] for tree_values in values])
        all_values, row_of_leaf = _merge_equal_leaves(all_values, tree_of_leaf)
        all_child = np.where(all_feature < 0, row_of_leaf[np.where(all_feature < 0, all_child, 0)], all_child)
    return {
        "feature": all_feature,
        "threshold": np.concatenate(threshold),
        "child": all_child.astype(np.int32),
        "tree_start": start,
        "leaf_values": np.ascontiguousarray(all_values),
    }


def _merge_equal_leaves(values: np.ndarray, tree_of_leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep equal leaf vectors once: of a full-depth forest's million leaves all but a few are one-hot.

    Where many differ, each tree keeps its own, so that the rows that one tree needs lie together in the cache.
    """
    rows = np.ascontiguousarray(values)
    bits = rows.view(np.int64 if rows.itemsize == 8 else np.int32)
    first, row_of_leaf = unique_rows(bits)
    if first.size > _FEW_LEAVES:
        first, row_of_leaf = unique_rows(np.column_stack([bits, tree_of_leaf]))
    return rows[first], row_of_leaf


def _sklearn_tree(tree: Any, values: np.ndarray) -> _Tree:
    return _Tree(
        left=tree.children_left,
        right=tree.children_right,
        feature=tree.feature,
        threshold=floor_to_float32(tree.threshold),
        weight=tree.weighted_n_node_samples,
        values=values,
    )


def _read_averaged(model: Any) -> dict[str, Any]:
    """Decision tree, random forest, extra trees: the mean of the trees' class fractions."""
    estimators = getattr(model, "estimators_", [model])
    n_outputs = len(model.classes_)
    trees = []
    for estimator in estimators:
        fractions = estimator.tree_.value[:, 0, :n_outputs]
        trees.append(_sklearn_tree(estimator.tree_, fractions / fractions.sum(axis=1, keepdims=True)))
    return {
        **_concatenate(trees, np.float64),
        "tree_output": np.full(len(trees), -1, dtype=np.int32),
        "base": np.zeros(n_outputs),
        "divisor": float(len(trees)),
        "slope": 1.0,
        "link": "identity",
    }


def _read_adaboost(model: Any) -> dict[str, Any]:
    """AdaBoost (SAMME): each tree votes for one class with its weight, the others lose weight / (K - 1).

    Zhu, Zou, Rosset and Hastie, "Multi-class AdaBoost" (2009), equations 13 to 15.
    """
    classes = model.classes_
    trees = []
    for estimator, weight in zip(model.estimators_, model.estimator_weights_, strict=False):
        if not hasattr(estimator, "tree_"):
            raise ValueError(
                f"model boosts {type(estimator).__name__}, but only decision trees can be packed; "
                "use AdaBoostClassifier(DecisionTreeClassifier(...))"
            )
        winner = estimator.tree_.value[:, 0, : len(estimator.classes_)].argmax(axis=1)
        voted = np.searchsorted(classes, estimator.classes_[winner])
        votes = np.full((winner.size, len(classes)), -weight / max(len(classes) - 1, 1))
        votes[np.arange(winner.size), voted] = weight
        trees.append(_sklearn_tree(estimator.tree_, votes))
    return {
        **_concatenate(trees, np.float64),
        "tree_output": np.full(len(trees), -1, dtype=np.int32),
        "base": np.zeros(len(classes)),
        "divisor": float(model.estimator_weights_.sum()),
        "slope": 1.0 / max(len(classes) - 1, 1),
        "link": "softmax",
    }


def _read_gradient_boosting(model: Any) -> dict[str, Any]:
    """Gradient boosting: start from the class priors, add a shrunk regression tree per class and round."""
    if model.init_ != "zero" and type(model.init_).__name__ != "DummyClassifier":
        raise ValueError(
            f"model starts from a {type(model.init_).__name__}, but only init=None or 'zero' can be packed; fit it so"
        )
    rounds = model.estimators_
    base = model._raw_predict_init(np.zeros((1, model.n_features_in_), dtype=np.float32))[0]
    trees = [
        _sklearn_tree(estimator.tree_, model.learning_rate * estimator.tree_.value[:, :, 0])
        for estimator in rounds.ravel()
    ]
    return {
        **_concatenate(trees, np.float64),
        "tree_output": np.tile(np.arange(rounds.shape[1], dtype=np.int32), rounds.shape[0]),
        "base": np.ascontiguousarray(base, dtype=np.float64),
        "divisor": 1.0,
        # The exponential loss is half a logit.
        "slope": 2.0 if model.loss == "exponential" else 1.0,
        "link": "logistic" if rounds.shape[1] == 1 else "softmax",
    }


def _read_hist_gradient_boosting(model: Any) -> dict[str, Any]:
    """Histogram gradient boosting: as gradient boosting, with trees stored as one structured array."""
    if model.is_categorical_ is not None and np.any(model.is_categorical_):
        raise ValueError("model treats features as categories, but only numbers can be packed; fit without them")
    trees = []
    for predictor in (tree for round_ in model._predictors for tree in round_):
        nodes = predictor.nodes
        is_leaf = nodes["is_leaf"].astype(bool)
        trees.append(
            _Tree(
                left=np.where(is_leaf, -1, nodes["left"].astype(np.int64)),
                right=np.where(is_leaf, -1, nodes["right"].astype(np.int64)),
                feature=nodes["feature_idx"],
                threshold=floor_to_float32(nodes["num_threshold"]),
                weight=nodes["count"],
                values=nodes["value"][:, None],
            )
        )
    n_outputs = len(model._predictors[0])
    return {
        **_concatenate(trees, np.float64),
        "tree_output": np.tile(np.arange(n_outputs, dtype=np.int32), len(model._predictors)),
        "base": np.ascontiguousarray(model._baseline_prediction[0], dtype=np.float64),
        "divisor": 1.0,
        "slope": 1.0,
        "link": "logistic" if n_outputs == 1 else "softmax",
    }


def _read_xgboost_tree(tree: dict[str, Any]) -> _Tree:
    """xgboost goes left where ``x < split``, so the largest float32 below the split takes its place."""
    if any(tree["split_type"]):
        raise ValueError("model treats features as categories, but only numbers can be packed; train without them")
    left = np.asarray(tree["left_children"], dtype=np.int64)
    right = np.asarray(tree["right_children"], dtype=np.int64)
    split = np.asarray(tree["split_conditions"], dtype=np.float32)
    width = int(tree["tree_param"]["size_leaf_vector"])
    if width > 1:
        # Trees with a vector in each leaf mark leaves by the left child and number them in the right one.
        values = np.zeros((left.size, width), dtype=np.float32)
        is_leaf = left < 0
        values[is_leaf] = np.asarray(tree["leaf_weights"], dtype=np.float32).reshape(-1, width)[right[is_leaf]]
    else:
        values = split[:, None]
    return _Tree(
        left=left,
        right=right,
        feature=np.asarray(tree["split_indices"]),
        threshold=np.nextafter(split, np.float32(-np.inf)),
        weight=np.asarray(tree["sum_hessian"], dtype=np.float64),
        values=values,
    )


def _trees_to_keep(model: Any, ensemble: dict[str, Any]) -> int:
    """Trees up to the best iteration where a classifier stopped early, else all."""
    n_trees = len(ensemble["trees"])
    if not hasattr(model, "get_booster") or getattr(model, "early_stopping_rounds", None) is None:
        return n_trees
    return min(n_trees, int(ensemble["iteration_indptr"][int(model.best_iteration) + 1]))


def _xgboost_base(text: str, n_outputs: int, is_binary: bool) -> np.ndarray:
    """Where xgboost's sums start; a binary model stores it as a probability."""
    score = np.asarray(json.loads(text), dtype=np.float32).reshape(-1)
    if is_binary:
        score = -np.log(np.float32(1) / score - np.float32(1))
    return np.ascontiguousarray(np.broadcast_to(score, (n_outputs,)).astype(np.float32))
