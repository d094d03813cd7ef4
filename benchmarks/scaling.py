"""Voxels per second of ``voxclf predict``: one and two workers, and volumes from 128^3 to 512^3.

All cases are regions in the middle of one phantom on disk, so reading and surroundings are alike. Each case is the
command as a user types it, in a process of its own; the same command on a single chunk is run beside it and is the
setup (interpreter, imports, model, its self-test), which the net rate leaves out.

- workers 1 and 2, one size: isolates the scaling over cores; threads against processes what sharing a model costs.
- sizes, two workers: isolates what depends on the size of the job; the net rate should not.

Run: ``python benchmarks/scaling.py`` (about eight minutes on two cores); ``--quick`` tries it out, writing nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from phantoms import centred_region, fit_on_phantom, write_endless
from record import describe_run, markdown_table, page, publish, run_voxclf

SIZES = (128, 256, 512)
QUICK_SIZES = (64, 128)
CHUNK = 64
LIBRARIES = ("numpy", "numba", "scikit-learn", "tensorstore")
COLUMNS = (
    "region",
    "executor",
    "workers",
    "blocks",
    "wall s",
    "setup s",
    "voxels/s net",
    "voxels/s in all",
    "net, times 1 worker",
    "peak MB",
)
TITLE = "Prediction over workers and volumes"
EXPLANATION = (
    "The default random forest on the 3D multi-scale bank, labels and uint8 probabilities with pyramids written. Setup "
    "is the same command on one chunk of 64^3; the net rate leaves it out on both sides. Times one worker: against one "
    "thread on the same region. Peak memory of several processes is the sum of their peaks."
)


def cases(sizes: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """Region, executor, workers: all of them on the second size, which takes seconds; two threads on every size."""
    alone = [(size, "threads", 1) for size in sizes[:2]]
    threads = [(size, "threads", 2) for size in sizes]
    return alone + threads + [(sizes[1], "processes", workers) for workers in (1, 2)]


def predict(folder: Path, size: int, executor: str, workers: int) -> Any:
    """Measure one prediction into a new output, which is removed again."""
    output = folder / "prediction"
    region = centred_region(volume_shape(folder), (size, size, size))
    options = ("--region", region, "--executor", executor, "--workers", workers, "--device", "cpu")
    measured = run_voxclf("predict", folder / "model", folder / "volume.zarr", "-o", output, *options)
    shutil.rmtree(output)
    return measured


def volume_shape(folder: Path) -> tuple[int, int, int]:
    """Shape of the phantom on disk."""
    from voxclf.volume import open_volume

    return open_volume(folder / "volume.zarr").shape


def measure(folder: Path, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Run all cases, each beside its own setup."""
    rows: list[dict[str, Any]] = []
    for size, executor, workers in cases(sizes):
        setup = predict(folder, CHUNK, executor, workers)
        full = predict(folder, size, executor, workers)
        n_voxels = size**3 - CHUNK**3
        rows.append(
            {
                "size": size,
                "executor": executor,
                "workers": workers,
                "n_blocks": full.values["n_blocks"],
                "seconds": full.seconds,
                "setup_s": setup.seconds,
                "net_voxels_per_s": n_voxels / (full.seconds - setup.seconds) if n_voxels else None,
                "voxels_per_s": size**3 / full.seconds,
                "peak_bytes": full.peak_bytes,
            }
        )
        print(rows[-1], flush=True)
    return rows


def lay_out(rows: list[dict[str, Any]]) -> list[str]:
    """Put rates beside the rate of one thread on the same region."""
    alone = {
        row["size"]: row["net_voxels_per_s"] for row in rows if row["workers"] == 1 and row["executor"] == "threads"
    }
    cells = []
    for row in rows:
        net, reference = row["net_voxels_per_s"], alone.get(row["size"])
        values = (
            f"{row['size']}^3",
            row["executor"],
            row["workers"],
            row["n_blocks"],
            f"{row['seconds']:.1f}",
            f"{row['setup_s']:.1f}",
            f"{net:,.0f}" if net else "",
            f"{row['voxels_per_s']:,.0f}",
            f"{net / reference:.2f}" if net and reference else "",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
        cells.append(dict(zip(COLUMNS, values, strict=True)))
    return markdown_table(COLUMNS, cells)


def main() -> None:
    """Prepare the inputs in a temporary folder, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small regions, nothing written")
    arguments = parser.parse_args()
    sizes = QUICK_SIZES if arguments.quick else SIZES
    facts = describe_run(LIBRARIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit_on_phantom(folder, 64 if arguments.quick else 128)
        largest = max(sizes)
        write_endless(folder / "volume.zarr", (largest, largest, largest))
        rows = measure(folder, sizes)
    if arguments.quick:
        print(page(TITLE, EXPLANATION, facts, lay_out(rows)))
    else:
        publish("scaling", TITLE, EXPLANATION, facts, rows, lay_out(rows))


if __name__ == "__main__":
    main()
