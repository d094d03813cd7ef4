"""Networks: build, start from pretrained weights if asked for, train, and score on the slab that was held out."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from voxclf.config import BankOptions, NetworkFitOptions
from voxclf.config.options import BankName
from voxclf.engine.ledger import write_atomically
from voxclf.engine.transfer import read_block
from voxclf.feature_stack import FeatureStack
from voxclf.fit_job import FitJob, Fitted, make_bank, training_folder
from voxclf.geometry import ORIGIN, UNIT, Region, VoxelSize, Zyx, add, make_block
from voxclf.metrics.calibration import fit_calibration
from voxclf.metrics.scored import ScoredLabels
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.network_model import NetworkModel
from voxclf.models.registry import NETWORKS, build, default_patch
from voxclf.provenance import IntensityStatistics
from voxclf.training.cross_validation import CrossValidation
from voxclf.training.fit_torch import TrainedNetwork, train_network
from voxclf.volume import Volume

HISTORY = "history.csv"
JOB = "job.txt"
REACH_SAMPLE = 96
"""Side of the piece of the volume on which a segmenter's reach is measured, voxels."""
ARCHITECTURE_OPTIONS = ("width", "encoder", "encoder_weights", "three_axes", "block")


def fit_network(job: FitJob) -> Fitted:
    """Train a network on the labels; a fit that was interrupted goes on where it stopped."""
    options = job.options
    inputs = make_inputs(job.volume, options.input_bank, options)
    architecture = choose_architecture(
        options.model, options, job.volume.voxel_size_nm, inputs.n_channels, job.label_set.n_classes
    )
    network = build_seeded(options.model, architecture, options.seed)
    trained = train_network(
        network,
        NETWORKS[options.model],
        inputs,
        job.volume,
        job.labels,
        job.survey,
        job.label_set,
        options,
        open_training_folder(training_folder(job.folder), job.fingerprint),
        job.executor.n_workers,
        job.progress,
    )
    job.watch.lap("train")
    scores = _score(trained, job.label_set.n_classes, options.seed)
    assert scores.honest.tables is not None
    if "encoder_weights" in architecture:
        architecture["encoder_weights"] = "none"  # the trained ones are in the folder; nothing is to be downloaded
    model = NetworkModel(
        name=options.model,
        architecture=architecture,
        network=trained.network,
        inputs=inputs,
        label_set=job.label_set,
        voxel_size_nm=job.volume.voxel_size_nm,
        intensity=IntensityStatistics.measure(job.volume),
        hyperparameters=options.model_dump(mode="json", include=set(NetworkFitOptions.model_fields)),
        calibration=fit_calibration(scores.honest.tables) if options.calibrate else None,
        training=job.facts(
            n_training_voxels=trained.n_labelled_seen,
            honest_macro_f1_by_round=[scores.honest.scores.macro_f1],
            split=trained.split,
            seconds=round(trained.seconds, 3),
            n_steps=int(trained.history[-1]["step"]) if trained.history else 0,
            best_epoch=trained.best_epoch,
            **_measure_reach(job, trained.network, inputs),
        ),
    )
    return Fitted(model, scores, {HISTORY: format_history(trained.history)})


def _measure_reach(job: FitJob, network: nn.Module, inputs: NetworkInput) -> dict[str, Any]:
    """How far around a voxel a segmenter looks, measured on the volume: its halo. Patch networks know theirs."""
    if NETWORKS[job.options.model].kind == "patch":
        return {}
    from voxclf.models.segmenter import Segmenter
    from voxclf.models.segmenter_reach import measure_reach
    from voxclf.models.segmenter_step import REACH_KEY

    assert isinstance(network, Segmenter)
    whole = Region(ORIGIN, job.volume.shape)
    around = Region(job.example, add(job.example, UNIT)).grow((REACH_SAMPLE // 2,) * 3).intersect(whole)
    sample = inputs.compute(read_block(job.volume, make_block(0, around, inputs.halo))[0])
    reach = measure_reach(network, sample)
    job.watch.lap("measure reach")
    return {REACH_KEY: reach.to_dict()}


def make_inputs(volume: Volume, input_bank: BankName | None, filters: BankOptions) -> NetworkInput:
    """Measure what a network reads on the training volume: the image, and a filter bank's features if wanted."""
    if input_bank is None:
        return NetworkInput.measure(volume)
    bank = make_bank(filters, volume.voxel_size_nm, input_bank)
    return NetworkInput.measure(volume, FeatureStack(bank, volume.voxel_size_nm))


def choose_architecture(
    name: str, options: NetworkFitOptions, voxel_size_nm: VoxelSize, n_channels: int, n_classes: int
) -> dict[str, Any]:
    """Arguments for ``registry.build``, as they are kept with the model.

    Raises
    ------
    ValueError
        If the network has no such option.
    """
    info = NETWORKS[name]
    architecture: dict[str, Any] = {"n_classes": n_classes, "in_channels": n_channels}
    if info.kind == "patch":
        patch: Zyx = options.patch or default_patch(name, voxel_size_nm)
        architecture["patch"] = list(patch)
    if "voxel_size_nm" in info.defaults:
        architecture["voxel_size_nm"] = list(voxel_size_nm)
    for option in ARCHITECTURE_OPTIONS:
        value = getattr(options, option)
        if option in info.defaults:
            architecture[option] = info.defaults[option] if value is None else value
        elif value != NetworkFitOptions.model_fields[option].default:
            raise ValueError(f"--{option.replace('_', '-')} was {value}, but {name} has no such option; leave it out")
    return architecture


def build_seeded(name: str, architecture: Mapping[str, Any], seed: int) -> nn.Module:
    """Build a network whose random weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name, **architecture)


def open_training_folder(folder: Path, fingerprint: str) -> Path:
    """The folder of this very training; what another one left there is removed."""
    job = folder / JOB
    if folder.exists() and not (job.exists() and job.read_text(encoding="utf-8") == fingerprint):
        shutil.rmtree(folder)
    write_atomically(job, fingerprint)
    return folder


def format_history(history: Sequence[Mapping[str, Any]]) -> bytes:
    """One line per round of training, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]) if history else [])
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def _score(trained: TrainedNetwork, n_classes: int, seed: int) -> CrossValidation:
    """The held-out slab, and beside it the labels that the network was trained on."""
    honest = ScoredLabels.from_cells(trained.validation, n_classes, trained.split["note"], seed)
    naive = ScoredLabels.from_tables(trained.training.total(n_classes), "labels that the network was trained on")
    return CrossValidation(honest, naive)
