"""Copies between formats, block by block: anything readable to OME-Zarr, or to TIFF for programs that want one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from voxclf.config import ConvertConfig
from voxclf.engine.executors import make_executor
from voxclf.engine.step import CopyStep
from voxclf.geometry import Region
from voxclf.jobs import BlockJob, OutputSpec, run_job
from voxclf.progress import Progress, silent
from voxclf.provenance import describe_input, software_versions
from voxclf.volume import Volume, export_tiff, open_volume


def convert_volume(config: ConvertConfig, progress: Progress = silent) -> None:
    """Write a volume in another format; voxel size, class names and channel names go with it.

    Raises
    ------
    ValueError
        If the output's ending is neither .zarr nor .tif.
    OutputExistsError
        If the output exists and ``overwrite`` is not set.
    """
    volume = open_volume(config.volume, config.voxel_size, kind=config.kind)
    suffix = Path(config.output).suffix.lower()
    if suffix == ".zarr":
        _convert_to_zarr(volume, config, progress)
    elif suffix in {".tif", ".tiff"}:
        export_tiff(volume, config.output, overwrite=config.overwrite, progress=progress)
    else:
        raise ValueError(f"output {config.output!r} ends in {suffix!r}; allowed are .zarr (OME-Zarr) and .tif")


def _convert_to_zarr(volume: Volume, config: ConvertConfig, progress: Progress) -> None:
    path = Path(config.output)
    kind = volume.metadata.get("kind", config.kind)
    description = {"job": "convert", "input": describe_input(volume), "kind": kind}
    output = OutputSpec(path, kind, volume.n_channels, volume.dtype, np.asarray, volume.channel_names or None)
    job = BlockJob(
        step=CopyStep(volume.n_channels, volume.dtype.itemsize),
        inputs=[volume],
        outputs=[output],
        ledger=path.with_suffix(".ledger"),
        description=description,
        attributes={
            # What another program's file carries is kept; where it was converted from is added.
            **{name: value for name, value in volume.metadata.items() if name != "kind"},
            "converted": {**description, "versions": software_versions()},
        },
        region=Region((0, 0, 0), volume.shape),
        voxel_size_nm=volume.voxel_size_nm,
    )
    executor = make_executor(config.executor, config.workers)
    run_job(job, executor, config.memory, overwrite=config.overwrite, pyramid=config.pyramid, progress=progress)
