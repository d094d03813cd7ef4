"""Pixel classification as it is usually written with scikit-image and scikit-learn: the peer of the benchmarks.

The whole volume in memory, ``multiscale_basic_features`` of it, a random forest of 100 trees of full depth on a draw
of the labelled voxels, ``predict_proba`` of all voxels at once. As a program it does one volume from TIFF to TIFF and
prints the seconds of its parts as JSON: ``python benchmarks/usual_way.py volume.tif labels.tif OUT``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from skimage.feature import multiscale_basic_features
from sklearn.ensemble import RandomForestClassifier

THREADS = 2
N_TREES = 100
N_TRAINING = 150_000
# Bytes per voxel and feature at the peak of multiscale_basic_features, measured: 4.2 volumes of float32.
PEAK_BYTES_PER_FEATURE = 17


def compute_features(volume: np.ndarray, sigmas: Sequence[float], dimensions: int) -> np.ndarray:
    """Intensity, edges and texture at scales from the first to the last sigma (voxels); (Z, Y, X, F)."""

    def filtered(image: np.ndarray) -> np.ndarray:
        return multiscale_basic_features(
            image, sigma_min=min(sigmas), sigma_max=max(sigmas), num_sigma=len(sigmas), workers=THREADS
        )

    return filtered(volume) if dimensions == 3 else np.stack([filtered(image) for image in volume])


def draw_voxels(labels: np.ndarray, n: int, draw: str, seed: int) -> np.ndarray:
    """Flat indices of labelled voxels: ``labelled`` takes them as they come, ``equal`` as many of every class."""
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero(labels)
    if draw == "labelled":
        return np.sort(rng.choice(labelled, min(n, labelled.size), replace=False))
    classes = labels.ravel()[labelled]
    ids = np.unique(classes)
    per_class = [rng.choice(labelled[classes == i], min(n // len(ids), (classes == i).sum()), False) for i in ids]
    return np.sort(np.concatenate(per_class))


def fit_forest(rows: np.ndarray, classes: np.ndarray, seed: int = 0, n_trees: int = N_TREES) -> RandomForestClassifier:
    """Fit scikit-learn's forest with its defaults."""
    return RandomForestClassifier(n_trees, n_jobs=THREADS, random_state=seed).fit(rows, classes)


def quantise(probabilities: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turn (N, K) into uint8 of shape (K, Z, Y, X), 255 meaning 1."""
    return np.round(probabilities.T * 255).astype(np.uint8).reshape(-1, *shape)


def classify(volume_path: Path, labels_path: Path, folder: Path, sigmas: Sequence[float]) -> dict[str, float]:
    """Do the whole job; returns the seconds of its parts."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = time.perf_counter() - started, time.perf_counter()

    volume, labels = tifffile.imread(volume_path), tifffile.imread(labels_path)
    lap("read")
    features = compute_features(volume, sigmas, 3)
    rows = features.reshape(-1, features.shape[-1])
    lap("features")
    chosen = draw_voxels(labels, N_TRAINING, "labelled", seed=0)
    forest = fit_forest(rows[chosen], labels.ravel()[chosen])
    lap("fit")
    probabilities = forest.predict_proba(rows)
    lap("predict")
    folder.mkdir(parents=True)
    tifffile.imwrite(folder / "labels.tif", forest.classes_[probabilities.argmax(axis=1)].reshape(volume.shape))
    np.save(folder / "probabilities.npy", quantise(probabilities, volume.shape))
    lap("write")
    return seconds


def main() -> None:
    """Read the command line, do the job, print its times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.7, 1.0, 1.6, 3.5, 5.0], help="voxels")
    arguments = parser.parse_args()
    print(json.dumps(classify(arguments.volume, arguments.labels, arguments.folder, arguments.sigmas)))


if __name__ == "__main__":
    main()
