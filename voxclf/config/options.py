"""Groups of options that several commands share: each is described once, here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL, Config, Lengths, MemoryBytes, PatchShape, Seconds, VoxelSizeNm

BankName = Literal["multiscale", "edges", "intensity"]
Balance = Literal["sqrt", "equal", "labelled"]
Storage = Literal["none", "uint8", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["32", "bf16"]
Schedule = Literal["constant", "cosine", "one_cycle"]
LossName = Literal["ce", "focal", "bce", "weighted_bce", "dice", "dice_squared", "dice_bce", "boundary_dou"]


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


class UnlabelledOption(Config):
    """Which voxels nobody labelled."""

    unlabelled: int = Field(0, ge=0, description="label value that means: not labelled")


class LabelValues(UnlabelledOption):
    """What the values of a label volume mean."""

    classes: str | None = Field(
        None, description="class names: '1=membrane,2=mitochondrion' or in order of their ids 'membrane,mitochondrion'"
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


class ComputeOptions(Config):
    """On which processor, and in which arithmetic."""

    device: Device = Field(
        "auto",
        description="where a model is evaluated and a network trained; auto: an NVIDIA GPU if there is one and the "
        "job is large, else the CPU",
    )
    precision: Precision = Field(
        "32",
        description="arithmetic of networks: 32, or bf16: about twice as fast where processor or GPU have it, "
        "probabilities to about 0.01",
    )


class NetworkFitOptions(ComputeOptions):
    """How a network is trained; refused with models that are not networks."""

    help_group: ClassVar[str] = "networks only"

    time: Seconds | None = Field(
        None, description="training time, e.g. 10m; the best network so far is kept. Default: until --patience"
    )
    patch: PatchShape | None = Field(
        None,
        description="patch that decides about its centre voxel: 32 or z,y,x; default: from the voxel size. Segmenters: "
        "crop to train on",
    )
    final_patch: PatchShape | None = Field(
        None,
        description="segmenters: crop to train on in the last third, usually larger than --patch: multi-scale training",
    )
    width: float = Field(1.0, gt=0, le=4, description="multiplies the numbers of channels inside the network")
    encoder: str | None = Field(None, description="unet2d: the network inside, e.g. resnet34, or plain")
    encoder_weights: str | None = Field(None, description="unet2d: what the encoder starts from: imagenet or none")
    three_axes: bool = Field(False, description="unet2d: average the sections across all three axes")
    block: Literal["acb", "res", "se", "eca"] | None = Field(
        None, description="res_unet_r, res_unet_h: the block that they are made of; default: acb"
    )
    input_bank: Literal["multiscale", "edges"] | None = Field(
        None, description="give the network this filter bank's features beside the image"
    )
    init: str | None = Field(None, description="folder from `voxclf pretrain` (or a network's) to start from")
    loss: LossName = Field("ce", description="what is minimised: ce is cross entropy")
    gamma: float = Field(2.0, ge=0, description="focus of --loss focal on voxels that are still wrong; 0 is ce")
    class_weights: Balance = Field(
        "sqrt", description="weight of the classes in the loss: by the root of their frequency, equal, or as labelled"
    )
    learning_rate: float = Field(1e-3, gt=0, description="largest step size of the optimiser")
    weight_decay: float = Field(5e-4, ge=0, description="pull of the weights towards zero")
    optimizer: Literal["adam", "adamw", "sgd", "adagrad"] = Field("adam", description="how gradients become steps")
    schedule: Schedule | None = Field(
        None,
        description="step size over the training time: constant, falling, or rising and falling; default: one_cycle "
        "with --time or --steps, constant without an end",
    )
    monitor: Literal["macro_f1", "loss"] = Field(
        "loss",
        description="what on the held-out labels decides which network is best (of the last quarter, if the step size "
        "falls) and when training ends; macro F1 leaps from round to round where few of a class are held out",
    )
    sampling: Literal["slabs", "patches"] = Field(
        "slabs",
        description="train on windows of labelled slices (the same gradient, 10 to 100 times the voxels) or "
        "on single patches",
    )
    batch: int | None = Field(None, ge=1, description="windows or patches per step; default: what suits the sampling")
    window: int | None = Field(
        None,
        ge=1,
        description="side of a training window, voxels; default: for slabs 17, or 33 and fewer of them where "
        "classes do not lie in clumps; for crops what suits the network",
    )
    spacing: int = Field(
        4,
        ge=1,
        description="slabs: distance of the voxels that count in a window, where the network's strides allow it; 1: "
        "every voxel, which are more in the time but more alike",
    )
    steps: int | None = Field(None, ge=1, description="most optimiser steps; default: no limit")
    epochs: int | None = Field(
        None,
        ge=1,
        description="most rounds of training between two validations; default: 200, no limit with --time or --steps",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="rounds without a better --monitor after which training ends; default: 10 with a constant "
        "--schedule, no limit with one that falls, since the best comes at its end",
    )
    augment: Literal["none", "flips", "patch", "B", "C", "D"] = Field(
        "patch", description="random changes of what is trained on; patch: flips, quarter turns and intensity"
    )
    devices: int = Field(1, ge=1, description="GPUs to train on at once")
    strategy: str = Field("auto", description="how several GPUs share training, as Lightning names it, e.g. ddp")

    @property
    def chosen_schedule(self) -> Schedule:
        """The schedule, or the default one: a step size that falls needs an end to fall to."""
        if self.schedule is not None:
            return self.schedule
        return "constant" if self.time is None and self.steps is None else "one_cycle"


class FitOptions(LabelValues, BankOptions, NetworkFitOptions):
    """What decides how a model is trained, beside its inputs."""

    model: str = Field("random_forest", description="kind of model; `voxclf models` lists them")
    samples: int = Field(150_000, ge=100, description="budget of labelled voxels to train on")
    balance: Balance | None = Field(
        None,
        description="weight of the classes in training: by the square root of their frequency, equal, or as labelled; "
        "networks: how often windows are drawn around them (see --class-weights); default: equal for the slabs of a "
        "patch network, else sqrt",
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
    tune_crf: bool = Field(
        False,
        description="trees: also tune a dense CRF on the held-out slabs and keep it with the model, if it helps there",
    )
    seed: int = Field(0, ge=0, description="seed of everything random")

    @property
    def row_balance(self) -> Balance:
        """The balance of the rows that trees are trained on."""
        return self.balance or "sqrt"


class PredictOptions(ComputeOptions):
    """What decides how a prediction is made and stored."""

    probabilities: Storage = Field("uint8", description="how probabilities are stored; none: labels only")
    uncertainty: bool = Field(
        False, description="also write uncertainty.zarr: entropy of the probabilities, 0 sure to 1 no idea"
    )
    region: str | None = Field(None, description="predict only z0:z1,y0:y1,x0:x1 (voxels)")
    crf: Literal["auto", "off"] = Field(
        "auto",
        description="auto: refine with the dense CRF, into the folder `refined` of the output, if crf-tune kept one "
        "with the model; off: leave it out",
    )
    pyramid: bool = Field(True, description="add coarser levels for viewers")
    tta: bool = Field(
        False, description="networks: average over mirrored volumes; 8 times the work, 4 where slices are thick"
    )
    output_stride: int = Field(
        1,
        ge=1,
        le=64,
        description="networks: classify every s-th voxel along each axis and interpolate: a preview, approximate",
    )
    real_context: bool = Field(
        False, description="networks with padding: let voxels see real neighbours instead: approximate"
    )
