"""Networks against forests on real EM at equal training time: fit, predict and evaluate through the command line.

Every network trains for the same wall time on the same labels, on the same number of threads, and is scored on the
same held-out labels as the forests of ``real_data.py``. A network gives up part of its labels to choose its best round.

- the networks of the report, one row each: isolates the architecture.
- ``+ bank``: the filter bank's features as further input channels; isolates what hand-made features add.
- random forest, and with autocontext: what there is to beat.

- ``by patches``: trained on batches of patches, where all others are trained on slabs; ``as published``, with the
  published step size and weights of the classes too.
- ``drawn by sqrt``: slabs as the patches, by the root of the classes' frequency; ``drawn equally``: patches as the
  slabs. Isolates which windows are drawn.
- ``many small slabs``, ``few large slabs``: what fit chooses between, by the labels; run only if named.
- ``dense windows``: slabs of 32² voxels by eights, all of which count; run only if named.

Exact networks predict the scored slab, in float32 and, with ``--precision bf16``, in that too, to say how far it is.
Padded ones cannot, and are scored patch by patch on ``--patches`` voxels drawn from the same labels, which gives macro
F1 to about 0.01.

vnc, flyem: three labelled slices, as in ``real_data.py``. vnc_12: all twelve training slices. flyem_all: all 120.
cdeep3m_mito: twelve slices. isbi2012: three.

Run: ``python benchmarks/real_networks.py --data DATA --time 5m`` (rows are kept in ``--kept`` as they finish, and a row
that is there is not run again, so it can be cut short, and several can fill one file at once); ``--only vnc,flyem``,
``--cases 4conv,dil``, ``--threads 1``. ``--publish`` writes the table of what is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from real_data import DATASETS, Dataset, default_data_folder, locate_flyem_all, locate_vnc, prepare_isbi2012
from record import RESULTS, describe_run, markdown_table, publish, run_voxclf

from voxclf.models.registry import NETWORKS
from voxclf.volume import open_volume

LIBRARIES = ("numpy", "torch", "lightning", "monai", "scikit-learn", "numba")
NAME, TITLE = "real_networks", "Networks and forests on real volumes"
COLUMNS = (
    "volume",
    "method",
    "macro F1",
    "mean IoU",
    "AP",
    "kappa",
    "held-out slab F1",
    "trained",
    "fit s",
    "voxels seen",
    "predict s",
    "largest difference",
    "bf16: mean difference",
    "bf16: other labels",
)
EXPLANATION = (
    "Scored on the held-out slab. Brackets: 95 % interval by a spatial bootstrap. Held-out slab F1: what the "
    "fit itself reports, on labels it held out. Fit: the whole command. Voxels seen: labelled, with repeats. "
    "Largest difference: between dense and patch-by-patch probabilities in float32, from the seam certificate. bf16: "
    "probabilities and labels of the scored slab, evaluated in bf16, against those of the same network in float32."
)
PUBLISHED = ("--schedule", "constant", "--learning-rate", "0.001", "--class-weights", "labelled")
SCHEDULE = ("--schedule", "one_cycle", "--learning-rate", "0.003", "--class-weights", "sqrt")


@dataclass(frozen=True)
class Case:
    """What ``voxclf fit`` and ``predict`` are asked for, and the name of the row."""

    model: str
    name: str
    options: tuple[str, ...]
    predict_options: tuple[str, ...] = ()

    @property
    def is_network(self) -> bool:
        """Networks have a training time; trees take what they take."""
        return self.model in NETWORKS

    @property
    def is_exact(self) -> bool:
        """Whether every voxel can be predicted; others are scored patch by patch."""
        return not self.is_network or NETWORKS[self.model].is_exact


SLABS = {"many small slabs": ("--window", "17", "--batch", "12"), "few large slabs": ("--window", "33", "--batch", "4")}
DENSE_WINDOWS = ("--spacing", "1", "--window", "32", "--batch", "8")


def _network(model: str, *options: str, label: str = "", predict_options: tuple[str, ...] = ()) -> Case:
    return Case(model, label or model, (*SCHEDULE, *options), predict_options)


USUAL_CASES = (
    Case("random_forest", "random_forest", ("--folds", "3")),
    Case("random_forest", "random_forest, autocontext 2", ("--folds", "3", "--autocontext", "2")),
    _network("3layer"),
    _network("4conv"),
    _network("4res_valid"),
    _network("dil"),
    _network("dilres"),
    _network("dilres", "--patch", "16", label="dilres, patch 16"),
    _network("dilres", "--patch", "16", label="dilres, patch 16, --tta", predict_options=("--tta",)),
    _network("dilres", "--patch", "5,64,64", label="dilres, patch 5,64,64"),
    _network("4conv", "--balance", "sqrt", label="4conv, drawn by sqrt"),
    _network("4conv", "--sampling", "patches", label="4conv, by patches"),
    _network("4conv", "--sampling", "patches", "--balance", "equal", label="4conv, by patches drawn equally"),
    Case("4conv", "4conv, by patches as published", (*PUBLISHED, "--sampling", "patches")),
    _network("4conv", "--patch", "5,64,64", label="4conv, patch 5,64,64"),
    _network(
        *("4conv", "--patch", "5,64,64", "--window", "96"),
        label="4conv, patch 5,64,64, window 96, --tta",
        predict_options=("--tta",),
    ),
    _network(
        *("4conv", "--patch", "5,64,64", "--window", "96", "--input-bank", "multiscale"),
        label="4conv + bank, patch 5,64,64, window 96",
    ),
    _network("4res"),
    _network("4res_ln"),
    _network("convnext"),
    _network("convnext_dilated"),
    _network("3layer", "--input-bank", "multiscale", label="3layer + bank"),
    _network("4conv", "--input-bank", "multiscale", label="4conv + bank"),
    _network("4res_valid", "--input-bank", "multiscale", label="4res_valid + bank"),
    _network("dilres", "--input-bank", "multiscale", label="dilres + bank"),
)
CASES = (
    *USUAL_CASES,
    *(_network("4conv", *options, label=f"4conv, {name}") for name, options in SLABS.items()),
    *(
        replace(case, name=f"{case.name}, dense windows", options=(*DENSE_WINDOWS, *case.options))
        for case in USUAL_CASES
        if case.is_network and case.is_exact and "patches" not in case.options
    ),
)


def locate(name: str, data: Path, scratch: Path) -> Dataset:
    """A volume with its labels, by the name of the row."""
    if name == "vnc_12":
        return replace(locate_vnc(data, scratch), name=name, labels=data / "vnc" / "labels_train.tif")
    if name == "flyem_all":
        return locate_flyem_all(data, scratch)
    if name == "isbi2012":
        return prepare_isbi2012(data, scratch, slice(0, 3), slice(16, 24))
    return DATASETS[name](data, scratch)


def run_case(dataset: Dataset, case: Case, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Fit, predict the scored slab and evaluate; one row."""
    model, output, output_bf16 = scratch / "model", scratch / "prediction", scratch / "prediction_bf16"
    size = ",".join(f"{s:g}" for s in dataset.voxel_size)
    budget = ("--time", options.time, "--precision", options.precision) if case.is_network else ()
    threads = ("--workers", options.threads)
    fit = run_voxclf(
        *("fit", dataset.volume, dataset.labels, "-o", model, "--voxel-size", size, "--seed", options.seed),
        *("--classes", ",".join(dataset.classes), "--model", case.model, *case.options, *budget, *threads),
        *(("--device", "cpu") if case.is_network else ()),
    )
    row = {"held_out_slab": fit.values["honest"]["macro_f1"], "fit_s": fit.seconds, "fit_peak_bytes": fit.peak_bytes}
    if case.is_network:
        row["n_seen"] = json.loads((model / "model.json").read_text())["training"]["n_training_voxels"]
    if not case.is_exact:
        row |= score_patches(model, dataset, options.patches, options.seed)
    else:
        where = ("--voxel-size", size, "--region", dataset.region)
        how = (*where, "--no-pyramid", "--memory", "2GB", "--device", "cpu", *threads)
        predict = run_voxclf("predict", model, dataset.volume, "-o", output, *how, *case.predict_options)
        scores = run_voxclf("evaluate", output, dataset.validation, "--region", dataset.region, *threads)
        row |= {**scores.values["held_out"], "classes": scores.values["classes"]}
        row |= {"predict_s": predict.values["seconds"], "predict_peak_bytes": predict.peak_bytes}
        row["largest_difference"] = (predict.values.get("certificate") or {}).get("largest_difference")
        if case.is_network and options.precision == "bf16" and not case.predict_options:
            run_voxclf("predict", model, dataset.volume, "-o", output_bf16, *how, "--precision", "bf16")
            row |= compare_precisions(output, output_bf16)
    for folder in (model, output, output_bf16):
        shutil.rmtree(folder, ignore_errors=True)
    return row


def compare_precisions(exact: Path, rough: Path) -> dict[str, float]:
    """How far probabilities, and how many labels, of one prediction are from those of another."""

    def read(folder: Path, name: str) -> np.ndarray:
        volume = open_volume(str(folder / name))
        return volume.read((0, 0, 0), volume.shape)

    probabilities, others = (read(folder, "probabilities.zarr").astype(np.float32) for folder in (exact, rough))
    labels, other_labels = (read(folder, "labels.zarr") for folder in (exact, rough))
    predicted = labels[0] > 0
    # Probabilities are stored as 0 to 255.
    return {
        "bf16_mean_difference": float(np.abs(probabilities - others)[:, predicted].mean() / 255),
        "bf16_other_labels": float((labels != other_labels)[0, predicted].mean()),
    }


def score_patches(folder: Path, dataset: Dataset, n: int, seed: int) -> dict[str, Any]:
    """Scores of a network that is evaluated patch by patch, on voxels drawn evenly from the validation labels."""
    import torch

    from voxclf.engine.transfer import read_block
    from voxclf.geometry import UNIT, Region, add, make_block
    from voxclf.metrics.cells import CellGrid, CellTables
    from voxclf.metrics.scored import ScoredLabels
    from voxclf.metrics.voxelwise import score_block
    from voxclf.models.checkpoint import load_model
    from voxclf.models.network_model import NetworkModel
    from voxclf.summary import score_values
    from voxclf.volume import open_labels

    torch.set_num_threads(1)
    model = load_model(folder)
    assert isinstance(model, NetworkModel)
    volume = open_volume(str(dataset.volume), dataset.voxel_size)
    labels = open_labels(str(dataset.validation), volume.shape).read((0, 0, 0), volume.shape)[0]
    classes = model.label_set.remap_to_indices(labels)
    labelled = np.argwhere(classes >= 0)
    chosen = np.random.default_rng(seed).choice(labelled, min(n, len(labelled)), replace=False)
    patches = model.patches
    grid = CellGrid.over(Region((0, 0, 0), volume.shape))
    tables = CellTables()
    for start in range(0, len(chosen), 256):
        voxels = [(int(z), int(y), int(x)) for z, y, x in chosen[start : start + 256]]
        windows = np.stack([read_block(volume, make_block(0, Region(v, add(v, UNIT)), patches.halo)) for v in voxels])
        found = patches.classify_windows(windows).T
        z, y, x = np.array(voxels).T
        truth, cells = classes[z, y, x], grid.number(np.array(voxels))
        for cell in np.unique(cells):
            here = cells == cell
            table = score_block(truth[here], np.ascontiguousarray(found[:, here]), None, model.label_set.n_classes)
            tables += CellTables({int(cell): table})
    scored = ScoredLabels.from_cells(tables, model.label_set.n_classes, "patches", seed)
    return {**score_values(scored), "n_patches": len(chosen)}


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that are finished."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def list_jobs(options: argparse.Namespace, setup: str) -> Iterator[tuple[str, Case]]:
    """What is asked for and not yet kept."""
    done = {(row["volume"], row["case"], row["seed"]) for row in load_rows(options.kept) if row["setup"] == setup}
    wanted = options.cases.split(";") if options.cases else [case.name for case in USUAL_CASES]
    for volume in options.only.split(","):
        for case in CASES:
            if case.name in wanted and (volume, case.name, options.seed) not in done:
                yield volume, case


def describe_row(row: dict[str, Any]) -> dict[str, str]:
    """One line of the table."""
    low, high = row.get("macro_f1_interval") or (None, None)
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
    difference = row.get("largest_difference")
    values = (
        row["volume"],
        row["case"] + (f", seed {row['seed']}" if row["seed"] else ""),
        f"{row['macro_f1']:.3f}{interval}",
        f"{row['mean_iou']:.3f}",
        f"{row['macro_average_precision']:.3f}",
        f"{row['kappa']:.3f}",
        f"{row['held_out_slab']:.3f}",
        _describe_training(row["setup"]) if "n_seen" in row else "",
        f"{row['fit_s']:.0f}",
        f"{row['n_seen']:,}" if "n_seen" in row else "",
        f"{row['predict_s']:.0f}" if "predict_s" in row else f"{row['n_patches']:,} patches only",
        "" if difference is None else f"{difference:.0e}",
        f"{row['bf16_mean_difference']:.4f}" if "bf16_mean_difference" in row else "",
        f"{100 * row['bf16_other_labels']:.2f} %" if "bf16_other_labels" in row else "",
    )
    return dict(zip(COLUMNS, values, strict=True))


def _describe_training(setup: str) -> str:
    """The time, and the precision where it is not the usual one: "30m", "3m, float32"."""
    return setup.split(" of ")[0] + (", float32" if setup.endswith(", 32") else "")


def write_table(options: argparse.Namespace) -> None:
    """Publish all kept rows."""
    rows = load_rows(options.kept)
    order = {case.name: i for i, case in enumerate(CASES)}
    rows.sort(key=lambda row: (row["volume"], order[row["case"]], row["seed"]))
    trained = "; ".join(sorted({row["setup"] for row in rows if "n_seen" in row}))
    facts = describe_run(LIBRARIES, trained=trained, remark=options.remark)
    publish(NAME, TITLE, EXPLANATION, facts, rows, markdown_table(COLUMNS, map(describe_row, rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data_folder())
    parser.add_argument("--only", default="vnc,flyem", help="vnc, vnc_12, flyem, flyem_all, cdeep3m_mito, isbi2012")
    parser.add_argument("--cases", help="names of rows, separated by semicolons; default: all")
    parser.add_argument("--time", default="5m", help="training time of a network")
    parser.add_argument("--precision", default="bf16", choices=["32", "bf16"], help="of training; see above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patches", type=int, default=5_000, help="voxels that score a padded network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, default=RESULTS / "real_networks.jsonl", help="finished rows")
    parser.add_argument("--remark", default="none", help="what to say about the run when it is published")
    parser.add_argument("--publish", action="store_true", help="write the table of the kept rows and stop")
    options = parser.parse_args()
    if options.publish:
        write_table(options)
        return
    setup = f"{options.time} of training on {options.threads} threads, {options.precision}"
    for volume, case in list_jobs(options, setup):
        with tempfile.TemporaryDirectory() as scratch:
            row = run_case(locate(volume, options.data, Path(scratch)), case, options, Path(scratch))
        row |= {"volume": volume, "case": case.name, "seed": options.seed, "setup": setup}
        with options.kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" | ".join(describe_row(row).values()), flush=True)


if __name__ == "__main__":
    main()
