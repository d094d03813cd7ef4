"""Features of a whole volume on disk: for other programs, and to look at what a filter sees.

Prediction does not come this way; it computes features block by block and keeps none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.bank import FilterBank
from voxclf.config import FeaturesConfig
from voxclf.engine.executors import make_executor
from voxclf.fit_job import make_bank
from voxclf.geometry import UNIT, VoxelSize, Zyx, add
from voxclf.jobs import BlockJob, JobResult, OutputSpec, check_finite, choose_region, run_job
from voxclf.predict import check_one_channel
from voxclf.probabilities import ENCODERS
from voxclf.progress import Progress, silent
from voxclf.provenance import describe_input, software_versions
from voxclf.volume import open_volume


@dataclass(frozen=True)
class FeatureStep:
    """The filter bank as a step: (1, Z + 2h, …) to (F, Z, Y, X) float32."""

    bank: FilterBank
    voxel_size_nm: VoxelSize
    alignment: Zyx = UNIT

    @property
    def halo(self) -> Zyx:
        """The reach of the widest filter."""
        return self.bank.halo(self.voxel_size_nm)

    @property
    def out_channels(self) -> int:
        """Number of features F."""
        return self.bank.n_features

    def working_bytes(self, core_shape: Zyx) -> int:
        """What is read, the filters' scratch, and the features once as computed and once as stored."""
        read = math.prod(add(core_shape, add(self.halo, self.halo)))
        scratch = self.bank.working_bytes(core_shape, self.voxel_size_nm)
        return 4 * (2 * self.bank.n_features * math.prod(core_shape) + read) + scratch

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Compute the features of a block."""
        (image,) = arrays
        return self.bank.compute(image[0], self.voxel_size_nm)


def write_features(config: FeaturesConfig, progress: Progress = silent) -> JobResult:
    """Write every feature of a volume as one OME-Zarr with a channel per feature; resumes when interrupted."""
    volume = open_volume(config.volume, config.voxel_size)
    check_one_channel(volume)
    executor = make_executor(config.executor, config.workers)
    check_finite(volume, executor, progress)
    bank = make_bank(config, volume.voxel_size_nm)
    region = choose_region(config.region, volume)
    path = Path(config.output)
    # The square of a 16-bit gradient does not fit float16.
    dtype = config.dtype or ("float16" if volume.dtype.itemsize == 1 else "float32")
    description = {
        "job": "features",
        "bank": bank.to_dict(),
        "input": describe_input(volume),
        "region": str(region),
        "dtype": dtype,
    }
    names = bank.names(volume.voxel_size_nm)
    output = OutputSpec(path, "features", bank.n_features, np.dtype(dtype), ENCODERS[dtype], names)
    job = BlockJob(
        step=FeatureStep(bank, volume.voxel_size_nm),
        inputs=[volume],
        outputs=[output],
        ledger=path.with_suffix(".ledger"),
        description=description,
        attributes={"provenance": {**description, "versions": software_versions()}},
        region=region,
        voxel_size_nm=volume.voxel_size_nm,
    )
    # Viewers load one feature at a time at full resolution; coarse levels would only double the disk space.
    return run_job(job, executor, config.memory, overwrite=config.overwrite, pyramid=False, progress=progress)
