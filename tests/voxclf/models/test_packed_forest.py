"""The packed forest equals the library that trained it, survives storage, and refuses what was tampered with."""

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import (
    AdaBoostClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.tree import DecisionTreeClassifier

from voxclf.errors import ModelError
from voxclf.models.forest_bytes import ByteTables
from voxclf.models.forest_import import floor_to_float32
from voxclf.models.packed_forest import PackedForest

F = 9


def make_rows(n, n_classes, seed=0):
    """Rows on a grid of eighths, so that many values meet a threshold exactly; -0.0 among them."""
    rng = np.random.default_rng(seed)
    rows = (np.round(rng.normal(size=(n, F)) * 8) / 8).astype(np.float32)
    rows[rng.random(rows.shape) < 0.02] = -0.0
    score = rows[:, 0] + rows[:, 1] * rows[:, 2] + 0.4 * rng.normal(size=n)
    return rows, np.digitize(score, np.quantile(score, np.arange(1, n_classes) / n_classes))


SKLEARN = {
    "tree": lambda: DecisionTreeClassifier(random_state=0),
    "tree_leaf": lambda: DecisionTreeClassifier(min_samples_leaf=7, random_state=0),
    "stump": lambda: DecisionTreeClassifier(max_depth=1),
    "forest": lambda: RandomForestClassifier(12, random_state=0),
    "forest_shallow": lambda: RandomForestClassifier(12, max_depth=5, random_state=0),
    "forest_weighted": lambda: RandomForestClassifier(9, class_weight="balanced", max_depth=9, random_state=0),
    "extra_trees": lambda: ExtraTreesClassifier(12, min_samples_leaf=3, random_state=0),
    "adaboost": lambda: AdaBoostClassifier(DecisionTreeClassifier(max_depth=3), n_estimators=8, random_state=0),
    "gradient": lambda: GradientBoostingClassifier(n_estimators=4, random_state=0),
    "gradient_zero": lambda: GradientBoostingClassifier(n_estimators=3, init="zero", random_state=0),
    "hist": lambda: HistGradientBoostingClassifier(max_iter=6, random_state=0),
}
XGBOOST = {
    "default": {},
    "exact": {"tree_method": "exact"},
    "deep": {"max_depth": 11, "min_child_weight": 0.1},
    "vector_leaves": {"multi_strategy": "multi_output_tree"},
    "boosted_forest": {"num_parallel_tree": 3, "subsample": 0.5, "colsample_bynode": 0.5},
}


def assert_equal_to_library(packed, rows, expected):
    found = packed.predict_probabilities(np.ascontiguousarray(rows.T))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.T, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.argmax(axis=0), expected.T.argmax(axis=0))
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("kind", SKLEARN)
def test_equals_scikit_learn(kind, n_classes):
    model = SKLEARN[kind]().fit(*make_rows(1500, n_classes))
    rows, _ = make_rows(4099, n_classes, seed=1)
    packed = PackedForest.from_sklearn(model)
    assert (packed.n_features, packed.n_classes) == (F, n_classes)
    assert_equal_to_library(packed, rows, model.predict_proba(rows))


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("kind", XGBOOST)
def test_equals_xgboost(kind, n_classes):
    model = xgboost.XGBClassifier(n_estimators=6, n_jobs=1, random_state=0, **XGBOOST[kind])
    model.fit(*make_rows(1500, n_classes))
    rows, _ = make_rows(4099, n_classes, seed=1)
    assert_equal_to_library(PackedForest.from_xgboost(model), rows, model.predict_proba(rows))
    assert_equal_to_library(PackedForest.from_xgboost(model.get_booster()), rows, model.predict_proba(rows))


def test_exponential_loss_equals_scikit_learn():
    model = GradientBoostingClassifier(n_estimators=5, loss="exponential", random_state=0).fit(*make_rows(800, 2))
    rows, _ = make_rows(1000, 2, seed=1)
    assert_equal_to_library(PackedForest.from_sklearn(model), rows, model.predict_proba(rows))


def test_early_stopping_keeps_the_best_iteration():
    rows, targets = make_rows(1500, 3)
    model = xgboost.XGBClassifier(n_estimators=60, early_stopping_rounds=3, learning_rate=0.8, n_jobs=1)
    model.fit(rows[:1000], targets[:1000], eval_set=[(rows[1000:], targets[1000:])], verbose=False)
    packed = PackedForest.from_xgboost(model)
    assert packed.n_trees == 3 * (model.best_iteration + 1)
    assert packed.n_trees < len(model.get_booster().get_dump())
    assert_equal_to_library(packed, rows, model.predict_proba(rows))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 4095, 4096, 4097, 16385])
@pytest.mark.parametrize("walk", ["bytes", "keys"])
def test_any_number_of_rows(n, walk):
    rows, targets = make_rows(3000, 4)
    if walk == "keys":
        rows = rows + np.random.default_rng(3).normal(size=rows.shape).astype(np.float32)
    model = RandomForestClassifier(5, random_state=0, max_depth=12).fit(rows, targets)
    packed = PackedForest.from_sklearn(model)
    assert isinstance(packed._tables, ByteTables) == (walk == "bytes")
    tested = np.resize(rows, (n, F))
    assert_equal_to_library(packed, tested, model.predict_proba(tested))


@pytest.mark.parametrize("max_depth", [1, 2, 3, 7, 8, 9, 14])
def test_byte_walk_of_every_depth(max_depth):
    rows, targets = make_rows(4000, 3)
    model = ExtraTreesClassifier(6, max_depth=max_depth, random_state=0).fit(np.round(rows * 4), targets)
    packed = PackedForest.from_sklearn(model)
    assert packed.max_depth == max(tree.get_depth() for tree in model.estimators_)
    assert_equal_to_library(packed, rows, model.predict_proba(rows))


def test_rows_at_and_beside_every_threshold():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 2)).astype(np.float32)
    targets = (rows[:, 0] > rows[:, 1]).astype(int)
    for model in (
        DecisionTreeClassifier().fit(rows, targets),
        HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=2).fit(rows, targets),
        xgboost.XGBClassifier(n_estimators=5, n_jobs=1).fit(rows, targets),
    ):
        is_xgboost = isinstance(model, xgboost.XGBClassifier)
        packed = PackedForest.from_xgboost(model) if is_xgboost else PackedForest.from_sklearn(model)
        at = packed.threshold[packed.feature >= 0]
        beside = np.concatenate([np.nextafter(at, np.float32(-np.inf)), at, np.nextafter(at, np.float32(np.inf))])
        for other in (-1.0, 0.0, 1.0):
            for tested in ((beside, np.full_like(beside, other)), (np.full_like(beside, other), beside)):
                tested = np.stack(tested, axis=1)
                assert_equal_to_library(packed, tested, model.predict_proba(tested))


@settings(deadline=None)
@given(
    st.floats(-1e300, 1e300) | st.floats(-2, 2) | st.sampled_from([np.inf, 0.0, -0.0, 1e-46]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_rounded_threshold_decides_like_the_exact_one(threshold, value):
    rounded = floor_to_float32(np.array([threshold]))[0]
    assert np.isfinite(rounded)
    for candidate in (np.float32(value), rounded, np.nextafter(rounded, np.float32(3e38))):
        if np.isfinite(candidate):
            assert (candidate <= rounded) == (float(candidate) <= threshold) or threshold < -3.4028235e38


def test_exact_ties_go_to_the_first_class_like_the_library():
    rows = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32).repeat(50, axis=0)
    targets = np.tile([0, 1], 100)
    model = DecisionTreeClassifier(max_depth=1).fit(rows, targets)
    assert_equal_to_library(PackedForest.from_sklearn(model), rows, model.predict_proba(rows))


def test_near_ties_below_float32_keep_the_winner():
    # 0.5 + 1e-12 and 0.5 - 1e-12 are one float32: the second class must still win.
    forest = small_forest(leaf_values=np.array([[0.5 - 1e-12, 0.5 + 1e-12], [1.0, 0.0]]))
    found = forest.predict_probabilities(np.array([[0.0, 1.0]], dtype=np.float32))
    assert found.argmax(axis=0).tolist() == [1, 0]
    np.testing.assert_allclose(found[:, 0], 0.5, atol=1e-7)


def test_missing_class_has_probability_zero():
    rows, targets = make_rows(900, 3)
    model = RandomForestClassifier(5, random_state=0).fit(rows, np.array([0, 2, 5])[targets])
    found = PackedForest.from_sklearn(model, n_classes=6).predict_probabilities(np.ascontiguousarray(rows.T))
    np.testing.assert_allclose(found[[0, 2, 5]], model.predict_proba(rows).T, atol=1e-6)
    assert (found[[1, 3, 4]] == 0).all()


def test_hand_computed_tree():
    forest = small_forest()
    found = forest.predict_probabilities(np.array([[0.5, np.nextafter(np.float32(0.5), np.float32(1)), -3]], "f4"))
    np.testing.assert_array_equal(found, np.array([[0.75, 0.25, 0.75], [0.25, 0.75, 0.25]], dtype=np.float32))
    assert (forest.n_nodes, forest.n_trees, forest.max_depth) == (3, 1, 1)


def test_writes_into_out_and_checks_it():
    forest = small_forest()
    features = np.zeros((1, 5), dtype=np.float32)
    out = np.full((2, 5), np.nan, dtype=np.float32)
    assert forest.predict_probabilities(features, out=out) is out
    np.testing.assert_array_equal(out[0], 0.75)
    with pytest.raises(ValueError, match=r"out has shape \(2, 4\)"):
        forest.predict_probabilities(features, out=out[:, :4])
    with pytest.raises(ValueError, match=r"needs \(1, N\)"):
        forest.predict_probabilities(features.T)
    with pytest.raises(ValueError, match="C-contiguous float32"):
        forest.predict_probabilities(features.astype(np.float64))


def test_no_rows():
    assert small_forest().predict_probabilities(np.empty((1, 0), dtype=np.float32)).shape == (2, 0)


@pytest.mark.parametrize("kind", ["forest", "adaboost", "hist"])
def test_storage_round_trip(kind, tmp_path):
    model = SKLEARN[kind]().fit(*make_rows(600, 3))
    rows, _ = make_rows(500, 3, seed=1)
    packed = PackedForest.from_sklearn(model)
    np.savez(tmp_path / "forest.npz", **packed.to_arrays())
    with np.load(tmp_path / "forest.npz", allow_pickle=False) as arrays:
        loaded = PackedForest.from_arrays(arrays)
    features = np.ascontiguousarray(rows.T)
    np.testing.assert_array_equal(loaded.predict_probabilities(features), packed.predict_probabilities(features))


def small_forest(**changes):
    """One split at 0.5: (0.75, 0.25) on the left, (0.25, 0.75) on the right."""
    arrays = {
        "n_features": 1,
        "n_classes": 2,
        "classes": np.array([0, 1], dtype=np.int32),
        "feature": np.array([0, -1, -1], dtype=np.int16),
        "threshold": np.array([0.5, 0, 0], dtype=np.float32),
        "child": np.array([1, 0, 1], dtype=np.int32),
        "tree_start": np.array([0, 3]),
        "tree_output": np.array([-1], dtype=np.int32),
        "leaf_values": np.array([[0.75, 0.25], [0.25, 0.75]]),
        "base": np.zeros(2),
        "divisor": 1.0,
        "slope": 1.0,
        "link": "identity",
    }
    return PackedForest(**{**arrays, **changes})


TAMPERED = {
    "child outside": ("child", [7, 0, 1], "children are not behind"),
    "child backwards": ("child", [0, 0, 1], "children are not behind"),
    "negative child": ("child", [-1, 0, 1], "children are not behind"),
    "leaf row outside": ("child", [1, 0, 2], "outside the 2 rows"),
    "negative leaf row": ("child", [1, 0, -2], "outside the 2 rows"),
    "feature outside": ("feature", [1, -1, -1], "0 to 0"),
    "feature below -1": ("feature", [0, -2, -1], "0 to 0"),
    "all inner": ("feature", [0, 0, 0], "children are not behind"),
    "threshold NaN": ("threshold", [np.nan, 0, 0], "threshold is not finite"),
    "threshold infinite": ("threshold", [np.inf, 0, 0], "threshold is not finite"),
    "threshold short": ("threshold", [0.5, 0], "equally long"),
    "leaf infinite": ("leaf_values", [[np.inf, 0], [0, 1]], "not finite"),
    "leaf width": ("leaf_values", [[1.0], [0.0]], "must have 2 columns"),
    "base NaN": ("base", [np.nan, 0], "not finite"),
    "base short": ("base", [0.0], "2 outputs"),
    "trees falling": ("tree_start", [3, 0], "rise from 0"),
    "trees too long": ("tree_start", [0, 9], "rise from 0"),
    "tree count": ("tree_start", [0, 1, 3], "n_trees"),
    "output outside": ("tree_output", [5], "must have 1 columns"),
    "class outside": ("classes", [0, 2], "distinct, 0 to 1"),
    "class twice": ("classes", [0, 0], "distinct"),
    "divisor zero": ("divisor", 0.0, "positive"),
    "slope NaN": ("slope", np.nan, "positive"),
    "link unknown": ("link", 9, "link is 9"),
    "no features": ("n_features", 0, "n_features is 0"),
    "one class": ("n_classes", 1, "not 2 to"),
    "too many classes": ("n_classes", 1 << 40, "not 2 to"),
    "other version": ("format_version", 99, "format version 99"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_arrays_are_refused(case):
    name, value, message = TAMPERED[case]
    arrays = small_forest().to_arrays()
    arrays[name] = np.array(value, dtype=arrays[name].dtype)
    with pytest.raises(ModelError, match=message):
        PackedForest.from_arrays(arrays)


def test_arrays_of_another_kind_are_refused():
    arrays = small_forest().to_arrays()
    with pytest.raises(ModelError, match="lacks the arrays \\['child'\\]"):
        PackedForest.from_arrays({name: array for name, array in arrays.items() if name != "child"})
    with pytest.raises(ModelError, match="'child' is float64"):
        PackedForest.from_arrays({**arrays, "child": np.zeros(3)})
    swapped = PackedForest.from_arrays({**arrays, "threshold": arrays["threshold"].astype(">f4")})
    assert swapped.predict_probabilities(np.ones((1, 3), dtype=np.float32)).argmax(axis=0).tolist() == [1, 1, 1]
    with pytest.raises(ModelError, match="with 2 axes"):
        PackedForest.from_arrays({**arrays, "threshold": np.zeros((3, 1), dtype=np.float32)})


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_random_damage_never_crashes(data):
    arrays = {name: array.copy() for name, array in small_forest().to_arrays().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["child", "feature", "tree_start", "tree_output", "classes"]))
        place = data.draw(st.integers(0, arrays[name].size - 1))
        bounds = np.iinfo(arrays[name].dtype)
        arrays[name][place] = data.draw(st.integers(-3, 9) | st.integers(int(bounds.min), int(bounds.max)))
    try:
        forest = PackedForest.from_arrays(arrays)
    except ModelError:
        return
    found = forest.predict_probabilities(np.linspace(-1, 1, 11, dtype=np.float32)[None])
    assert np.isfinite(found).all()


def test_models_that_cannot_be_packed_are_named():
    rows, targets = make_rows(200, 3)
    with pytest.raises(TypeError, match="model is a str"):
        PackedForest.from_sklearn("forest")
    with pytest.raises(TypeError, match="Booster or XGBClassifier"):
        PackedForest.from_xgboost(3)
    with pytest.raises(ValueError, match="never fitted"):
        PackedForest.from_sklearn(RandomForestClassifier())
    with pytest.raises(ValueError, match="reg:squarederror"):
        PackedForest.from_xgboost(xgboost.XGBRegressor(n_estimators=1, n_jobs=1).fit(rows, targets).get_booster())
    with pytest.raises(ValueError, match="'gblinear'"):
        PackedForest.from_xgboost(xgboost.XGBClassifier(booster="gblinear", n_jobs=1).fit(rows, targets))
    with pytest.raises(ValueError, match="integers 0 to 1"):
        PackedForest.from_sklearn(DecisionTreeClassifier().fit(rows, targets), n_classes=2)
