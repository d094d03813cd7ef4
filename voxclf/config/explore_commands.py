"""Commands that look at data before anything is trained."""

from __future__ import annotations

from pydantic import Field

from voxclf.config.base import POSITIONAL
from voxclf.config.options import BankOptions, LabelValues, VolumeInput, WorkerOptions


class ExploreConfig(VolumeInput, LabelValues, BankOptions, WorkerOptions):
    """``voxclf explore``."""

    command = "explore"
    summary = "look before training: labels, grey values per class, slices, noise, and what is wrong with the data"
    examples = (
        "voxclf explore volume.tif labels.tif -o LOOK --voxel-size 50,4.6,4.6",
        "voxclf explore volume.zarr slices.toml -o LOOK --learning-curve",
        "voxclf explore volume.zarr -o LOOK",
    )
    labels: str | None = Field(
        None,
        description="label volume of the same shape (0 = unlabelled), or a TOML file that lists labelled slices",
        json_schema_extra=POSITIONAL,
    )
    output: str = Field(description="folder for explore.html and explore.json")
    voxels: int = Field(
        500_000_000, ge=1_000_000, description="voxels to read of a larger volume, in boxes spread over it"
    )
    learning_curve: bool = Field(
        False, description="fit on growing parts of the labels and say what another labelled slice would bring"
    )
    model: str = Field("random_forest", description="tree model of the learning curve; the filter bank is its too")
    trees: int | None = Field(None, ge=1, description="trees of the learning curve's models; default: 50")
    folds: int = Field(3, ge=2, le=20, description="slabs held out in turn for the learning curve")
    seed: int = Field(0, ge=0, description="seed of everything random")
