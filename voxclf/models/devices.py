"""Which processor evaluates a model and how, and the step that does it there.

Trees run as compiled code on CPUs and through torch on GPUs, networks through torch on either. Importing torch takes
seconds and some hundred megabytes, so for trees it happens only when a GPU was asked for, or when nothing was asked
for, the job is large, and the machine has an NVIDIA device.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from voxclf.config.options import Precision, PredictOptions
from voxclf.engine.executors import Executor, ExecutorName, ThreadExecutor, available_cores, make_executor
from voxclf.engine.step import Step
from voxclf.models.model import Model
from voxclf.models.packed_forest import PackedForest
from voxclf.models.registry import NETWORKS
from voxclf.models.trees import TreeModel

Device = Literal["cpu", "cuda", "mps"]
DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]

TURN_THREADS = 2
"""Where blocks take turns (on a GPU, or a network on all cores): one thread computes, the other reads and writes."""
LARGE_JOB_VOXELS = 20_000_000
"""Voxels from which starting torch and a GPU, some ten seconds, is small beside the work. An estimate."""
LARGE_FOREST_STEPS = 200
"""Comparisons per voxel (trees x depth) from which a GPU is worth it without multi-scale filters. An estimate."""


@dataclass(frozen=True)
class Inference:
    """How a network is evaluated; trees know no choice here.

    Parameters
    ----------
    precision : "32" or "bf16"
        Of its activations.
    flips : bool
        Whether probabilities are averaged over mirror images of the volume.
    output_stride : int
        Distance of the voxels that are classified; those between are interpolated.
    real_context : bool
        Whether padding gives way to the voxels that are really there.
    memory_bytes : int
        Budget of the whole job.
    n_threads : int, optional
        Threads within a network's layers, on a CPU.
    n_callers : int
        Threads that take turns with it.
    """

    precision: Precision = "32"
    flips: bool = False
    output_stride: int = 1
    real_context: bool = False
    memory_bytes: int = 4 * 10**9
    n_threads: int | None = None
    n_callers: int = 1

    @classmethod
    def from_options(cls, options: PredictOptions, memory_bytes: int, workers: int | None) -> Inference:
        """What a command asked for."""
        return cls(
            options.precision,
            options.tta,
            options.output_stride,
            options.real_context,
            memory_bytes,
            workers or available_cores(),
            TURN_THREADS,
        )

    @property
    def approximation(self) -> str:
        """In which way the result is not what the patches give; empty if it is."""
        if self.output_stride > 1:
            return f"approximate: one voxel in {self.output_stride} along each axis classified, the rest interpolated"
        if self.real_context:
            return "approximate: the network's padding replaced by the voxels around each patch"
        return ""


EXACT = Inference()
PADDED_CHOICES = (
    "Use --output-stride 4 (every 4th voxel along each axis from its patch, the rest interpolated), --real-context "
    "(real voxels in place of padding, which the network has not seen in training), or fit 4res_valid, which does not "
    "pad"
)


def check_inference(name: str, inference: Inference) -> None:
    """Refuse, by a model's name, choices that it does not have, or that exclude each other.

    Raises
    ------
    ValueError
        Naming the option.
    """
    if inference.output_stride > 1 and inference.real_context:
        raise ValueError(
            f"--output-stride was {inference.output_stride} and --real-context was given too; they are two ways to "
            "evaluate a network with padding: leave one out"
        )
    is_network = name in NETWORKS
    is_patch_network = is_network and NETWORKS[name].kind == "patch"
    refused = {
        "--precision bf16": inference.precision != "32" and not is_network,
        "--tta": inference.flips and not is_network,
        "--output-stride": inference.output_stride > 1 and not is_patch_network,
        "--real-context": inference.real_context and not is_patch_network,
    }
    for option, is_wrong in refused.items():
        if is_wrong:
            raise ValueError(
                f"{option} was given, but {name} has no such choice; it is for "
                f"{'patch networks' if is_network else 'networks'}: leave it out"
            )


def check_exactness(name: str, inference: Inference) -> None:
    """Refuse, before it is fitted, a network that could not be evaluated as asked.

    Raises
    ------
    ValueError
        With the choices there are for a network with padding.
    """
    is_padded = name in NETWORKS and NETWORKS[name].kind == "patch" and not NETWORKS[name].is_exact
    if is_padded and not inference.approximation:
        raise ValueError(f"{name} pads, so it cannot be evaluated exactly at every voxel. {PADDED_CHOICES}")


def describe_inference(model: Model, inference: Inference) -> dict[str, Any]:
    """What of the evaluation decides a network's output, for the job's description; nothing for trees."""
    if model.kind != "network":
        return {}
    described: dict[str, Any] = {"precision": inference.precision, "mirror_images": inference.flips}
    if inference.approximation:
        described |= {"approximation": inference.approximation}
    return described


def make_step(
    model: Model,
    device: DeviceChoice = "auto",
    n_voxels: int | None = None,
    round_index: int | None = None,
    inference: Inference = EXACT,
) -> Step:
    """Build the step that predicts blocks with this model on a device; see :func:`choose_device`.

    ``round_index`` is the round of autocontext, the last by default, as in :meth:`TreeModel.step`.
    """
    chosen = choose_device(model, device, n_voxels)
    if model.kind == "network":
        from voxclf.models.network_model import NetworkModel
        from voxclf.models.network_step import make_network_step

        assert isinstance(model, NetworkModel)
        return make_network_step(model, chosen, inference)
    assert isinstance(model, TreeModel)
    step = model.step(round_index)
    if chosen == "cpu":
        return step
    from voxclf.models.trees_torch import TorchTreePredictor

    assert isinstance(step.classifier, PackedForest)
    return TorchTreePredictor(step.stack, step.classifier, chosen, step.calibration)


def choose_executor(model: Model, device: Device, name: ExecutorName, n_workers: int | None) -> Executor:
    """Who does the blocks: trees on a CPU run one per worker, everything else takes turns.

    A network uses all cores for one block: its convolutions scale as well as blocks do, and one large tile wastes less
    on its halo, and takes less memory, than one tile per core.
    """
    if device == "cpu" and model.kind == "trees":
        return make_executor(name, n_workers)
    return ThreadExecutor(TURN_THREADS)


def choose_device(model: Model, device: DeviceChoice = "auto", n_voxels: int | None = None) -> Device:
    """Decide where a model runs.

    Parameters
    ----------
    model : Model
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
        is_large = n_voxels is None or n_voxels >= LARGE_JOB_VOXELS or model.kind == "network"
        return "cuda" if is_large and is_worth_a_gpu(model) and has_nvidia_device() and sees("cuda") else "cpu"
    if isinstance(model, TreeModel):
        _check_runs_on(model, device)
    check_gpu(device)
    return device


def check_gpu(device: Literal["cuda", "mps"]) -> None:
    """Refuse a GPU that torch cannot use.

    Raises
    ------
    ValueError
        Saying what to do.
    """
    if not sees(device):
        raise ValueError(
            f"--device was {device}, but torch finds no such GPU on this machine; use --device cpu or auto, or install "
            "the GPU's driver and a torch that was built for it"
        )


def warn_of_slow_precision(precision: Precision, device: str) -> None:
    """Warn where bf16, which is asked for to be fast, is slow: on a CPU without instructions for it."""
    if precision != "bf16" or device != "cpu":
        return
    import torch

    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        warnings.warn(
            "this processor has no instructions for bfloat16, so --precision bf16 takes many times as long as 32; "
            "leave it out, or use a GPU or a processor with AMX or AVX512-BF16",
            stacklevel=2,
        )


def is_worth_a_gpu(model: Model) -> bool:
    """Whether a voxel of this model is enough work to be sent to a GPU."""
    if not isinstance(model, TreeModel):
        return True
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


def free_gpu_bytes(device: str = "cuda") -> int:
    """Memory of an NVIDIA GPU that can still be had, bytes."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for reuse is free for us, though the driver counts it as taken.
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _check_runs_on(model: TreeModel, device: Literal["cuda", "mps"]) -> None:
    if not isinstance(model.classifier, PackedForest):
        raise ValueError(f"--device was {device}, but {model.name} is not made of trees and runs on cpu only; use that")
    if device == "mps" and (model.bank.kind, model.bank.dimensions) == ("multiscale", 3):
        raise ValueError(
            "--device was mps, but the eigenvalues of 3D filters need float64, which mps does not have; use --device "
            "cpu, or fit with --dimensions 2"
        )
