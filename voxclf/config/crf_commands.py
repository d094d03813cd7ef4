"""Commands of the dense CRF."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL, Lengths, MemoryBytes, Seconds
from voxclf.config.options import BlockwiseConfig, OverwriteOption, PredictionInput, Storage, UnlabelledOption


class CrfInput(PredictionInput):
    """A prediction, its volume, and what else edges may be seen in."""

    guide: str | None = Field(
        None, description="another volume of the same shape whose edges count too, e.g. from `voxclf features`"
    )
    guide_channels: str | None = Field(
        None, description="channels of --guide, names or numbers from 0, separated by commas; default: all"
    )


class CrfRefineConfig(CrfInput, BlockwiseConfig):
    """``voxclf crf-refine``."""

    command = "crf-refine"
    summary = "refine probabilities along the edges of the image with a dense CRF; resumes when interrupted"
    examples = (
        "voxclf crf-refine OUT volume.tif -o REFINED --parameters crf.toml",
        "voxclf crf-refine OUT volume.zarr -o REFINED --bilateral-sigma-nm 40 --intensity-sigma 0.1 "
        "--spatial-sigma-nm 10 --bilateral-weight 3 --memory 16GB",
    )
    output: str = Field(description="folder for labels.zarr and probabilities.zarr")
    parameters: str | None = Field(
        None, description="parameter file from `voxclf crf-tune`, or a model folder that holds one, instead of the next"
    )
    bilateral_sigma_nm: Lengths | None = Field(
        None, description="reach of the kernel that stops at edges, nm: one number or z,y,x"
    )
    intensity_sigma: Lengths | None = Field(
        None,
        description="difference of intensity that counts as an edge, as a share of the intensity range: one number or "
        "one per channel",
    )
    spatial_sigma_nm: Lengths | None = Field(None, description="reach of the smoothing kernel, nm: one number or z,y,x")
    bilateral_weight: float | str | None = Field(
        None, description="weight of the first kernel (4 where left out): a number, or a file with a K x K matrix"
    )
    spatial_weight: float | str | None = Field(
        None, description="weight of the second kernel (2 where left out): a number, or a file with a K x K matrix"
    )
    image_sigma_nm: float | None = Field(
        None, ge=0, description="smooth the image by this width, nm, before edges are looked for (0 where left out)"
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


class CrfTuneConfig(CrfInput, UnlabelledOption, OverwriteOption):
    """``voxclf crf-tune``."""

    command = "crf-tune"
    summary = "fit the parameters of the dense CRF on labels, or find that none helps"
    examples = (
        "voxclf crf-tune OUT volume.tif labels_val.tif --model model",
        "voxclf crf-tune OUT volume.zarr slices_val.toml -o crf.toml --time 30m",
    )
    labels: str = Field(
        description="labels that the model was not trained on: volume or slice listing", json_schema_extra=POSITIONAL
    )
    model: str | None = Field(
        None,
        description="model folder that made the prediction, to keep the parameters in: `predict` and `run` with this "
        "model then refine too",
    )
    output: str | None = Field(None, description="parameter file (TOML) to write, where --model is not given")
    n_iterations: int = Field(5, ge=1, le=1000, description="mean-field iterations, of every refinement too")
    time: Seconds = Field(300.0, description="when to stop the search, e.g. 90s, 5m or 1h")
    workers: int | None = Field(None, ge=1, description="tiles refined at once; default: one per core")
    seed: int = Field(0, ge=0, description="seed of everything random")
