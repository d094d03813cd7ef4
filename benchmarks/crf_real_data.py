"""What the dense CRF gains on real EM: a random forest before, after a tuned CRF, and after one picked by hand.

The forest is trained on the sparse labels of ``real_data.py``. The CRF is tuned by ``voxclf crf-tune`` on labels that
the forest was not trained on, and every row is scored on the held-out slab, which neither of them has seen:

- vnc: trained on slices 2, 6, 10, tuned on 0, 4, 8, scored on 12 to 15.
- flyem: trained on three orthogonal slices, tuned on what lies at least 10 voxels from them in slices 0 to 119, scored
  on 130 to 159.
- cdeep3m_mito: trained on slices 0 to 11, tuned on 13, scored on 15 to 19.

By hand: reach of 8 voxels, intensity width 0.1, smoothing of 2 voxels, weights 4 and 2 for any two classes, ten
iterations, which is what ``voxclf crf-refine`` takes for weights where none are given.

Run: ``python benchmarks/crf_real_data.py --data DATA`` (half an hour on two cores); ``--only vnc``; ``--keep FOLDER``
keeps models and predictions there and goes on from those that are there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from real_data import DATASETS, FOLDS, Dataset, default_data_folder
from record import describe_run, markdown_table, publish, run_voxclf
from usual_way import THREADS

from voxclf.config import EvaluateConfig, make_config
from voxclf.evaluate import Evaluation, evaluate
from voxclf.metrics.paired import bootstrap_gain
from voxclf.metrics.scored import ScoredLabels
from voxclf.models.crf_parameters import CrfParameters

LIBRARIES = ("numpy", "scipy", "scikit-learn", "numba")
TITLE = "The dense CRF on real volumes"
EXPLANATION = (
    "A random forest of the multiscale bank, trained on sparse labels; its CRF tuned on other labels; both scored on "
    "a held-out slab. Brackets: 95 % intervals by a spatial bootstrap; of gains, paired: the same cells are drawn for "
    "both. Tuning time ended by --time, the search alone; judging and reading come on top."
)
COLUMNS = ("volume", "probabilities", "macro F1", "mean IoU", "gain in macro F1", "gain in mean IoU", "IoU per class")
MARGIN = 10  # voxels between the forest's slices in flyem and what its CRF is tuned on
PREDICTED = {"vnc": "0:16,:,:", "flyem": "0:160,:,:", "cdeep3m_mito": "0:20,:,:"}


def write_tuning_labels(dataset: Dataset, data: Path, path: Path) -> None:
    """Labels that the forest was not trained on and that are not scored on."""
    if dataset.name == "cdeep3m_mito":
        truth = tifffile.imread(data / dataset.name / "train_labels.tif")
        kept = np.zeros(truth.shape, bool)
        kept[13] = True
    elif dataset.name == "vnc":
        truth = tifffile.imread(data / dataset.name / "labels_train.tif")
        kept = np.zeros(truth.shape, bool)
        kept[[0, 4, 8]] = True
    else:
        truth = tifffile.imread(data / dataset.name / "labels_train.tif")
        kept = np.ones(truth.shape, bool)
        for axis, position in enumerate((60, 125, 125)):
            kept.swapaxes(0, axis)[position - MARGIN : position + MARGIN + 1] = False
    tifffile.imwrite(path, np.where(kept, truth, 0), compression="zlib")


def prepare(dataset: Dataset, data: Path, folder: Path) -> tuple[Path, Path]:
    """Fit and predict, unless that was done before; returns the folders of the model and of the prediction."""
    size = ",".join(f"{s:g}" for s in dataset.voxel_size)
    model, prediction = folder / "model", folder / "prediction"
    if not (model / "model.json").exists():
        names = ",".join(dataset.classes)
        run_voxclf(
            *("fit", dataset.volume, dataset.labels, "-o", model, "--voxel-size", size, "--classes", names),
            *("--folds", FOLDS, "--workers", THREADS),
        )
    # The configuration is written when a prediction is complete.
    if not (prediction / "config.toml").exists():
        run_voxclf(
            *("predict", model, dataset.volume, "-o", prediction, "--voxel-size", size, "--crf", "off"),
            *("--region", PREDICTED[dataset.name], "--workers", THREADS, "--device", "cpu"),
        )
    return model, prediction


def score(prediction: Path, dataset: Dataset) -> Evaluation:
    """Tables of a prediction on the held-out slab."""
    values = {"prediction": str(prediction), "labels": str(dataset.validation), "region": dataset.region}
    return evaluate(make_config(EvaluateConfig, values))


def compete(dataset: Dataset, data: Path, folder: Path, seconds: int) -> Iterator[dict[str, Any]]:
    """Before, tuned, by hand."""
    model, prediction = prepare(dataset, data, folder)
    before = score(prediction, dataset)
    yield describe(dataset, "random forest", before)

    labels = folder / "tuning_labels.tif"
    write_tuning_labels(dataset, data, labels)
    tuned = run_voxclf(
        *("crf-tune", prediction, dataset.volume, labels, "--model", model, "--overwrite"),
        *("--time", f"{seconds}s", "--workers", THREADS),
    )
    refine = ("crf-refine", prediction, dataset.volume, "--region", dataset.region, "--workers", THREADS)
    parameters = CrfParameters.load(model)
    told = {"reason": tuned.values["reason"], "tune_s": tuned.seconds, "parameters": parameters.to_dict()}
    if parameters.enabled:
        run_voxclf(*refine, "-o", folder / "tuned", "--parameters", model, "--overwrite")
        yield {**describe(dataset, "+ tuned CRF", score(folder / "tuned", dataset), before), **told}
    else:
        yield {**describe(dataset, "+ tuned CRF: no CRF", before, before), **told}

    finest = min(dataset.voxel_size)
    by_hand = ("--bilateral-sigma-nm", 8 * finest, "--intensity-sigma", 0.1, "--spatial-sigma-nm", 2 * finest)
    run_voxclf(*refine, "-o", folder / "by_hand", *by_hand, "--overwrite")
    yield describe(dataset, "+ CRF by hand", score(folder / "by_hand", dataset), before)


def describe(dataset: Dataset, name: str, found: Evaluation, before: Evaluation | None = None) -> dict[str, Any]:
    """Scores with intervals, and the paired gain over the probabilities before."""
    scored = ScoredLabels.from_cells(found.tables, found.label_set.n_classes, "")
    row = {
        "volume": dataset.name,
        "probabilities": name,
        "scores": scored.scores.to_dict(),
        "intervals": {key: scored.intervals[key].to_dict() for key in ("macro_f1", "mean_iou")},
    }
    if before is not None:
        gain = bootstrap_gain(before.tables.cells, found.tables.cells, np.random.default_rng(0))
        row["gain"] = {key: interval.to_dict() for key, interval in gain.items()}
    return row


def lay_out(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the page, and what tuning said."""
    table = markdown_table(COLUMNS, (lay_out_row(row) for row in rows))
    said = [f"- {row['volume']}, on its tuning labels: {row['reason']}" for row in rows if "reason" in row]
    return [*table, "", *said]


def lay_out_row(row: dict[str, Any]) -> dict[str, str]:
    """One line of the table."""
    cells = {"volume": row["volume"], "probabilities": row["probabilities"]}
    for title, key in {"macro F1": "macro_f1", "mean IoU": "mean_iou"}.items():
        value = row["intervals"][key]
        cells[title] = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        if "gain" in row:
            gain = row["gain"][key]
            cells[f"gain in {title}"] = f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    cells["IoU per class"] = " ".join(f"{value:.3f}" for value in row["scores"]["iou"])
    return cells


def main() -> None:
    """Every volume that is there, publish after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data_folder(), help="folder with the real volumes")
    parser.add_argument("--only", default=",".join(DATASETS), help="volumes, separated by commas")
    parser.add_argument("--time", type=int, default=300, help="seconds to search for parameters")
    parser.add_argument("--keep", type=Path, help="folder for models and predictions; default: a temporary one")
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, threads=THREADS)
    rows, remarks = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.only.split(","):
            if not (arguments.data / name).is_dir():
                remarks.append(f"{name} is left out: its data are not there.")
                continue
            folder = (arguments.keep or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            dataset = DATASETS[name](arguments.data, folder)
            for row in compete(dataset, arguments.data, folder, arguments.time):
                rows.append(row)
                print(lay_out_row(row), flush=True)
            publish("crf_real_data", TITLE, " ".join([EXPLANATION, *remarks]), facts, rows, lay_out(rows))


if __name__ == "__main__":
    main()
