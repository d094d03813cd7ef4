"""Commands that look at labels and results again: what may be wrong, what changed, what it looks like."""

from __future__ import annotations

from pydantic import Field

from voxclf.config.base import POSITIONAL, Config, VoxelSizeNm
from voxclf.config.options import BankOptions, LabelsInput, LabelValues, OverwriteOption, VolumeInput, WorkerOptions


class AuditConfig(VolumeInput, LabelsInput, LabelValues, BankOptions, WorkerOptions, OverwriteOption):
    """``voxclf audit``."""

    command = "audit"
    summary = "list labels that are probably wrong: regions that models contradict, and slices one position off"
    examples = (
        "voxclf audit volume.tif labels.tif -o AUDIT --voxel-size 50,4.6,4.6",
        "voxclf audit volume.zarr slices.toml -o AUDIT --top 50 --smallest 200",
    )
    output: str = Field(description="folder for audit.html, audit.csv, audit.json and out_of_fold.zarr")
    top: int = Field(100, ge=1, le=10_000, description="how many regions to list")
    smallest: int = Field(60, ge=1, description="smallest region to look at, voxels of a slice")
    samples: int = Field(150_000, ge=100, description="budget of labelled voxels to train on")
    trees: int = Field(60, ge=1, description="trees of each model")
    seed: int = Field(0, ge=0, description="seed of everything random")


class DiffConfig(WorkerOptions, OverwriteOption):
    """``voxclf diff``."""

    command = "diff"
    summary = "compare two label or instance volumes: voxels, volumes, and objects born, lost, split and merged"
    examples = (
        "voxclf diff OLD/labels.zarr NEW/labels.zarr -o DIFF --volume volume.tif",
        "voxclf diff a.tif b.tif -o DIFF --instances --voxel-size 10,10,10",
    )
    before: str = Field(
        description="label volume, or folder from `voxclf predict`, to compare from", json_schema_extra=POSITIONAL
    )
    after: str = Field(description="the same, to compare with", json_schema_extra=POSITIONAL)
    output: str = Field(description="folder for diff.html, diff.csv, objects.csv and diff.json")
    volume: str | None = Field(None, description="the image behind them, for pictures of the largest differences")
    voxel_size: VoxelSizeNm | None = Field(
        None, description="z,y,x in nm, e.g. 50,4.6,4.6; needed where neither volume states it"
    )
    instances: bool = Field(False, description="values are object ids, not classes")
    classes: str | None = Field(None, description="class names, where the volumes do not carry them")
    region: str | None = Field(None, description="compare only z0:z1,y0:y1,x0:x1 (voxels)")
    least_overlap: float = Field(
        0.1, ge=0, lt=1, description="share of the smaller object that must be shared for two to count as related"
    )
    top: int = Field(50, ge=0, le=10_000, description="how many of the largest differences to list")


class ViewConfig(Config):
    """``voxclf view``."""

    command = "view"
    summary = "look at a volume, its labels and probabilities in neuroglancer or napari, from local files"
    examples = (
        "voxclf view OUT volume.tif",
        "voxclf view OUT volume.zarr --at 40,512,512 --port 9280",
        "voxclf view OUT volume.zarr --napari",
    )
    prediction: str = Field(
        description="folder from `voxclf predict` or `run`, or a label volume", json_schema_extra=POSITIONAL
    )
    volume: str | None = Field(None, description="the image behind it", json_schema_extra=POSITIONAL)
    voxel_size: VoxelSizeNm | None = Field(
        None, description="z,y,x in nm, e.g. 50,4.6,4.6; needed where the volume does not state it"
    )
    at: str | None = Field(None, description="z,y,x of the voxel to look at; default: the middle")
    port: int = Field(0, ge=0, le=65_535, description="port on this machine; 0: any that is free")
    print: bool = Field(False, description="print the address and the viewer's state, and do not serve")
    browser: bool = Field(True, description="open the address in the browser")
    napari: bool = Field(False, description="use napari if it is installed, else print the command that opens it")
    allow_origin: str | None = Field(
        None, description="web address whose pages may read the data too, e.g. https://neuroglancer-demo.appspot.com"
    )
