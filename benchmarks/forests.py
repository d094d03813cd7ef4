"""Rows per second through a forest: the packed forest on two threads against scikit-learn and xgboost.

Every contestant gets what it likes best, in memory before the clock starts: features by row for the libraries, by
feature for us. They take turns, repetition by repetition, in one process, so that a busy machine slows them all;
what is reported are ratios of the same repetition. Rows are voxels of the phantom in the order in which blocks
bring them, features are 40 of the 3D multiscale bank.

- full forest: isolates the walk through trees that do not fit a cache; both sides evaluate the same model.
- default forest: what `voxclf fit` makes of the same rows, against scikit-learn's full-depth forest, because that
  is what a user of scikit-learn would run. Scores on the same voxels stand beside the times.
- xgboost: isolates the byte walk; `inplace_predict` is xgboost's fastest way in.

Run: ``python benchmarks/forests.py`` (about four minutes on two cores); ``--quick`` for a look in one;
``--rows 10000000`` adds one repetition over ten million rows, which takes 5 GB.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import xgboost
from record import describe_run, markdown_table, publish
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import f1_score

from features.bank import FilterBank
from voxclf.datasets import make_phantom
from voxclf.models.packed_forest import PackedForest
from voxclf.training.fit_trees import fit_tree_model

THREADS = 2
VOXEL_SIZE = (5.0, 5.0, 5.0)
SIGMAS_NM = (5.0, 8.0, 17.5, 25.0)
N_FEATURES = 40
N_CLASSES = 6
BLOCK_ROWS = 1 << 15
LIBRARIES = ("numpy", "numba", "scikit-learn", "xgboost-cpu", "xgboost")
TITLE = "Packed forest against scikit-learn and xgboost"
EXPLANATION = (
    "A ratio is the library's time over ours in the same repetition: median (lowest to highest). F1 is the macro F1 on "
    "another phantom than the one trained on; the default forest is another model than the full-depth one beside it, "
    "so there labels differ."
)
COLUMNS = (
    "case",
    "library",
    "rows",
    "library s",
    "voxclf s",
    "ratio",
    "labels that differ",
    "largest Δp",
    "F1 theirs / ours",
)


# --- data ---


def phantom_rows(size, seed):
    """Features (40, N) and class indices (N,) of a phantom's voxels, in block order."""
    phantom = make_phantom(size, VOXEL_SIZE, seed)
    bank = FilterBank("multiscale", 3, sigmas_nm=SIGMAS_NM)
    halo = bank.halo(VOXEL_SIZE)
    padded = np.pad(phantom.image, [(h, h) for h in halo], mode="reflect")
    features = bank.compute(padded, VOXEL_SIZE).reshape(bank.n_features, -1)
    assert bank.n_features == N_FEATURES
    return features, phantom.labels.ravel().astype(np.int64) - 1


def training_rows(features, targets, n):
    """An equal draw from every class, as rows."""
    rng = np.random.default_rng(0)
    per_class = n // N_CLASSES
    drawn = [rng.choice(np.flatnonzero(targets == k), per_class) for k in range(N_CLASSES)]
    index = np.sort(np.concatenate(drawn))
    return np.ascontiguousarray(features[:, index].T), targets[index]


# --- contestants ---


def predict_packed(forest, blocks, pool):
    """As the engine does: blocks of features to threads."""
    return np.concatenate(list(pool.map(forest.predict_probabilities, blocks)), axis=1)


def split(features):
    """Blocks that are contiguous, as a filter bank yields them."""
    n = features.shape[1]
    return [np.ascontiguousarray(features[:, start : start + BLOCK_ROWS]) for start in range(0, n, BLOCK_ROWS)]


def race(case, library, run_library, run_ours, targets, repetitions):
    """Seconds of both, in turn; agreement and scores from the last repetition."""
    seconds = {"library": [], "voxclf": []}
    for _ in range(repetitions):
        began = time.perf_counter()
        expected = run_library()
        seconds["library"].append(time.perf_counter() - began)
        began = time.perf_counter()
        found = run_ours()
        seconds["voxclf"].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds["library"], seconds["voxclf"], strict=True)]
    labels = found.argmax(axis=0)
    their_labels = expected.argmax(axis=1)
    row = {
        "case": case,
        "library": library,
        "rows": int(labels.size),
        "library_s": round(median(seconds["library"]), 3),
        "voxclf_s": round(median(seconds["voxclf"]), 3),
        "ratio": round(median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "labels_that_differ": int((labels != their_labels).sum()),
        "largest_difference": float(np.abs(found.T - expected).max()),
        "library_f1": round(f1_score(targets, their_labels, average="macro"), 4),
        "voxclf_f1": round(f1_score(targets, labels, average="macro"), 4),
    }
    print(row, flush=True)
    return row


def run_races(features, targets, models, repetitions):
    """All cases on the same rows."""
    rows = np.ascontiguousarray(features.T)
    blocks = split(features)
    table = []
    with ThreadPoolExecutor(THREADS) as pool:
        for case, library, run_library, forest in models:
            forest.predict_probabilities(blocks[0][:, :100].copy())  # compile
            table.append(
                race(
                    case,
                    library,
                    lambda run=run_library: run(rows),
                    lambda forest=forest: predict_packed(forest, blocks, pool),
                    targets,
                    repetitions,
                )
            )
    return table


def fit_models(rows, targets, quick):
    """The cases: name, library, how the library predicts, our forest."""
    forest = RandomForestClassifier(100, n_jobs=THREADS, random_state=0).fit(rows, targets)
    default = fit_tree_model("random_forest", rows, targets, N_CLASSES, n_jobs=THREADS)
    boosted = xgboost.XGBClassifier(n_estimators=100, max_depth=6, max_bin=255, n_jobs=THREADS)
    booster = boosted.fit(rows, targets).get_booster()
    booster.set_param({"nthread": THREADS})
    full = PackedForest.from_sklearn(forest)
    print(f"full forest: {full.n_nodes} nodes; default: {default.model.n_nodes} nodes, {default.hyperparameters}")

    def xgboost_predict(x):
        return booster.inplace_predict(x, validate_features=False)

    cases = [
        ("full forest", "scikit-learn RandomForest", forest.predict_proba, full),
        ("default forest", "scikit-learn RandomForest, full depth", forest.predict_proba, default.model),
        ("xgboost, 100 rounds", "xgboost inplace_predict", xgboost_predict, PackedForest.from_xgboost(boosted)),
    ]
    if not quick:
        hist = HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=0).fit(rows, targets)
        extra = ExtraTreesClassifier(100, min_samples_leaf=5, n_jobs=THREADS, random_state=0).fit(rows, targets)
        cases.append(
            ("hist. boosting", "scikit-learn HistGradientBoosting", hist.predict_proba, PackedForest.from_sklearn(hist))
        )
        cases.append(("extra trees", "scikit-learn ExtraTrees", extra.predict_proba, PackedForest.from_sklearn(extra)))
    return cases


# --- results ---


def lay_out(table):
    """A row a race."""
    cells = []
    for row in table:
        values = (
            row["case"],
            row["library"],
            f"{row['rows']:,}",
            row["library_s"],
            row["voxclf_s"],
            f"{row['ratio']} ({row['lowest']} to {row['highest']})",
            row["labels_that_differ"],
            f"{row['largest_difference']:.0e}",
            f"{row['library_f1']} / {row['voxclf_f1']}",
        )
        cells.append(dict(zip(COLUMNS, values, strict=True)))
    return markdown_table(COLUMNS, cells)


def main():
    """Fit, race, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200,000 rows, three cases, nothing written")
    parser.add_argument("--rows", type=int, default=0, help="one more repetition over so many rows")
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, threads=THREADS)
    features, targets = phantom_rows(100, seed=0)
    models = fit_models(*training_rows(features, targets, 30_000 if arguments.quick else 100_000), arguments.quick)
    features, targets = phantom_rows(100, seed=1)
    n = 200_000 if arguments.quick else targets.size
    table = run_races(np.ascontiguousarray(features[:, :n]), targets[:n], models, 3)
    if arguments.rows:
        times = -(-arguments.rows // targets.size)
        features = np.tile(features, times)[:, : arguments.rows].copy()
        table += run_races(features, np.tile(targets, times)[: arguments.rows], models[:3], 1)
    if not arguments.quick:
        publish("forests", TITLE, EXPLANATION, facts, table, lay_out(table))


if __name__ == "__main__":
    main()
