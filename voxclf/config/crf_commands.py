"""Commands of the dense CRF."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxclf.config.base import POSITIONAL, Lengths, MemoryBytes, Positive, Seconds
from voxclf.config.options import BlockwiseConfig, OverwriteOption, PredictionInput, Storage


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
