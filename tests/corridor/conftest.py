"""A folder as a user would have it, with a model fitted once for all tests of the corridor."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.conftest import draw_cells
from voxclf import cli

SHAPE = (24, 44, 50)
SMALL = ["--bank", "edges", "--trees", "8", "--max-depth", "6", "--folds", "3"]
NEEDS_VOXEL_SIZE = {"fit", "predict", "run", "features", "convert"}


def run(folder, *arguments):
    """Run a command with paths relative to a folder; returns its exit code."""
    before = Path.cwd()
    os.chdir(folder)
    add_size = arguments[0] in NEEDS_VOXEL_SIZE and "--voxel-size" not in arguments
    try:
        return cli.main([*map(str, arguments), *(["--voxel-size", "20,10,10"] if add_size else [])])
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with image, sparse labels and truth as TIFF, and a model fitted on them."""
    folder = tmp_path_factory.mktemp("project")
    image, dense = draw_cells(SHAPE, seed=5)
    sparse = np.zeros_like(dense)
    sparse[12], sparse[:, 20], sparse[:, :, 25] = dense[12], dense[:, 20], dense[:, :, 25]
    for name, array in (("image", image), ("labels", sparse), ("truth", dense)):
        tifffile.imwrite(folder / f"{name}.tif", array, imagej=True, metadata={"axes": "ZYX"})
    assert run(folder, "fit", "image.tif", "labels.tif", "-o", "model", *SMALL) == 0
    return folder
