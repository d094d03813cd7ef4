"""Does pretraining without labels help where labels are few? Two networks, four beginnings, several draws of labels.

Every network is pretrained once per task on a volume without labels (flyem's second cube) for ``--pretrain-time``, then
fitted for ``--time`` on few labels: ``SQUARES`` squares of ``SIDE`` voxels on each of flyem's three labelled slices,
drawn anew for every seed. All beginnings get the same labels and the same seed, so differences are within a draw.

- none: random weights.
- CR0, CR1: centre-region regression, one voxel or 3 x 3 x 3 masked.
- VAE: variational autoencoder of whole patches.

Scored patch by patch on voxels drawn from the validation labels, the same for all. convnext is a quarter as wide as
published and has patches of 16, so that it sees enough of them in minutes of one core.

Run: ``python benchmarks/pretraining.py --data DATA`` (rows are kept in ``--kept`` as they finish, and a row that is
there is not run again); ``--networks 4conv`` for one of them; ``--publish`` writes the table of what is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from real_data import Dataset, default_data_folder, locate_flyem
from real_networks import SCHEDULE, load_rows, score_patches
from record import RESULTS, describe_run, markdown_table, publish, run_voxclf
from scipy import stats

LIBRARIES = ("numpy", "torch", "lightning", "monai", "scikit-learn")
NAME, TITLE = "pretraining", "Pretraining without labels, then few labels"
EXPLANATION = (
    "Means over draws of the labels; brackets: 95 % t-interval of the mean, so of draws and trainings, not of other "
    "volumes. Difference: to none, draw by draw."
)
COLUMNS = ("network", "pretrained", "draws", "macro F1", "difference to none", "AP", "pretraining", "fit")
NETWORKS: dict[str, tuple[str, ...]] = {
    "4conv": ("--model", "4conv"),
    "convnext": ("--model", "convnext", "--patch", "16", "--width", "0.25"),
}
TASKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "CR0": ("--task", "center", "--padding", "0"),
    "CR1": ("--task", "center", "--padding", "1"),
    "VAE": ("--task", "vae"),
}
SQUARES, SIDE = 4, 24


def draw_labels(dataset: Dataset, seed: int, path: Path) -> int:
    """Write few labels of the three slices; returns how many."""
    labels = tifffile.imread(dataset.labels)
    rng = np.random.default_rng(seed)
    kept = np.zeros_like(labels)
    for axis in range(3):
        in_plane = [a for a in range(3) if a != axis]
        n_labelled = (labels > 0).sum(axis=tuple(in_plane))
        n_voxels = np.prod([labels.shape[a] for a in in_plane])
        # The other two slices leave a line in every plane; of this axis' own slice most is labelled.
        index = int(np.argmax(n_labelled / n_voxels))
        extent = np.argwhere(np.take(labels, index, axis=axis) > 0).max(axis=0) + 1
        for _ in range(SQUARES):
            start = [int(rng.integers(0, n - SIDE + 1)) for n in extent]
            box = [slice(s, s + SIDE) for s in start]
            box.insert(axis, slice(index, index + 1))
            kept[tuple(box)] = labels[tuple(box)]
    tifffile.imwrite(path, kept, compression="zlib")
    return int((kept > 0).sum())


def pretrain(network: str, task: str, data: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Pretrain once; a folder that is there is used again."""
    output = folder / f"{network}_{task}"
    if not output.exists():
        run_voxclf(
            *("pretrain", data / "flyem" / "raw_unlabelled.tif", "-o", output, *NETWORKS[network], *TASKS[task]),
            *("--voxel-size", "10,10,10", "--time", options.pretrain_time, "--precision", "bf16", "--device", "cpu"),
            *("--workers", options.threads, "--patience", "1000"),
        )
    return output


def run_draw(network: str, task: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row: labels, fit, score."""
    dataset = locate_flyem(options.data, folder)
    init = ("--init", pretrain(network, task, options.data, folder, options)) if task != "none" else ()
    with tempfile.TemporaryDirectory() as scratch:
        labels, model = Path(scratch) / "labels.tif", Path(scratch) / "model"
        n_labels = draw_labels(dataset, seed, labels)
        fit = run_voxclf(
            *("fit", dataset.volume, labels, "-o", model, "--voxel-size", "10,10,10", "--seed", seed, *init),
            *("--classes", ",".join(dataset.classes), *NETWORKS[network], *SCHEDULE, "--time", options.time),
            *("--precision", "bf16", "--workers", options.threads, "--device", "cpu"),
        )
        row = score_patches(model, dataset, options.patches, seed=0)
    return {
        **row,
        "network": network,
        "task": task,
        "seed": seed,
        "labels": n_labels,
        "fit_s": fit.seconds,
        "pretrain_time": options.pretrain_time,
        "time": options.time,
        "threads": options.threads,
    }


def describe_mean(values: np.ndarray, sign: str = "") -> str:
    """Mean and the half width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values.mean():{sign}.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():{sign}.3f} ± {half:.3f}"


def lay_out(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The table: one line per network and beginning."""
    lines = []
    for network in NETWORKS:
        f1 = {(row["task"], row["seed"]): row["macro_f1"] for row in rows if row["network"] == network}
        for task in TASKS:
            mine = [row for row in rows if (row["network"], row["task"]) == (network, task)]
            if not mine:
                continue
            pairs = [(row["macro_f1"], f1["none", row["seed"]]) for row in mine if ("none", row["seed"]) in f1]
            values = (
                network,
                task,
                str(len(mine)),
                describe_mean(np.array([row["macro_f1"] for row in mine])),
                describe_mean(np.array([a - b for a, b in pairs]), "+") if task != "none" and pairs else "",
                describe_mean(np.array([row["macro_average_precision"] for row in mine])),
                mine[0]["pretrain_time"] if task != "none" else "",
                mine[0]["time"],
            )
            lines.append(dict(zip(COLUMNS, values, strict=True)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data_folder())
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretrain-time", default="3m")
    parser.add_argument("--time", default="45s", help="training time of a fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patches", type=int, default=3_000, help="validation voxels that score a network")
    parser.add_argument("--kept", type=Path, default=RESULTS / "pretraining.jsonl", help="finished rows")
    parser.add_argument("--pretrained", type=Path, help="folder to keep pretrained networks in; default: temporary")
    parser.add_argument("--remark", default="none", help="what to say about the run when it is published")
    parser.add_argument("--publish", action="store_true", help="write the table of the kept rows and stop")
    options = parser.parse_args()
    if options.publish:
        rows = load_rows(options.kept)
        threads = ", ".join(sorted({str(row["threads"]) for row in rows}))
        n_labels = f"{min(row['labels'] for row in rows):,} to {max(row['labels'] for row in rows):,}"
        facts = describe_run(LIBRARIES, threads=threads, labels=n_labels, remark=options.remark)
        publish(NAME, TITLE, EXPLANATION, facts, rows, markdown_table(COLUMNS, lay_out(rows)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.pretrained or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(options.seeds):
            for network in options.networks:
                for task in TASKS:
                    done = {(row["network"], row["task"], row["seed"]) for row in load_rows(options.kept)}
                    if (network, task, seed) in done:
                        continue
                    row = run_draw(network, task, seed, folder, options)
                    with options.kept.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(network, task, seed, f"{row['macro_f1']:.3f}", flush=True)


if __name__ == "__main__":
    main()
