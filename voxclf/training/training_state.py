"""A training in progress, on disk: one safetensors file that holds tensors and, as JSON, everything else.

No pickle is read or written: a file from elsewhere cannot run code. The file is replaced as a whole, so a job that is
killed while it saves leaves the state before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

STATE_FILE = "training_state.safetensors"


@dataclass
class TrainingState:
    """How far a training is.

    Parameters
    ----------
    epoch, step : int
        Finished rounds, and optimiser steps.
    seconds : float
        Time spent, before interruptions too.
    n_seen : int
        Labelled voxels trained on, counted as often as they were.
    best_score : float
        Highest so far; -inf before the first validation.
    best_epoch : int
        Round that reached it.
    best_is_calm : bool
        Whether that was in the last part of a falling step size, as all rounds are of a constant one.
    history : list of dict
        One entry per round.
    best : dict of str to Tensor
        The network of the best round.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    n_seen: int = 0
    best_score: float = -float("inf")
    best_epoch: int = 0
    best_is_calm: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def keep_best(self, network: nn.Module) -> None:
        """Remember the network as it is now."""
        self.best = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}

    def save(self, folder: Path, network: nn.Module, optimizer: Optimizer) -> None:
        """Write the state, the network and the optimiser."""
        values = asdict_without_tensors(self)
        moments, groups = split_optimizer_state(optimizer.state_dict())
        tensors = {
            **{f"best/{name}": tensor for name, tensor in self.best.items()},
            **{f"network/{name}": tensor for name, tensor in network.state_dict().items()},
            **{f"optimizer/{name}": tensor for name, tensor in moments.items()},
        }
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"state": json.dumps(values), "groups": json.dumps(groups)}
        draft = folder / f"{STATE_FILE}.part"
        save_file(ready, draft, metadata=metadata)
        draft.replace(folder / STATE_FILE)


def asdict_without_tensors(state: TrainingState) -> dict[str, Any]:
    """All of a state that JSON can hold."""
    return {name: value for name, value in vars(state).items() if name != "best"}


def split_optimizer_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Take an optimiser's state apart into named tensors and the options of its groups."""
    tensors = {
        f"{number}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, moments in state["state"].items()
        for name, value in moments.items()
        if value is not None
    }
    return tensors, state["param_groups"]


def load_state(folder: Path, network: nn.Module, optimizer: Optimizer | None) -> TrainingState | None:
    """Read what :meth:`TrainingState.save` wrote back into network and optimiser; None where nothing was saved."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    state = TrainingState(**json.loads(metadata["state"]), best=_part(tensors, "best/"))
    network.load_state_dict(_part(tensors, "network/"))
    if optimizer is not None:
        _load_optimizer(optimizer, _part(tensors, "optimizer/"), json.loads(metadata["groups"]))
    return state


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        number, name = key.split("/", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape and tensor.ndim:
            # In the memory order of the parameter (channels last), or every step would reorder it.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
