"""Dense CRF over a whole prediction, and the tuning of its parameters: what ``crf-refine`` and ``crf-tune`` call.

image + probabilities → CrfRefiner, block by block, resumable → probabilities + labels
image + probabilities + labels → tiles → tuned parameters, or "no CRF"
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.config import CrfRefineConfig, CrfTuneConfig, PredictionInput
from voxclf.engine.executors import Executor, SerialExecutor, ThreadExecutor, available_cores, make_executor
from voxclf.errors import FormatError, OutputExistsError
from voxclf.geometry import Region, VoxelSize, Zyx, parse_region
from voxclf.jobs import BlockJob, JobResult, check_finite, run_job
from voxclf.labels import LabelSet
from voxclf.metrics.structure import StructureChange, choose_speck_volume, count_structures
from voxclf.models.crf_parameters import CrfParameters, Weight, read_weight
from voxclf.models.crf_refiner import CrfRefiner, measure_intensity_window
from voxclf.models.devices import LARGE_JOB_VOXELS, has_nvidia_device, sees
from voxclf.predict import LABELS, LEDGER, PROBABILITIES, check_one_channel, describe_outputs
from voxclf.progress import Progress, last, silent
from voxclf.provenance import describe_input, software_versions
from voxclf.sampling import survey_labels
from voxclf.training.crf_tiles import TuningInputs, find_tiles
from voxclf.training.tune_crf import CrfTuning, tune_crf
from voxclf.volume import Volume, open_labels, open_volume

VOXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference of voxel sizes that rounding in a file explains; both describe the same voxels."""
DEFAULT_WEIGHTS = {"bilateral_weight": 4.0, "spatial_weight": 2.0}
DEFAULT_ITERATIONS = 10
BY_HAND = (
    "bilateral_sigma_nm",
    "intensity_sigma",
    "spatial_sigma_nm",
    "bilateral_weight",
    "spatial_weight",
    "n_iterations",
)
STRUCTURE_SIDE = 128
"""Side of the central box whose objects are counted: large enough for whole organelles, and counted in seconds."""


@dataclass(frozen=True)
class Prediction:
    """A prediction that was opened to be refined: its probabilities, its image and its classes."""

    probabilities: Volume
    image: Volume
    label_set: LabelSet
    region: Region


@dataclass(frozen=True)
class Refinement:
    """What ``crf-refine`` did; ``job`` and ``structure`` are None where the parameters say "no CRF"."""

    folder: Path
    label_set: LabelSet
    parameters: CrfParameters
    region: Region
    halo: Zyx
    tolerance: float
    device: str
    job: JobResult | None = None
    structure: StructureChange | None = None


def refine_volume(config: CrfRefineConfig, progress: Progress = silent) -> Refinement:
    """Refine the probabilities of a prediction along the edges of its image.

    Interrupted at any moment, the same call finishes the rest, with output identical to an uninterrupted run. Blocks
    agree with the whole volume but for the fraction ``tolerance`` of labels. With ``executor="threads"`` blocks come
    one after the other, each on all threads, because one large block wastes less on its halo than several small ones.

    Raises
    ------
    FileNotFoundError
        If the prediction, volume or parameter file does not exist.
    FormatError
        If the prediction holds labels but no probabilities.
    ValueError
        If shapes, voxel sizes or classes do not fit together, or a parameter is missing or not allowed.
    OutputExistsError
        If the output was written by another job and ``overwrite`` is not set.
    BlockError
        If a block failed; everything finished before it is kept, and the next call goes on from there.
    """
    parameters = choose_parameters(config)
    parameters.make_crf()  # what is wrong with the parameters is told before any file is opened
    prediction = open_prediction(config)
    parameters.check_classes(prediction.label_set)
    folder = Path(config.output)
    _refuse_own_input(folder, config)
    image = prediction.image
    region = _choose_region(config.region, prediction)
    window = parameters.intensity_window or measure_intensity_window(image)
    parameters = replace(parameters, intensity_window=window)
    device = choose_crf_device(config.device, region.n_voxels)
    executor, n_threads = _share_cores(config, device)
    refiner = CrfRefiner(
        parameters.make_crf(),
        prediction.label_set.n_classes,
        image.voxel_size_nm,
        config.tolerance,
        window,
        n_threads,
        device,
    )
    done = Refinement(folder, prediction.label_set, parameters, region, refiner.halo, config.tolerance, device)
    if not parameters.enabled:
        return done
    for volume in (image, prediction.probabilities):
        check_finite(volume, executor, progress)
    job = _describe_job(config, prediction, refiner, parameters, region)
    result = run_job(
        job, executor, config.memory, overwrite=config.overwrite, pyramid=config.pyramid, progress=progress
    )
    structure = compare_structure(prediction, result.volumes[0], region)
    return replace(done, job=result, structure=structure)


def tune_parameters(config: CrfTuneConfig, progress: Progress = silent) -> CrfTuning:
    """Fit the parameters of the CRF on labels and write them, or write that no CRF helps.

    Raises
    ------
    ValueError
        As for :func:`refine_volume`, or if the labels lie in too few places to tune on some and judge on others.
    OutputExistsError
        If the output exists and ``overwrite`` is not set.
    """
    path = Path(config.output)
    if path.exists() and (path.is_dir() or not config.overwrite):
        raise OutputExistsError(f"{path} exists already; use --overwrite to replace it, or give another output")
    prediction = open_prediction(config)
    labels = open_labels(config.labels, prediction.image.shape)
    inputs = TuningInputs(
        prediction.image,
        prediction.probabilities,
        labels,
        replace(prediction.label_set, unlabelled=config.unlabelled),
    )
    n_workers = config.workers or available_cores()
    executor = ThreadExecutor(n_workers)
    surveyed = survey_labels(labels, config.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, math.prod(labels.shape), "voxel")).total
    inputs.label_set.check_counts([survey.counts.get(i, 0) for i in inputs.label_set.ids])
    tiles = find_tiles(inputs, survey, prediction.region, np.random.default_rng(config.seed))
    result = tune_crf(
        inputs,
        tiles,
        n_iterations=config.n_iterations,
        seconds=config.time,
        seed=config.seed,
        n_workers=n_workers,
        progress=progress,
    )
    made_from = {
        "prediction": describe_input(prediction.probabilities),
        "volume": describe_input(prediction.image),
        "labels": describe_input(labels),
        "seed": config.seed,
        "versions": software_versions(),
    }
    result.parameters.save(path, {**result.to_dict(), **made_from})
    return result


def choose_parameters(config: CrfRefineConfig) -> CrfParameters:
    """The parameters of a file, or those given one by one.

    Raises
    ------
    ValueError
        If both are given, or a width is missing.
    """
    by_hand = {name: getattr(config, name) for name in BY_HAND if getattr(config, name) is not None}
    if config.parameters:
        if by_hand:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in by_hand)
            raise ValueError(
                f"--parameters {config.parameters} was given together with {options}; only one of both is allowed: "
                "leave one out, or change a copy of the file"
            )
        return CrfParameters.load(Path(config.parameters))
    missing = [f"--{name.replace('_', '-')}" for name in BY_HAND[:3] if name not in by_hand]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not given; the CRF needs --parameters FILE from voxclf crf-tune (parameters picked "
            "by hand often lower the scores), or all of --bilateral-sigma-nm, --intensity-sigma, --spatial-sigma-nm"
        )
    weights: dict[str, Weight] = {
        name: read_weight(by_hand[name], name) if name in by_hand else weight
        for name, weight in DEFAULT_WEIGHTS.items()
    }
    return CrfParameters(
        bilateral_sigma_nm=by_hand["bilateral_sigma_nm"],
        intensity_sigma=by_hand["intensity_sigma"],
        spatial_sigma_nm=by_hand["spatial_sigma_nm"],
        bilateral_weight=weights["bilateral_weight"],
        spatial_weight=weights["spatial_weight"],
        n_iterations=by_hand.get("n_iterations", DEFAULT_ITERATIONS),
    )


def open_prediction(config: PredictionInput) -> Prediction:
    """Open the probabilities and the image of a prediction and check that they belong together.

    The image's voxel size may be missing: the prediction states it.

    Raises
    ------
    FileNotFoundError, FormatError, ValueError
        As :func:`refine_volume`.
    """
    probabilities = _open_probabilities(config.prediction)
    image = open_volume(config.volume, config.voxel_size, require_voxel_size=False)
    check_one_channel(image)
    if image.shape != probabilities.shape:
        raise ValueError(
            f"{image.path} has shape {image.shape} but {probabilities.path} has {probabilities.shape} (z, y, x); they "
            "must agree: give the volume that was predicted"
        )
    if not image.has_voxel_size:
        image = replace(image, voxel_size_nm=probabilities.voxel_size_nm)
    _check_voxel_sizes(image, probabilities)
    label_set = LabelSet.from_metadata(probabilities.metadata) or LabelSet.from_ids(
        range(1, probabilities.n_channels + 1), probabilities.channel_names or None
    )
    # A prediction of a region is 0 around it, which is no probability.
    predicted = probabilities.metadata.get("provenance", {}).get("region")
    region = parse_region(predicted, image.shape) if predicted else Region((0, 0, 0), image.shape)
    return Prediction(probabilities, image, label_set, region)


def _open_probabilities(path: str) -> Volume:
    folder = Path(path)
    if (folder / PROBABILITIES).exists():
        path = str(folder / PROBABILITIES)
    elif (folder / LABELS).exists():
        raise FormatError(
            f"{folder} holds labels but no probabilities (voxclf predict --probabilities none); the CRF refines "
            "probabilities: predict again with --probabilities uint8"
        )
    volume = open_volume(path)
    is_labels = volume.metadata.get("kind") == "labels" or volume.n_channels < 2
    if is_labels or not (volume.dtype == np.uint8 or volume.dtype.kind == "f"):
        raise FormatError(
            f"{path} holds {volume.n_channels} channel(s) of {volume.dtype}: labels or an image. Probabilities "
            "have a channel per class, uint8 or float: give a folder from voxclf predict, or its probabilities.zarr"
        )
    return volume


def _check_voxel_sizes(image: Volume, probabilities: Volume) -> None:
    sizes: tuple[VoxelSize, VoxelSize] = image.voxel_size_nm, probabilities.voxel_size_nm
    if np.abs(np.array(sizes[0]) / np.array(sizes[1]) - 1).max() > VOXEL_SIZE_TOLERANCE:
        raise ValueError(
            f"{image.path} has voxel size {sizes[0]} nm but {probabilities.path} has {sizes[1]} nm (z, y, x); they "
            "must agree, because widths are in nm: give the volume that was predicted, or correct --voxel-size"
        )


def _choose_region(text: str | None, prediction: Prediction) -> Region:
    if not text:
        return prediction.region
    region = parse_region(text, prediction.image.shape)
    if region.intersect(prediction.region) != region:
        raise ValueError(
            f"--region was {text}, but only {prediction.region} was predicted; choose a region inside, or predict more"
        )
    return region


def _refuse_own_input(folder: Path, config: CrfRefineConfig) -> None:
    given = Path(config.prediction).resolve()
    if folder.resolve() in (given, given.parent):
        raise ValueError(
            f"--output was {folder}, which holds the prediction itself; give another folder, so that both are kept"
        )


def choose_crf_device(device: str, n_voxels: int) -> str:
    """Decide where the CRF runs; "auto" takes an NVIDIA GPU if there is one and the job is large enough for it.

    Raises
    ------
    ValueError
        If a GPU is asked for that is not there.
    """
    if device == "auto":
        return "cuda" if n_voxels >= LARGE_JOB_VOXELS and has_nvidia_device() and sees("cuda") else "cpu"
    if device == "cuda" and not sees("cuda"):
        raise ValueError(
            "--device was cuda, but torch finds no such GPU on this machine; use --device cpu or auto, or install the "
            "GPU's driver and a torch that was built for it"
        )
    return device


def _share_cores(config: CrfRefineConfig, device: str) -> tuple[Executor, int]:
    """Who does the blocks, and the threads of each."""
    if device != "cpu":
        return SerialExecutor(), 1
    if config.executor == "threads":
        return SerialExecutor(), config.workers or available_cores()
    return make_executor(config.executor, config.workers), 1


def _describe_job(
    config: CrfRefineConfig, prediction: Prediction, refiner: CrfRefiner, parameters: CrfParameters, region: Region
) -> BlockJob:
    folder = Path(config.output)
    description: dict[str, Any] = {
        "job": "crf-refine",
        "input": describe_input(prediction.image),
        "prediction": describe_input(prediction.probabilities),
        "parameters": parameters.to_dict(),
        "tolerance": config.tolerance,
        "halo": list(refiner.halo),
        "region": str(region),
        "probabilities": config.probabilities,
    }
    provenance = {
        **description,
        "blocks": describe_halo(refiner.halo, config.tolerance),
        "device": refiner.device,
        "prediction_made_by": dict(prediction.probabilities.metadata.get("provenance", {})),
        "versions": software_versions(),
    }
    return BlockJob(
        step=refiner,
        inputs=[prediction.image, prediction.probabilities],
        outputs=describe_outputs(folder, prediction.label_set, config.probabilities),
        ledger=folder / LEDGER,
        description=description,
        attributes={"provenance": provenance, **prediction.label_set.to_dict()},
        region=region,
        voxel_size_nm=prediction.image.voxel_size_nm,
    )


def describe_halo(halo: Zyx, tolerance: float) -> str:
    """What a halo stands for, in words."""
    return (
        f"halo of {halo} voxels (z, y, x) around each block, for which about {tolerance:.4%} of labels differ from "
        "those of the whole volume refined at once"
    )


def compare_structure(prediction: Prediction, refined_labels: Volume, region: Region) -> StructureChange:
    """Count the objects in the central box of a region, in the most probable classes before and in the labels after."""
    start = tuple(a + max(0, n - STRUCTURE_SIDE) // 2 for a, n in zip(region.start, region.shape, strict=True))
    stop = tuple(a + min(n, STRUCTURE_SIDE) for a, n in zip(start, region.shape, strict=True))
    box = Region(start, stop)  # type: ignore[arg-type]
    before = prediction.probabilities.read(box.start, box.stop).argmax(axis=0).astype(np.int16)
    after = prediction.label_set.remap_to_indices(refined_labels.read(box.start, box.stop)[0])
    size = prediction.image.voxel_size_nm
    speck_nm3 = choose_speck_volume(size)
    counted = [count_structures(found, prediction.label_set.n_classes, size, speck_nm3) for found in (before, after)]
    return StructureChange(str(box), speck_nm3, *counted)
