"""Commands about volumes and labels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL, VoxelCounts, VoxelSizeNm
from voxclf.config.options import BlockwiseConfig, UnlabelledOption, VolumeInput


class InfoConfig(VolumeInput):
    """``voxclf info``."""

    command = "info"
    summary = "show what is in a volume: shape, voxel size, type, chunks, intensities, classes"
    examples = ("voxclf info volume.tif --voxel-size 8,8,8", "voxclf info data.h5:/raw", "voxclf info OUT/labels.zarr")


class ConvertConfig(VolumeInput, BlockwiseConfig):
    """``voxclf convert``."""

    command = "convert"
    summary = "copy a volume between formats, block by block: any readable format to OME-Zarr or TIFF"
    examples = (
        "voxclf convert volume.tif volume.zarr --voxel-size 8,8,8",
        "voxclf convert OUT/labels.zarr labels.tif",
    )
    output: str = Field(description="OME-Zarr (.zarr) or TIFF (.tif) to write", json_schema_extra=POSITIONAL)
    kind: Literal["image", "labels"] = Field(
        "image",
        description="what the voxels mean, where the file does not say: labels keep their ids in coarser levels",
    )
    pyramid: bool = Field(True, description="add coarser levels for viewers (OME-Zarr)")


class SuggestConfig(UnlabelledOption, BlockwiseConfig):
    """``voxclf suggest``."""

    command = "suggest"
    summary = "say where to label next: boxes ranked by uncertainty, rarity and diversity"
    examples = (
        "voxclf suggest OUT volume.tif -o OUT/next --labels labels.tif",
        "voxclf suggest OUT -o OUT/next --boxes 50 --box-size-nm 200,400,400",
    )
    prediction: str = Field(description="folder from `voxclf predict`", json_schema_extra=POSITIONAL)
    volume: str | None = Field(
        None,
        description="the volume that was predicted: boxes are then also told apart by texture, and shown on a page",
        json_schema_extra=POSITIONAL,
    )
    output: str = Field(description="folder for suggestions.csv, suggestions.json and suggestions.html")
    labels: str | None = Field(
        None, description="labels so far: what is labelled is left out, and classes with few labels come first"
    )
    boxes: int = Field(20, ge=1, le=1000, description="how many boxes")
    box_size: VoxelCounts | None = Field(
        None, description="z,y,x of a box in voxels, e.g. 1,64,64; default: up to 64 in the plane, the same nm along z"
    )
    box_size_nm: VoxelSizeNm | None = Field(None, description="z,y,x of a box in nm, instead of --box-size")
    region: str | None = Field(None, description="look only in z0:z1,y0:y1,x0:x1 (voxels)")
