"""Every model in the list learns, is reproducible, and says what it refuses."""

import numpy as np
import pytest
import xgboost

from voxclf.models.forest_bytes import ByteTables
from voxclf.models.gaussian_mixture import GaussianMixture
from voxclf.models.packed_forest import PackedForest
from voxclf.training.fit_trees import TREE_MODELS, bin_edges, fit_tree_model

F, K = 6, 5
FEW = {"n_trees": 8}


def make_clusters(n, seed):
    """Four Gaussian clusters, at other places in feature space; class 3 of the five never occurs."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(42).normal(size=(K, F)) * 2
    targets = rng.choice([0, 1, 2, 4], size=n)
    return (centres[targets] + rng.normal(size=(n, F))).astype(np.float32), targets


TRAIN = make_clusters(1200, 0)
TEST = make_clusters(1001, 1)


def settings(name):
    return {"n_jobs": 1, **({} if name in ("decision_tree", "gaussian_mixture") else FEW)}


@pytest.mark.parametrize("name", TREE_MODELS)
def test_learns_and_leaves_missing_classes_at_zero(name):
    fitted = fit_tree_model(name, *TRAIN, K, **settings(name))
    found = fitted.model.predict_probabilities(np.ascontiguousarray(TEST[0].T))
    assert found.shape == (K, 1001)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)
    assert (found[3] == 0).all()
    # The best possible rule, the nearest of the true centres, is right for 97 % of these rows.
    assert (found.argmax(axis=0) == TEST[1]).mean() > 0.85
    if fitted.feature_importances is not None:
        assert fitted.feature_importances.shape == (F,)
        assert fitted.feature_importances.sum() == pytest.approx(1, abs=1e-5)
    assert fitted.name == name
    assert set(TREE_MODELS[name].defaults) <= set(fitted.hyperparameters)


@pytest.mark.parametrize("name", TREE_MODELS)
def test_same_seed_same_model(name):
    first, second = (fit_tree_model(name, *TRAIN, K, seed=7, **settings(name)) for _ in range(2))
    for key, array in first.model.to_arrays().items():
        np.testing.assert_array_equal(array, second.model.to_arrays()[key])


@pytest.mark.parametrize("name", TREE_MODELS)
def test_arrays_rebuild_the_model(name):
    model = fit_tree_model(name, *TRAIN, K, **settings(name)).model
    rebuilt = type(model).from_arrays(model.to_arrays())
    features = np.ascontiguousarray(TEST[0].T)
    np.testing.assert_array_equal(rebuilt.predict_probabilities(features), model.predict_probabilities(features))


def test_another_seed_another_forest():
    first, second = (fit_tree_model("random_forest", *TRAIN, K, seed=seed, **FEW).model for seed in (0, 1))
    assert first.n_nodes != second.n_nodes


@pytest.mark.parametrize("name", ["random_forest", "extra_trees", "adaboost", "hist_gradient_boosting", "xgboost"])
def test_every_threshold_fits_a_byte(name):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5000, 3)).astype(np.float32)
    targets = rng.integers(0, 2, 5000)
    model = fit_tree_model(name, rows, targets, 2, n_trees=10, max_depth=10, min_samples_leaf=1).model
    assert isinstance(model, PackedForest)
    assert isinstance(model._tables, ByteTables)


def test_binned_forest_predicts_what_the_library_predicts_on_bins():
    from sklearn.ensemble import RandomForestClassifier

    fitted = fit_tree_model("random_forest", *TRAIN, K, n_trees=5, max_depth=0, min_samples_leaf=1, n_jobs=1)
    edges = bin_edges(TRAIN[0])
    codes = [
        np.stack([np.searchsorted(e, x) for e, x in zip(edges, rows.T, strict=True)], 1) for rows in (TRAIN[0], TEST[0])
    ]
    library = RandomForestClassifier(5, random_state=0).fit(codes[0], TRAIN[1])
    found = fitted.model.predict_probabilities(np.ascontiguousarray(TEST[0].T))
    np.testing.assert_allclose(found[[0, 1, 2, 4]], library.predict_proba(codes[1]).T, atol=1e-6)


def test_depth_zero_is_no_limit():
    deep = fit_tree_model("decision_tree", *TRAIN, K, max_depth=0, min_samples_leaf=1).model
    flat = fit_tree_model("decision_tree", *TRAIN, K, max_depth=2).model
    assert flat.max_depth == 2
    assert deep.max_depth > 5


def test_sample_weight_moves_the_decision():
    rows = np.repeat(np.float32([[0.0], [1.0]]), 100, axis=0)
    targets = np.tile([0, 1], 100)
    weight = np.where(targets == 1, 9.0, 1.0)
    for name in ("decision_tree", "random_forest", "adaboost", "xgboost", "hist_gradient_boosting"):
        model = fit_tree_model(name, rows, targets, 2, sample_weight=weight, seed=1).model
        assert model.predict_probabilities(np.float32([[0.5]]))[1, 0] > 0.6


def test_xgboost_keeps_its_own_file():
    fitted = fit_tree_model("xgboost", *TRAIN, K, n_trees=4, n_jobs=1)
    booster = xgboost.Booster(model_file=bytearray(fitted.native))
    expected = booster.predict(xgboost.DMatrix(TEST[0])).T
    found = fitted.model.predict_probabilities(np.ascontiguousarray(TEST[0].T))
    np.testing.assert_allclose(found[[0, 1, 2, 4]], expected, atol=1e-6)


def test_mixture_equals_scikit_learn_and_names_its_components():
    fitted = fit_tree_model("gaussian_mixture", *TRAIN, K)
    assert isinstance(fitted.model, GaussianMixture)
    assert sorted(fitted.model.component_class) == [0, 1, 2, 4]
    assert fitted.feature_importances is None
    # Expected densities from SciPy, built from the stored whitening: precision = W.T @ W.
    from scipy.stats import multivariate_normal

    weights = []
    for w, offset, log_weight in zip(fitted.model.whitening, fitted.model.offset, fitted.model.log_weight, strict=True):
        density = multivariate_normal(np.linalg.solve(w, offset), np.linalg.inv(w.T @ w))
        weights.append(density.pdf(TEST[0]) * np.exp(log_weight - np.linalg.slogdet(w)[1]))
    expected = np.stack(weights) / np.sum(weights, axis=0)
    found = fitted.model.component_probabilities(np.ascontiguousarray(TEST[0].T))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bin_edges_lie_between_values():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=3000), rng.integers(0, 7, 3000), np.full(3000, 2.5)], axis=1).astype(np.float32)
    dense, few, constant = bin_edges(rows)
    assert dense.size <= 254
    assert few.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert constant.size == 0
    counts = np.bincount(np.searchsorted(dense, rows[:, 0]))
    assert counts.min() >= 1
    assert counts.max() <= 3 * 3000 / 255


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "forest"}, "model 'forest' is unknown"),
        ({"features": TRAIN[0].T}, r"must be \(N, F\)"),
        ({"features": np.full_like(TRAIN[0], np.nan)}, "NaN or infinity"),
        ({"targets": TRAIN[1] + 1}, "integers 0 to 4"),
        ({"targets": TRAIN[1] * 1.0}, "dtype float64"),
        ({"targets": TRAIN[1] * 0}, "only class 0"),
        ({"n_trees": 0}, "n_trees is 0"),
        ({"name": "decision_tree", "n_trees": 5}, "has only"),
        ({"sample_weight": np.ones(3)}, "sample_weight has shape"),
        ({"name": "gaussian_mixture", "sample_weight": np.ones(1200)}, "cannot weigh"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"name": "random_forest", "features": TRAIN[0], "targets": TRAIN[1], "n_classes": K}
    with pytest.raises(ValueError, match=message):
        fit_tree_model(**{**arguments, **changes})
