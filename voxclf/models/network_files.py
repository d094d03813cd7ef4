"""The files of a network: its weights as safetensors, its architecture and normalisation as JSON.

::

    weights.safetensors   every parameter and batch-norm statistic by its name in the module
    calibration.npz       with --calibrate
    history.csv           training and validation loss round by round
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from voxclf.errors import ModelError
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.network_model import NetworkModel
from voxclf.models.registry import NETWORKS, build

WEIGHTS, CALIBRATION = "weights.safetensors", "calibration.npz"
NEEDED_FILES = (WEIGHTS,)


def write_files(model: NetworkModel, folder: Path) -> dict[str, Any]:
    """Write weights and calibration; returns what ``model.json`` must say about them."""
    save_weights(model.network, folder / WEIGHTS)
    if model.calibration is not None:
        arrays: dict[str, Any] = {**model.calibration.to_arrays()}
        np.savez(folder / CALIBRATION, **arrays)
    return {
        "architecture": model.architecture,
        "inputs": model.inputs.to_dict(),
        "feature_names": list(model.feature_names),
        "is_calibrated": model.calibration is not None,
    }


def read_files(folder: Path, description: dict[str, Any], shared: dict[str, Any]) -> NetworkModel:
    """Rebuild the network; ``shared`` are the fields that models of every kind have.

    Raises
    ------
    ModelError
        If the network is unknown, or the weights are damaged or belong to another one.
    """
    name, architecture = shared["name"], description["architecture"]
    if name not in NETWORKS:
        raise ModelError(f"{folder} holds a network {name!r}; this voxclf knows {', '.join(NETWORKS)}: update voxclf")
    network = build(name, **architecture)
    load_weights(network, folder / WEIGHTS)
    calibration = None
    if description["is_calibrated"]:
        with np.load(folder / CALIBRATION, allow_pickle=False) as archive:
            calibration = CalibrationMap.from_arrays(dict(archive))
    inputs = NetworkInput.from_dict(description["inputs"])
    for what, declared, built in (
        ("input channels", inputs.n_channels, architecture["in_channels"]),
        ("classes", shared["label_set"].n_classes, architecture["n_classes"]),
    ):
        if declared != built:
            raise ModelError(
                f"{folder}: model.json declares {declared} {what}, its network has {built}; they do not belong "
                "together: copy the model again or fit again"
            )
    return NetworkModel(architecture=architecture, network=network, inputs=inputs, calibration=calibration, **shared)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write every parameter and buffer of a module under its name."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}, path)


def load_weights(network: nn.Module, path: Path) -> None:
    """Read what :func:`save_weights` wrote into a module of the same architecture.

    Raises
    ------
    ModelError
        If the file is damaged or holds the weights of another architecture.
    """
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{path} does not hold the weights of this network ({str(error).splitlines()[0]}); copy the model again or "
            "fit again"
        ) from error
