"""What a fit starts from and what it ends with, the same for trees and for networks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from features.bank import FilterBank
from voxclf.config import BankOptions, FitOptions
from voxclf.config.options import BankName
from voxclf.engine.executors import Executor
from voxclf.engine.ledger import fingerprint
from voxclf.geometry import VoxelSize, Zyx
from voxclf.labels import LabelSet
from voxclf.models.model import Model
from voxclf.progress import Progress
from voxclf.provenance import describe_input, software_versions, timestamp
from voxclf.sampling import LabelSurvey
from voxclf.training.cross_validation import CrossValidation
from voxclf.training.tune_crf import CrfTuning
from voxclf.volume import Volume


class Stopwatch:
    """Seconds per stage, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        """Give a name to the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._started
        self._started = now


@dataclass(frozen=True)
class FitJob:
    """Everything that decides a model: data, labels, options.

    Parameters
    ----------
    survey : LabelSurvey
        Where the labels are.
    label_set : LabelSet
        The classes.
    example : (z, y, x)
        A voxel to show the model's work at.
    folder : Path
        Where the model will stand; work in progress stands beside it.
    """

    volume: Volume
    labels: Volume
    survey: LabelSurvey
    label_set: LabelSet
    options: FitOptions
    example: Zyx
    folder: Path
    executor: Executor
    progress: Progress
    watch: Stopwatch

    @property
    def fingerprint(self) -> str:
        """Equal for the same inputs and options."""
        return fit_fingerprint(self.volume, self.labels, self.options)

    def facts(self, **own: Any) -> dict[str, Any]:
        """What ``model.json`` says about the training; ``own`` is what only this kind of model has to say."""
        return {
            **describe_inputs(self.volume, self.labels),
            "options": asked(self.options),
            "job": self.fingerprint,
            **own,
            "label_counts": self.survey.counts,
            "example": self.example,
            "versions": software_versions(),
            "finished": timestamp(),
        }


@dataclass(frozen=True)
class Fitted:
    """A model, what it is worth, files that its folder keeps beside it, and a CRF if one was tuned."""

    model: Model
    scores: CrossValidation
    extra_files: Mapping[str, bytes | None] = field(default_factory=dict)
    crf: CrfTuning | None = None


def asked(options: FitOptions) -> dict[str, Any]:
    """The options that decide a model, as values for JSON."""
    return options.model_dump(mode="json", include=set(FitOptions.model_fields))


def describe_inputs(volume: Volume, labels: Volume) -> dict[str, Any]:
    """Fingerprints of what a model is fitted on."""
    return {"volume": describe_input(volume), "labels": describe_input(labels)}


def fit_fingerprint(volume: Volume, labels: Volume, options: FitOptions) -> str:
    """Names a fit: equal for the same inputs and options."""
    return fingerprint({**describe_inputs(volume, labels), "options": asked(options)})


def make_bank(options: BankOptions, voxel_size_nm: VoxelSize, name: BankName | None = None) -> FilterBank:
    """Build the filter bank that was asked for; what was left open follows from the voxel size."""
    name = name or options.bank
    bank = FilterBank.default(name, voxel_size_nm)
    if options.dimensions is not None:
        bank = FilterBank.with_defaults(name, options.dimensions, voxel_size_nm)
    return bank if options.sigmas is None else replace(bank, sigmas_nm=options.sigmas)


def training_folder(folder: Path) -> Path:
    """Where an unfinished training of a network keeps its state: beside the model's folder."""
    return folder.with_name(f".{folder.name}.training")
