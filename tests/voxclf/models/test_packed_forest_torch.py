"""The forest as tensors gives the probabilities of the packed forest."""

import numpy as np
import pytest
from sklearn.ensemble import AdaBoostClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.tree import DecisionTreeClassifier

from voxclf.models.packed_forest import PackedForest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize(
    "model",
    [
        RandomForestClassifier(7, random_state=0),
        AdaBoostClassifier(DecisionTreeClassifier(max_depth=2), n_estimators=5, random_state=0),
        GradientBoostingClassifier(n_estimators=3, random_state=0),
    ],
    ids=lambda model: type(model).__name__,
)
def test_tensors_equal_arrays(model, n_classes, monkeypatch):
    from voxclf.models import forest_torch

    # Small enough that rows and trees are both split into groups.
    monkeypatch.setattr(forest_torch, "_WALKERS_AT_ONCE", 500)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1237, 5)).astype(np.float32)
    targets = np.digitize(rows[:, 0] + rows[:, 1], np.linspace(-1, 1, n_classes - 1))
    classes = np.arange(n_classes) + 1  # class 0 never occurs
    packed = PackedForest.from_sklearn(model.fit(rows, classes[targets]), n_classes=n_classes + 1)
    features = np.ascontiguousarray(rows.T)
    found = forest_torch.predict_probabilities_torch(packed, torch.from_numpy(features))
    expected = packed.predict_probabilities(features)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_wrong_tensors_are_refused():
    from voxclf.models.forest_torch import TorchForest

    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    forest = TorchForest(PackedForest.from_sklearn(DecisionTreeClassifier().fit(rows, rows[:, 0] > 0)))
    with pytest.raises(ValueError, match=r"needs float32 \(3, N\)"):
        forest.predict_probabilities(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="float64"):
        forest.predict_probabilities(torch.zeros(3, 4, dtype=torch.float64))
