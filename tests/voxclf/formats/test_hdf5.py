import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from voxclf.errors import FormatError
from voxclf.formats.hdf5 import Hdf5Source
from voxclf.volume import open_volume


@pytest.fixture
def file(tmp_path, array):
    path = str(tmp_path / "v.h5")
    with h5py.File(path, "w") as f:
        raw = f.create_dataset("volumes/raw", data=array, chunks=(8, 16, 16), compression="gzip")
        raw.attrs["resolution"] = [50, 4.6, 4.6]
        f.create_dataset("volumes/labels", data=(array > 100).astype(np.uint16))
        f.create_dataset("note", data=np.arange(3))
    return path


def test_reads_one_dataset(file, array):
    volume = open_volume(f"{file}:/volumes/raw")
    assert (volume.shape, volume.voxel_size_nm, volume.chunk_shape) == ((23, 37, 41), (50, 4.6, 4.6), (8, 16, 16))
    np.testing.assert_array_equal(volume.read((3, 5, 7), (20, 30, 40))[0], array[3:20, 5:30, 7:40])


@pytest.mark.parametrize(
    ("path", "problem"),
    [("", "holds several datasets"), (":/raw", "has no dataset '/raw'"), (":/volumes", "has no dataset '/volumes'")],
)
def test_missing_dataset_lists_those_there_are(file, path, problem):
    with pytest.raises(FormatError, match=rf"{problem}; choose one as in .*: ?.*/volumes/raw \(23, 37, 41\)"):
        open_volume(file + path)


def test_only_dataset_need_not_be_named(tmp_path, array):
    path = tmp_path / "v.h5"
    with h5py.File(path, "w") as f:
        f["data"] = array
        f["data"].attrs["element_size_um"] = [0.05, 0.0046, 0.0046]
    volume = open_volume(path)
    assert volume.voxel_size_nm == (50, 4.6, 4.6)
    np.testing.assert_array_equal(volume.read((0, 0, 0), volume.shape)[0], array)


def test_axistags_decide_the_order(tmp_path, array):
    path = str(tmp_path / "v.h5")
    with h5py.File(path, "w") as f:
        f["exported"] = array.transpose(2, 1, 0)[None, ..., None]
        f["exported"].attrs["axistags"] = json.dumps({"axes": [{"key": key} for key in "txyzc"]})
    np.testing.assert_array_equal(Hdf5Source(path).read((1, 2, 3), (9, 8, 7))[0], array[1:9, 2:8, 3:7])


def test_dimension_labels_decide_the_order(tmp_path, array):
    path = str(tmp_path / "v.h5")
    with h5py.File(path, "w") as f:
        f["raw"] = np.stack([array, array + 1], axis=-1)
        for dimension, label in zip(f["raw"].dims, "zyxc", strict=True):
            dimension.label = label
    assert Hdf5Source(path).info.shape == (2, 23, 37, 41)
    np.testing.assert_array_equal(Hdf5Source(path).read((1, 2, 3), (9, 8, 7))[1], array[1:9, 2:8, 3:7] + 1)


def test_truncated_file(file):
    with Path(file).open("r+b") as f:
        f.truncate(4000)
    with pytest.raises(FormatError, match=r"v\.h5 is not a readable HDF5 file .* truncated"):
        open_volume(f"{file}:/volumes/raw")


def test_threads(file, array):
    source = Hdf5Source(file, "/volumes/raw")
    starts = list(range(20)) * 5
    with ThreadPoolExecutor(8) as pool:
        boxes = list(pool.map(lambda z: source.read((z, 1, 2), (z + 3, 36, 40)), starts))
    for z, box in zip(starts, boxes, strict=True):
        np.testing.assert_array_equal(box[0], array[z : z + 3, 1:36, 2:40])
