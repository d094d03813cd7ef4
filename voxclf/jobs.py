"""One resumable job over a volume: create or reopen the outputs, run the blocks that are missing, add pyramids.

Predicting, writing features and converting are all this; they differ in their step and in what they store.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.engine.executors import Executor
from voxclf.engine.ledger import Ledger
from voxclf.engine.run import (
    Check,
    Encode,
    Output,
    Receipt,
    choose_chunk_shape,
    choose_core_shape,
    fold_blocks,
    map_blocks,
)
from voxclf.engine.step import CopyStep, Step
from voxclf.errors import OutputExistsError
from voxclf.formats.ome_metadata import Kind
from voxclf.geometry import Block, Region, VoxelSize, Zyx, parse_region, split_into_blocks
from voxclf.progress import Progress, last, silent
from voxclf.pyramid import Reduction, downsampled_view
from voxclf.volume import DEFAULT_CHUNK, Volume, create_volume, list_levels, open_level

FIXED_BYTES = 90_000_000
"""What compiled code and the libraries' own buffers take in a process once blocks run, whatever their size."""

SCAN_CORE: Zyx = (64, 256, 256)


@dataclass(frozen=True)
class OutputSpec:
    """A volume that a job will write, described before it exists.

    Parameters
    ----------
    path : Path
        OME-Zarr to create.
    kind : str
        "labels", "probabilities", "features" or "image"; decides how coarser levels are made.
    n_channels, dtype, channel_names
        What is stored per voxel.
    encode : callable
        Turns a step's float result (C, Z, Y, X) into what is stored.
    """

    path: Path
    kind: Kind
    n_channels: int
    dtype: np.dtype
    encode: Encode
    channel_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BlockJob:
    """What is computed: a step over input volumes, into outputs, within a region.

    ``description`` is JSON-able and decides whether an interrupted run is the same job; the outputs carry it as
    their provenance. ``ledger`` is the folder of the done-markers. ``check`` sees every block before it is written.
    """

    step: Step
    inputs: Sequence[Volume]
    outputs: Sequence[OutputSpec]
    ledger: Path
    description: Mapping[str, Any]
    attributes: Mapping[str, Any]
    region: Region
    voxel_size_nm: VoxelSize
    check: Check | None = None


@dataclass(frozen=True)
class JobResult:
    """What a job did: the volumes, and how many blocks were there already."""

    volumes: tuple[Volume, ...]
    n_blocks: int
    n_resumed: int


def choose_region(text: str | None, volume: Volume) -> Region:
    """The region asked for, or the whole volume."""
    return parse_region(text, volume.shape) if text else Region((0, 0, 0), volume.shape)


def run_job(
    job: BlockJob,
    executor: Executor,
    memory_bytes: int,
    *,
    overwrite: bool = False,
    pyramid: bool = True,
    progress: Progress = silent,
) -> JobResult:
    """Run a job, or what an interrupted run of it left to do.

    Raises
    ------
    OutputExistsError
        If an output exists that this job did not write, and ``overwrite`` is not set.
    BlockError
        If a block failed; everything finished before it is kept.
    """
    if overwrite:
        shutil.rmtree(job.ledger, ignore_errors=True)
    elif not (job.ledger / "job.json").exists():
        _refuse_foreign_outputs(job)
    ledger = Ledger.open(job.ledger, job.description)
    step = job.step
    budget = memory_bytes - _held_bytes(job) * executor.n_processes
    z, y, x = (min(c, n) for c, n in zip(DEFAULT_CHUNK, job.inputs[0].shape, strict=True))
    chunk_shape = choose_chunk_shape(step, (z, y, x), budget, executor.n_workers)
    outputs = [_open_output(job, spec, chunk_shape, overwrite) for spec in job.outputs]
    write_shape = outputs[0].volume.write_shape
    core_shape = choose_core_shape(step, write_shape, job.region.shape, budget, executor.n_workers)
    core_shape = ledger.keep_core_shape(core_shape)
    blocks = split_into_blocks(job.inputs[0].shape, core_shape, step.halo, step.alignment, job.region)
    n_resumed = len(ledger.done)
    n_left = job.region.n_voxels * (1 - n_resumed / len(blocks))
    receipts = map_blocks(step, job.inputs, outputs, blocks, executor, ledger, job.check)
    for _ in progress(str(job.description["job"]), receipts, n_left, "voxel"):
        pass
    if pyramid:
        for spec in job.outputs:
            _build_pyramid(job, spec, executor, progress)
    return JobResult(tuple(output.volume for output in outputs), len(blocks), n_resumed)


def _held_bytes(job: BlockJob) -> int:
    """What each process holds whatever the blocks: decoded input, and code with its buffers."""
    return sum(volume.info.most_cached_bytes for volume in job.inputs) + FIXED_BYTES


def _refuse_foreign_outputs(job: BlockJob) -> None:
    for spec in job.outputs:
        if spec.path.exists():
            raise OutputExistsError(
                f"{spec.path} exists and is not an interrupted run of this job; use --overwrite to replace it, or give "
                "another output"
            )


def _open_output(job: BlockJob, spec: OutputSpec, chunk_shape: Zyx, overwrite: bool) -> Output:
    if overwrite or not spec.path.exists():
        create_volume(
            spec.path,
            job.inputs[0].shape,
            spec.n_channels,
            spec.dtype,
            job.voxel_size_nm,
            chunk_shape,
            kind=spec.kind,
            attributes=job.attributes,
            channel_names=spec.channel_names,
            overwrite=overwrite,
        )
    level = open_level(spec.path, 0, writable=True)
    return Output(replace(level, path=str(spec.path)), spec.encode)


def _build_pyramid(job: BlockJob, spec: OutputSpec, executor: Executor, progress: Progress) -> None:
    """Fill the coarser levels of an output, each from the one above, within the region that was computed."""
    n_voxels = sum(math.prod(level.shape) for level in list_levels(spec.path)[1:])
    for _ in progress(f"pyramid {spec.kind}", _fill_levels(job, spec, executor), n_voxels, "voxel"):
        pass


def _fill_levels(job: BlockJob, spec: OutputSpec, executor: Executor) -> Iterator[Receipt]:
    reduction: Reduction = "most frequent" if spec.kind == "labels" else "mean"
    region = job.region
    for level in list_levels(spec.path)[1:]:
        view = downsampled_view(open_level(spec.path, level.index - 1), level.factors, reduction)
        coarser = open_level(spec.path, level.index, writable=True)
        region = _coarsen(region, level.factors)
        blocks = split_into_blocks(coarser.shape, coarser.write_shape, region=region)
        step = CopyStep(coarser.n_channels, coarser.dtype.itemsize)
        ledger = Ledger.open(job.ledger / f"{spec.path.stem}_{level.index}", {"level": level.index})
        yield from map_blocks(step, [view], [Output(coarser, np.asarray)], blocks, executor, ledger)


def _coarsen(region: Region, factors: Zyx) -> Region:
    """The voxels of a coarser level that a region of the finer one has a part in."""
    z0, y0, x0 = (a // f for a, f in zip(region.start, factors, strict=True))
    z1, y1, x1 = (-(-b // f) for b, f in zip(region.stop, factors, strict=True))
    return Region((z0, y0, x0), (z1, y1, x1))


@dataclass(frozen=True)
class _CountVoxels:
    def __call__(self, block: Block, array: np.ndarray) -> int:
        return block.core.n_voxels


def check_finite(volume: Volume, executor: Executor, progress: Progress = silent) -> None:
    """Read a float volume once, before work starts, and refuse NaN and infinity; integers cannot hold any.

    Raises
    ------
    BlockError
        Naming the first such voxel of a block.
    """
    if volume.dtype.kind == "f":
        blocks = split_into_blocks(volume.shape, SCAN_CORE)
        counted = fold_blocks(_CountVoxels(), [volume], blocks, executor)
        last(progress("check", counted, blocks.region.n_voxels, "voxel"))
