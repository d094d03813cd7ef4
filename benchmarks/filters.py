"""Features per second: the compiled bank on two threads against SciPy and scikit-image as users call them.

Every case runs its contestants in turn, repetition by repetition, in one process, so that a busy machine slows
them all; what is reported are ratios of the same repetition.  Ours includes padding the volume, cutting it into
blocks and filling one array with the features of the whole volume.

- edges: isolates memory traffic; every feature is a few additions per voxel.
- multiscale: isolates arithmetic, shared passes and eigenvalues.  SciPy computes the same features with the same
  radius; scikit-image has its own five per sigma, so it is compared per feature.

Each runs once into memory that is there already, as when a forest consumes block after block, and once into a
new array, which the operating system must first provide, as it must for SciPy's and scikit-image's results.

Run: ``python benchmarks/filters.py``; ``--size 128`` leaves the 256^3 volume out, ``--all-sigmas`` filters it
with all six sigmas in place of two (ten minutes more).
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import psutil
from record import describe_run, markdown_table, publish
from scipy import ndimage
from skimage import feature
from skimage import filters as skfilters

from features import filters as definitions
from features.bank import FilterBank

THREADS = 2
VOXEL_SIZE = (1.0, 1.0, 1.0)  # sigmas are then in voxels
SIGMAS = (0.7, 1.0, 1.6, 3.5, 5.0, 10.0)
TWO_SIGMAS = (1.6, 10.0)
POOL = ThreadPoolExecutor(THREADS)  # one for all runs, as in the block engine: threads keep their scratch
LIBRARIES = ("numpy", "scipy", "scikit-image", "numba")
TITLE = "Filter bank against SciPy and scikit-image"
EXPLANATION = (
    "A ratio is time per feature over ours (first row of the case) in the same repetition: median (lowest to highest). "
    "Peak memory is what a run needed beyond the input, sampled."
)


def phantom(size):
    """Smooth random structure with noise, 8 bit: filters take as long on any image."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(size,) * 3).astype(np.float32), 3)
    noisy = 128 + 40 * smooth / smooth.std() + rng.normal(scale=12, size=smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


# --- contestants ---


def ours(bank, volume, out=None):
    """Pad as the block engine does, cut into slabs (so that every channel of a block is contiguous), filter."""
    halo = bank.halo(VOXEL_SIZE)
    padded = np.pad(volume, [(h, h) for h in halo], mode="symmetric")
    out = np.empty((bank.n_features, *volume.shape), np.float32) if out is None else out
    n_slabs = THREADS if bank.kind == "multiscale" else 8 * THREADS
    cuts = np.linspace(0, len(volume), n_slabs + 1).astype(int)

    def slab(i):
        block = padded[cuts[i] : cuts[i + 1] + 2 * halo[0]]
        bank.compute(block, VOXEL_SIZE, out=out[:, cuts[i] : cuts[i + 1]])

    list(POOL.map(slab, range(n_slabs)))
    return out


def per_slice(function, volume, **arguments):
    return np.stack([function(image, **arguments) for image in volume])


def scipy_edges(volume, dimensions):
    volume = volume.astype(np.float32)
    features = [volume]
    for filter_one in (ndimage.sobel, ndimage.prewitt):
        if dimensions == 3:
            responses = [filter_one(volume, axis) for axis in (2, 1, 0)]
        else:
            responses = [per_slice(filter_one, volume, axis=axis) for axis in (1, 0)]
        features += [*responses, np.sqrt(sum(r * r for r in responses))]
    return [*features, ndimage.laplace(volume) if dimensions == 3 else per_slice(ndimage.laplace, volume)]


def skimage_edges(volume, dimensions):
    volume = volume.astype(np.float32)
    features = [volume]
    for filter_one in (skfilters.sobel, skfilters.prewitt):
        if dimensions == 3:
            features += [filter_one(volume, axis=axis) for axis in (2, 1, 0)]
            features.append(filter_one(volume))
        else:
            features += [per_slice(filter_one, volume, axis=axis) for axis in (1, 0)]
            features.append(per_slice(filter_one, volume))
    laplace = skfilters.laplace
    return [*features, laplace(volume) if dimensions == 3 else per_slice(laplace, volume)]


def eigenvalues(entries):
    matrices = np.empty((*entries[0].shape, 3, 3), np.float32)
    for (a, b), values in zip(((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)), entries, strict=True):
        matrices[..., a, b] = matrices[..., b, a] = values
    return list(np.moveaxis(np.linalg.eigvalsh(matrices)[..., ::-1], -1, 0))


def scipy_multiscale(volume, sigmas):
    volume = volume.astype(np.float32)
    features = []
    for sigma in sigmas:

        def blur(image, width=sigma, order=0):
            radius = definitions.gaussian_radius(width)
            return ndimage.gaussian_filter(image, width, order=order, radius=radius, mode="reflect")

        def derivative(*axes, width=sigma):
            return width ** len(axes) * blur(volume, order=[axes.count(axis) for axis in range(3)])

        smooth = blur(volume)
        gradient = [derivative(axis) for axis in range(3)]
        pairs = [(a, b) for a in range(3) for b in range(a, 3)]
        hessian = [derivative(a, b) for a, b in pairs]
        tensor = [blur(gradient[a] * gradient[b], definitions.STRUCTURE_TENSOR_OUTER * sigma) for a, b in pairs]
        features += [smooth, hessian[0] + hessian[3] + hessian[5], np.sqrt(sum(g * g for g in gradient))]
        features += [smooth - blur(volume, definitions.DIFFERENCE_OF_GAUSSIANS_INNER * sigma)]
        features += eigenvalues(tensor) + eigenvalues(hessian)
    return features


def skimage_multiscale(volume, sigmas):
    """Runs on all cores by default, unlike SciPy."""
    features = feature.multiscale_basic_features(
        volume, sigma_min=min(sigmas), sigma_max=max(sigmas), num_sigma=len(sigmas)
    )
    return np.moveaxis(features, -1, 0)


# --- measuring ---


def timed(function: Callable):
    """Seconds, processor seconds of all threads, most memory beyond what was there in MB (sampled), features."""
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        start, processor_start = time.perf_counter(), time.process_time()
        result = function()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor_start
        peak[0] = max(peak[0], process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return seconds, processor, max(0, peak[0] - before) / 2**20, len(result)


def compete(name, contestants, repetitions):
    """Time all contestants in turn; the first is ours."""
    print(f"{name} ...", flush=True)
    runs = [{label: timed(run) for label, run in contestants.items()} for _ in range(repetitions)]
    first = next(iter(contestants))
    rows = []
    for label in contestants:
        seconds = [run[label][0] for run in runs]
        n_features = runs[0][label][3]
        ratios = [(r[label][0] / r[label][3]) / (r[first][0] / r[first][3]) for r in runs]
        rows.append(
            {
                "case": name,
                "method": label,
                "features": n_features,
                "seconds": round(median(seconds), 4),
                "processor_seconds": round(median(run[label][1] for run in runs), 4),
                "peak_MB": round(max(run[label][2] for run in runs)),
                "times_ours_per_feature": round(median(ratios), 1),
                "lowest": round(min(ratios), 1),
                "highest": round(max(ratios), 1),
                "repetitions": repetitions,
            }
        )
        print("   ", rows[-1], flush=True)
    return rows


def edge_case(size, dimensions, repetitions):
    volume, bank = phantom(size), FilterBank("edges", dimensions)
    buffer = ours(bank, volume)
    contestants = {
        "voxclf, memory reused": lambda: ours(bank, volume, buffer),
        "voxclf, new memory": lambda: ours(bank, volume),
        "scipy.ndimage": lambda: scipy_edges(volume, dimensions),
        "skimage.filters": lambda: skimage_edges(volume, dimensions),
    }
    return compete(f"edges {dimensions}D, {size}^3", contestants, repetitions)


def multiscale_case(size, sigmas, repetitions):
    volume, bank = phantom(size), FilterBank("multiscale", 3, sigmas)
    buffer = ours(bank, volume)
    contestants = {
        "voxclf, memory reused": lambda: ours(bank, volume, buffer),
        "voxclf, new memory": lambda: ours(bank, volume),
        "scipy.ndimage + numpy eigvalsh": lambda: scipy_multiscale(volume, sigmas),
        "skimage multiscale_basic_features": lambda: skimage_multiscale(volume, sigmas),
    }
    name = f"multiscale 3D, {size}^3, sigmas {', '.join(f'{s:g}' for s in sigmas)}"
    return compete(name, contestants, repetitions)


def compile_kernels():
    """Keep compilation out of the figures."""
    small = phantom(12)
    for bank in (FilterBank("edges", 2), FilterBank("edges", 3), FilterBank("multiscale", 3, (1.0,))):
        ours(bank, np.pad(small, 30))


# --- results ---


def lay_out(rows):
    lines = [
        {**row, "ratio to ours": f"{row['times_ours_per_feature']} ({row['lowest']} to {row['highest']})"}
        for row in rows
    ]
    columns = ("case", "method", "features", "seconds", "processor_seconds", "peak_MB", "ratio to ours")
    return markdown_table(columns, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, choices=(128, 256), help="largest volume")
    parser.add_argument("--all-sigmas", action="store_true", help="six sigmas at 256^3 as well")
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, threads=THREADS)
    compile_kernels()
    rows = edge_case(arguments.size, 2, 3) + edge_case(arguments.size, 3, 3)
    rows += multiscale_case(128, SIGMAS, 2)
    if arguments.size == 256:
        rows += multiscale_case(256, SIGMAS if arguments.all_sigmas else TWO_SIGMAS, 1)
    publish("filters", TITLE, EXPLANATION, facts, rows, lay_out(rows))


if __name__ == "__main__":
    main()
