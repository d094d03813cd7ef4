"""From a volume and labels to a fitted model with an honest score.

    survey_labels → fit_tree_rounds (`fit_rounds.py`) or fit_network (`fit_networks.py`) → save_model

The honest score comes from parts of the volume held out, as far from anything trained on as the model sees. The naive
one, from the neighbourhood of what it was trained on, is reported beside it to show how far it misleads.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxclf.config import BankOptions, FitConfig, FitOptions, NetworkFitOptions
from voxclf.config.options import ComputeOptions
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.transfer import read_block
from voxclf.errors import OutputExistsError
from voxclf.fit_job import FitJob, Fitted, Stopwatch, fit_fingerprint, training_folder
from voxclf.fit_rounds import fit_tree_rounds
from voxclf.geometry import Region, Zyx, make_block
from voxclf.jobs import check_finite
from voxclf.labels import LabelSet, load_label_set, parse_classes
from voxclf.models.checkpoint import load_model, save_model
from voxclf.models.crf_parameters import FILE as CRF_FILE
from voxclf.models.model import Model
from voxclf.models.registry import NETWORKS, NetworkInfo, check_model_name
from voxclf.progress import Progress, last, silent
from voxclf.sampling import LabelSurvey, survey_labels
from voxclf.training.cross_validation import CrossValidation
from voxclf.volume import Volume, open_labels, open_volume

GOLDEN_CORE = 8
TREE_OPTIONS = ("bank", "samples", "trees", "max_depth", "min_samples_leaf", "autocontext", "folds", "tune_crf")
NETWORK_OPTIONS = tuple(sorted(set(NetworkFitOptions.model_fields) - set(ComputeOptions.model_fields)))


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` gives."""

    model: Model
    folder: Path
    label_counts: dict[int, int]
    cross_validation: CrossValidation
    seconds: dict[str, float]


def fit_model(config: FitConfig, progress: Progress = silent) -> FitResult:
    """Train a model on the labelled voxels of a volume, score it honestly and save it.

    Raises
    ------
    ValueError
        If shapes differ, the labels hold fewer than two classes, or the model's name is unknown.
    OutputExistsError
        If the output exists and ``overwrite`` is not set.
    """
    check_model_name(config.model)
    if config.model not in NETWORKS and (config.device not in ("auto", "cpu") or config.precision != "32"):
        raise ValueError(
            f"--device was {config.device} and --precision {config.precision}, but {config.model} is fitted on the CPU "
            "in its own arithmetic; leave both out (`voxclf predict --device` runs its trees on a GPU)"
        )
    folder = Path(config.output)
    check_model_folder(folder, config.overwrite)
    volume = open_volume(config.volume, config.voxel_size)
    labels = open_labels(config.labels, volume.shape)
    executor = make_executor(config.executor, config.workers)
    return fit_on_labels(volume, labels, config, folder, executor, progress)


def check_model_folder(folder: Path, overwrite: bool) -> None:
    """Refuse, before any work, a folder that a model may not be written to.

    Raises
    ------
    OutputExistsError
        If it holds a model and ``overwrite`` is not set, or holds anything else.
    """
    if not folder.exists():
        return
    if not (folder / "model.json").exists():
        raise OutputExistsError(
            f"{folder} exists and is not a model folder, so it is not replaced; give another output"
        )
    if not overwrite:
        raise OutputExistsError(f"{folder} holds another model; use --overwrite to replace it, or give another output")


def fit_on_labels(
    volume: Volume,
    labels: Volume,
    options: FitOptions,
    folder: Path,
    executor: Executor,
    progress: Progress = silent,
) -> FitResult:
    """As :func:`fit_model`, with the volumes already open."""
    check_options(options)
    watch = Stopwatch()
    if labels.labelled_boxes is not None and options.unlabelled != 0:
        raise ValueError(
            f"--unlabelled was {options.unlabelled}, but around the slices of {labels.path} every voxel is 0; leave it "
            "out and write 0 where nothing is labelled on a slice"
        )
    check_finite(volume, executor, progress)
    surveyed = survey_labels(labels, options.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, math.prod(labels.shape), "voxel")).total
    label_set = resolve_label_set(labels, survey, options)
    label_set.check_counts([survey.counts.get(i, 0) for i in label_set.ids])
    watch.lap("survey labels")

    example = choose_example(labels, survey, options.unlabelled)
    job = FitJob(volume, labels, survey, label_set, options, example, folder, executor, progress, watch)
    fitted = _choose_fitter(options.model)(job)
    golden = read_golden_patch(volume, example, fitted.model.golden_halo)
    save_model(fitted.model, golden, folder, fitted.extra_files)
    fitted.scores.save(folder)
    if fitted.crf is not None:
        # Not one of the model's own files, which must stay as they are: crf-tune may replace it.
        fitted.crf.parameters.save(folder / CRF_FILE, fitted.crf.to_dict())
    shutil.rmtree(training_folder(folder), ignore_errors=True)
    return FitResult(fitted.model, folder, survey.counts, fitted.scores, watch.seconds)


def _choose_fitter(name: str) -> Callable[[FitJob], Fitted]:
    if name not in NETWORKS:
        return fit_tree_rounds
    from voxclf.fit_networks import fit_network

    return fit_network


def check_options(options: FitOptions) -> None:
    """Refuse options that the model asked for does not have; they would be ignored silently.

    Raises
    ------
    ValueError
        Naming the option.
    """
    if options.tune_crf and options.calibrate:
        raise ValueError(
            "--tune-crf was given together with --calibrate; the CRF would be tuned on probabilities that are not yet "
            "calibrated: leave one out, or tune on other labels afterwards (voxclf crf-tune --model)"
        )
    is_network = options.model in NETWORKS
    foreign = TREE_OPTIONS if is_network else NETWORK_OPTIONS
    if is_network and options.input_bank is None:
        foreign = (*foreign, "sigmas", "dimensions")
    for name in given_options(options, foreign):
        hint = "; filters come with --input-bank" if is_network and name in BankOptions.model_fields else ""
        raise ValueError(
            f"{spell_option(options, name)}, but {options.model} is a {'network' if is_network else 'tree model'} and "
            f"has no such option: leave it out (`voxclf fit --help` says which options are for which models{hint})"
        )
    if is_network:
        check_window_options(options, NETWORKS[options.model])


def check_window_options(options: FitOptions, info: NetworkInfo) -> None:
    """Refuse options of windows that this network is not trained on.

    Raises
    ------
    ValueError
        Naming the option.
    """
    foreign: tuple[str, ...]
    if info.kind == "segmenter":
        foreign, because = ("sampling", "spacing"), "is trained on crops, whose voxels all count"
    elif not info.is_exact:
        foreign, because = ("sampling", "spacing", "window", "final_patch"), "pads, so it is trained on single patches"
    elif options.sampling == "patches":
        foreign, because = ("spacing", "window", "final_patch"), "is trained on single patches of one size"
    else:
        foreign, because = ("final_patch",), "classifies patches of one size"
    for name in given_options(options, foreign):
        advice = "; take a segmenter such as unet3d" if name == "final_patch" else ""
        raise ValueError(f"{spell_option(options, name)}, but {options.model} {because}; leave it out{advice}")


def given_options(options: FitOptions, names: Iterable[str]) -> Iterator[str]:
    """Those of ``names`` whose values are not their defaults."""
    return (name for name in names if getattr(options, name) != type(options).model_fields[name].default)


def spell_option(options: FitOptions, name: str) -> str:
    """As in "--final-patch was 16,16,16"."""
    value = getattr(options, name)
    spelt = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{name.replace('_', '-')} was {spelt}"


def load_if_fitted(folder: Path, volume: Volume, labels: Volume, options: FitOptions) -> FitResult | None:
    """Return what this very job fitted earlier, if it did, so that an interrupted run need not fit again."""
    if not (folder / "model.json").exists():
        return None
    model = load_model(folder)
    if model.training.get("job") != fit_fingerprint(volume, labels, options):
        return None
    counts = {int(label): count for label, count in model.training["label_counts"].items()}
    return FitResult(model, folder, counts, CrossValidation.load(folder), {})


def resolve_label_set(labels: Volume, survey: LabelSurvey, options: FitOptions) -> LabelSet:
    """Find names and colours: from ``--classes``, else stored with the labels or in a sidecar, else plain ids."""
    ids = [i for i in survey.counts if i != options.unlabelled]
    if options.classes:
        return parse_classes(options.classes, ids, options.unlabelled)
    stored = LabelSet.from_metadata(labels.metadata)
    if stored:
        return replace(stored, unlabelled=options.unlabelled)
    for sidecar in (Path(labels.path).with_suffix(".toml"), Path(labels.path).with_suffix(".classes.toml")):
        if sidecar.is_file() and sidecar != Path(labels.path):
            return replace(load_label_set(sidecar), unlabelled=options.unlabelled)
    return LabelSet.from_ids(ids, unlabelled=options.unlabelled)


def choose_example(labels: Volume, survey: LabelSurvey, unlabelled: int) -> Zyx:
    """A voxel to show a model's work at: where the labelled planes of the most varied box cross."""
    box = max(survey.boxes, key=lambda candidate: (len(candidate.counts), candidate.n_labelled)).region
    labelled = labels.read(box.start, box.stop)[0] != unlabelled
    z, y, x = (
        int(labelled.sum(axis=tuple(other for other in range(3) if other != axis)).argmax()) + box.start[axis]
        for axis in range(3)
    )
    return z, y, x


def read_golden_patch(volume: Volume, example: Zyx, halo: Zyx) -> np.ndarray:
    """A small piece of the volume around a voxel, with its halo, (1, z, y, x), for the model's self-test."""
    z0, y0, x0 = (max(0, c - GOLDEN_CORE // 2) for c in example)
    z1, y1, x1 = (min(s + GOLDEN_CORE, n) for s, n in zip((z0, y0, x0), volume.shape, strict=True))
    return read_block(volume, make_block(0, Region((z0, y0, x0), (z1, y1, x1)), halo))
