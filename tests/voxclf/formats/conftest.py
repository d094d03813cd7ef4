"""A small volume of odd shape, and where the real ones are."""

import os
from pathlib import Path

import numpy as np
import pytest

SHAPE = (23, 37, 41)
VOXEL_SIZE_NM = (50.0, 4.6, 4.6)


@pytest.fixture(scope="session")
def array() -> np.ndarray:
    """A (Z, Y, X) uint8 volume that compresses a little and has no symmetry."""
    rng = np.random.default_rng(0)
    return np.cumsum(rng.integers(-3, 4, SHAPE), axis=2).astype(np.uint8)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of reference volumes; tests that need it are skipped where it is absent."""
    default = Path(__file__).parents[3] / ".." / "shared" / "data"
    folder = Path(os.environ.get("VOXCLF_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip("reference volumes are absent: set VOXCLF_DATA to their folder")
    return folder
