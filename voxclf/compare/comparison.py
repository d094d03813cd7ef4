"""Several models on the same labels, split and time budget: ``voxclf compare``.

split → for every seed and contestant: fit, predict around the held-out labels, score → ranking → page, table, JSON
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from voxclf.compare.contestants import Contestant, parse_contestants
from voxclf.compare.runs import RUNS, Ground, Run, run_contestant
from voxclf.compare.scores import Difference, Standing, differences_to_best, rank, stage_gains
from voxclf.compare.split import HeldOut, bounding_region, hold_out_slab, survey_all, survey_within
from voxclf.config import CompareConfig, save_config
from voxclf.engine.executors import Executor, make_executor
from voxclf.engine.ledger import fingerprint, write_atomically
from voxclf.errors import OutputExistsError, VoxclfError
from voxclf.feature_stack import FeatureStack
from voxclf.fit import resolve_label_set
from voxclf.fit_job import make_bank
from voxclf.geometry import Zyx
from voxclf.jobs import choose_region
from voxclf.labels import LabelSet
from voxclf.predict import check_one_channel
from voxclf.progress import Progress, silent
from voxclf.provenance import describe_input
from voxclf.volume import Volume, open_labels, open_volume

Item = TypeVar("Item")

JOB = "job.json"
LABELS = "labels"
NOT_SHARED = {"output", "models", "seeds", "seed", "overwrite", "memory"}
"""Settings that may change from one call to the next: contestants and seeds are added to those that are done, and one
that lacked memory gets more."""


@dataclass(frozen=True)
class Failure:
    """A contestant that did not finish with one seed, and why."""

    name: str
    seed: int
    message: str


@dataclass(frozen=True)
class Comparison:
    """Everything that was found.

    Parameters
    ----------
    label_set : LabelSet
    split : HeldOut
        What was trained and scored on.
    standings : tuple of Standing
        The best first.
    differences : tuple of Difference
        Each of the others against the best.
    gains : tuple of Difference
        What each stage adds to the same contestant without it.
    failures : tuple of Failure
    """

    label_set: LabelSet
    split: HeldOut
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]
    gains: tuple[Difference, ...]
    failures: tuple[Failure, ...] = ()


def compare_models(config: CompareConfig, progress: Progress = silent) -> Comparison:
    """Train every contestant with every seed on one part of the labels, and score it on the other.

    All contestants meet the same labels, split, region and seeds; networks train for the same time. Interrupted, or
    called again with more contestants or seeds, it repeats nothing that is finished. A contestant that fails is
    named in the result and tried again by the next call; the others go on.

    Raises
    ------
    ValueError
        If a contestant is unknown or asks for what is not allowed, inputs do not fit together, or the labels leave no
        room to hold out a part; all this before any work.
    OutputExistsError
        If the output holds another comparison and ``overwrite`` is not set.
    VoxclfError
        If no contestant finished.
    """
    contestants = parse_contestants(config.models)
    volume = open_volume(config.volume, config.voxel_size)
    check_one_channel(volume)
    labels = open_labels(config.labels, volume.shape)
    for contestant in contestants:
        contestant.check(config)
    executor = make_executor(config.executor, config.workers)
    folder, job = Path(config.output), _describe_job(config, volume, labels)
    _check_folder(folder, job, config.overwrite)
    label_set = _find_label_set(labels, contestants[0], config, executor)
    ground = _prepare_ground(config, contestants, volume, labels, label_set, executor)
    write_atomically(folder / JOB, json.dumps(job, indent=1) + "\n")
    save_config(config, folder / "config.toml")
    runs, failures = _run_all(ground, contestants, progress)
    n_voxels = ground.split.region.n_voxels
    finished = [Standing(c, tuple(r for r in runs if r.contestant == c), n_voxels) for c in contestants]
    standings = rank([standing for standing in finished if standing.runs])
    if not standings:
        raise VoxclfError("no contestant finished:\n" + "\n".join(f"{f.name}: {f.message}" for f in failures))
    return Comparison(
        label_set,
        ground.split,
        tuple(standings),
        tuple(differences_to_best(standings)),
        tuple(stage_gains(standings)),
        tuple(failures),
    )


def _run_all(
    ground: Ground, contestants: tuple[Contestant, ...], progress: Progress
) -> tuple[list[Run], list[Failure]]:
    """Seed by seed, so that an interrupted comparison has something of every contestant."""
    runs, failures = [], []
    config = ground.config
    for seed in range(config.seed, config.seed + config.seeds):
        for contestant in contestants:
            named = _Named(f"{contestant.name}, seed {seed}", progress)
            try:
                runs.append(run_contestant(ground, contestant, seed, named))
            # RuntimeError is what torch raises, running out of memory included.
            except (VoxclfError, ValueError, RuntimeError, MemoryError) as error:
                failures.append(Failure(contestant.name, seed, f"{error}" or type(error).__name__))
    return runs, failures


@dataclass(frozen=True)
class _Named:
    """Progress that says whose stage it is."""

    name: str
    progress: Progress

    def __call__(self, stage: str, results: Iterable[Item], total: float, unit: str) -> Iterator[Item]:
        return self.progress(f"{stage} ({self.name})", results, total, unit)


def _describe_job(config: CompareConfig, volume: Volume, labels: Volume) -> dict[str, Any]:
    """What may not differ between calls for one folder, with its fingerprint."""
    job: dict[str, Any] = {
        "volume": describe_input(volume),
        "labels": describe_input(labels),
        "settings": config.model_dump(mode="json", exclude=NOT_SHARED),
    }
    if config.validation:
        job["validation"] = describe_input(open_labels(config.validation, volume.shape))
    return {"fingerprint": fingerprint(job), **job}


def _check_folder(folder: Path, job: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder of another comparison: its runs would not be on the same ground."""
    record = folder / JOB
    if overwrite:
        for name in (RUNS, LABELS):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif record.exists() and json.loads(record.read_text(encoding="utf-8"))["fingerprint"] != job["fingerprint"]:
        raise OutputExistsError(
            f"{folder} holds a comparison with other inputs or settings; only --models, --seeds and --memory may "
            "differ from one call to the next: use --overwrite to start anew, or give another output"
        )
    elif not record.exists() and (folder / RUNS).exists():
        raise OutputExistsError(f"{folder / RUNS} exists and is not of a comparison; give another output")


def _find_label_set(labels: Volume, contestant: Contestant, config: CompareConfig, executor: Executor) -> LabelSet:
    survey = survey_all(labels, config.unlabelled, executor)
    options = contestant.fit_config(config, config.labels, config.classes, config.seed, Path(config.output))
    return resolve_label_set(labels, survey, options)


def _prepare_ground(
    config: CompareConfig,
    contestants: tuple[Contestant, ...],
    volume: Volume,
    labels: Volume,
    label_set: LabelSet,
    executor: Executor,
) -> Ground:
    folder = Path(config.output) / LABELS
    gap = FeatureStack(make_bank(config, volume.voxel_size_nm), volume.voxel_size_nm).halo
    size = volume.voxel_size_nm
    if config.validation:
        split = _take_validation(config, volume, executor)
    else:
        split = hold_out_slab(labels, label_set, size, gap, config.slabs, folder, executor)
    if config.region:
        test, asked = open_labels(split.test, volume.shape), choose_region(config.region, volume)
        seen = survey_within(test, config.unlabelled, asked, executor)
        split = replace(split, region=bounding_region(seen))
    tuning = None
    if any(contestant.with_crf for contestant in contestants):
        train = open_labels(split.train, volume.shape)
        tuning = _split_for_tuning(config, train, label_set, volume, gap, folder / "tuning", executor)
    return Ground(config, split, tuning)


def _take_validation(config: CompareConfig, volume: Volume, executor: Executor) -> HeldOut:
    assert config.validation is not None
    labels = open_labels(config.validation, volume.shape)
    region = bounding_region(survey_all(labels, config.unlabelled, executor))
    note = f"scored on {Path(config.validation).name}, given as --validation"
    return HeldOut(config.labels, config.validation, region, note, config.classes)


def _split_for_tuning(
    config: CompareConfig,
    train: Volume,
    label_set: LabelSet,
    volume: Volume,
    gap: Zyx,
    folder: Path,
    executor: Executor,
) -> HeldOut:
    try:
        return hold_out_slab(train, label_set, volume.voxel_size_nm, gap, config.slabs, folder, executor)
    except ValueError as error:
        raise ValueError(
            f"+crf is tuned on a second slab of the training labels, and there is no room for one: {error}; leave the "
            "contestants with +crf out"
        ) from None
