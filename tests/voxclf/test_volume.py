import math
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from voxclf.errors import FormatError, OutputExistsError
from voxclf.volume import create_volume, export_tiff, open_labels, open_level, open_volume

SHAPE, VOXEL_SIZE_NM = (23, 37, 41), (50.0, 4.6, 4.6)


@pytest.fixture(scope="module")
def array():
    rng = np.random.default_rng(1)
    return np.cumsum(rng.integers(-3, 4, SHAPE), axis=2).astype(np.uint8)


@pytest.fixture
def tif(tmp_path, array):
    """A stack that states y and x, as most do, but not z."""
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, array, compression="zlib", resolution=(1e7 / 4.6, 1e7 / 4.6), resolutionunit="CENTIMETER")
    return path


class TestVoxelSize:
    def test_missing_says_what_is_known_and_how_to_give_it(self, tif):
        with pytest.raises(
            ValueError, match=r"v\.tif states only a part .*\(unknown, 4\.6, 4\.6\) nm .*--voxel-size 50,4\.6,4\.6"
        ):
            open_volume(tif)

    def test_given(self, tif):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_volume(tif, VOXEL_SIZE_NM).voxel_size_nm == VOXEL_SIZE_NM

    def test_given_wins_over_the_file_with_a_warning_that_names_both(self, tif):
        with pytest.warns(UserWarning, match=r"\(unknown, 4\.6, 4\.6\) nm .* but \(50\.0, 8\.0, 8\.0\) nm was given"):
            volume = open_volume(tif, (50, 8, 8))
        assert volume.voxel_size_nm == (50, 8, 8)

    def test_not_required_is_nan_never_1(self, tif):
        volume = open_volume(tif, require_voxel_size=False)
        assert not volume.has_voxel_size
        assert all(math.isnan(v) for v in volume.voxel_size_nm)

    @pytest.mark.parametrize(
        "given", [(0, 1, 1), (1, -1, 1), (1, 1), (1, 1, math.nan), (1, 1, math.inf), ("a", 1, 1), 5]
    )
    def test_nonsense_is_refused(self, tif, given):
        with pytest.raises(ValueError, match=r"voxel_size_nm was .*--voxel-size"):
            open_volume(tif, given)


class TestVolume:
    def test_reads_boxes(self, tif, array):
        volume = open_volume(tif, VOXEL_SIZE_NM)
        assert (volume.shape, volume.n_channels, volume.dtype) == (SHAPE, 1, np.uint8)
        np.testing.assert_array_equal(volume.read((1, 2, 3), (9, 8, 7))[0], array[1:9, 2:8, 3:7])

    @pytest.mark.parametrize(
        ("start", "stop"), [((0, 0, 0), (24, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((5, 5, 5), (5, 6, 6))]
    )
    def test_boxes_outside_are_refused(self, tif, start, stop):
        with pytest.raises(ValueError, match=r"is empty or sticks out of .*v\.tif, whose shape is \(23, 37, 41\)"):
            open_volume(tif, VOXEL_SIZE_NM).read(start, stop)

    def test_pickle_holds_the_path_and_no_voxels(self, tif, array):
        volume = open_volume(tif, VOXEL_SIZE_NM)
        volume.read((0, 0, 0), SHAPE)
        sent = pickle.dumps(volume)
        assert len(sent) < 2000
        received = pickle.loads(sent)
        assert (received.path, received.voxel_size_nm) == (str(tif), VOXEL_SIZE_NM)
        np.testing.assert_array_equal(received.read((0, 0, 0), SHAPE)[0], array)

    def test_unpickling_opens_nothing_until_the_first_read(self, tif):
        sent = pickle.dumps(open_volume(tif, VOXEL_SIZE_NM))
        tif.unlink()
        received = pickle.loads(sent)
        assert received.shape == SHAPE
        with pytest.raises(FileNotFoundError):
            received.read((0, 0, 0), (1, 1, 1))

    def test_another_process_writes_through_a_pickle(self, tmp_path, array):
        volume = create_volume(tmp_path / "v.zarr", SHAPE, 1, "uint8", VOXEL_SIZE_NM, kind="image")
        (tmp_path / "sent").write_bytes(pickle.dumps(volume))
        np.save(tmp_path / "array.npy", array[None])
        code = (
            "import pickle, sys, pathlib, numpy as np\n"
            "folder = pathlib.Path(sys.argv[1])\n"
            "volume = pickle.loads((folder / 'sent').read_bytes())\n"
            "volume.write((0, 0, 0), np.load(folder / 'array.npy'))\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE)[0], array)

    def test_threads_write_their_own_chunks(self, tmp_path, array):
        volume = create_volume(tmp_path / "v.zarr", SHAPE, 1, "uint8", VOXEL_SIZE_NM, (8, 8, 8), kind="image")
        corners = [(z, y, x) for z in range(0, 23, 8) for y in range(0, 37, 8) for x in range(0, 41, 8)]

        def write(corner):
            z, y, x = corner
            volume.write(corner, array[None, z : z + 8, y : y + 8, x : x + 8])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, corners))
        np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE)[0], array)

    def test_inputs_cannot_be_written(self, tif, array):
        volume = open_volume(tif, VOXEL_SIZE_NM)
        with pytest.raises(FormatError, match="open for reading only"):
            volume.write((0, 0, 0), array[None])
        with pytest.raises(FormatError, match="open for reading only"):
            _ = volume.write_shape

    def test_misfitting_writes_are_refused(self, tmp_path):
        volume = create_volume(tmp_path / "v.zarr", SHAPE, 2, "uint8", VOXEL_SIZE_NM, kind="probabilities")
        with pytest.raises(ValueError, match=r"needs \(C, z, y, x\) with C = 2"):
            volume.write((0, 0, 0), np.zeros((1, 2, 2, 2), np.uint8))
        with pytest.raises(TypeError, match="type float32; convert it to uint8"):
            volume.write((0, 0, 0), np.zeros((2, 2, 2, 2), np.float32))
        with pytest.raises(ValueError, match="sticks out"):
            volume.write((22, 0, 0), np.zeros((2, 2, 2, 2), np.uint8))


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["uint32", "int64"])
    def test_wide_integers_are_no_image(self, tmp_path, array, dtype):
        np.save(tmp_path / "v.npy", array.astype(dtype))
        with pytest.raises(FormatError, match="is it a label volume"):
            open_volume(tmp_path / "v.npy", VOXEL_SIZE_NM)
        assert open_labels(tmp_path / "v.npy", SHAPE).dtype == np.dtype(dtype)

    def test_wide_labels_of_our_own_open_again(self, tmp_path):
        create_volume(tmp_path / "v.zarr", SHAPE, 1, "uint32", VOXEL_SIZE_NM, kind="labels")
        assert open_volume(tmp_path / "v.zarr").dtype == np.uint32


class TestLabels:
    def test_another_shape_names_both_and_what_to_do(self, tif):
        with pytest.raises(ValueError, match=r"shape \(23, 37, 41\) but the volume has \(23, 37, 42\).*TOML listing"):
            open_labels(tif, (23, 37, 42))

    def test_floats_are_refused(self, tmp_path, array):
        np.save(tmp_path / "v.npy", array.astype(np.float32))
        with pytest.raises(FormatError, match="labels are whole numbers"):
            open_labels(tmp_path / "v.npy", SHAPE)

    def test_channels_are_refused(self, tmp_path, array):
        np.save(tmp_path / "v.npy", np.stack([array, array]))
        with pytest.raises(FormatError, match="2 channels"):
            open_labels(tmp_path / "v.npy", SHAPE)

    def test_plain_volume_does_not_know_where_its_labels_are(self, tif):
        assert open_labels(tif, SHAPE).labelled_boxes is None


class TestCreate:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"shape": (0, 3, 4)}, ValueError, "shape was"),
            ({"n_channels": 0}, ValueError, "n_channels was 0"),
            ({"channel_names": ["a", "b"]}, ValueError, "one name per channel"),
            ({"dtype": "complex64"}, TypeError, "dtype was complex64"),
            ({"voxel_size_nm": (math.nan, 1, 1)}, ValueError, "must be above 0"),
            ({"chunk_shape": (8, 8, 8), "shard_shape": (12, 8, 8)}, ValueError, r"must be a multiple of chunk_shape"),
        ],
    )
    def test_mistakes(self, tmp_path, change, error, message):
        arguments = {"shape": SHAPE, "n_channels": 1, "dtype": "uint8", "voxel_size_nm": VOXEL_SIZE_NM, "kind": "image"}
        with pytest.raises(error, match=message):
            create_volume(tmp_path / "v.zarr", **{**arguments, **change})
        assert not list(tmp_path.iterdir())

    def test_chunks_are_cut_to_the_volume(self, tmp_path):
        volume = create_volume(tmp_path / "v.zarr", (20, 1000, 1000), 1, "uint8", (8, 8, 8), kind="image")
        assert volume.write_shape == volume.chunk_shape == (20, 64, 64)


class TestExport:
    @pytest.mark.parametrize(
        ("dtype", "is_imagej"),
        [("uint8", True), ("uint16", True), ("float32", True), ("float16", True), ("int16", False), ("uint32", False)],
    )
    def test_round_trip_keeps_voxels_and_voxel_size(self, tmp_path, array, dtype, is_imagej):
        values = np.stack([array, 255 - array]).astype(dtype)
        volume = create_volume(tmp_path / "v.zarr", SHAPE, 2, dtype, VOXEL_SIZE_NM, (8, 16, 16), kind="probabilities")
        volume.write((0, 0, 0), values)
        export_tiff(volume, tmp_path / "v.tif")
        with tifffile.TiffFile(tmp_path / "v.tif") as tif:
            assert tif.is_imagej == is_imagej
            assert tif.series[0].axes == "ZCYX"
            np.testing.assert_array_equal(tif.asarray(), values.transpose(1, 0, 2, 3))
        if dtype != "uint32":
            again = open_volume(tmp_path / "v.tif")
            assert again.voxel_size_nm == pytest.approx(VOXEL_SIZE_NM)
            np.testing.assert_array_equal(again.read((0, 0, 0), SHAPE), values)

    def test_any_format_can_be_exported(self, tmp_path, array):
        with h5py.File(tmp_path / "v.h5", "w") as file:
            file["raw"] = array
        export_tiff(open_volume(tmp_path / "v.h5", VOXEL_SIZE_NM), tmp_path / "v.tif")
        np.testing.assert_array_equal(open_volume(tmp_path / "v.tif").read((0, 0, 0), SHAPE)[0], array)

    def test_without_voxel_size_none_is_invented(self, tmp_path, array):
        np.save(tmp_path / "v.npy", array)
        export_tiff(open_volume(tmp_path / "v.npy", require_voxel_size=False), tmp_path / "v.tif")
        assert not open_volume(tmp_path / "v.tif", require_voxel_size=False).has_voxel_size

    def test_labels_are_compressed(self, tmp_path):
        volume = create_volume(tmp_path / "v.zarr", SHAPE, 1, "uint8", VOXEL_SIZE_NM, kind="labels")
        export_tiff(volume, tmp_path / "v.tif")
        assert (tmp_path / "v.tif").stat().st_size < math.prod(SHAPE) / 2

    def test_existing_files_are_kept_unless_overwritten(self, tmp_path, tif):
        volume = open_volume(tif, VOXEL_SIZE_NM)
        (tmp_path / "old.tif").write_text("something else")
        with pytest.raises(OutputExistsError, match="--overwrite"):
            export_tiff(volume, tmp_path / "old.tif")
        export_tiff(volume, tmp_path / "old.tif", overwrite=True)
        assert open_volume(tmp_path / "old.tif").shape == SHAPE
        assert not list(tmp_path.glob("*.partial"))


def test_real_labels_open_beside_their_volume():
    folder = Path(os.environ.get("VOXCLF_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("reference volumes are absent: set VOXCLF_DATA to their folder")
    volume = open_volume(folder / "vnc" / "raw.tif", (50, 4.6, 4.6))
    labels = open_labels(folder / "vnc" / "labels_sparse.tif", volume.shape)
    labelled = [z for z in range(20) if labels.read((z, 0, 0), (z + 1, 1024, 1024)).any()]
    assert labelled == [2, 6, 10]


def test_a_write_in_another_process_is_seen_at_once(tmp_path, array):
    """A reader that cached a chunk must not hold on to it: pyramids read what workers have just written."""
    writer = create_volume(tmp_path / "v.zarr", SHAPE, 1, "uint8", VOXEL_SIZE_NM, kind="image")
    reader = open_level(tmp_path / "v.zarr", 0)
    assert not reader.read((0, 0, 0), SHAPE).any()
    code = (
        "import sys, numpy as np\n"
        "from voxclf.volume import open_level\n"
        "open_level(sys.argv[1], 0, writable=True).write((0, 0, 0), np.full((1, 23, 37, 41), 9, np.uint8))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "v.zarr")], check=True)
    assert (reader.read((0, 0, 0), SHAPE) == 9).all()
    writer.write((0, 0, 0), array[None])
    np.testing.assert_array_equal(reader.read((0, 0, 0), SHAPE)[0], array)
