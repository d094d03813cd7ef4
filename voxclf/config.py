"""One frozen, validated configuration per command; the CLI, the TOML file and the provenance are read off it.

A field's ``description`` is its ``--help`` text, its constraint is checked before any work starts, and what
ran is saved beside the output as ``config.toml``, which ``--config`` reads back.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

POSITIONAL: dict[str, Any] = {"positional": True}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_numbers(value: Any) -> Any:
    """Read ``50,4.6,4.6`` into a list of numbers; anything but text is passed on to the field's own check."""
    if not isinstance(value, str):
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise ValueError("give numbers separated by commas, for example 50,4.6,4.6") from None


def parse_memory(value: Any) -> Any:
    """Read ``4GB``, ``512MB`` or a number of bytes into bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", value)
    if not match or match[2].upper() not in UNITS:
        raise ValueError("give a number and a unit, for example 4GB or 512MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_duration(value: Any) -> Any:
    """Read ``90s``, ``5m``, ``1h`` or a number of seconds into seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([smh]?)\s*", value.lower())
    if not match:
        raise ValueError("give a number and a unit, for example 90s, 5m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
VoxelSizeNm = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(parse_numbers)]
Lengths = Annotated[tuple[Positive, ...], BeforeValidator(parse_numbers)]
MemoryBytes = Annotated[int, BeforeValidator(parse_memory), Field(ge=150_000_000)]
BankName = Literal["multiscale", "edges", "intensity"]
VoxelCounts = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(parse_numbers)]
Balance = Literal["sqrt", "equal", "labelled"]
Storage = Literal["none", "uint8", "float16", "float32"]


class Config(BaseModel):
    """What every command shares: unknown fields are refused, values are checked once and then frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()


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


class BankOptions(Config):
    """Which filters turn a volume into features."""

    bank: BankName = Field("multiscale", description="filter bank: multiscale, edges (3x3 filters) or intensity alone")
    sigmas: Lengths | None = Field(
        None, description="scales of the multiscale bank in nm, e.g. 5,10,20,40; default: from the voxel size"
    )
    dimensions: Literal[2, 3] | None = Field(
        None, description="filter per slice (2) or in 3D (3); default: 2 where slices are much thicker than pixels"
    )


class InfoConfig(VolumeInput):
    """``voxclf info``."""

    command = "info"
    summary = "show what is in a volume: shape, voxel size, type, chunks, intensities, classes"
    examples = ("voxclf info volume.tif --voxel-size 8,8,8", "voxclf info data.h5:/raw", "voxclf info OUT/labels.zarr")


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


class FitConfig(VolumeInput, LabelsInput, FitOptions, WorkerOptions, OverwriteOption):
    """``voxclf fit``."""

    command = "fit"
    summary = "train a model from a volume and labels on some of its voxels"
    examples = (
        "voxclf fit volume.tif labels.tif -o model --voxel-size 50,4.6,4.6",
        "voxclf fit volume.zarr slices.toml -o model --model xgboost --classes membrane,mitochondrion,other",
    )
    output: str = Field(description="model folder to write")


class PredictOptions(Config):
    """What decides how a prediction is stored."""

    probabilities: Storage = Field("uint8", description="how probabilities are stored; none: labels only")
    region: str | None = Field(None, description="predict only z0:z1,y0:y1,x0:x1 (voxels)")
    pyramid: bool = Field(True, description="add coarser levels for viewers")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="where trees run; auto: an NVIDIA GPU if there is one and the job is large, else the CPU"
    )


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


class EvaluateConfig(WorkerOptions):
    """``voxclf evaluate``."""

    command = "evaluate"
    summary = "score a prediction against labels that were not trained on"
    examples = ("voxclf evaluate OUT labels_val.tif -o OUT/evaluation",)
    prediction: str = Field(description="folder from `voxclf predict`, or a label volume", json_schema_extra=POSITIONAL)
    labels: str = Field(description="true labels: volume or slice listing", json_schema_extra=POSITIONAL)
    output: str | None = Field(None, description="folder for report.html and report.json; default: print only")
    classes: str | None = Field(None, description="class names, where the prediction does not carry them")
    unlabelled: int = Field(0, ge=0, description="label value that means: not labelled")
    region: str | None = Field(None, description="score only z0:z1,y0:y1,x0:x1 (voxels)")


class PredictionInput(VolumeInput):
    """A prediction, and the volume that it was made from."""

    prediction: str = Field(
        description="folder from `voxclf predict`, or a volume of probabilities", json_schema_extra=POSITIONAL
    )


class CrfRefineConfig(PredictionInput, BlockwiseConfig):
    """``voxclf crf-refine``."""

    command = "crf-refine"
    summary = "refine probabilities along the edges of the image with a dense CRF; resumes when interrupted"
    examples = (
        "voxclf crf-refine OUT volume.tif -o REFINED --parameters crf.toml",
        "voxclf crf-refine OUT volume.zarr -o REFINED --bilateral-sigma-nm 40 --intensity-sigma 0.1 "
        "--spatial-sigma-nm 10 --bilateral-weight 3 --memory 16GB",
    )
    output: str = Field(description="folder for labels.zarr and probabilities.zarr")
    parameters: str | None = Field(None, description="parameter file from `voxclf crf-tune`, instead of the next six")
    bilateral_sigma_nm: Lengths | None = Field(
        None, description="reach of the kernel that stops at edges, nm: one number or z,y,x"
    )
    intensity_sigma: Positive | None = Field(
        None, description="difference of intensity that counts as an edge, as a share of the intensity range"
    )
    spatial_sigma_nm: Lengths | None = Field(None, description="reach of the smoothing kernel, nm: one number or z,y,x")
    bilateral_weight: float | str | None = Field(
        None, description="weight of the first kernel (4 where left out): a number, or a file with a K x K matrix"
    )
    spatial_weight: float | str | None = Field(
        None, description="weight of the second kernel (2 where left out): a number, or a file with a K x K matrix"
    )
    n_iterations: int | None = Field(None, ge=1, le=1000, description="mean-field iterations (10 where left out)")
    tolerance: float = Field(
        1e-4, gt=0, lt=1, description="share of labels that cutting into blocks may change; decides the halo"
    )
    probabilities: Storage = Field("uint8", description="how probabilities are stored; none: labels only")
    region: str | None = Field(None, description="refine only z0:z1,y0:y1,x0:x1 (voxels); default: what was predicted")
    pyramid: bool = Field(True, description="add coarser levels for viewers")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the CRF runs; auto: an NVIDIA GPU if there is one and the job is large, else the CPU"
    )
    memory: MemoryBytes = Field(
        4_000_000_000, description="budget for the blocks in work, e.g. 16GB; larger blocks waste less on their halo"
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="threads of a block, or with --executor processes blocks at once; default: one per core",
    )


class CrfTuneConfig(PredictionInput, OverwriteOption):
    """``voxclf crf-tune``."""

    command = "crf-tune"
    summary = "fit the parameters of the dense CRF on labels, or find that none helps"
    examples = (
        "voxclf crf-tune OUT volume.tif labels_val.tif -o crf.toml",
        "voxclf crf-tune OUT volume.zarr slices_val.toml -o crf.toml --time 30m",
    )
    labels: str = Field(
        description="labels that the model was not trained on: volume or slice listing", json_schema_extra=POSITIONAL
    )
    output: str = Field(description="parameter file (TOML) to write")
    unlabelled: int = Field(0, ge=0, description="label value that means: not labelled")
    n_iterations: int = Field(10, ge=1, le=1000, description="mean-field iterations")
    time: Seconds = Field(300.0, description="when to stop the search, e.g. 90s, 5m or 1h")
    workers: int | None = Field(None, ge=1, description="tiles refined at once; default: one per core")
    seed: int = Field(0, ge=0, description="seed of everything random")


class SuggestConfig(BlockwiseConfig):
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
    unlabelled: int = Field(0, ge=0, description="label value that means: not labelled")
    boxes: int = Field(20, ge=1, le=1000, description="how many boxes")
    box_size: VoxelCounts | None = Field(
        None, description="z,y,x of a box in voxels, e.g. 1,64,64; default: up to 64 in the plane, the same nm along z"
    )
    box_size_nm: VoxelSizeNm | None = Field(None, description="z,y,x of a box in nm, instead of --box-size")
    region: str | None = Field(None, description="look only in z0:z1,y0:y1,x0:x1 (voxels)")


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


COMMANDS: tuple[type[Config], ...] = (
    RunConfig,
    FitConfig,
    PredictConfig,
    EvaluateConfig,
    CrfTuneConfig,
    CrfRefineConfig,
    SuggestConfig,
    FeaturesConfig,
    InfoConfig,
    ConvertConfig,
    ModelsConfig,
    DemoConfig,
)

AnyConfig = TypeVar("AnyConfig", bound=Config)


def make_config(kind: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
    """Check values and freeze them.

    Raises
    ------
    ValueError
        With one line for each value that is wrong: which, what it was, what is allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, detail) for detail in error.errors())) from None


def _explain(kind: type[Config], detail: Any) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else "configuration"
    option = name if _is_positional(kind, name) else f"--{name.replace('_', '-')}"
    if detail["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        return f"{name} is not a setting of `voxclf {kind.command}`; known are {known}"
    if detail["type"] == "missing" and len(detail["loc"]) > 1:
        return f"{option} has only {len(detail['input'])} numbers ({kind.model_fields[name].description})"
    if detail["type"] == "missing":
        return f"{option} is missing: {kind.model_fields[name].description}"
    message = detail["msg"].removeprefix("Value error, ")
    field = kind.model_fields.get(name)
    meaning = f" ({field.description})" if field else ""
    return f"{option} was {detail['input']!r}: {message[0].lower()}{message[1:]}{meaning}"


def _is_positional(kind: type[Config], name: str) -> bool:
    field = kind.model_fields.get(name)
    return bool(field and field.json_schema_extra == POSITIONAL)


def positional_names(kind: type[Config]) -> list[str]:
    """Arguments given without an option, in the order of the command line: the model first, then inputs."""
    order = {"model": 0, "prediction": 0, "volume": 1, "labels": 2, "output": 3}
    names = [name for name in kind.model_fields if _is_positional(kind, name)]
    return sorted(names, key=lambda name: order[name])


def load_config_file(path: Path) -> dict[str, Any]:
    """Read settings from TOML; names as in :class:`Config`, dashes allowed."""
    if not path.exists():
        raise FileNotFoundError(f"--config {path} does not exist; give a TOML file such as a saved config.toml")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path} is not valid TOML: {error}; compare with a saved config.toml") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def save_config(config: Config, path: Path) -> None:
    """Write what ran, so that ``voxclf COMMAND --config`` repeats it."""
    values = config.model_dump(mode="json", exclude_none=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# voxclf {config.command} --config {path.name}\n{tomli_w.dumps(values)}", encoding="utf-8")
