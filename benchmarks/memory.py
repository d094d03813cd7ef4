"""Peak memory of ``voxclf predict``: does it depend on the size of the volume, and does it keep to its budget?

A phantom of 1024 x 2048 x 2048 voxels is written to disk block by block. Every case predicts a region of it, or the
256^3 phantom, in a process of its own. What is reported is the process's own peak, from the operating system.

- 256^3 against the large volume, one budget: isolates the volume's size. The region of the large one is cut so that
  at least 100 blocks are computed; that many show a leak or a queue that grows.
- two budgets: isolates what the budget governs. It is kept if the process grows by no more than ``--memory`` above
  an idle one that has imported everything and opened the volume. What the model adds is told apart. (At 2 GB and
  above, 256^3 has too few blocks to make use of the budget, so the volumes can then only be compared to it.)

Run: ``python benchmarks/memory.py`` (about ten minutes on two cores, 7 GB of disk); ``--quick`` tries it out, writing
nothing.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

from phantoms import centred_region, fit_on_phantom, write_endless
from record import Measured, describe_run, markdown_table, page, publish, run_measured, run_voxclf

from voxclf.config import parse_memory
from voxclf.engine.run import choose_core_shape
from voxclf.geometry import Region, Zyx
from voxclf.models.checkpoint import load_model
from voxclf.volume import DEFAULT_CHUNK

SMALL: Zyx = (256, 256, 256)
LARGE: Zyx = (1024, 2048, 2048)
QUICK_SMALL: Zyx = (96, 96, 96)
QUICK_LARGE: Zyx = (160, 192, 192)
LEAST_BLOCKS, QUICK_BLOCKS = 100, 4
WORKERS = 2
TOLERANCE = 0.10
LIBRARIES = ("numpy", "numba", "tensorstore")
COLUMNS = (
    "volume",
    "budget",
    "region",
    "blocks",
    "wall s",
    "peak MB",
    "above idle MB",
    "of the budget",
    "large / small",
)
TITLE = "Peak memory of prediction"
# What `voxclf predict` has loaded before it does anything: all of these are imported on the way to the first block.
IDLE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from record import high_water
import voxclf.commands, voxclf.predict
from voxclf.models.checkpoint import load_model
from voxclf.volume import open_volume
volume = open_volume(sys.argv[2])
volume.read((0, 0, 0), (1, 1, 1))
idle = high_water()
load_model(Path(sys.argv[1]))
print(json.dumps({"idle_bytes": idle, "with_model_bytes": high_water()}))
"""


def measure_idle(model: Path, volume: Path) -> dict[str, int]:
    """Peak memory of a process that has imported everything, and of one that has loaded the model as well."""
    measured = run_measured([sys.executable, "-c", IDLE, str(model), str(volume), str(Path(__file__).parent)])
    values: dict[str, int] = measured.values
    return values


def choose_region(model: Path, small: Zyx, shape: Zyx, budget: int, least_blocks: int) -> Region:
    """Grow a box in the middle of a volume, chunk by chunk, until it surely holds that many blocks."""
    step = load_model(model).step()
    inner = list(small)
    for axis in cycle((2, 1, 0)):
        region = centred_region(shape, (inner[0], inner[1], inner[2]))
        # The job takes its input's cache off the budget first: its blocks are these or smaller ones.
        core = choose_core_shape(step, DEFAULT_CHUNK, region.shape, budget, WORKERS)
        whole_blocks = math.prod(n // m for n, m in zip(region.shape, core, strict=True))
        if whole_blocks >= least_blocks or region.shape == shape:
            return region
        inner[axis] = min(shape[axis], inner[axis] + 2 * DEFAULT_CHUNK[axis])
    raise AssertionError("a cycle does not end")


def predict(folder: Path, volume: str, budget: int, region: Region) -> Measured:
    """Measure one prediction into a new output, which is removed again."""
    output = folder / "prediction"
    options = ("--region", region, "--memory", budget, "--workers", WORKERS, "--device", "cpu")
    measured = run_voxclf("predict", folder / "model", folder / volume, "-o", output, *options)
    shutil.rmtree(output)
    return measured


def measure(folder: Path, budgets: list[str], small: Zyx, large: Zyx, least_blocks: int) -> dict[str, Any]:
    """Run every budget on both volumes."""
    idle = measure_idle(folder / "model", folder / "large.zarr")
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        n_bytes = parse_memory(budget)
        regions = {
            "small.zarr": Region((0, 0, 0), small),
            "large.zarr": choose_region(folder / "model", small, large, n_bytes, least_blocks),
        }
        for volume, region in regions.items():
            measured = predict(folder, volume, n_bytes, region)
            rows.append(
                {
                    "volume": volume,
                    "budget": budget,
                    "budget_bytes": n_bytes,
                    "region": str(region),
                    "n_blocks": measured.values["n_blocks"],
                    "seconds": measured.seconds,
                    "peak_bytes": measured.peak_bytes,
                    "above_idle_bytes": measured.peak_bytes - idle["idle_bytes"],
                }
            )
            print(rows[-1], flush=True)
    return {"idle": idle, "shapes": {"small.zarr": small, "large.zarr": large}, "cases": rows}


def lay_out(results: dict[str, Any]) -> list[str]:
    """One row a prediction; the last column compares the volumes at one budget."""
    small = {row["budget"]: row["peak_bytes"] for row in results["cases"] if row["volume"] == "small.zarr"}
    cells = []
    for row in results["cases"]:
        ratio = row["peak_bytes"] / small[row["budget"]]
        verdict = "within" if abs(ratio - 1) <= TOLERANCE else "NOT within"
        used = row["above_idle_bytes"] / row["budget_bytes"]
        values = (
            " x ".join(map(str, results["shapes"][row["volume"]])),
            row["budget"],
            row["region"],
            row["n_blocks"],
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['above_idle_bytes'] / 1e6:.0f}",
            f"{used:.0%}{'' if used <= 1 else ' NOT kept'}",
            "" if row["volume"] == "small.zarr" else f"{ratio:.2f}, {verdict} {TOLERANCE:.0%}",
        )
        cells.append(dict(zip(COLUMNS, values, strict=True)))
    return markdown_table(COLUMNS, cells)


def explain(results: dict[str, Any]) -> str:
    """State what was run and what idle means."""
    idle = results["idle"]
    loaded = f"{idle['idle_bytes'] / 1e6:.0f} MB ({idle['with_model_bytes'] / 1e6:.0f} MB at most once the model was"
    return (
        f"The default random forest on the 3D multi-scale bank, {WORKERS} threads, labels and uint8 probabilities with "
        f"pyramids. Idle is a process with everything imported and the volume open, {loaded} loaded and had tested "
        "itself). A budget is kept if the peak is no more than the budget above idle."
    )


def main() -> None:
    """Prepare the inputs in a temporary folder, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["400MB", "1GB"], help="values of --memory")
    parser.add_argument("--quick", action="store_true", help="one budget, a small volume, nothing written")
    arguments = parser.parse_args()
    small, large = (QUICK_SMALL, QUICK_LARGE) if arguments.quick else (SMALL, LARGE)
    budgets = arguments.budgets[:1] if arguments.quick else arguments.budgets
    facts = describe_run(LIBRARIES, threads=WORKERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit_on_phantom(folder, 64 if arguments.quick else 128)
        write_endless(folder / "small.zarr", small)
        write_endless(folder / "large.zarr", large)
        print("volumes written", flush=True)
        results = measure(folder, budgets, small, large, QUICK_BLOCKS if arguments.quick else LEAST_BLOCKS)
    if arguments.quick:
        print(page(TITLE, explain(results), facts, lay_out(results)))
    else:
        publish("memory", TITLE, explain(results), facts, [results], lay_out(results))


if __name__ == "__main__":
    main()
