"""What depth buys: validation scores of the default forest beside full-depth forests, five seeds, on real volumes.

The default forest is limited so that a voxel's walk is short. This case isolates what that costs in accuracy: both
forests are fitted on the same rows of `labels_sparse` and scored on the same voxels of `labels_val`.

Run: ``python benchmarks/forest_depth.py`` (about five minutes on two cores); ``--quick`` for one seed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from record import describe_run, markdown_table, publish

from voxclf.config import FitOptions
from voxclf.engine.executors import ThreadExecutor
from voxclf.feature_stack import FeatureStack
from voxclf.fit_job import make_bank
from voxclf.labels import LabelSet
from voxclf.metrics.voxelwise import score_block, score_tables
from voxclf.progress import last
from voxclf.sampling import DrawnRows, draw_rows, join_rows, row_weights, survey_labels, target_shares
from voxclf.training.fit_trees import fit_tree_model
from voxclf.volume import open_labels, open_volume

VOLUMES = {"vnc": (50.0, 4.6, 4.6), "flyem": (10.0, 10.0, 10.0)}
CASES = {
    "full depth, 100 trees": {"n_trees": 100, "max_depth": 0, "min_samples_leaf": 1},
    "default": {},
}
N_TRAINING, N_VALIDATION = 60_000, 300_000
EXECUTOR = ThreadExecutor(2)
TITLE = "Depth of the forest and validation scores"
EXPLANATION = (
    f"Random forests on {N_TRAINING:,} labelled voxels of three slices, scored on {N_VALIDATION:,} voxels of the "
    "validation slab: mean over the seeds (lowest to highest). Difference: to the full-depth forest of the same seed."
)


def draw(
    name: str, data: Path, labels: str, n_training: int, n_evaluation: int, seed: int
) -> tuple[DrawnRows, list[int]]:
    volume = open_volume(data / name / "raw.tif", VOLUMES[name])
    labelled = open_labels(data / name / labels, volume.shape)
    survey = last(survey_labels(labelled, 0, EXECUTOR)).total
    label_set = LabelSet.from_ids(survey.counts)
    stack = FeatureStack(make_bank(FitOptions(), VOLUMES[name]), VOLUMES[name])
    drawn = draw_rows(
        [volume], labelled, survey, stack, label_set, n_training=n_training, n_evaluation=n_evaluation,
        balance="sqrt", seed=seed, executor=EXECUTOR,
    )  # fmt: skip
    return join_rows(last(drawn).total), list(survey.counts.values())


def measure(name: str, data: Path, n_seeds: int) -> list[dict[str, str]]:
    validation = draw(name, data, "labels_val.tif", 1, N_VALIDATION, 0)[0].evaluation
    scores: dict[str, list[float]] = {case: [] for case in CASES}
    for seed in range(n_seeds):
        rows, counts = draw(name, data, "labels_sparse.tif", N_TRAINING, 1, seed)
        training = rows.training
        weights = row_weights(training.classes, target_shares(np.array(counts), "sqrt"))
        for case, options in CASES.items():
            fitted = fit_tree_model(
                "random_forest", training.features.T, training.classes, len(counts),
                seed=seed, n_jobs=2, sample_weight=weights, **options,
            )  # fmt: skip
            probabilities = fitted.model.predict_probabilities(validation.features)
            found = score_tables(score_block(validation.classes, probabilities, None, len(counts)))
            scores[case].append(found.macro_f1)
            print(f"{name} seed {seed} {case}: {found.macro_f1:.4f}", flush=True)
    full = np.array(scores["full depth, 100 trees"])
    return [
        {
            "volume": name,
            "forest": case,
            "macro F1": f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})",
            "difference": f"{np.mean(np.array(values) - full):+.4f}",
        }
        for case, values in scores.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--quick", action="store_true", help="one seed, nothing written")
    options = parser.parse_args()
    facts = describe_run(("numpy", "scikit-learn", "numba"))
    rows = []
    for name in VOLUMES:
        if (options.data / name).exists():
            rows += measure(name, options.data, 1 if options.quick else 5)
        else:
            print(f"skipped: {name} is not in {options.data}")
    table = markdown_table(("volume", "forest", "macro F1", "difference"), rows)
    if options.quick:
        print("\n".join(table))
    else:
        publish("forest_depth", TITLE, EXPLANATION, facts, rows, table)


if __name__ == "__main__":
    main()
