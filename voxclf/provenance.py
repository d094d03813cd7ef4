"""What made an output: input fingerprints, intensity statistics, versions. Stored beside every result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from voxclf import __version__
from voxclf.formats.zarr import write_json_atomically
from voxclf.geometry import Region, Zyx
from voxclf.volume import Volume

SAMPLE_SIDE = 32
SAMPLES_PER_AXIS = 3
LIBRARIES = ("numpy", "scipy", "scikit-learn", "xgboost-cpu", "xgboost", "numba", "tensorstore", "torch")


def sample_boxes(shape: Zyx) -> Iterator[Region]:
    """Yield 27 small boxes spread evenly over a volume: enough to recognise it, whatever its size."""
    starts = [
        sorted({round(i * max(0, n - SAMPLE_SIDE) / (SAMPLES_PER_AXIS - 1)) for i in range(SAMPLES_PER_AXIS)})
        for n in shape
    ]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                stop = tuple(min(a + SAMPLE_SIDE, n) for a, n in zip((z, y, x), shape, strict=True))
                yield Region((z, y, x), stop)  # type: ignore[arg-type]


@dataclass(frozen=True)
class IntensityStatistics:
    """Intensities of a volume, estimated from its sample boxes.

    A model keeps those of the volume it was trained on: a volume to be predicted that looks quite different
    (another contrast, another instrument) is worth a warning.
    """

    mean: float
    std: float
    percentile_1: float
    percentile_99: float

    @classmethod
    def measure(cls, volume: Volume) -> IntensityStatistics:
        """Read the sample boxes and summarise them."""
        values = np.concatenate(
            [volume.read(box.start, box.stop).ravel() for box in sample_boxes(volume.shape)]
        ).astype(np.float64)
        low, high = np.percentile(values, [1, 99])
        return cls(float(values.mean()), float(values.std()), float(low), float(high))

    def distance(self, other: IntensityStatistics) -> float:
        """How far another volume's mean lies from this one's, in standard deviations of this one."""
        return abs(other.mean - self.mean) / max(self.std, 1e-12)

    def to_dict(self) -> dict[str, float]:
        """As plain numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> IntensityStatistics:
        """Read back what :meth:`to_dict` gave."""
        return cls(**values)


def describe_input(volume: Volume) -> dict[str, Any]:
    """Path, geometry and a fingerprint of the voxels in the sample boxes."""
    digest = hashlib.blake2b(f"{volume.shape} {volume.dtype}".encode(), digest_size=16)
    for box in sample_boxes(volume.shape):
        digest.update(volume.read(box.start, box.stop).tobytes())
    return {
        "path": volume.path,
        "shape": list(volume.shape),
        "channels": volume.n_channels,
        "dtype": str(volume.dtype),
        "voxel_size_nm": list(volume.voxel_size_nm),
        "fingerprint": digest.hexdigest(),
    }


def add_provenance(path: Path, values: Mapping[str, Any]) -> None:
    """Add to the provenance of an OME-Zarr that voxclf wrote what was known only once it was finished."""
    file = path / "zarr.json"
    group = json.loads(file.read_text(encoding="utf-8"))
    group["attributes"]["voxclf"].setdefault("provenance", {}).update(values)
    write_json_atomically(file, group)


def software_versions() -> dict[str, str]:
    """Versions of voxclf, Python and the libraries that decide a result, as installed."""
    versions = {"voxclf": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
