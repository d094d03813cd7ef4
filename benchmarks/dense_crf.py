"""The dense CRF against pydensecrf: time, memory and error, interleaved in one run; and blocks where one cannot go.

    python benchmarks/dense_crf.py                                  64³ and 128³, about five minutes on two cores
    python benchmarks/dense_crf.py --sizes 256 --repeats 1          the large case, 8 GB for pydensecrf
    python benchmarks/dense_crf.py --sizes 128 512 --device cuda    adds the GPU; pydensecrf is left out from 400³ up
    python benchmarks/dense_crf.py --sizes --blocks 512             `voxclf crf-refine` within --memory, disk to disk

Times are of whole calls, set-up included, after one call on a small volume that compiles or loads the loops. The
contenders take turns, so that a busy machine slows both, and the best of the repeats counts. CPU time tells what a
core does where wall time depends on who else computes. Peak memory is resident memory above the inputs, from a run
of its own; of blocks, all resident memory of the command. Rows of sizes that an earlier run measured are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from record import RESULTS, describe_run, markdown_table, publish, run_voxclf
from scipy import ndimage

from crf import DenseCRF
from voxclf.config.base import parse_memory
from voxclf.geometry import split_into_blocks
from voxclf.volume import create_volume

LIBRARIES = ("numpy", "numba", "torch", "pydensecrf2")
NAME, TITLE = "dense_crf", "The dense CRF against pydensecrf"
EXPLANATION = (
    "Six classes, ten iterations, set-up included, best of the repeats; ratios are of the last contender's time to "
    "each. small, medium, large: reach of 3, 8, 20 voxels, intensity width 0.05, 0.1, 0.3, smoothing of 1, 2, 3. "
    "Bytes per voxel: peak above the inputs. Rows measured by another run say so."
)
UNIT = (1.0, 1.0, 1.0)
# Reach of the bilateral kernel in voxels, its intensity width, reach of the spatial kernel in voxels.
SETTINGS = {"small": (3.0, 0.05, 1.0), "medium": (8.0, 0.1, 2.0), "large": (20.0, 0.3, 3.0)}
N_CLASSES = 6
VOLUMES = ("image.npy", "probabilities.npy")
# pydensecrf takes 280-400 bytes per voxel: 24 GB are full at about 400³.
LARGEST_FOR_PYDENSECRF = 400


def make_tissue(size: int, n_classes: int = N_CLASSES, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Cells with membranes and noise: uint8 image and float32 probabilities; beyond 64³ mirrored copies."""
    rng = np.random.default_rng(seed)
    tile = min(size, 64)
    shape = (tile,) * 3
    seeds = np.zeros(shape, dtype=int)
    n_cells = max(8, tile**3 // 12**3)
    seeds[tuple(rng.integers(0, tile, n_cells) for _ in shape)] = np.arange(1, n_cells + 1)
    nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    cell = seeds[tuple(nearest)]
    is_membrane = ndimage.grey_dilation(cell, size=2) != cell
    label = np.where(is_membrane, 0, 1 + cell % max(1, n_classes - 1))
    image = ndimage.gaussian_filter(np.linspace(0.2, 0.85, n_classes)[label], 0.7) + rng.normal(0, 0.06, shape)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (n_classes, *shape)), (0, 1, 1, 1))
    score = 2.0 * np.eye(n_classes)[label].transpose(3, 0, 1, 2) + 4 * noise + rng.normal(0, 0.7, noise.shape)
    score = np.exp(score)
    grey = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    probabilities = (score / score.sum(axis=0)).astype(np.float32)
    more = [(0, size - tile)] * 3
    return np.pad(grey, more, mode="symmetric"), np.pad(probabilities, [(0, 0), *more], mode="symmetric")


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_bytes(call: Callable[[], object]) -> int:
    """Resident memory a call needs at its peak, above what was there before."""
    process = psutil.Process()
    before = process.memory_info().rss
    peak, is_done = [before], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    is_done.set()
    watcher.join()
    return peak[0] - before


def peak_in_a_fresh_process(size: int, setting: str, method: str) -> int:
    """`peak_bytes` of one contender, where no earlier call has left memory behind to be used again."""
    with tempfile.TemporaryDirectory() as folder:
        for name, volume in zip(VOLUMES, make_tissue(size), strict=True):
            np.save(Path(folder, name), volume)
        command = [sys.executable, __file__, "--peak-of", folder, setting, method]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(answer.split()[-1])


def print_peak(folder: str, setting: str, method: str) -> None:
    """What the process started by `peak_in_a_fresh_process` does."""
    crf = DenseCRF(*SETTINGS[setting], 4.0, 2.0, include_self=True, n_iterations=2)
    backend, _, device = method.partition(" ")
    volumes = [np.load(Path(folder, name)) for name in VOLUMES]
    crf.refine(volumes[0][:8], volumes[1][:, :8], UNIT, backend=backend, device=device or "cpu")
    print(peak_bytes(lambda: crf.refine(*volumes, UNIT, backend=backend, device=device or "cpu")))


def contenders(crf: DenseCRF, volumes: tuple, size: int, device: str, n_threads: int) -> dict[str, Callable]:
    """The calls to compare, by name."""
    calls: dict[str, Callable] = {"compiled": lambda: crf.refine(*volumes, UNIT, n_threads=n_threads)}
    if device:
        calls[f"torch {device}"] = lambda: crf.refine(*volumes, UNIT, backend="torch", device=device)
    if size < LARGEST_FOR_PYDENSECRF:
        calls["pydensecrf"] = lambda: crf.refine(*volumes, UNIT, backend="pydensecrf")
    return calls


def compare(size: int, setting: str, options: argparse.Namespace) -> list[dict]:
    """One row per contender: best times of the repeats and peak memory."""
    volumes = make_tissue(size)
    # pydensecrf always counts a voxel in its own message; ours is told to, so that both solve the same problem.
    crf = DenseCRF(*SETTINGS[setting], 4.0, 2.0, include_self=True)
    small = tuple(v[..., :16, :16, :16] for v in volumes)
    for call in contenders(crf, small, 16, options.device, options.threads).values():
        call()
    calls = contenders(crf, volumes, size, options.device, options.threads)
    times: dict[str, list] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(timed(call))
    rows = []
    for name in calls:
        wall, cpu = np.min(times[name], axis=0)
        memory = 0 if options.skip_memory else peak_in_a_fresh_process(size, setting, name) / size**3
        rows.append({"size": size, "setting": setting, "method": name, "wall_s": round(float(wall), 3),
                     "cpu_s": round(float(cpu), 3), "bytes_per_voxel": round(memory)})  # fmt: skip
    for row in rows:
        for unit in ("wall", "cpu"):
            row[f"{unit}_ratio"] = round(rows[-1][f"{unit}_s"] / row[f"{unit}_s"], 2) if len(rows) > 1 else None
    return rows


def errors(size: int, n_classes: int, setting: str) -> dict:
    """How far ten iterations are from the exact mean field, ours and pydensecrf's, with full penalty matrices."""
    image, probabilities = make_tissue(size, n_classes)
    rng = np.random.default_rng(1)
    wide, near = (
        (m + m.T) * (1 - np.eye(n_classes)) for m in rng.random((2, n_classes, n_classes)) * [[[3.0]], [[1.5]]]
    )
    row: dict = {"size": size, "classes": n_classes, "setting": setting}
    for method, with_self in (("compiled", False), ("pydensecrf", True)):
        crf = DenseCRF(*SETTINGS[setting], wide, near, include_self=with_self)
        exact = crf.refine(image, probabilities, UNIT, backend="grey_levels")
        refined = crf.refine(image, probabilities, UNIT, backend=method)  # type: ignore[arg-type]
        difference = np.abs(refined - exact)
        row[method] = {
            "mean": float(f"{difference.mean():.2g}"),
            "max": float(f"{difference.max():.2g}"),
            "labels_percent": float(f"{100 * np.mean(refined.argmax(0) != exact.argmax(0)):.2g}"),
        }
    return row


def refine_in_blocks(size: int, setting: str, memory: str, n_threads: int) -> dict:
    """`voxclf crf-refine` of a cube on disk: time, and all resident memory, against the budget."""
    wide, intensity, near = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tissue(folder, size)
        measured = run_voxclf(
            *("crf-refine", folder / "probabilities.zarr", folder / "image.zarr", "-o", folder / "refined"),
            *("--bilateral-sigma-nm", wide, "--intensity-sigma", intensity, "--spatial-sigma-nm", near),
            *("--memory", memory, "--workers", n_threads, "--device", "cpu", "--no-pyramid"),
        )
    values = measured.values
    return {"size": size, "setting": setting, "method": "crf-refine in blocks", "wall_s": round(measured.seconds, 1),
            "memory_budget": parse_memory(memory), "peak_bytes": measured.peak_bytes, "n_blocks": values["n_blocks"],
            "halo": values["halo"]}  # fmt: skip


def write_tissue(folder: Path, size: int) -> None:
    """Image and probabilities of a cube as OME-Zarr, from mirrored copies of a small one, block by block."""
    image, probabilities = make_tissue(64)
    arrays = {"image": image[None], "probabilities": np.rint(255 * probabilities).astype(np.uint8)}
    shape = (size,) * 3
    for kind, array in arrays.items():
        volume = create_volume(folder / f"{kind}.zarr", shape, len(array), np.uint8, UNIT, kind=kind)  # type: ignore[arg-type]
        for block in split_into_blocks(shape, (64, 64, 64)):
            flips = [slice(None, None, -1 if start // 64 % 2 else 1) for start in block.core.start]
            z, y, x = (slice(0, n) for n in block.core.shape)
            volume.write(block.core.start, np.ascontiguousarray(array[:, *flips][:, z, y, x]))


# --- results ---


def lay_out(times: list[dict], wrong: list[dict]) -> list[str]:
    """Times and memory, then errors if there are any."""
    table = markdown_table(
        ("voxels", "setting", "method", "wall s", "× wall", "CPU s", "× CPU", "bytes / voxel", "remark"),
        (lay_out_time(row) for row in times),
    )
    if not wrong:
        return table
    rows = (
        {
            "voxels": f"{row['size']}³",
            "classes": row["classes"],
            "setting": row["setting"],
            "method": method,
            **{name: f"{row[method][name]:.1e}" for name in ("mean", "max")},
            "labels %": f"{row[method]['labels_percent']:g}",
        }
        for row in wrong
        for method in ("compiled", "pydensecrf")
    )
    said = "Difference from the exact mean field after ten iterations, full penalty matrices:"
    columns = ("voxels", "classes", "setting", "method", "mean", "max", "labels %")
    return [*table, "", said, "", *markdown_table(columns, rows)]


def lay_out_time(row: dict) -> dict:
    """One line of the first table."""
    remarks = [f"measured {row['measured']}"] if "measured" in row else []
    if "peak_bytes" in row:
        remarks.append(
            f"{row['n_blocks']} blocks, halo {row['halo'][0]}; peak {row['peak_bytes'] / 1e9:.2f} GB of a budget of "
            f"{row['memory_budget'] / 1e9:g} GB"
        )
    return {
        "voxels": f"{row['size']}³",
        "setting": row["setting"],
        "method": row["method"],
        "wall s": f"{row['wall_s']:.2f}",
        "× wall": row.get("wall_ratio") or "",
        "CPU s": f"{row['cpu_s']:.2f}" if "cpu_s" in row else "",
        "× CPU": row.get("cpu_ratio") or "",
        "bytes / voxel": row.get("bytes_per_voxel") or round(row.get("peak_bytes", 0) / row["size"] ** 3) or "",
        "remark": "; ".join(remarks),
    }


def keep_earlier(rows: list[dict], key: str, identity: tuple[str, ...]) -> list[dict]:
    """These rows, after those that an earlier run measured of other cases, which say when."""
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        return rows
    earlier = json.loads(path.read_text())
    measured = f"{earlier['machine']['date'][:10]} at {earlier['machine']['commit']}"
    known = {tuple(row[name] for name in identity) for row in rows}
    kept = [row for row in earlier["rows"].get(key, []) if tuple(row[name] for name in identity) not in known]
    return [*({"measured": measured, **row} for row in kept), *rows]


def announce(facts: dict, times: list[dict], wrong: list[dict]) -> None:
    """Publish what was measured, with what an earlier run did."""
    times = sorted(keep_earlier(times, "times", ("size", "setting", "method")), key=lambda row: -row["size"])
    wrong = keep_earlier(wrong, "errors", ("size", "setting", "classes"))
    publish(NAME, TITLE, EXPLANATION, facts, {"times": times, "errors": wrong}, lay_out(times, wrong))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128], help="edges of the cubes to time")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="", help="also time the torch backend on this device")
    parser.add_argument("--exact", type=int, default=0, help="edge of the cube to compare with the exact mean field")
    parser.add_argument("--classes", type=int, nargs="*", default=[N_CLASSES], help="classes for --exact")
    parser.add_argument("--skip-memory", action="store_true", help="leave out the run that measures memory")
    parser.add_argument("--blocks", type=int, default=0, help="edge of the cube to refine in blocks, from disk to disk")
    parser.add_argument("--memory", default="4GB", help="budget for --blocks")
    parser.add_argument("--peak-of", nargs=3, metavar=("FOLDER", "SETTING", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(*options.peak_of)
        return
    facts = describe_run(LIBRARIES, threads=options.threads)
    times, wrong = [], []
    for size in options.sizes:
        for setting in options.settings:
            rows = compare(size, setting, options)
            times += rows
            print(*rows, sep="\n", flush=True)
    for n_classes in options.classes if options.exact else []:
        for setting in options.settings:
            wrong.append(errors(options.exact, n_classes, setting))
            print(wrong[-1], flush=True)
    if options.blocks:
        for setting in options.settings:
            times.append(refine_in_blocks(options.blocks, setting, options.memory, options.threads))
            print(times[-1], flush=True)
    announce(facts, times, wrong)


if __name__ == "__main__":
    main()
