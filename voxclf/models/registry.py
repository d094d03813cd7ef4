"""Model name → what it is and its defaults: the list that ``voxclf models`` prints and ``fit`` chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """What the registry tells about a model: one line, and the defaults that `fit_tree_model` fills in."""

    name: str
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _info(name: str, description: str, **defaults: Any) -> tuple[str, ModelInfo]:
    return name, ModelInfo(name, description, MappingProxyType(defaults))


# Forests: depth 16 changed validation macro F1 against full depth by -0.003 on ssTEM with classes drawn equally,
# by 0.000 with classes drawn by the root of their frequency, by +0.002 on FIB-SEM; depth 12 by -0.016, -0.007 and
# 0.000. It halves the nodes. Leaves of at least 5 rows cost another 0.003, 50 trees in place of 100 0.000 to 0.005.
TREE_MODELS: Mapping[str, ModelInfo] = MappingProxyType(
    dict(
        (
            _info(
                "decision_tree",
                "One decision tree: a rule list that can be read; the least accurate, and instant.",
                max_depth=12,
                min_samples_leaf=20,
            ),
            _info(
                "random_forest",
                "Random forest: many trees on resampled rows, averaged; robust without tuning. The default.",
                n_trees=80,
                max_depth=16,
                min_samples_leaf=1,
            ),
            _info(
                "extra_trees",
                "Extremely randomised trees: as a random forest, with random thresholds; smoother, faster to fit.",
                n_trees=80,
                max_depth=18,
                min_samples_leaf=1,
            ),
            _info(
                "adaboost",
                "AdaBoost (SAMME): small trees, each on the rows that the ones before got wrong.",
                n_trees=100,
                max_depth=6,
                min_samples_leaf=5,
            ),
            _info(
                "gradient_boosting",
                "Gradient boosting of scikit-learn, on a random quarter of the rows per tree; slow to fit.",
                n_trees=100,
                max_depth=4,
                min_samples_leaf=5,
            ),
            _info(
                "hist_gradient_boosting",
                "Histogram gradient boosting of scikit-learn: gradient boosting on binned features, fast to fit.",
                n_trees=100,
                max_depth=6,
                min_samples_leaf=20,
            ),
            _info(
                "xgboost",
                "xgboost: regularised histogram gradient boosting; usually the most accurate.",
                n_trees=100,
                max_depth=6,
                min_samples_leaf=1,
            ),
            _info(
                "gaussian_mixture",
                "Gaussian mixture: unsupervised; labels only give the starting means and name the components.",
            ),
        )
    )
)


def check_model_name(name: str) -> None:
    """Refuse a model that does not exist.

    Raises
    ------
    ValueError
        Listing those that do.
    """
    if name not in TREE_MODELS:
        known = ", ".join(TREE_MODELS)
        raise ValueError(f"model {name!r} is unknown; known are {known} (`voxclf models` explains them)")
