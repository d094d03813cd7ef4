"""Groups of options that several commands share: each is described once, here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL, Config, Lengths, MemoryBytes, VoxelSizeNm

BankName = Literal["multiscale", "edges", "intensity"]
Balance = Literal["sqrt", "equal", "labelled"]
Storage = Literal["none", "uint8", "float16", "float32"]


class WorkerOptions(Config):
    """Who does the blocks of a command."""

    workers: int | None = Field(None, ge=1, description="blocks computed at once; default: one per core")
    executor: Literal["threads", "processes", "serial"] = Field(
        "threads", description="where blocks run: threads share one model, processes each hold their own"
    )


class OverwriteOption(Config):
    """What to do about an output that is there already."""

    overwrite: bool = Field(False, description="replace an output of another job instead of refusing")


class BlockwiseConfig(WorkerOptions, OverwriteOption):
    """How a command that writes a volume walks over it."""

    memory: MemoryBytes = Field(
        400_000_000, description="budget for the blocks in work, all workers together, e.g. 4GB"
    )


class VolumeInput(Config):
    """A volume to read."""

    volume: str = Field(
        description="TIFF file or folder of slices, OME-Zarr, file.h5:/path, MRC, N5, precomputed or .npy",
        json_schema_extra=POSITIONAL,
    )
    voxel_size: VoxelSizeNm | None = Field(
        None, description="z,y,x in nm, e.g. 50,4.6,4.6; needed where the file does not state it"
    )


class LabelsInput(Config):
    """Labels to learn from."""

    labels: str = Field(
        description="label volume of the same shape (0 = unlabelled), or a TOML file that lists labelled slices",
        json_schema_extra=POSITIONAL,
    )


class PredictionInput(VolumeInput):
    """A prediction, and the volume that it was made from."""

    prediction: str = Field(
        description="folder from `voxclf predict`, or a volume of probabilities", json_schema_extra=POSITIONAL
    )


class BankOptions(Config):
    """Which filters turn a volume into features."""

    bank: BankName = Field("multiscale", description="filter bank: multiscale, edges (3x3 filters) or intensity alone")
    sigmas: Lengths | None = Field(
        None, description="scales of the multiscale bank in nm, e.g. 5,10,20,40; default: from the voxel size"
    )
    dimensions: Literal[2, 3] | None = Field(
        None, description="filter per slice (2) or in 3D (3); default: 2 where slices are much thicker than pixels"
    )


class FitOptions(BankOptions):
    """What decides how a model is trained, beside its inputs."""

    model: str = Field("random_forest", description="kind of model; `voxclf models` lists them")
    classes: str | None = Field(
        None, description="class names: '1=membrane,2=mitochondrion' or in order of their ids 'membrane,mitochondrion'"
    )
    unlabelled: int = Field(0, ge=0, description="label value that means: not labelled")
    samples: int = Field(150_000, ge=100, description="budget of labelled voxels to train on")
    balance: Balance = Field(
        "sqrt",
        description="weight of the classes in training: by the square root of their frequency, equal, or as labelled",
    )
    trees: int | None = Field(None, ge=1, description="number of trees or boosting rounds; default: the model's own")
    max_depth: int | None = Field(None, ge=1, description="longest path of a tree; default: the model's own")
    min_samples_leaf: int | None = Field(
        None, ge=1, description="fewest training voxels in a leaf; default: the model's own"
    )
    autocontext: int = Field(
        1, ge=1, le=4, description="rounds: 2 lets a second model see the first one's probabilities around each voxel"
    )
    calibrate: bool = Field(
        False, description="correct the probabilities with what the held-out slabs show; labels may change too"
    )
    folds: int = Field(5, ge=2, le=20, description="slabs of the spatial cross-validation")
    seed: int = Field(0, ge=0, description="seed of everything random")


class PredictOptions(Config):
    """What decides how a prediction is stored."""

    probabilities: Storage = Field("uint8", description="how probabilities are stored; none: labels only")
    region: str | None = Field(None, description="predict only z0:z1,y0:y1,x0:x1 (voxels)")
    pyramid: bool = Field(True, description="add coarser levels for viewers")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="where trees run; auto: an NVIDIA GPU if there is one and the job is large, else the CPU"
    )
