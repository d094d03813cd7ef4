"""The corridor: from a volume and a model to probabilities and labels of every voxel.

model = load_model(folder)                what was learned
volume = open_volume(path)                lazily, any format
run_job(make_step(model), [volume], …)    probabilities → labels, block by block, resumable; then pyramids
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.config import PredictConfig
from voxclf.engine.executors import make_executor
from voxclf.errors import ModelError
from voxclf.geometry import ORIGIN, Region, add
from voxclf.jobs import BlockJob, JobResult, OutputSpec, check_finite, choose_region, run_job
from voxclf.labels import LabelSet
from voxclf.models.checkpoint import load_model, model_fingerprint
from voxclf.models.devices import (
    Device,
    Inference,
    check_inference,
    choose_device,
    choose_executor,
    describe_inference,
    make_step,
    warn_of_slow_precision,
)
from voxclf.models.model import Model
from voxclf.models.network_certificate import SeamCertificate
from voxclf.probabilities import ENCODERS, MostProbableClass, encode_uncertainty, quantise
from voxclf.progress import Progress, silent
from voxclf.provenance import IntensityStatistics, add_provenance, describe_input, software_versions
from voxclf.volume import Volume, open_volume

VOXEL_SIZE_TOLERANCE = 0.05
"""Relative difference of voxel sizes up to which a model is applied; measured sizes scatter by a few percent."""
INTENSITY_WARNING_STD = 2.0
LABELS, PROBABILITIES, UNCERTAINTY = "labels.zarr", "probabilities.zarr", "uncertainty.zarr"
LEDGER, ROUNDS, CERTIFICATE = "ledger", "rounds", "certificate.log"


@dataclass(frozen=True)
class Prediction:
    """What ``predict`` wrote, and where.

    ``certificate`` says how far a network's probabilities are from those of single patches; empty for trees.
    """

    folder: Path
    label_set: LabelSet
    region: Region
    job: JobResult
    warnings: tuple[str, ...]
    device: str = "cpu"
    certificate: dict[str, Any] = field(default_factory=dict)


def predict_volume(config: PredictConfig, progress: Progress = silent) -> Prediction:
    """Classify every voxel of a volume with a fitted model.

    Interrupted at any moment, the same call finishes the rest, with output identical to an uninterrupted run (on a
    GPU, or after a change of device, to 1e-5 of a probability). On a GPU blocks take turns, and ``executor`` and
    ``workers`` do not apply; so they do with a network on a CPU, which uses ``workers`` cores for each block.

    Examples
    --------
    >>> predict_volume(PredictConfig(model="model", volume="volume.tif", output="OUT"))  # doctest: +SKIP

    Raises
    ------
    ModelError
        If the model is damaged or was trained at another voxel size.
    OutputExistsError
        If the output was written by another job and ``overwrite`` is not set.
    ValueError
        If the volume has several channels, the region is not inside it, or the device is not there; if a network
        with padding is asked for every voxel exactly, or an option does not belong to the model.
    BlockError
        If a block failed, NaN in a float volume and a broken seam certificate included; everything finished before
        it is kept, and the next call goes on from there.
    """
    model = load_model(Path(config.model))
    inference = Inference.from_options(config, config.memory, config.workers)
    check_inference(model.name, inference)
    volume = open_volume(config.volume, config.voxel_size)
    warnings = check_volume(model, volume)
    region = choose_region(config.region, volume)
    device = choose_device(model, config.device, region.n_voxels)
    warn_of_slow_precision(inference.precision, device)
    executor = make_executor(config.executor, config.workers)
    check_finite(volume, executor, progress)
    executor = choose_executor(model, device, config.executor, config.workers)
    folder = Path(config.output)
    inputs = [volume]
    certificate: dict[str, Any] = {}
    for job in _plan_rounds(model, volume, region, config, device, inference):
        is_last = job.description["round"] == model.n_rounds
        pyramid = config.pyramid and is_last
        job = replace(job, inputs=inputs)
        result = run_job(job, executor, config.memory, overwrite=config.overwrite, pyramid=pyramid, progress=progress)
        inputs = [volume, result.volumes[0]]
        if isinstance(job.check, SeamCertificate):
            certificate = job.check.summarise()
            for output in result.volumes:
                add_provenance(Path(output.path), {"certificate": certificate})
    if inference.approximation:
        warnings = (*warnings, f"the result is {inference.approximation}")
    return Prediction(folder, model.label_set, region, result, warnings, device, certificate)


def _plan_rounds(
    model: Model, volume: Volume, region: Region, config: PredictConfig, device: Device, inference: Inference
) -> Iterator[BlockJob]:
    """One job per round of autocontext; all but the last write the probabilities that the next one reads."""
    folder = Path(config.output)
    for index in range(model.n_rounds):
        is_last = index == model.n_rounds - 1
        description = {
            "job": "predict" if is_last else f"round {index + 1}",
            "round": index + 1,
            "model": model_fingerprint(Path(config.model)),
            "input": describe_input(volume),
            "region": str(region),
            "probabilities": config.probabilities,
            **({"uncertainty": True} if config.uncertainty else {}),
            **describe_inference(model, inference),
        }
        # A later round looks around each voxel, so earlier ones reach further than the region asked for.
        reach = model.step().halo if not is_last else ORIGIN
        for _ in range(model.n_rounds - 2 - index):
            reach = add(reach, model.step().halo)
        rounds = folder / ROUNDS
        between = OutputSpec(
            rounds / f"round_{index + 1}.zarr",
            "probabilities",
            model.label_set.n_classes,
            np.dtype(np.uint8),
            quantise,
            model.label_set.names,
        )
        final = describe_outputs(folder, model.label_set, config.probabilities, with_uncertainty=config.uncertainty)
        step = make_step(model, device, round_index=index, inference=inference)
        yield BlockJob(
            step=step,
            inputs=[],
            outputs=final if is_last else [between],
            ledger=folder / LEDGER if is_last else rounds / f"round_{index + 1}.ledger",
            description=description,
            attributes={
                "provenance": {
                    **description,
                    "model_name": model.name,
                    "trained_on": _describe_training(model),
                    "device": device,
                    "versions": software_versions(),
                },
                **model.label_set.to_dict(),
            },
            region=region.grow(reach).intersect(Region(ORIGIN, volume.shape)),
            voxel_size_nm=volume.voxel_size_nm,
            check=SeamCertificate.of_step(step, volume, folder / LEDGER / CERTIFICATE),
        )


def _describe_training(model: Model) -> dict[str, Any]:
    """What tells the labels that a model was trained on from others; empty for models made elsewhere."""
    labels = model.training.get("labels")
    if not isinstance(labels, dict):
        return {}
    return {"fingerprint": labels["fingerprint"], "label_counts": model.training["label_counts"]}


def check_volume(model: Model, volume: Volume) -> tuple[str, ...]:
    """Refuse a volume that the model cannot be applied to; return warnings where it looks unusual.

    Raises
    ------
    ModelError
        If the voxel size differs by more than 5 % along an axis.
    ValueError
        If the volume has more than one channel.
    """
    check_one_channel(volume)
    ratios = np.array(volume.voxel_size_nm) / np.array(model.voxel_size_nm)
    if np.abs(ratios - 1).max() > VOXEL_SIZE_TOLERANCE:
        raise ModelError(
            f"model was trained at voxel size {model.voxel_size_nm} nm, {volume.path} has {volume.voxel_size_nm} nm "
            "(z, y, x); it would see other structures: fit a model on this volume, or correct --voxel-size "
            "if the file states it wrongly"
        )
    distance = model.intensity.distance(IntensityStatistics.measure(volume))
    if distance <= INTENSITY_WARNING_STD:
        return ()
    return (
        f"intensities differ from the training volume's (the mean is {distance:.1f} of its standard deviations away); "
        "the model may not fit this volume: look at the labels before you trust them",
    )


def check_one_channel(volume: Volume) -> None:
    """Refuse volumes of several channels, which models do not read."""
    if volume.n_channels != 1:
        raise ValueError(
            f"{volume.path} has {volume.n_channels} channels, one is allowed; save the channel of interest as a "
            "volume of its own"
        )


def describe_outputs(
    folder: Path, label_set: LabelSet, storage: str, *, with_uncertainty: bool = False
) -> list[OutputSpec]:
    """The volumes that a prediction writes: labels, probabilities unless ``storage`` is "none", and uncertainty."""
    outputs = [OutputSpec(folder / LABELS, "labels", 1, label_set.id_dtype, MostProbableClass(label_set))]
    if storage != "none":
        outputs.append(
            OutputSpec(
                folder / PROBABILITIES,
                "probabilities",
                label_set.n_classes,
                np.dtype(storage),
                ENCODERS[storage],
                label_set.names,
            )
        )
    if with_uncertainty:
        outputs.append(OutputSpec(folder / UNCERTAINTY, "image", 1, np.dtype(np.uint8), encode_uncertainty))
    return outputs
