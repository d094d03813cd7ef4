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

from voxclf.config import CrfRefineConfig, CrfTuneConfig, PredictConfig, RunConfig, make_config
from voxclf.crf_inputs import PredictedVolumes, open_crf_volumes
from voxclf.engine.executors import Executor, SerialExecutor, ThreadExecutor, available_cores, make_executor
from voxclf.engine.run import LEAST_CHUNK
from voxclf.errors import OutputExistsError
from voxclf.geometry import Region, Zyx, parse_region
from voxclf.jobs import FIXED_BYTES, BlockJob, JobResult, check_finite, run_job
from voxclf.labels import LabelSet
from voxclf.metrics.structure import StructureChange, choose_speck_volume, count_structures
from voxclf.models.checkpoint import model_fingerprint
from voxclf.models.crf_parameters import FILE, CrfParameters, Weight, read_weight
from voxclf.models.crf_refiner import CrfRefiner, make_refiner, measure_intensity_windows
from voxclf.models.devices import LARGE_JOB_VOXELS, check_gpu, has_nvidia_device, sees
from voxclf.predict import LEDGER, describe_outputs
from voxclf.progress import Progress, last, silent
from voxclf.provenance import describe_input, software_versions
from voxclf.sampling import LabelSurvey, survey_labels
from voxclf.training.crf_tiles import TuningInputs, find_tiles
from voxclf.training.tune_crf import CrfTuning, tune_crf
from voxclf.volume import Volume, open_labels

DEFAULT_WEIGHTS = {"bilateral_weight": 4.0, "spatial_weight": 2.0}
DEFAULT_ITERATIONS = 10
WIDTHS = ("bilateral_sigma_nm", "intensity_sigma", "spatial_sigma_nm")
REFINED = "refined"
"""Folder in that of a prediction where `predict` and `run` put the refined one."""
BY_HAND = (*WIDTHS, *DEFAULT_WEIGHTS, "image_sigma_nm", "n_iterations")
STRUCTURE_SIDE = 128
"""Side of the central box whose objects are counted: large enough for whole organelles, and counted in seconds."""


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
    volumes = open_crf_volumes(config)
    parameters.check_classes(volumes.label_set)
    parameters.check_channels(volumes.n_channels)
    folder = Path(config.output)
    _refuse_own_input(folder, config)
    region = _choose_region(config.region, volumes)
    windows = parameters.intensity_windows or measure_intensity_windows(volumes.images)
    parameters = replace(parameters, intensity_windows=windows)
    device = choose_crf_device(config.device, region.n_voxels)
    executor, n_threads = _share_cores(config, device)
    refiner = make_refiner(
        parameters,
        volumes.label_set.n_classes,
        volumes.voxel_size_nm,
        config.tolerance,
        n_threads=n_threads,
        device=device,
        n_channels=volumes.n_channels,
        volume_shape=volumes.probabilities.shape,
    )
    done = Refinement(folder, volumes.label_set, parameters, region, refiner.halo, config.tolerance, device)
    if not parameters.enabled:
        return done
    for volume in volumes.inputs:
        check_finite(volume, executor, progress)
    job = _describe_job(config, volumes, refiner, parameters, region)
    check_memory(refiner, config.memory, executor.n_workers)
    result = run_job(
        job, executor, config.memory, overwrite=config.overwrite, pyramid=config.pyramid, progress=progress
    )
    structure = compare_structure(volumes, result.volumes[0], region)
    return replace(done, job=result, structure=structure)


def find_kept_parameters(crf: str, model: Path, probabilities: str) -> Path | None:
    """The parameter file that ``crf-tune`` kept in a model folder, if it is wanted and says that the CRF helps.

    Raises
    ------
    ValueError
        If there is one, but no probabilities are to be stored that could be refined.
    """
    path = model / FILE
    if crf == "off" or not path.exists() or not CrfParameters.load(path).enabled:
        return None
    if probabilities == "none":
        raise ValueError(
            f"--probabilities was none, but {path} asks for the prediction to be refined, which needs them; store them "
            "(uint8), or use --crf off"
        )
    return path


def refine_prediction(config: PredictConfig | RunConfig, model: Path, progress: Progress = silent) -> Refinement | None:
    """Refine what was just predicted into a folder ``refined`` in it, if the model has parameters that help."""
    parameters = find_kept_parameters(config.crf, model, config.probabilities)
    if parameters is None:
        return None
    values = {
        "prediction": config.output,
        "volume": config.volume,
        "voxel_size": config.voxel_size,
        "output": str(Path(config.output) / REFINED),
        "parameters": str(parameters),
        "probabilities": config.probabilities,
        "region": config.region,
        "pyramid": config.pyramid,
        "device": config.device if config.device in ("auto", "cuda") else "cpu",
        "workers": config.workers,
        "executor": config.executor,
        "overwrite": config.overwrite,
    }
    # The default budget of predicting is for small blocks; a CRF's blocks have larger halos and a default of their own.
    if "memory" in config.model_fields_set:
        values["memory"] = config.memory
    try:
        return refine_volume(make_config(CrfRefineConfig, values), progress)
    except OutputExistsError:
        # Its folder follows the prediction and the model's parameters: tuned again, they replace what older ones made.
        return refine_volume(make_config(CrfRefineConfig, {**values, "overwrite": True}), progress)


def tune_parameters(config: CrfTuneConfig, progress: Progress = silent) -> CrfTuning:
    """Fit the parameters of the CRF on labels and write them, or write that no CRF helps.

    Raises
    ------
    ValueError
        As for :func:`refine_volume`, or if the labels lie in too few places to tune on some and judge on others.
    OutputExistsError
        If the output exists and ``overwrite`` is not set.
    """
    path = choose_output(config)
    if path.exists() and (path.is_dir() or not config.overwrite):
        raise OutputExistsError(f"{path} exists already; use --overwrite to replace it, or give another output")
    volumes = open_crf_volumes(config)
    if config.model:
        _check_made_by(volumes, Path(config.model))
    labels = open_labels(config.labels, volumes.probabilities.shape)
    label_set = replace(volumes.label_set, unlabelled=config.unlabelled)
    inputs = TuningInputs(volumes.images, volumes.probabilities, label_set, labels)
    n_workers = config.workers or available_cores()
    executor = ThreadExecutor(n_workers)
    surveyed = survey_labels(labels, config.unlabelled, executor)
    survey = last(progress("survey labels", surveyed, math.prod(labels.shape), "voxel")).total
    inputs.label_set.check_counts([survey.counts.get(i, 0) for i in inputs.label_set.ids])
    _refuse_training_labels(volumes, labels, survey)
    tiles = find_tiles(inputs, survey, volumes.region, np.random.default_rng(config.seed))
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
        **volumes.describe(),
        "labels": describe_input(labels),
        "seed": config.seed,
        "versions": software_versions(),
    }
    result.parameters.save(path, {**result.to_dict(), **made_from})
    return result


def choose_output(config: CrfTuneConfig) -> Path:
    """Where ``crf-tune`` writes its parameters.

    Raises
    ------
    ValueError
        If both or neither of a model and a file are given, or a model with a guide.
    """
    if (config.model is None) == (config.output is None):
        given = "neither was given" if config.model is None else f"were {config.model} and {config.output}"
        raise ValueError(
            f"--model and --output: {given}; exactly one is needed: --model MODEL keeps the parameters with the model, "
            "where predict and run find them, --output FILE.toml writes them elsewhere"
        )
    if config.model and config.guide:
        raise ValueError(
            f"--guide {config.guide} was given together with --model; parameters in a model folder must do with the "
            "volume alone, because predict has no guide: use --output, then crf-refine with the same --guide"
        )
    return Path(config.model) / FILE if config.model else Path(str(config.output))


def _check_made_by(volumes: PredictedVolumes, model: Path) -> None:
    made_by = volumes.probabilities.metadata.get("provenance", {}).get("model")
    if made_by != model_fingerprint(model):
        raise ValueError(
            f"--model was {model}, but {volumes.probabilities.path} was not predicted with it as it is now; parameters "
            "fit the probabilities of one model: predict again with this model, or give the one that was used"
        )


def _refuse_training_labels(volumes: PredictedVolumes, labels: Volume, survey: LabelSurvey) -> None:
    """Refuse labels that the model knows, where the prediction says what it was trained on."""
    trained_on = volumes.probabilities.metadata.get("provenance", {}).get("trained_on")
    if not trained_on:
        return
    # A fingerprint is of samples of the volume, which may all lie between sparse slices: the counts decide then.
    counts = {int(label): count for label, count in trained_on["label_counts"].items()}
    if trained_on["fingerprint"] == describe_input(labels)["fingerprint"] and counts == dict(survey.counts):
        raise ValueError(
            f"labels {labels.path} are those that the model was trained on; its probabilities are better there than "
            "anywhere else, so parameters tuned on them would not fit the rest: give labels of other places, or have "
            "them tuned on held-out slabs while fitting (voxclf fit --tune-crf, voxclf run --tune-crf)"
        )


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
    missing = [f"--{name.replace('_', '-')}" for name in WIDTHS if name not in by_hand]
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
        image_sigma_nm=by_hand.get("image_sigma_nm", 0.0),
    )


def _choose_region(text: str | None, volumes: PredictedVolumes) -> Region:
    if not text:
        return volumes.region
    region = parse_region(text, volumes.probabilities.shape)
    if region.intersect(volumes.region) != region:
        raise ValueError(
            f"--region was {text}, but only {volumes.region} was predicted; choose a region inside, or predict more"
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
    if device == "cuda":
        check_gpu("cuda")
    return device


def _share_cores(config: CrfRefineConfig, device: str) -> tuple[Executor, int]:
    """Who does the blocks, and the threads of each."""
    if device != "cpu":
        return SerialExecutor(), 1
    if config.executor == "threads":
        return SerialExecutor(), config.workers or available_cores()
    return make_executor(config.executor, config.workers), 1


def check_memory(refiner: CrfRefiner, memory_bytes: int, n_workers: int) -> None:
    """Say what to do about kernels whose halo leaves no room for a block, before any output is created.

    Raises
    ------
    ValueError
        If blocks of 8 voxels a side, one per worker, need more memory than there is.
    """
    core: Zyx = (LEAST_CHUNK, LEAST_CHUNK, LEAST_CHUNK)
    needed = refiner.working_bytes(core) * n_workers + FIXED_BYTES
    if needed <= memory_bytes:
        return
    looser = replace(refiner, tolerance=min(10 * refiner.tolerance, 0.1))
    advice = f"raise --memory to {math.ceil(needed / 1e8) / 10:g}GB or more"
    if n_workers > 1:
        advice += ", lower --workers"
    raise ValueError(
        f"--memory was {memory_bytes / 1e9:g} GB, but kernels of {refiner.crf.bilateral_sigma_nm} and "
        f"{refiner.crf.spatial_sigma_nm} nm (z, y, x) see {refiner.halo} voxels around each block at --tolerance "
        f"{refiner.tolerance:g}, and the smallest block needs {needed / 1e9:.2g} GB; {advice}, allow --tolerance "
        f"{looser.tolerance:g} (a halo of {looser.halo}), use narrower kernels, or refine a coarser copy of the volume"
    )


def _describe_job(
    config: CrfRefineConfig, volumes: PredictedVolumes, refiner: CrfRefiner, parameters: CrfParameters, region: Region
) -> BlockJob:
    folder = Path(config.output)
    description: dict[str, Any] = {
        "job": "crf-refine",
        **volumes.describe(),
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
        "prediction_made_by": dict(volumes.probabilities.metadata.get("provenance", {})),
        "versions": software_versions(),
    }
    return BlockJob(
        step=refiner,
        inputs=volumes.inputs,
        outputs=describe_outputs(folder, volumes.label_set, config.probabilities),
        ledger=folder / LEDGER,
        description=description,
        attributes={"provenance": provenance, **volumes.label_set.to_dict()},
        region=region,
        voxel_size_nm=volumes.voxel_size_nm,
    )


def describe_halo(halo: Zyx, tolerance: float) -> str:
    """What a halo stands for, in words."""
    return (
        f"halo of {halo} voxels (z, y, x) around each block, for which about {tolerance:.4%} of labels differ from "
        "those of the whole volume refined at once"
    )


def compare_structure(volumes: PredictedVolumes, refined_labels: Volume, region: Region) -> StructureChange:
    """Count the objects in the central box of a region, in the most probable classes before and in the labels after."""
    box = central_box(region)
    before = volumes.probabilities.read(box.start, box.stop).argmax(axis=0).astype(np.int16)
    after = volumes.label_set.remap_to_indices(refined_labels.read(box.start, box.stop)[0])
    size = volumes.voxel_size_nm
    speck_nm3 = choose_speck_volume(size)
    counted = [count_structures(found, volumes.label_set.n_classes, size, speck_nm3) for found in (before, after)]
    return StructureChange(str(box), speck_nm3, *counted)


def central_box(region: Region) -> Region:
    """The box in the middle of a region whose objects are counted."""
    start = tuple(a + max(0, n - STRUCTURE_SIDE) // 2 for a, n in zip(region.start, region.shape, strict=True))
    stop = tuple(a + min(n, STRUCTURE_SIDE) for a, n in zip(start, region.shape, strict=True))
    return Region(start, stop)  # type: ignore[arg-type]
