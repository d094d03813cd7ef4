"""Which processor evaluates a model, and the step that does it there: compiled code on CPUs, torch on GPUs.

Importing torch takes seconds and some hundred megabytes, so it happens only when a GPU was asked for, or when
nothing was asked for, the job is large, and the machine has an NVIDIA device.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from voxclf.engine.step import Step
from voxclf.models.packed_forest import PackedForest
from voxclf.models.trees import TreeModel

Device = Literal["cpu", "cuda", "mps"]
DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]

LARGE_JOB_VOXELS = 20_000_000
"""Voxels from which starting torch and a GPU, some ten seconds, is small beside the work. An estimate."""
LARGE_FOREST_STEPS = 200
"""Comparisons per voxel (trees x depth) from which a GPU is worth it without multi-scale filters. An estimate."""


def make_step(
    model: TreeModel, device: DeviceChoice = "auto", n_voxels: int | None = None, round_index: int | None = None
) -> Step:
    """Build the step that predicts blocks with this model on a device; see :func:`choose_device`.

    ``round_index`` is the round of autocontext, the last by default, as in :meth:`TreeModel.step`.
    """
    chosen = choose_device(model, device, n_voxels)
    step = model.step(round_index)
    if chosen == "cpu":
        return step
    from voxclf.models.trees_torch import TorchTreePredictor

    assert isinstance(step.classifier, PackedForest)
    return TorchTreePredictor(step.stack, step.classifier, chosen, step.calibration)


def choose_device(model: TreeModel, device: DeviceChoice = "auto", n_voxels: int | None = None) -> Device:
    """Decide where a model runs.

    Parameters
    ----------
    model : TreeModel
        What is to be evaluated.
    device : "auto", "cpu", "cuda" or "mps"
        "auto" takes an NVIDIA GPU if torch sees one and the model and the job are large enough, else the CPU.
    n_voxels : int, optional
        Size of the job; left out, it counts as large.

    Raises
    ------
    ValueError
        If a GPU is asked for that is not there, or for a model that does not run on it.
    """
    if device == "cpu":
        return "cpu"
    if device == "auto":
        is_large = n_voxels is None or n_voxels >= LARGE_JOB_VOXELS
        return "cuda" if is_large and is_worth_a_gpu(model) and has_nvidia_device() and sees("cuda") else "cpu"
    _check_runs_on(model, device)
    if not sees(device):
        raise ValueError(
            f"--device was {device}, but torch finds no such GPU on this machine; use --device cpu or auto, or install "
            "the GPU's driver and a torch that was built for it"
        )
    return device


def is_worth_a_gpu(model: TreeModel) -> bool:
    """Whether a voxel of this model is enough work to be sent to a GPU."""
    forest = model.classifier
    if not isinstance(forest, PackedForest):
        return False
    return model.bank.kind == "multiscale" or forest.n_trees * forest.max_depth >= LARGE_FOREST_STEPS


def has_nvidia_device() -> bool:
    """Whether the machine looks as if it had an NVIDIA GPU; costs nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def sees(device: Literal["cuda", "mps"]) -> bool:
    """Whether torch can use such a GPU; imports torch, and without torch the answer is no."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available())


def _check_runs_on(model: TreeModel, device: Literal["cuda", "mps"]) -> None:
    if not isinstance(model.classifier, PackedForest):
        raise ValueError(f"--device was {device}, but {model.name} is not made of trees and runs on cpu only; use that")
    if device == "mps" and (model.bank.kind, model.bank.dimensions) == ("multiscale", 3):
        raise ValueError(
            "--device was mps, but the eigenvalues of 3D filters need float64, which mps does not have; use --device "
            "cpu, or fit with --dimensions 2"
        )
