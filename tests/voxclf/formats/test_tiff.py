import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from voxclf.errors import FormatError
from voxclf.formats.decode_cache import DecodeCache
from voxclf.formats.detect import open_source
from voxclf.formats.tiff import TiffSource
from voxclf.formats.tiff_chain import count_pages
from voxclf.formats.tiff_folder import TiffFolderSource, natural_key

PIXELS_PER_NM = 1 / 4.6
#: Ways in which microscopes and programs write stacks.
LAYOUTS = {
    "imagej": {
        "imagej": True,
        "metadata": {"axes": "ZYX", "spacing": 50, "unit": "nm"},
        "resolution": (PIXELS_PER_NM, PIXELS_PER_NM),
    },
    "imagej zlib": {"imagej": True, "metadata": {"axes": "ZYX"}, "compression": "zlib"},
    "imagej one entry": {"imagej": True, "metadata": {"axes": "ZYX"}, "truncate": True},
    "plain": {},
    "strips": {"rowsperstrip": 16, "compression": "zlib", "predictor": True},
    "uncompressed strips": {"rowsperstrip": 16, "metadata": None},
    "tiles": {"tile": (16, 32), "compression": "lzw"},
    "uncompressed tiles": {"tile": (16, 16)},
    "bigtiff": {"bigtiff": True},
    "big-endian": {"byteorder": ">"},
    "big-endian zlib": {"byteorder": ">", "compression": "zlib"},
    "ome": {
        "ome": True,
        "compression": "zstd",
        "metadata": {
            "axes": "ZYX",
            "PhysicalSizeZ": 0.05,
            "PhysicalSizeY": 4.6,
            "PhysicalSizeYUnit": "nm",
            "PhysicalSizeX": 4.6,
            "PhysicalSizeXUnit": "nm",
        },
    },
}


@pytest.fixture(autouse=True)
def quiet_tifffile(caplog):
    caplog.set_level(logging.CRITICAL, logger="tifffile")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_what_tifffile_wrote(tmp_path, array, layout, dtype):
    path = str(tmp_path / "stack.tif")
    values = (array.astype(np.float64) * (200 if dtype == "uint16" else 1)).astype(dtype)
    tifffile.imwrite(path, values, **LAYOUTS[layout])
    source = TiffSource(path)
    assert source.info.shape == (1, 23, 37, 41)
    assert source.info.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(source.read((0, 0, 0), (23, 37, 41))[0], values)
    np.testing.assert_array_equal(source.read((3, 14, 30), (9, 33, 35))[0], values[3:9, 14:33, 30:35])


def test_pages_written_one_by_one_are_a_stack(tmp_path, array):
    path = str(tmp_path / "stack.tif")
    with tifffile.TiffWriter(path) as writer:
        for page in array:
            writer.write(page, metadata=None)
    np.testing.assert_array_equal(TiffSource(path).read((0, 0, 0), (23, 37, 41))[0], array)


def test_hyperstack_gives_channels_first(tmp_path, array):
    path = str(tmp_path / "stack.tif")
    two = np.stack([array, 255 - array], axis=1)  # z, c, y, x
    tifffile.imwrite(path, two, imagej=True, metadata={"axes": "ZCYX"})
    source = TiffSource(path)
    assert source.info.shape == (2, 23, 37, 41)
    np.testing.assert_array_equal(source.read((2, 3, 4), (5, 6, 7)), two.transpose(1, 0, 2, 3)[:, 2:5, 3:6, 4:7])


def test_a_single_image_is_one_slice(tmp_path, array):
    path = str(tmp_path / "slice.tif")
    tifffile.imwrite(path, array[0])
    assert TiffSource(path).info.shape == (1, 1, 37, 41)


def test_bilevel_masks_become_0_and_1(tmp_path, array):
    path = str(tmp_path / "mask.tif")
    tifffile.imwrite(path, array > 100, compression="zlib")
    source = TiffSource(path)
    assert source.info.dtype == np.uint8
    np.testing.assert_array_equal(source.read((0, 0, 0), (23, 37, 41))[0], array > 100)


@pytest.mark.parametrize(
    ("layout", "voxel_size"),
    [("imagej", (50.0, 4.6, 4.6)), ("ome", (50.0, 4.6, 4.6)), ("plain", (None,) * 3), ("imagej zlib", (None,) * 3)],
)
def test_voxel_size_is_read_where_stated(tmp_path, array, layout, voxel_size):
    path = str(tmp_path / "stack.tif")
    tifffile.imwrite(path, array, **LAYOUTS[layout])
    assert TiffSource(path).info.voxel_size_nm == voxel_size


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((1e7 / 4.6, 1e7 / 8), "CENTIMETER", (None, 8.0, 4.6)),
        ((300, 300), "INCH", (None,) * 3),
        ((72, 72), "CENTIMETER", (None,) * 3),
    ],
    ids=["specimen", "printer", "screen"],
)
def test_resolution_tags_count_only_where_they_can_be_about_the_specimen(tmp_path, array, resolution, unit, expected):
    path = str(tmp_path / "stack.tif")
    tifffile.imwrite(path, array, resolution=resolution, resolutionunit=unit)
    found = TiffSource(path).info.voxel_size_nm
    assert [round(v, 3) if v else v for v in found] == list(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.02, 0.3, 0.6, 0.9, 0.97])
def test_truncated_file_is_found_on_opening(tmp_path, array, layout, kept):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, array, **LAYOUTS[layout])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(FormatError, match=r"stack\.tif"):
        open_source(str(path))


def test_truncation_names_the_page(tmp_path, array):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, array, compression="zlib")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"truncated: the entry of page \d+ .* copy or export it again"):
        TiffSource(str(path))


def test_page_list_that_runs_in_a_circle_is_damaged(tmp_path):
    path = tmp_path / "circle.tif"
    path.write_bytes(b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0")
    with pytest.raises(FormatError, match="points back"):
        count_pages(str(path))


def test_overwritten_strip_names_file_and_page(tmp_path, array):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, array, compression="zlib", metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[7].dataoffsets[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)
    source = TiffSource(str(path))
    source.read((0, 0, 0), (7, 37, 41))
    with pytest.raises(FormatError, match=r"stack\.tif is damaged: page 7"):
        source.read((6, 0, 0), (9, 37, 41))


def test_colour_is_refused(tmp_path):
    path = str(tmp_path / "rgb.tif")
    tifffile.imwrite(path, np.zeros((5, 37, 41, 3), np.uint8), photometric="rgb")
    with pytest.raises(FormatError, match=r"colour image .* Image > Type > 8-bit"):
        TiffSource(path)


def test_time_series_is_refused_but_one_time_point_is_not(tmp_path, array):
    path = str(tmp_path / "time.tif")
    tifffile.imwrite(path, array, imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(FormatError, match=r"'t' is longer than 1; .* swap frames and slices"):
        TiffSource(path)
    tifffile.imwrite(path, array[None], imagej=True, metadata={"axes": "TZYX"})
    assert TiffSource(path).info.shape == (1, 23, 37, 41)


def test_images_of_different_shapes_are_refused(tmp_path, array):
    path = str(tmp_path / "mixed.tif")
    with tifffile.TiffWriter(path) as writer:
        writer.write(array)
        writer.write(array[0, :9])
    with pytest.raises(FormatError, match="2 images of different kinds"):
        TiffSource(path)


def test_pages_stored_in_different_ways_are_refused(tmp_path, array):
    path = str(tmp_path / "mixed.tif")
    with tifffile.TiffWriter(path) as writer:
        for z, page in enumerate(array):
            writer.write(page, metadata=None, compression="zlib", rowsperstrip=5 if z == 9 else 16)
    with pytest.raises(FormatError, match=r"mixed\.tif is damaged or of a variant"):
        open_source(path)


def test_complex_voxels_are_refused(tmp_path):
    path = str(tmp_path / "complex.tif")
    tifffile.imwrite(path, np.zeros((3, 7, 9), np.complex64), photometric="minisblack")
    with pytest.raises(FormatError, match="type complex64; voxclf reads integers and floats"):
        TiffSource(path)


def test_blockwise_reading_decodes_each_page_once(tmp_path, array):
    path = str(tmp_path / "stack.tif")
    tifffile.imwrite(path, array, compression="zlib")
    source = TiffSource(path)
    with mock.patch.object(source._keyframe, "decode", wraps=source._keyframe.decode) as decode:
        for y, x in itertools.product(range(0, 37, 8), range(0, 41, 8)):
            source.read((0, y, x), (23, min(y + 8, 37), min(x + 8, 41)))
    assert decode.call_count == 23


def test_cache_holds_no_more_than_its_limit(array):
    cache = DecodeCache(limit_bytes=3 * array.nbytes)
    for key in range(10):
        cache.get(key, array.copy)
        assert cache.held_bytes <= 3 * array.nbytes
    assert cache.get("large", lambda: np.zeros(4 * array.nbytes, np.uint8)).nbytes == 4 * array.nbytes
    assert cache.held_bytes <= 3 * array.nbytes


def test_cache_forgets_a_failure(array):
    cache = DecodeCache()
    with pytest.raises(FormatError):
        cache.get("page", mock.Mock(side_effect=FormatError("damaged")))
    assert cache.get("page", array.copy).shape == array.shape


def test_threads_read_the_same_voxels_and_decode_once(tmp_path, array):
    path = str(tmp_path / "stack.tif")
    tifffile.imwrite(path, array, compression="zlib", tile=(16, 16))
    source = TiffSource(path)
    boxes = [((z, y, 3), (z + 6, y + 9, 38)) for z in range(0, 17, 2) for y in range(0, 28, 3)] * 4
    with (
        mock.patch.object(source._keyframe, "decode", wraps=source._keyframe.decode) as decode,
        ThreadPoolExecutor(8) as pool,
    ):
        read = list(pool.map(lambda box: source.read(*box), boxes))
    for (start, stop), box in zip(boxes, read, strict=True):
        np.testing.assert_array_equal(box[0], array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))])
    assert decode.call_count <= 22 * 3 * 3


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_box_of_any_layout(tmp_path_factory, data):
    # Pages of width 1 are folded into others by the writer.
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(2, 40)))
    tile = data.draw(st.sampled_from([None, (16, 16), (32, 16)]))
    rows = data.draw(st.integers(1, 40))
    values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    path = str(tmp_path_factory.mktemp("tiff") / "stack.tif")
    compression = data.draw(st.sampled_from([None, "zlib"]))
    layout = {"tile": tile} if tile else {"rowsperstrip": rows}
    # Left to itself, the writer takes three slices for red, green and blue.
    tifffile.imwrite(
        path, values, photometric="minisblack", compression=compression, metadata={"axes": "ZYX"}, **layout
    )
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(TiffSource(path).read(start, stop)[0], values[box])


class TestFolder:
    def write(self, folder, array, **options):
        for z, page in enumerate(array):
            tifffile.imwrite(folder / f"slice_{z}.tif", page, **options)

    def test_slices_come_in_natural_order(self, tmp_path, array):
        self.write(tmp_path, array, compression="zlib")
        (tmp_path / "notes.txt").write_text("not a slice")
        (tmp_path / "._slice_0.tif").write_bytes(b"left by another system")
        source = TiffFolderSource(str(tmp_path))
        assert source.info.shape == (1, 23, 37, 41)
        np.testing.assert_array_equal(source.read((8, 5, 6), (13, 30, 33))[0], array[8:13, 5:30, 6:33])

    def test_natural_order(self):
        names = ["z10.tif", "z9.tif", "a_2_b_10.tif", "a_2_b_9.tif", "A_1.tif"]
        assert sorted(names, key=natural_key) == ["A_1.tif", "a_2_b_9.tif", "a_2_b_10.tif", "z9.tif", "z10.tif"]

    def test_odd_slice_is_named(self, tmp_path, array):
        self.write(tmp_path, array)
        tifffile.imwrite(tmp_path / "slice_11.tif", array[11, 1:])
        with pytest.raises(FormatError, match=r"slice_11\.tif has shape \(36, 41\)"):
            TiffFolderSource(str(tmp_path))

    def test_truncated_slice_is_named(self, tmp_path, array):
        self.write(tmp_path, array)
        whole = (tmp_path / "slice_5.tif").read_bytes()
        (tmp_path / "slice_5.tif").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FormatError, match=r"slice_5\.tif is truncated"):
            TiffFolderSource(str(tmp_path))

    def test_a_folder_of_stacks_is_refused(self, tmp_path, array):
        self.write(tmp_path, np.stack([array, array]))
        with pytest.raises(FormatError, match="holds 23 pages"):
            TiffFolderSource(str(tmp_path))


def test_real_stacks_equal_tifffile(data):
    for name, start, stop in (("vnc", (3, 200, 900), (7, 300, 1000)), ("flyem", (90, 10, 200), (110, 60, 250))):
        path = str(data / name / "raw.tif")
        box = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
        np.testing.assert_array_equal(TiffSource(path).read(start, stop), tifffile.imread(path)[None][box])
