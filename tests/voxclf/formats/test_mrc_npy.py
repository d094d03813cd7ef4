import mrcfile
import numpy as np
import pytest

from voxclf.errors import FormatError
from voxclf.formats.mrc import MrcSource
from voxclf.formats.npy import NpySource
from voxclf.volume import open_volume


def write_mrc(path, array, voxel_size_angstrom=None):
    with mrcfile.new(path, array) as mrc:
        if voxel_size_angstrom:
            mrc.voxel_size = voxel_size_angstrom


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32"])
def test_mrc_round_trip(tmp_path, array, dtype):
    values = (array // 2).astype(dtype)
    write_mrc(tmp_path / "v.mrc", values, (46.0, 46.0, 500.0))  # x, y, z
    volume = open_volume(tmp_path / "v.mrc")
    assert volume.voxel_size_nm == pytest.approx((50, 4.6, 4.6))
    assert volume.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.read((3, 5, 7), (20, 30, 40))[0], values[3:20, 5:30, 7:40])


@pytest.mark.parametrize("custom", ["imod", "maximum"])
def test_mrc_bytes_that_are_unsigned(tmp_path, array, custom):
    write_mrc(tmp_path / "v.mrc", array.view(np.int8))
    with mrcfile.open(tmp_path / "v.mrc", "r+") as mrc:
        if custom == "imod":
            extra = bytearray(mrc.header.extra2.tobytes())
            extra[40:48] = np.array([1146047817, 0], "<i4").tobytes()
            mrc.header.extra2 = np.void(bytes(extra))
        else:
            mrc.header.dmax = 255
    source = MrcSource(str(tmp_path / "v.mrc"))
    assert source.info.dtype == np.uint8
    np.testing.assert_array_equal(source.read((0, 0, 0), (23, 37, 41))[0], array)


def test_big_endian_mrc(tmp_path, array):
    write_mrc(tmp_path / "v.mrc", array.astype(np.int16))
    with mrcfile.open(tmp_path / "v.mrc") as mrc:
        header, data = mrc.header.copy(), mrc.data.astype(">i2")
    swapped = header.byteswap().view(header.dtype.newbyteorder(">"))
    swapped["machst"] = [0x11, 0x11, 0, 0]
    (tmp_path / "v.mrc").write_bytes(swapped.tobytes() + data.tobytes())
    np.testing.assert_array_equal(MrcSource(str(tmp_path / "v.mrc")).read((0, 0, 0), (23, 37, 41))[0], array)


def test_mrc_axis_order_is_taken_from_the_header(tmp_path, array):
    write_mrc(tmp_path / "v.mrc", array.transpose(2, 1, 0).astype(np.int16), (46.0, 46.0, 500.0))
    with mrcfile.open(tmp_path / "v.mrc", "r+") as mrc:
        mrc.header.mapc, mrc.header.mapr, mrc.header.maps = 3, 2, 1  # columns are z, sections are x
    np.testing.assert_array_equal(
        MrcSource(str(tmp_path / "v.mrc")).read((1, 2, 3), (9, 8, 7))[0], array[1:9, 2:8, 3:7]
    )


def test_mrc_without_voxel_size(tmp_path, array):
    write_mrc(tmp_path / "v.mrc", array.astype(np.int16))
    with pytest.raises(ValueError, match="states no voxel size"):
        open_volume(tmp_path / "v.mrc")


def test_truncated_mrc_says_so_on_opening(tmp_path, array):
    write_mrc(tmp_path / "v.mrc", array.astype(np.int16))
    whole = (tmp_path / "v.mrc").read_bytes()
    (tmp_path / "v.mrc").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match=r"v\.mrc is truncated"):
        open_volume(tmp_path / "v.mrc", (8, 8, 8))
    (tmp_path / "v.mrc").write_bytes(whole[:500])
    with pytest.raises(FormatError, match=r"v\.mrc"):
        open_volume(tmp_path / "v.mrc", (8, 8, 8))


def test_fourier_transforms_are_refused(tmp_path):
    write_mrc(tmp_path / "v.mrc", np.zeros((3, 7, 9), np.complex64))
    with pytest.raises(FormatError, match="complex64; voxclf reads integers and floats"):
        MrcSource(str(tmp_path / "v.mrc"))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", ">i2", "float16", "bool"])
def test_npy_round_trip(tmp_path, array, dtype, order):
    values = np.asarray(array, dtype, order=order)
    np.save(tmp_path / "v.npy", values)
    source = NpySource(str(tmp_path / "v.npy"))
    box = source.read((3, 5, 7), (20, 30, 40))[0]
    assert box.dtype == source.info.dtype
    assert box.dtype.isnative
    np.testing.assert_array_equal(box, values[3:20, 5:30, 7:40])


def test_npy_axes_by_number(tmp_path, array):
    np.save(tmp_path / "czyx.npy", np.stack([array, array]))
    assert NpySource(str(tmp_path / "czyx.npy")).info.shape == (2, 23, 37, 41)
    np.save(tmp_path / "yx.npy", array[0])
    assert NpySource(str(tmp_path / "yx.npy")).info.shape == (1, 1, 37, 41)
    np.save(tmp_path / "time.npy", np.zeros((2, 1, 3, 4, 5)))
    with pytest.raises(FormatError, match="'t' is longer than 1"):
        NpySource(str(tmp_path / "time.npy"))


def test_npy_of_objects_is_never_unpickled(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[{}, []]], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="type object"):
        open_volume(tmp_path / "v.npy", (8, 8, 8))


def test_truncated_npy(tmp_path, array):
    np.save(tmp_path / "v.npy", array)
    whole = (tmp_path / "v.npy").read_bytes()
    for kept in (len(whole) - 1, 200, 20):
        (tmp_path / "v.npy").write_bytes(whole[:kept])
        with pytest.raises(FormatError, match=r"v\.npy"):
            open_volume(tmp_path / "v.npy", (8, 8, 8))
