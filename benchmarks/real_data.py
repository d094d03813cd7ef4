"""Scores on real EM from a few labelled slices: ``voxclf run`` with several banks and models, and the usual way.

Every row trains on the same labels and is scored on the same held-out ones by ``voxclf evaluate``. Only the slab that
is scored is predicted.

- random forest on intensity, edges, multiscale: isolates the filter bank.
- xgboost on multiscale: isolates the model.
- autocontext: isolates the second round, whose features include the first round's probabilities.
- scikit-learn: a forest of 100 trees of full depth on scikit-image's features, as one would write it
  (``usual_way.py``), with 150,000 training voxels as they are labelled, or as many of every class.

vnc: ssTEM, three labelled slices. flyem: FIB-SEM, three orthogonal slices. cdeep3m_mito: block-face SEM whose voxel
size is not stated; 30 x 6 x 6 nm is assumed; trained on slices 0 to 11, scored on 15 to 19.

Run: ``python benchmarks/real_data.py --data DATA`` (about an hour on two cores for one seed, half of it for vnc);
``--only vnc,flyem``, ``--seeds 3``; ``--quick`` tries it out on crops, writing nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tifffile
from record import BENCHMARKS, describe_run, markdown_table, page, publish, run_voxclf
from usual_way import THREADS, compute_features, draw_voxels, fit_forest, quantise

from voxclf.formats.ome_metadata import Kind
from voxclf.labels import LabelSet
from voxclf.volume import create_volume

LIBRARIES = ("numpy", "scipy", "scikit-image", "scikit-learn", "xgboost-cpu", "xgboost", "numba")
TITLE = "Scores on real volumes"
EXPLANATION = (
    "Trained on the sparse labels, scored on the held-out slab. Brackets: 95 % interval of the first seed by a spatial "
    "bootstrap; after ±: half the range over seeds. Honest: macro F1 of the fit's own cross-validation over slabs of "
    "the training labels; naive: the same with voxels held out at random. Fit: survey, features of the labelled "
    "boxes and training, without cross-validation (for scikit-learn: training alone). Predict: features and "
    "classification of the scored slab (scikit-learn: features of the whole volume where they are 3D)."
)
COLUMNS = (
    "volume",
    "method",
    "macro F1",
    "mean IoU",
    "AP",
    "kappa",
    "honest F1",
    "naive F1",
    "fit s",
    "CV s",
    "predict s",
)
SCORES = {"macro F1": "macro_f1", "mean IoU": "mean_iou", "AP": "macro_average_precision", "kappa": "kappa"}
FOLDS = 3  # of the honest score, instead of 5: a third of the time
QUICK_TRAINING, QUICK_TREES = 5_000, 10


@dataclass(frozen=True)
class Dataset:
    """A volume, labels to train on, labels to score on, and where the latter lie.

    Parameters
    ----------
    scored_slices : (first, behind the last)
        Slices that hold validation labels.
    peer_sigmas : tuple of float
        Scales of scikit-image's features, voxels; 20 features in all.
    dimensions : int
        Of scikit-image's filters: 2 per slice, 3 for the volume.
    """

    name: str
    volume: Path
    labels: Path
    validation: Path
    voxel_size: tuple[float, float, float]
    classes: tuple[str, ...]
    scored_slices: tuple[int, int]
    dimensions: int
    peer_sigmas: tuple[float, ...]

    @property
    def region(self) -> str:
        """The scored slab, as ``--region`` wants it."""
        return f"{self.scored_slices[0]}:{self.scored_slices[1]},:,:"


@dataclass(frozen=True)
class Case:
    """What ``voxclf run`` is asked for."""

    model: str
    bank: str
    rounds: int = 1

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.model}, {self.bank}" + (f", autocontext {self.rounds}" if self.rounds > 1 else "")

    @property
    def options(self) -> list[str]:
        """As the command line wants it."""
        rounds = ["--autocontext", str(self.rounds)] if self.rounds > 1 else []
        return ["--model", self.model, "--bank", self.bank, *rounds]


# --- data ---


def default_data_folder() -> Path:
    """Where the real volumes are: VOXCLF_DATA, or beside the repository."""
    return Path(os.environ.get("VOXCLF_DATA", BENCHMARKS.parents[1] / "shared" / "data"))


def locate_vnc(data: Path, folder: Path) -> Dataset:
    """ssTEM of Drosophila nerve cord."""
    source = data / "vnc"
    return Dataset(
        "vnc",
        source / "raw.tif",
        source / "labels_sparse.tif",
        source / "labels_val.tif",
        (50.0, 4.6, 4.6),
        ("membrane", "glia", "mitochondrion", "synapse", "intracellular"),
        (12, 16),
        2,
        (1.0, 2.0, 4.0, 8.0, 16.0),
    )


def locate_flyem(data: Path, folder: Path) -> Dataset:
    """FIB-SEM of Drosophila medulla."""
    source = data / "flyem"
    return Dataset(
        "flyem",
        source / "raw.tif",
        source / "labels_sparse.tif",
        source / "labels_val.tif",
        (10.0, 10.0, 10.0),
        ("interior", "boundary"),
        (130, 160),
        3,
        (1.0, 2.5, 6.3, 16.0),
    )


def locate_flyem_all(data: Path, folder: Path) -> Dataset:
    """The same with all slices that may be trained on."""
    return replace(locate_flyem(data, folder), name="flyem_all", labels=data / "flyem" / "labels_train.tif")


def split_labels(labels: Path, training: slice, validation: slice, start: Path) -> tuple[Path, Path]:
    """Write two parts of the labelled slices, to train on and to score on, as files whose names begin with `start`."""
    everything = tifffile.imread(labels)
    paths = []
    for name, slices in (("train", training), ("validation", validation)):
        part = np.zeros_like(everything)
        part[slices] = everything[slices]
        paths.append(start.with_name(f"{start.name}_{name}.tif"))
        tifffile.imwrite(paths[-1], part, compression="zlib")
    return paths[0], paths[1]


def prepare_cdeep3m(data: Path, folder: Path) -> Dataset:
    """Block-face SEM of brain; its labels are split into a part to train on and a slab to score on."""
    source = data / "cdeep3m_mito"
    training, validation = split_labels(source / "train_labels.tif", slice(0, 12), slice(15, 20), folder / "cdeep3m")
    return Dataset(
        "cdeep3m_mito",
        source / "train_raw.tif",
        training,
        validation,
        (30.0, 6.0, 6.0),
        ("background", "mitochondrion"),
        (15, 20),
        2,
        (1.0, 2.0, 4.0, 8.0, 16.0),
    )


def prepare_isbi2012(
    data: Path, folder: Path, training: slice = slice(0, 16), validation: slice = slice(19, 24)
) -> Dataset:
    """Serial sections of Drosophila; the last of the labelled slices are scored on."""
    source = data / "isbi2012"
    files = split_labels(source / "labels_train.tif", training, validation, folder / "isbi2012")
    return Dataset(
        "isbi2012",
        source / "raw.tif",
        *files,
        (50.0, 4.0, 4.0),
        ("interior", "membrane"),
        (validation.start, validation.stop),
        2,
        (1.0, 2.0, 4.0, 8.0, 16.0),
    )


DATASETS: dict[str, Callable[[Path, Path], Dataset]] = {
    "vnc": locate_vnc,
    "flyem": locate_flyem,
    "cdeep3m_mito": prepare_cdeep3m,
}


def crop(dataset: Dataset, folder: Path) -> Dataset:
    """A piece for a trial: a third of the scored slab's surroundings, wide enough to hold every class."""
    wide = slice(60, 190) if dataset.name == "flyem" else slice(0, 448)
    paths = []
    for path in (dataset.volume, dataset.labels, dataset.validation):
        paths.append(folder / f"quick_{dataset.name}_{path.name}")
        tifffile.imwrite(paths[-1], tifffile.imread(path)[:, wide, wide])
    return replace(dataset, volume=paths[0], labels=paths[1], validation=paths[2])


# --- contestants ---


def list_cases() -> list[Case]:
    """All that ``voxclf run`` is compared in."""
    cases = [Case("random_forest", bank) for bank in ("intensity", "edges", "multiscale")]
    cases.append(Case("xgboost", "multiscale"))
    return [*cases, Case("random_forest", "multiscale", 2)]


def run_ours(dataset: Dataset, case: Case, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """One ``voxclf run``, from files to scores."""
    output = folder / "run"
    size = ",".join(f"{s:g}" for s in dataset.voxel_size)
    trial = ["--samples", QUICK_TRAINING, "--trees", QUICK_TREES, "--folds", 2] if quick else ["--folds", FOLDS]
    measured = run_voxclf(
        *("run", dataset.volume, dataset.labels, "-o", output, "--validation", dataset.validation),
        *("--voxel-size", size, "--classes", ",".join(dataset.classes), "--region", dataset.region),
        *(*case.options, "--seed", seed, "--workers", THREADS, "--device", "cpu", *trial),
    )
    shutil.rmtree(output)
    values = measured.values
    seconds = values["seconds"]
    after_fit = ("cross-validation", "predict", "score")
    return {
        **values["held_out"],
        "honest": values["honest"]["macro_f1"],
        "naive": values["naive"]["macro_f1"],
        "fit_s": sum(s for name, s in seconds.items() if name not in after_fit),
        "cross_validation_s": seconds["cross-validation"],
        "predict_s": seconds["predict"],
        "peak_bytes": measured.peak_bytes,
        "classes": values["classes"],
    }


class Peer:
    """The usual way on one volume; features are computed once for all draws and seeds."""

    def __init__(self, dataset: Dataset, quick: bool) -> None:
        self.dataset, self.quick = dataset, quick
        self.truth = tifffile.imread(dataset.labels)
        volume = tifffile.imread(dataset.volume)
        first, stop = dataset.scored_slices
        started = time.perf_counter()
        if dataset.dimensions == 3:
            features = compute_features(volume, dataset.peer_sigmas, 3)
            self.scored = features[first:stop]
            labelled, self.labels = features, self.truth
        else:
            self.scored = compute_features(volume[first:stop], dataset.peer_sigmas, 2)
        self.features_s = time.perf_counter() - started
        if dataset.dimensions == 2:
            slices = np.flatnonzero(self.truth.reshape(len(self.truth), -1).any(axis=1))
            labelled, self.labels = compute_features(volume[slices], dataset.peer_sigmas, 2), self.truth[slices]
        self.rows = labelled.reshape(-1, labelled.shape[-1])

    def run(self, draw: str, seed: int, folder: Path) -> dict[str, Any]:
        """Train, predict the scored slab, and have voxclf score it."""
        started = time.perf_counter()
        n, n_trees = (QUICK_TRAINING, QUICK_TREES) if self.quick else (150_000, 100)
        chosen = draw_voxels(self.labels, n, draw, seed)
        forest = fit_forest(self.rows[chosen], self.labels.ravel()[chosen], seed, n_trees)
        fitted = time.perf_counter()
        probabilities = quantise(
            forest.predict_proba(self.scored.reshape(-1, self.scored.shape[-1])), self.scored.shape[:3]
        )
        predicted = time.perf_counter()
        self._write(folder / "peer", probabilities)
        measured = run_voxclf("evaluate", folder / "peer", self.dataset.validation, "--region", self.dataset.region)
        shutil.rmtree(folder / "peer")
        return {
            **measured.values["held_out"],
            "fit_s": fitted - started,
            "predict_s": self.features_s + predicted - fitted,
            "classes": measured.values["classes"],
        }

    def _write(self, folder: Path, probabilities: np.ndarray) -> None:
        """Lay a prediction out as ``voxclf predict`` does, so that it is scored by the same command."""
        label_set = LabelSet.from_ids(range(1, len(self.dataset.classes) + 1))
        labels = label_set.remap_to_ids(probabilities.argmax(axis=0))[None]
        size, shape = self.dataset.voxel_size, self.truth.shape
        start = (self.dataset.scored_slices[0], 0, 0)
        classes = label_set.to_dict()
        outputs: dict[Kind, np.ndarray] = {"labels": labels, "probabilities": probabilities}
        for kind, array in outputs.items():
            volume = create_volume(
                folder / f"{kind}.zarr", shape, len(array), array.dtype, size, kind=kind, attributes=classes
            )
            volume.write(start, array)


def compete(dataset: Dataset, n_seeds: int, folder: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """All rows of one volume."""
    for case in list_cases():
        runs = [run_ours(dataset, case, seed, folder, quick) for seed in range(n_seeds)]
        yield {"volume": dataset.name, "method": case.name, "runs": runs}
    peer = Peer(dataset, quick)
    for draw, words in {"labelled": "as labelled", "equal": "equal classes"}.items():
        runs = [peer.run(draw, seed, folder) for seed in range(n_seeds)]
        yield {"volume": dataset.name, "method": f"scikit-learn forest, scikit-image features, {words}", "runs": runs}


# --- results ---


def lay_out(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds."""
    return markdown_table(COLUMNS, (lay_out_row(row) for row in rows))


def lay_out_row(row: dict[str, Any]) -> dict[str, str]:
    """Scores with their spread, the interval of the first seed, and times."""
    runs = row["runs"]
    cells = {"volume": row["volume"], "method": row["method"]}
    for column, key in SCORES.items():
        cells[column] = spell_mean([run[key] for run in runs])
    interval = runs[0].get("macro_f1_interval")
    if interval and None not in interval:
        cells["macro F1"] += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    for column, key in {"honest F1": "honest", "naive F1": "naive"}.items():
        cells[column] = spell_mean([run[key] for run in runs if key in run])
    for column, key in {"fit s": "fit_s", "CV s": "cross_validation_s", "predict s": "predict_s"}.items():
        cells[column] = f"{mean(run[key] for run in runs):.1f}" if key in runs[0] else ""
    return cells


def spell_mean(values: Sequence[float | None]) -> str:
    """Mean, and half the range where there are several; empty where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {(max(known) - min(known)) / 2:.3f}" if len(known) > 1 else ""
    return f"{mean(known):.3f}{spread}"


def main() -> None:
    """Run every case on every volume that is there, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data_folder(), help="folder with the real volumes")
    parser.add_argument("--only", default=",".join(DATASETS), help="volumes, separated by commas")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of voxclf and of scikit-learn")
    parser.add_argument("--quick", action="store_true", help="crops, few trees, nothing written")
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, threads=THREADS, seeds=arguments.seeds)
    rows, remarks = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dataset_name in arguments.only.split(","):
            if not (arguments.data / dataset_name).is_dir():
                remarks.append(f"{dataset_name} is left out: its data are not there.")
                continue
            dataset = DATASETS[dataset_name](arguments.data, folder)
            dataset = crop(dataset, folder) if arguments.quick else dataset
            for row in compete(dataset, arguments.seeds, folder, arguments.quick):
                rows.append(row)
                print(lay_out_row(row), flush=True)
            # After every volume, so that what took long is kept if a later one fails.
            if not arguments.quick:
                publish("real_data", TITLE, " ".join([EXPLANATION, *remarks]), facts, rows, lay_out(rows))
    if arguments.quick:
        print(page(TITLE, " ".join([EXPLANATION, *remarks]), facts, lay_out(rows)))


if __name__ == "__main__":
    main()
