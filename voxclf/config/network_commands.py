"""Commands for networks alone: pretraining without labels, and export for other programs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL
from voxclf.config.options import NetworkFitOptions, OverwriteOption, VolumeInput, WorkerOptions


class PretrainConfig(VolumeInput, NetworkFitOptions, WorkerOptions, OverwriteOption):
    """``voxclf pretrain``."""

    command = "pretrain"
    summary = "let a patch network learn from an unlabelled volume, for `fit --init`"
    examples = (
        "voxclf pretrain volume.zarr -o pretrained --model convnext --task center --padding 1 --time 1h",
        "voxclf fit volume.zarr slices.toml -o model --model convnext --init pretrained",
    )
    model: str = Field("4conv", description="patch network; `voxclf models` lists them")
    task: Literal["center", "vae"] = Field(
        "center", description="predict the masked middle of a patch, or reconstruct the patch through 512 numbers"
    )
    padding: int = Field(0, ge=0, description="the masked middle reaches this far: 0 is one voxel, 1 is 3 x 3 x 3")
    mask_center: bool = Field(False, description="mask the middle for --task vae too")
    seed: int = Field(0, ge=0, description="seed of everything random")
    output: str = Field(description="folder to write")


class ExportConfig(OverwriteOption):
    """``voxclf export``."""

    command = "export"
    summary = "write a network as ONNX, for programs without Python"
    examples = ("voxclf export model -o model.onnx", "voxclf export model -o model.onnx --dense")
    model: str = Field(description="model folder of a patch network from `voxclf fit`", json_schema_extra=POSITIONAL)
    output: str = Field(description="ONNX file to write; what it reads and says is written beside it as JSON")
    dense: bool = Field(False, description="the form that classifies every voxel of a block at once, of any size")
