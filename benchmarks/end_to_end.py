"""``voxclf predict`` against the same job written with scikit-image and scikit-learn.

Two comparisons, on FIB-SEM (``flyem``, where the data are) and on a phantom:

- the usual way (``usual_way.py``): isolates what a user gains. Both train a forest on the same labels and classify
  every voxel of a TIFF at scales from 0.7 to 5 voxels; ours computes 50 features, theirs 25. Each run is a process of
  its own, they take turns, and what is compared is the time from file to files without the fit, and peak memory.
- same labels: isolates correctness. The forest that voxclf fitted is rebuilt as a scikit-learn RandomForest and
  evaluated by scikit-learn, on features that SciPy computes from the written definitions (``features/filters.py``) of
  the whole volume in memory, and on the features that ``voxclf features`` writes. Every label is compared. SciPy
  works in float64, the compiled kernels in float32: a feature that falls on a threshold may fall on its other side.

Run: ``python benchmarks/end_to_end.py`` (about a quarter of an hour on two cores and 15 GB; ``--repetitions 1`` takes
half); ``--quick`` tries it out, writing nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import tifffile
from phantoms import VOXEL_SIZE, write_labelled
from real_data import default_data_folder
from record import Measured, describe_run, markdown_table, page, publish, run_measured, run_voxclf
from usual_way import PEAK_BYTES_PER_FEATURE, THREADS

from features import filters
from features.bank import FilterBank
from voxclf.datasets import make_phantom
from voxclf.geometry import VoxelSize
from voxclf.models.checkpoint import load_model
from voxclf.models.packed_forest import PackedForest
from voxclf.volume import open_volume

SIZE = 320
SMALLER_SIZES = (256, 192, 128, 64)
SAME_LABELS_SIZE = 128
SIGMAS = (0.7, 1.0, 1.6, 3.5, 5.0)
USUAL = "scikit-image + scikit-learn"
PEER_FEATURES = 5 * len(SIGMAS)
LIBRARIES = ("numpy", "scipy", "scikit-image", "scikit-learn", "numba")
TITLE = "End to end against scikit-image and scikit-learn"
EXPLANATION = (
    "The usual way: scikit-image's multiscale_basic_features of the whole volume in memory and a scikit-learn forest "
    "of 100 trees of full depth, trained on 150,000 of the same labelled voxels. Seconds are wall time from file to "
    "files without the fit, interpreter start included; median of the runs. Scores are on labels_val (flyem) or the "
    "full truth (phantom). Same labels: the forest that voxclf fitted, evaluated by scikit-learn; the margin is the "
    "largest gap between the two most probable classes at a voxel whose label differs."
)
USUAL_COLUMNS = (
    "volume",
    "method",
    "runs",
    "seconds",
    "voxels/s",
    "peak MB",
    "macro F1",
    "usual way takes, times the seconds",
    "times the memory",
)
SAME_COLUMNS = (
    "volume",
    "features by",
    "voxels",
    "labels that differ",
    "margin",
    "largest Δp",
    "features s",
    "forest s",
    "voxclf predict s",
)


@dataclass(frozen=True)
class Job:
    """A volume on disk with labels to train on and labels to score on."""

    name: str
    volume: Path
    labels: Path
    truth: Path
    voxel_size: VoxelSize

    @property
    def voxel_size_option(self) -> list[str]:
        """As the command line wants it."""
        return ["--voxel-size", ",".join(f"{s:g}" for s in self.voxel_size)]


# --- inputs ---


def prepare_flyem(data: Path, folder: Path, quick: bool) -> Job:
    """Use the FIB-SEM volume, or for a trial a piece of it around the crossing of the labelled slices."""
    source = data / "flyem"
    names = ("raw", "labels_sparse", "labels_val")
    paths = [source / f"{name}.tif" for name in names]
    if quick:
        # Slices 50 to 160 hold labels of both kinds.
        crops = [tifffile.imread(path)[50:160, 80:170, 80:170] for path in paths]
        paths = [folder / f"{name}.tif" for name in names]
        for path, crop in zip(paths, crops, strict=True):
            tifffile.imwrite(path, crop)
    volume, labels, truth = paths
    return Job("flyem", volume, labels, truth, (10.0, 10.0, 10.0))


def prepare_phantom(folder: Path, size: int) -> Job:
    """Write a phantom, labels on three slices of it, and its truth."""
    phantom = make_phantom(size, VOXEL_SIZE)
    volume, labels = write_labelled(folder, phantom)
    tifffile.imwrite(folder / "truth.tif", phantom.labels)
    return Job(f"phantom {size}^3", volume, labels, folder / "truth.tif", VOXEL_SIZE)


def size_that_fits(size: int) -> int:
    """Take the largest phantom whose features, the usual way, fit the memory that is free now."""
    available = psutil.virtual_memory().available
    for candidate in (size, *(s for s in SMALLER_SIZES if s < size)):
        if candidate**3 * PEER_FEATURES * PEAK_BYTES_PER_FEATURE < 0.9 * available:
            return candidate
    raise MemoryError(f"{available / 1e9:.1f} GB are free, too little for any phantom the usual way; free some memory")


# --- the usual way ---


def race(job: Job, folder: Path, repetitions: int, budgets: list[str]) -> list[dict[str, Any]]:
    """Run ours with every budget and theirs in turn; scores come from the last run."""
    model, theirs = folder / "model", folder / "usual"
    run_voxclf("fit", job.volume, job.labels, "-o", model, *job.voxel_size_option, "--workers", THREADS)
    options = (*job.voxel_size_option, "--workers", THREADS, "--device", "cpu")
    outputs = {f"voxclf predict --memory {budget}": folder / budget for budget in budgets}
    runs: dict[str, list[Measured]] = {name: [] for name in (*outputs, USUAL)}
    peer = [sys.executable, str(Path(__file__).with_name("usual_way.py"))]
    for _ in range(repetitions):
        for budget, (name, output) in zip(budgets, outputs.items(), strict=True):
            shutil.rmtree(output, ignore_errors=True)
            runs[name].append(run_voxclf("predict", model, job.volume, "-o", output, *options, "--memory", budget))
        shutil.rmtree(theirs, ignore_errors=True)
        runs[USUAL].append(run_measured([*peer, *map(str, (job.volume, job.labels, theirs))]))
        print(job.name, {name: round(done[-1].seconds, 1) for name, done in runs.items()}, flush=True)
    outputs[USUAL] = theirs / "labels.tif"
    n_voxels = int(np.prod(open_volume(job.volume, job.voxel_size).shape))
    return [
        {
            "volume": job.name,
            "method": name,
            "voxels": n_voxels,
            "seconds": [run.seconds - run.values.get("fit", 0.0) for run in done],
            "parts_s": [run.values for run in done] if name == USUAL else [],
            "peak_bytes": [run.peak_bytes for run in done],
            "macro_f1": run_voxclf("evaluate", outputs[name], job.truth).values["held_out"]["macro_f1"],
        }
        for name, done in runs.items()
    ]


def lay_out_race(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios are of runs of the same repetition; their median and range."""
    cells = []
    for row in rows:
        usual = next(r for r in rows if (r["volume"], r["method"]) == (row["volume"], USUAL))
        values = (
            row["volume"],
            row["method"],
            len(row["seconds"]),
            f"{median(row['seconds']):.1f}",
            f"{row['voxels'] / median(row['seconds']):,.0f}",
            f"{max(row['peak_bytes']) / 1e6:,.0f}",
            f"{row['macro_f1']:.3f}",
            "" if row is usual else spell_ratios(usual["seconds"], row["seconds"]),
            "" if row is usual else spell_ratios(usual["peak_bytes"], row["peak_bytes"]),
        )
        cells.append(dict(zip(USUAL_COLUMNS, values, strict=True)))
    return markdown_table(USUAL_COLUMNS, cells)


def spell_ratios(theirs: list[float], ours: list[float]) -> str:
    """Median ratio, lowest and highest."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


# --- same labels ---


def to_sklearn(forest: PackedForest) -> Any:
    """Rebuild a packed random forest as scikit-learn's own object, to be evaluated by scikit-learn's own code."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.tree import DecisionTreeClassifier

    whole = RandomForestClassifier(forest.n_trees, n_jobs=THREADS)
    trees = [DecisionTreeClassifier() for _ in range(forest.n_trees)]
    for number, tree in enumerate(trees):
        tree.tree_ = _rebuild_tree(forest, int(forest.tree_start[number]), int(forest.tree_start[number + 1]))
    for model in (whole, *trees):
        model.classes_ = np.arange(forest.n_classes)
        model.n_classes_, model.n_outputs_, model.n_features_in_ = forest.n_classes, 1, forest.n_features
    whole.estimators_ = trees
    return whole


def _rebuild_tree(forest: PackedForest, start: int, stop: int) -> Any:
    from sklearn.tree._tree import NODE_DTYPE, Tree

    feature, child = forest.feature[start:stop], forest.child[start:stop]
    inner = feature >= 0
    nodes = np.zeros(stop - start, NODE_DTYPE)
    nodes["left_child"] = np.where(inner, child - start, -1)
    nodes["right_child"] = np.where(inner, child - start + 1, -1)
    nodes["feature"] = np.where(inner, feature, -2)
    nodes["threshold"] = forest.threshold[start:stop]
    nodes["n_node_samples"] = nodes["weighted_n_node_samples"] = 1
    values = np.zeros((stop - start, 1, forest.n_classes))
    leaf_rows = np.zeros((np.count_nonzero(~inner), forest.n_classes))
    leaf_rows[:, forest.classes] = forest.leaf_values[child[~inner]]
    values[~inner, 0] = leaf_rows
    tree = Tree(forest.n_features, np.array([forest.n_classes], np.intp), 1)
    tree.__setstate__({"max_depth": forest.max_depth, "node_count": len(nodes), "nodes": nodes, "values": values})
    return tree


def compute_by_definition(image: np.ndarray, bank: FilterBank, voxel_size: VoxelSize) -> np.ndarray:
    """Features (F, Z, Y, X) of a whole volume from the definitions, which run in SciPy and in float64."""
    definitions = {
        name: (getattr(filters, name), filters.smoothing_radius)
        for name in bank.filters
        if name != "structure_tensor_eigenvalues"
    }
    definitions["structure_tensor_eigenvalues"] = (
        filters.structure_tensor_eigenvalues,
        filters.structure_tensor_radius,
    )
    features = []
    for sigma in bank.sigmas_in_voxels(voxel_size):
        for name in bank.filters:
            function, radius = definitions[name]
            padded = np.pad(image, [(r, r) for r in radius(sigma)], mode="symmetric")
            features.append(np.asarray(function(padded, sigma), np.float32).reshape(-1, *image.shape))
    return np.concatenate(features)


def compare_labels(job: Job, folder: Path, size: int) -> list[dict[str, Any]]:
    """Predict a piece of the volume with voxclf and the scikit-learn way with the same forest."""
    model = load_model(folder / "model")
    assert isinstance(model.classifier, PackedForest)
    image = tifffile.imread(job.volume)[:size, :size, :size]
    piece, ours, written = folder / "piece.tif", folder / "piece", folder / "piece_features.zarr"
    tifffile.imwrite(piece, image)
    options = (*job.voxel_size_option, "--workers", THREADS)
    predict = ("predict", folder / "model", piece, "-o", ours, *options)
    predicted = run_voxclf(*predict, "--probabilities", "float32", "--device", "cpu")
    run_voxclf("features", piece, "-o", written, *options, "--dtype", "float32")
    probabilities = read_all(ours / "probabilities.zarr")
    labels = model.label_set.remap_to_indices(read_all(ours / "labels.zarr")[0])
    forest = to_sklearn(model.classifier)
    rows = []
    contestants: dict[str, Callable[[], np.ndarray]] = {
        "SciPy, from the definitions": lambda: compute_by_definition(image, model.bank, job.voxel_size),
        "voxclf features": lambda: read_all(written),
    }
    for name, compute in contestants.items():
        started = time.perf_counter()
        features = compute()
        computed = time.perf_counter()
        expected = forest.predict_proba(features.reshape(len(features), -1).T).T.reshape(probabilities.shape)
        finished = time.perf_counter()
        differ = expected.argmax(axis=0) != labels
        best = np.sort(expected[:, differ], axis=0)[-2:]
        rows.append(
            {
                "volume": f"{job.name}, {' x '.join(map(str, image.shape))}",
                "features_by": name,
                "voxels": image.size,
                "labels_that_differ": int(differ.sum()),
                "margin": float((best[1] - best[0]).max()) if differ.any() else None,
                "largest_difference": float(np.abs(expected - probabilities).max()),
                "features_s": computed - started,
                "forest_s": finished - computed,
                "predict_s": predicted.seconds,
            }
        )
        print(rows[-1], flush=True)
    return rows


def read_all(path: Path) -> np.ndarray:
    """The whole of a volume, (C, Z, Y, X)."""
    volume = open_volume(path, require_voxel_size=False)
    return volume.read((0, 0, 0), volume.shape)


def lay_out_labels(rows: list[dict[str, Any]]) -> list[str]:
    """One row a way of computing the features."""
    cells = []
    for row in rows:
        values = (
            row["volume"],
            row["features_by"],
            f"{row['voxels']:,}",
            row["labels_that_differ"],
            "" if row["margin"] is None else f"{row['margin']:.0e}",
            f"{row['largest_difference']:.0e}",
            "" if row["features_by"].startswith("voxclf") else f"{row['features_s']:.1f}",
            f"{row['forest_s']:.1f}",
            f"{row['predict_s']:.1f}",
        )
        cells.append(dict(zip(SAME_COLUMNS, values, strict=True)))
    return markdown_table(SAME_COLUMNS, cells)


def prepare_jobs(arguments: argparse.Namespace, folder: Path) -> tuple[list[Job], list[str]]:
    """The volumes to race on, and what could not be done as asked."""
    jobs, remarks = [], []
    if (arguments.data / "flyem" / "raw.tif").exists():
        (folder / "flyem").mkdir()
        jobs.append(prepare_flyem(arguments.data, folder / "flyem", arguments.quick))
    else:
        remarks.append("flyem is left out: its data are not there.")
    asked = 96 if arguments.quick else arguments.size
    size = size_that_fits(asked)
    if size < asked:
        remarks.append(f"The phantom is {size}^3, not {asked}^3: there was not enough free memory for the usual way.")
    jobs.append(prepare_phantom(folder / "phantom", size))
    return jobs, remarks


def main() -> None:
    """Prepare the inputs in a temporary folder, race, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="edge of the phantom")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--budgets", nargs="+", default=["400MB"], help="values of --memory; 400MB is the default")
    parser.add_argument("--data", type=Path, default=default_data_folder(), help="folder with the real volumes")
    parser.add_argument("--quick", action="store_true", help="small volumes, one repetition, nothing written")
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, threads=THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs, remarks = prepare_jobs(arguments, folder)
        raced, compared = [], []
        for job in jobs:
            workspace = folder / f"{job.volume.parent.name}_runs"
            workspace.mkdir()
            raced += race(job, workspace, 1 if arguments.quick else arguments.repetitions, arguments.budgets)
            compared += compare_labels(job, workspace, 48 if arguments.quick else SAME_LABELS_SIZE)
    table = [*lay_out_race(raced), "", *lay_out_labels(compared)]
    explanation = " ".join([EXPLANATION, *remarks])
    if arguments.quick:
        print(page(TITLE, explanation, facts, table))
    else:
        publish("end_to_end", TITLE, explanation, facts, [*raced, *compared], table)


if __name__ == "__main__":
    main()
