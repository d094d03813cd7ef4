"""``voxclf info``: what is in a volume, from its header and 27 small samples, whatever its size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from voxclf.config import InfoConfig
from voxclf.labels import LabelSet
from voxclf.provenance import IntensityStatistics, sample_boxes
from voxclf.volume import open_volume

MAX_LISTED_IDS = 32


def describe_volume(config: InfoConfig) -> dict[str, Any]:
    """Describe a volume in the words a user would look for."""
    volume = open_volume(config.volume, config.voxel_size, require_voxel_size=False, kind="labels")
    n_voxels = math.prod(volume.shape)
    size_nm = volume.voxel_size_nm
    values: dict[str, Any] = {
        "path": volume.path,
        "shape (z, y, x)": list(volume.shape),
        "channels": volume.n_channels,
        "voxels": f"{n_voxels:,} ({n_voxels * volume.n_channels * volume.dtype.itemsize / 1e9:.3f} GB)",
        "type": str(volume.dtype),
        "chunks (z, y, x)": list(volume.chunk_shape),
        "voxel size (nm)": list(size_nm) if volume.has_voxel_size else "not stated; give --voxel-size z,y,x",
    }
    if volume.has_voxel_size:
        values["extent (µm)"] = [round(n * s / 1000, 3) for n, s in zip(volume.shape, size_nm, strict=True)]
    if volume.channel_names:
        values["channel names"] = list(volume.channel_names)
    label_set = LabelSet.from_metadata(volume.metadata)
    if label_set:
        values["classes"] = dict(zip(map(str, label_set.ids), label_set.names, strict=True))
    sampled = np.unique(np.concatenate([np.unique(volume.read(b.start, b.stop)) for b in sample_boxes(volume.shape)]))
    if volume.dtype.kind in "iu" and len(sampled) <= MAX_LISTED_IDS:
        values["values (in samples)"] = sampled.tolist()
    else:
        statistics = IntensityStatistics.measure(volume)
        values["intensity (in samples)"] = {
            "mean": round(statistics.mean, 2),
            "std": round(statistics.std, 2),
            "1 % to 99 %": f"{statistics.percentile_1:g} to {statistics.percentile_99:g}",
        }
    return values
