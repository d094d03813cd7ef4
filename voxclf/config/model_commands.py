"""Commands that fit, apply and score models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL, Config
from voxclf.config.options import (
    BankOptions,
    BlockwiseConfig,
    FitOptions,
    LabelsInput,
    OverwriteOption,
    PredictOptions,
    UnlabelledOption,
    VolumeInput,
    WorkerOptions,
)


class FitConfig(VolumeInput, LabelsInput, FitOptions, WorkerOptions, OverwriteOption):
    """``voxclf fit``."""

    command = "fit"
    summary = "train a model from a volume and labels on some of its voxels"
    examples = (
        "voxclf fit volume.tif labels.tif -o model --voxel-size 50,4.6,4.6",
        "voxclf fit volume.zarr slices.toml -o model --model xgboost --classes membrane,mitochondrion,other",
    )
    output: str = Field(description="model folder to write")


class PredictConfig(VolumeInput, PredictOptions, BlockwiseConfig):
    """``voxclf predict``."""

    command = "predict"
    summary = "classify every voxel of a volume with a fitted model; resumes when interrupted"
    examples = (
        "voxclf predict model volume.tif -o OUT",
        "voxclf predict model big.zarr -o OUT --memory 8GB --workers 16 --probabilities none",
    )
    model: str = Field(description="model folder from `voxclf fit`", json_schema_extra=POSITIONAL)
    output: str = Field(description="folder for labels.zarr and probabilities.zarr")


class EvaluateConfig(UnlabelledOption, WorkerOptions):
    """``voxclf evaluate``."""

    command = "evaluate"
    summary = "score a prediction against labels that were not trained on"
    examples = ("voxclf evaluate OUT labels_val.tif -o OUT/evaluation",)
    prediction: str = Field(description="folder from `voxclf predict`, or a label volume", json_schema_extra=POSITIONAL)
    labels: str = Field(description="true labels: volume or slice listing", json_schema_extra=POSITIONAL)
    output: str | None = Field(None, description="folder for report.html and report.json; default: print only")
    classes: str | None = Field(None, description="class names, where the prediction does not carry them")
    region: str | None = Field(None, description="score only z0:z1,y0:y1,x0:x1 (voxels)")


class RunConfig(VolumeInput, LabelsInput, FitOptions, PredictOptions, BlockwiseConfig):
    """``voxclf run``."""

    command = "run"
    summary = "the main job: check, fit, predict every voxel, score, report"
    examples = (
        "voxclf run volume.tif labels.tif -o OUT --voxel-size 50,4.6,4.6",
        "voxclf run volume.zarr slices.toml -o OUT --model xgboost --validation labels_val.tif",
    )
    validation: str | None = Field(None, description="labels that are only scored on, never trained on")
    output: str = Field(description="folder for everything: model, volumes, report")


class FeaturesConfig(VolumeInput, BankOptions, BlockwiseConfig):
    """``voxclf features``."""

    command = "features"
    summary = "write the filter bank's features of a volume as OME-Zarr"
    examples = (
        "voxclf features volume.tif -o features.zarr --bank edges",
        "voxclf features volume.zarr -o features.zarr --sigmas 8,16,32 --region 0:100,:,:",
    )
    output: str = Field(description="OME-Zarr to write, channels = features")
    region: str | None = Field(None, description="compute only z0:z1,y0:y1,x0:x1 (voxels)")
    dtype: Literal["float16", "float32"] | None = Field(
        None, description="how features are stored; default: float16 for 8-bit volumes, else float32"
    )


class ModelsConfig(Config):
    """``voxclf models``."""

    command = "models"
    summary = "list the models that `fit` and `run` know"
    examples = ("voxclf models",)


class DemoConfig(BlockwiseConfig):
    """``voxclf demo``."""

    command = "demo"
    summary = "the whole corridor on a built-in phantom: fit on three slices, predict, score, report"
    examples = ("voxclf demo", "voxclf demo --size 96 --model xgboost -o demo-xgboost")
    output: str = Field("demo", description="folder to write")
    size: int = Field(128, ge=64, le=1024, description="edge of the phantom, voxels")
    model: str = Field("random_forest", description="kind of model; `voxclf models` lists them")
    seed: int = Field(0, ge=0, description="seed of the phantom and the model")
