"""Commands that set models against each other."""

from __future__ import annotations

from pydantic import Field

from voxclf.config.base import Seconds
from voxclf.config.options import (
    Balance,
    BankOptions,
    BlockwiseConfig,
    ComputeOptions,
    LabelsInput,
    LabelValues,
    VolumeInput,
)


class CompareConfig(VolumeInput, LabelsInput, LabelValues, BankOptions, ComputeOptions, BlockwiseConfig):
    """``voxclf compare``."""

    command = "compare"
    summary = "several models on the same labels, split and time budget: one table, and what each stage gains"
    examples = (
        "voxclf compare volume.tif labels.tif -o CMP --models random_forest,xgboost,4conv,unet3d --time 10m",
        "voxclf compare volume.tif labels.tif -o CMP --models "
        "random_forest,random_forest+autocontext,random_forest+crf --validation labels_val.tif",
        "voxclf compare volume.tif labels.tif -o CMP --models random_forest:bank=edges,random_forest --seeds 5",
    )
    models: str = Field(
        "random_forest,xgboost",
        description="who takes part, separated by commas: NAME[:option=value...][+autocontext[=ROUNDS]][+crf]",
    )
    output: str = Field(description="folder for the page, the table, and everything that was fitted and predicted")
    validation: str | None = Field(
        None, description="labels to score on; default: one slab of the labels is held out of training"
    )
    slabs: int = Field(5, ge=2, le=20, description="without --validation: slabs of the labels, one of them held out")
    time: Seconds = Field(
        600.0, description="training time of each network, and of tuning each CRF, e.g. 90s, 10m or 1h"
    )
    seeds: int = Field(3, ge=1, le=20, description="how often each model is trained, with another seed each time")
    seed: int = Field(0, ge=0, description="first of the seeds")
    region: str | None = Field(
        None, description="predict and score only z0:z1,y0:y1,x0:x1 (voxels); default: around the labels scored on"
    )
    samples: int = Field(150_000, ge=100, description="labelled voxels that trees are trained on")
    balance: Balance | None = Field(None, description="weight of the classes in training, as in `voxclf fit`")
    folds: int = Field(5, ge=2, le=20, description="slabs of the cross-validation within the training labels")
