"""Filter bank and forest on a GPU against the compiled path on all cores: voxels per second, and whether they agree.

Each case is one block with its halo, as the engine hands it out: to the device, features, forest, back. It isolates
computing; reading and writing volumes is left out on both sides. The forest is made up (balanced trees, thresholds
at quantiles of the features), so that no training library is needed; a walk always takes the full depth, which is
the worst case for both sides.

Run: ``python benchmarks/gpu_trees.py`` from the repository's root. It needs NumPy and torch; with numba and scipy it
also times the CPU path and compares the answers. ``--size 32 --device cpu`` tries it out anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import FunctionType

import numpy as np
import torch
from record import RESULTS, describe_run, markdown_table, publish

sys.path.insert(0, str(Path(__file__).parents[1]))
HAS_COMPILER = find_spec("numba") is not None and find_spec("scipy") is not None


class Absent:
    """Stands in for numba and scipy where they are missing: decorators keep the function, nothing else is called."""

    def __call__(self, *arguments, **_):
        """Be a decorator, or make one."""
        is_decorated = len(arguments) == 1 and isinstance(arguments[0], FunctionType)
        return arguments[0] if is_decorated else lambda function: function

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __mro_entries__(self, bases):
        return ()


if not HAS_COMPILER:
    for missing in ("numba", "numba.core", "numba.core.datamodel", "numba.extending", "llvmlite", "scipy"):
        sys.modules[missing] = Absent()

from features.bank import FilterBank  # noqa: E402
from features.torch_bank import compute_torch  # noqa: E402
from voxclf.feature_stack import FeatureStack  # noqa: E402
from voxclf.models.packed_forest import PackedForest  # noqa: E402
from voxclf.models.trees_torch import TorchTreePredictor  # noqa: E402

VOXEL_SIZE = (1.0, 1.0, 1.0)  # sigmas are then in voxels
SIGMAS = (0.7, 1.0, 1.6, 3.5, 5.0, 10.0)
BANKS = {
    "edges 3D": FilterBank("edges", 3),
    "multiscale 2D": FilterBank("multiscale", 2, SIGMAS),
    "multiscale 3D": FilterBank("multiscale", 3, SIGMAS),
}
N_CLASSES = 6
N_EDGES = 255
TITLE = "Filter bank and forest on a GPU"
COLUMNS = (
    "case",
    "features",
    "device s",
    "Mvoxel/s",
    "of it features s",
    "CPU s",
    "CPU Mvoxel/s",
    "times CPU",
    "same class",
)
SAMPLE_SIDE = 24


def make_volume(shape):
    """Random structure of several sizes, 8 bit."""
    rng = np.random.default_rng(0)
    volume = np.zeros(shape, np.float32)
    for step in (1, 4, 12):
        coarse = rng.normal(size=[-(-n // step) for n in shape]).astype(np.float32)
        for axis, n in enumerate(shape):
            coarse = coarse.repeat(step, axis=axis).take(range(n), axis=axis)
        volume += coarse
    return np.clip(128 + 30 * volume, 0, 255).astype(np.uint8)


def make_forest(features, n_trees, depth):
    """Balanced trees over features (F, N): random features, thresholds at random quantiles, random leaves."""
    rng = np.random.default_rng(1)
    quantiles = np.quantile(features, np.linspace(0.05, 0.95, N_EDGES), axis=1).T.astype(np.float32)
    n_inner, n_leaves = 2**depth - 1, 2**depth
    n_nodes = n_inner + n_leaves
    feature = np.full((n_trees, n_nodes), -1, np.int16)
    feature[:, :n_inner] = rng.integers(0, len(features), (n_trees, n_inner))
    threshold = np.zeros((n_trees, n_nodes), np.float32)
    threshold[:, :n_inner] = quantiles[feature[:, :n_inner], rng.integers(0, N_EDGES, (n_trees, n_inner))]
    start = np.arange(n_trees)[:, None]
    child = np.empty((n_trees, n_nodes), np.int32)
    child[:, :n_inner] = start * n_nodes + 2 * np.arange(n_inner) + 1
    child[:, n_inner:] = start * n_leaves + np.arange(n_leaves)
    return PackedForest(
        n_features=len(features),
        n_classes=N_CLASSES,
        classes=np.arange(N_CLASSES, dtype=np.int32),
        feature=feature.ravel(),
        threshold=threshold.ravel(),
        child=child.ravel(),
        tree_start=np.arange(n_trees + 1, dtype=np.int64) * n_nodes,
        tree_output=np.full(n_trees, -1, np.int32),
        leaf_values=rng.dirichlet(np.full(N_CLASSES, 0.3), n_trees * n_leaves).astype(np.float32),
        base=np.zeros(N_CLASSES, np.float32),
        divisor=float(n_trees),
        slope=1.0,
        link="identity",
    )


def timed(function, repetitions, synchronise):
    """Median, lowest and highest seconds after one run that is not counted, and the last result."""
    function()
    seconds = []
    for _ in range(repetitions):
        synchronise()
        started = time.perf_counter()
        result = function()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return (median(seconds), min(seconds), max(seconds)), result


def compiled_path(bank, forest, block, n_threads):
    """The CPU path as the engine runs it: slabs of the block, one thread each."""
    halo = bank.halo(VOXEL_SIZE)
    z, y, x = (n - 2 * h for n, h in zip(block.shape, halo, strict=True))
    out = np.empty((N_CLASSES, z, y, x), np.float32)
    cuts = np.linspace(0, z, min(n_threads, z) + 1).astype(int)

    def slab(i):
        features = bank.compute(block[cuts[i] : cuts[i + 1] + 2 * halo[0]], VOXEL_SIZE)
        probabilities = forest.predict_probabilities(features.reshape(len(features), -1))
        out[:, cuts[i] : cuts[i + 1]] = probabilities.reshape(-1, *features.shape[1:])

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(slab, range(len(cuts) - 1)))
    return out


def run_case(name, arguments, device):
    bank = BANKS[name]
    halo = bank.halo(VOXEL_SIZE)
    core = (arguments.size,) * 3
    block = make_volume([n + 2 * h for n, h in zip(core, halo, strict=True)])
    sample = [slice(0, SAMPLE_SIDE + 2 * h) for h in halo]
    on_device = torch.from_numpy(block).to(device)
    features = compute_torch(bank, on_device[tuple(sample)], VOXEL_SIZE)
    forest = make_forest(features.flatten(1).cpu().numpy(), arguments.trees, arguments.depth)
    step = TorchTreePredictor(FeatureStack(bank, VOXEL_SIZE), forest, device)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    n_voxels = arguments.size**3
    seconds, probabilities = timed(lambda: step(block[None]), arguments.repetitions, synchronise)
    row = {
        "case": name,
        "features": bank.n_features,
        "size": arguments.size,
        "device_s": seconds,
        "device_Mvoxel_per_s": n_voxels / seconds[0] / 1e6,
        "device_peak_GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }
    if step._part_shape(core) == core:  # else the block goes in parts, and features alone would not fit
        only_features, _ = timed(lambda: compute_torch(bank, on_device, VOXEL_SIZE), arguments.repetitions, synchronise)
        row["device_features_s"] = only_features[0]
    if HAS_COMPILER:
        n_threads = arguments.threads or os.cpu_count() or 1
        cpu_seconds, expected = timed(
            lambda: compiled_path(bank, forest, block, n_threads), arguments.repetitions, lambda: None
        )
        difference = np.abs(probabilities - expected).max(axis=0)
        row |= {
            "cpu_threads": n_threads,
            "cpu_s": cpu_seconds,
            "cpu_Mvoxel_per_s": n_voxels / cpu_seconds[0] / 1e6,
            "times_cpu": cpu_seconds[0] / seconds[0],
            "share_of_voxels_over_1e-5": float((difference > 1e-5).mean()),
            "same_class": float((probabilities.argmax(0) == expected.argmax(0)).mean()),
        }
    print(json.dumps(row), flush=True)
    return row


def describe_device(device):
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (as a torch device)",
        "cuda": torch.version.cuda or "none",
    }


def explain(arguments):
    return (
        f"One block of {arguments.size}^3 voxels with its halo, {arguments.trees} trees of depth {arguments.depth}, "
        f"{N_CLASSES} classes. Median of {arguments.repetitions} runs (lowest to highest); same class is the share of "
        "voxels with the CPU path's most probable class."
    )


def lay_out(rows):
    cells = []
    for row in rows:
        values = [
            row["case"],
            row["features"],
            spell(row["device_s"]),
            f"{row['device_Mvoxel_per_s']:.2f}",
            f"{row['device_features_s']:.3f}" if "device_features_s" in row else "in parts",
            spell(row["cpu_s"]) if "cpu_s" in row else "not measured",
            f"{row['cpu_Mvoxel_per_s']:.2f} ({row['cpu_threads']} threads)" if "cpu_s" in row else "",
            f"{row['times_cpu']:.1f}" if "cpu_s" in row else "",
            f"{row['same_class']:.6f}" if "cpu_s" in row else "",
        ]
        cells.append(dict(zip(COLUMNS, values, strict=True)))
    return markdown_table(COLUMNS, cells)


def spell(seconds):
    middle, low, high = seconds
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--size", type=int, default=256, help="edge of the block's core, voxels")
    parser.add_argument("--trees", type=int, default=80)
    parser.add_argument("--depth", type=int, default=14)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of the CPU path; default: all cores")
    parser.add_argument("--cases", nargs="+", default=list(BANKS), choices=list(BANKS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    arguments = parser.parse_args()
    facts = describe_run(("torch", "numpy", "numba"), **describe_device(arguments.device))
    rows = [run_case(name, arguments, arguments.device) for name in arguments.cases]
    publish("gpu_trees", TITLE, explain(arguments), facts, rows, lay_out(rows), arguments.output)


if __name__ == "__main__":
    main()
