import logging
import subprocess
import sys

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile

from voxclf.errors import FormatError
from voxclf.formats.detect import detect_format, open_source, split_hdf5_path


def test_content_decides_not_the_name(tmp_path, array):
    np.save(tmp_path / "v.npy", array)
    (tmp_path / "v.npy").rename(tmp_path / "v.tif")
    assert detect_format(str(tmp_path / "v.tif")) == "npy"


def test_folder_of_slices_beside_an_unrelated_attributes_file(tmp_path, array):
    (tmp_path / "attributes.json").write_text("{}")
    (tmp_path / "slices").mkdir()
    tifffile.imwrite(tmp_path / "slices" / "1.TIF", array[0])
    assert detect_format(str(tmp_path / "slices")) == "tiff folder"


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.tif does not exist"):
        detect_format(str(tmp_path / "nothing.tif"))
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5 does not exist"):
        detect_format(str(tmp_path / "nothing.h5:/raw"))


@pytest.mark.parametrize(("content", "state"), [(b"", "is empty"), (b"\x89PNG\r\n\x1a\n", "begins with")])
def test_unknown_file_lists_what_is_read(tmp_path, content, state):
    (tmp_path / "v.png").write_bytes(content)
    with pytest.raises(FormatError, match=rf"v\.png {state}.*voxclf reads TIFF .* OME-Zarr"):
        detect_format(str(tmp_path / "v.png"))


def test_unknown_folder(tmp_path):
    with pytest.raises(FormatError, match="folder without a volume"):
        detect_format(str(tmp_path))


def write_small_files(folder, array):
    tifffile.imwrite(folder / "strips.tif", array, compression="zlib", rowsperstrip=16)
    tifffile.imwrite(folder / "tiles.tif", array, tile=(16, 16), ome=True)
    tifffile.imwrite(folder / "imagej.tif", array, imagej=True, metadata={"axes": "ZYX"})
    np.save(folder / "v.npy", array)
    with mrcfile.new(folder / "v.mrc", array.astype(np.int16)):
        pass
    with h5py.File(folder / "v.h5", "w") as file:
        file.create_dataset("raw", data=array, chunks=(2, 16, 16), compression="gzip")
    return sorted(folder.iterdir())


def test_damaged_files_raise_format_errors_and_nothing_else(tmp_path, array, caplog):
    """Bytes changed at random, mostly in the header: read, or refused in words, but never another exception."""
    caplog.set_level(logging.CRITICAL, logger="tifffile")
    rng = np.random.default_rng(0)
    n_refused = 0
    for file in write_small_files(tmp_path, array[:5, :20, :18]):
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for i in range(60):
            damaged = whole[: rng.integers(1, len(whole) + 1)].copy() if rng.random() < 0.2 else whole.copy()
            damaged[rng.integers(0, min(len(damaged), 1100), 3)] = rng.integers(0, 256, 3)
            # A name of its own for each, because HDF5 remembers files that are still open.
            path = tmp_path / f"{i}_{file.name}"
            path.write_bytes(damaged)
            try:
                source = open_source(str(path))
                source.read((0, 0, 0), tuple(min(8, n) for n in source.info.shape[1:]))
            except FormatError:
                n_refused += 1
    assert n_refused > 100


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("v.h5", ("v.h5", None)),
        ("a.b/V.HDF5:/x/y", ("a.b/V.HDF5", "/x/y")),
        ("v.h5:", ("v.h5", None)),
        ("a.h5/slices", ("a.h5/slices", None)),
        ("stack:1.tif", ("stack:1.tif", None)),
    ],
)
def test_hdf5_paths(path, parts):
    assert split_hdf5_path(path) == parts


def test_opening_a_tiff_imports_no_other_library(tmp_path, array):
    tifffile.imwrite(tmp_path / "v.tif", array)
    code = (
        "import sys, voxclf.volume as v\n"
        "heavy = {'tensorstore', 'h5py', 'mrcfile', 'tifffile', 'zarr', 'torch', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"v.open_volume({str(tmp_path / 'v.tif')!r}, (8, 8, 8))\n"
        "assert heavy & set(sys.modules) == {'tifffile'}, heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
