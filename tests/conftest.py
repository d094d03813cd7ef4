"""What tests share: a small EM-like volume, labels on three slices of it, and where the real data are."""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from voxclf.volume import create_volume, open_volume

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
VOXEL_SIZE_NM = (20.0, 10.0, 10.0)
needs_einops = pytest.mark.skipif(find_spec("einops") is None, reason="einops is not installed (swin_unetr)")


def find_data() -> Path:
    """The folder of real EM volumes: VOXCLF_DATA, or ``shared/data`` beside the repository."""
    return Path(os.environ.get("VOXCLF_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def real_data():
    """Give the path of a real data file, or skip the test by the file's name."""

    def locate(name: str) -> Path:
        path = find_data() / name
        if not path.exists():
            pytest.skip(f"real data {name} not found; set VOXCLF_DATA to the folder that holds it")
        return path

    return locate


def draw_cells(shape, seed=0):
    """Membranes between a few Voronoi cells, dark blobs inside them, noise: (image uint8, labels 1..3)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    seeds = rng.uniform(0, shape, (6, 3))
    distance = np.sort(np.linalg.norm(grid[..., None, :] - seeds, axis=-1), axis=-1)
    labels = np.ones(shape, np.uint8)
    labels[distance[..., 0] < 0.2 * min(shape)] = 3
    labels[distance[..., 1] - distance[..., 0] < 1.6] = 2
    levels = np.array([0, 180, 80, 110], float)
    image = levels[labels] + rng.normal(0, 14, shape)
    return np.clip(image, 0, 255).astype(np.uint8), labels


@pytest.fixture
def save_volume(tmp_path):
    """Write an array (Z, Y, X) or (C, Z, Y, X) as OME-Zarr and open it for reading."""

    def save(array, name="volume.zarr", kind="image", chunk_shape=(8, 8, 8), voxel_size_nm=VOXEL_SIZE_NM, **options):
        array = array if array.ndim == 4 else array[None]
        path = tmp_path / name
        volume = create_volume(
            path, array.shape[1:], len(array), array.dtype, voxel_size_nm, chunk_shape, kind=kind, **options
        )
        volume.write((0, 0, 0), array)
        return open_volume(path, kind="labels" if kind == "labels" else "image")

    return save


@pytest.fixture
def cells():
    """A (23, 37, 41) image and its dense labels."""
    return draw_cells((23, 37, 41))


@pytest.fixture
def sparse_labels(cells):
    """The labels on three orthogonal slices only; 0 elsewhere."""
    dense = cells[1]
    sparse = np.zeros_like(dense)
    sparse[11], sparse[:, 18], sparse[:, :, 20] = dense[11], dense[:, 18], dense[:, :, 20]
    return sparse


def read(path):
    """All voxels of a volume, (C, Z, Y, X)."""
    volume = open_volume(path, kind="labels" if "labels" in str(path) else "image")
    return volume.read((0, 0, 0), volume.shape)


def snapshot(folder):
    """Every file of the output volumes with its bytes; the ledger's order of lines is not part of the result."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("labels.zarr", "probabilities.zarr")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }
