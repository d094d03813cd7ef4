import pickle

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from voxclf.errors import FormatError
from voxclf.geometry import Region
from voxclf.volume import open_labels

SHAPE = (23, 37, 41)
#: The picture's (row, column) axes and the axis that it leaves out.
PLANES = {"xy": "yxz", "yx": "xyz", "xz": "zxy", "zx": "xzy", "yz": "zyx", "zy": "yzx"}


def write_listing(folder, slices):
    """Write slices of (array, plane, origin) and their listing; returns its path."""
    lines = []
    for i, (labels, plane, origin) in enumerate(slices):
        tifffile.imwrite(folder / f"labels_{i}.tif", np.asarray(labels), photometric="minisblack")
        lines += ["[[slice]]", f'file = "labels_{i}.tif"', f'plane = "{plane}"', f"origin = {list(origin)}"]
    (folder / "slices.toml").write_text("\n".join(lines))
    return folder / "slices.toml"


@pytest.mark.parametrize("plane", PLANES)
def test_each_plane_lands_where_it_should(tmp_path, plane):
    rows, columns, _ = PLANES[plane]
    picture = np.arange(1, 36, dtype=np.uint8).reshape(5, 7)
    labels = open_labels(write_listing(tmp_path, [(picture, plane, (4, 10, 20))]), SHAPE)
    volume = labels.read((0, 0, 0), SHAPE)[0]
    assert np.count_nonzero(volume) == 35
    for r, c in ((0, 0), (0, 6), (4, 0), (2, 3)):
        place = {"z": 4, "y": 10, "x": 20}
        place[rows] += r
        place[columns] += c
        assert volume[place["z"], place["y"], place["x"]] == picture[r, c]


def test_labelled_boxes_say_where_labels_are(tmp_path):
    picture = np.ones((5, 7), np.uint8)
    path = write_listing(tmp_path, [(picture, "xy", (4, 10, 20)), (picture, "yz", (4, 10, 20))])
    labels = open_labels(path, SHAPE)
    assert labels.labelled_boxes == (Region((4, 10, 20), (5, 15, 27)), Region((4, 10, 20), (9, 17, 21)))
    assert labels.shape == SHAPE
    assert labels.dtype == np.uint8


def test_a_stack_covers_several_slices(tmp_path):
    pages = np.arange(1, 3 * 5 * 7 + 1, dtype=np.uint8).reshape(3, 5, 7)
    labels = open_labels(write_listing(tmp_path, [(pages, "xz", (1, 2, 3))]), SHAPE)
    np.testing.assert_array_equal(labels.read((1, 2, 3), (6, 5, 10))[0], pages.transpose(1, 0, 2))


def test_crossing_slices_fill_each_others_gaps(tmp_path):
    first, second = np.ones((37, 41), np.uint8), np.full((23, 41), 1, np.uint8)
    first[10], second[4, :20] = 0, 0
    labels = open_labels(write_listing(tmp_path, [(first, "xy", (4, 0, 0)), (second, "xz", (0, 10, 0))]), SHAPE)
    np.testing.assert_array_equal(labels.read((4, 10, 0), (5, 11, 41))[0, 0, 0], [0] * 20 + [1] * 21)


def test_crossing_slices_that_disagree_name_both_and_the_voxel(tmp_path):
    first, second = np.ones((37, 41), np.uint8), np.ones((23, 41), np.uint8)
    second[4, 7] = 2
    path = write_listing(tmp_path, [(first, "xy", (4, 0, 0)), (second, "xz", (0, 10, 0))])
    with pytest.raises(FormatError, match=r"slice 1 .*slice 2 .*1 voxels different labels \(\(4, 10, 7\): 1 and 2\)"):
        open_labels(path, SHAPE)


@pytest.mark.parametrize("origin", [(0, 34, 0), (0, 0, 36), (-1, 0, 0), (23, 0, 0)])
def test_slice_that_sticks_out_is_named(tmp_path, origin):
    path = write_listing(tmp_path, [(np.ones((5, 7), np.uint8), "xy", origin)])
    with pytest.raises(FormatError, match=r"slice 1 of .*labels_0\.tif\) covers .* sticks out of the volume's shape"):
        open_labels(path, SHAPE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the entries \[\]"),
        ("[[slice]", "is not a TOML file"),
        ("slice = 3", "has the entries"),
        ('[[slice]]\nfile = "labels_0.tif"', "needs exactly file, plane and origin"),
        ('[[slice]]\nfile = "labels_0.tif"\nplane = "xw"\norigin = [0, 0, 0]', "plane 'xw'; allowed are"),
        ('[[slice]]\nfile = "labels_0.tif"\nplane = "xy"\norigin = [0, 0.5, 0]', "three whole numbers"),
    ],
)
def test_mistakes_in_the_listing(tmp_path, text, message):
    path = write_listing(tmp_path, [(np.ones((5, 7), np.uint8), "xy", (0, 0, 0))])
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        open_labels(path, SHAPE)


def test_missing_file_is_named(tmp_path):
    path = write_listing(tmp_path, [(np.ones((5, 7), np.uint8), "xy", (0, 0, 0))])
    (tmp_path / "labels_0.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels_0\.tif"):
        open_labels(path, SHAPE)
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        open_labels(tmp_path / "none.toml", SHAPE)


def test_labels_that_are_no_numbers(tmp_path):
    path = write_listing(tmp_path, [(np.ones((5, 7), np.float32), "xy", (0, 0, 0))])
    with pytest.raises(FormatError, match="labels are one channel of whole numbers"):
        open_labels(path, SHAPE)


def test_workers_get_the_listing_not_the_volume(tmp_path):
    labels = open_labels(write_listing(tmp_path, [(np.ones((5, 7), np.uint8), "xy", (0, 0, 0))]), SHAPE)
    sent = pickle.dumps(labels)
    assert len(sent) < 2000
    assert pickle.loads(sent).read((0, 0, 0), (1, 5, 7)).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_blocks_agree_with_the_whole(tmp_path_factory, data):
    slices = []
    for _ in range(data.draw(st.integers(1, 3))):
        plane = data.draw(st.sampled_from(["xy", "xz", "yz"]))
        rows, columns, normal = PLANES[plane]
        start = {a: data.draw(st.integers(0, n - 1)) for a, n in zip("zyx", SHAPE, strict=True)}
        room = {a: n - start[a] for a, n in zip("zyx", SHAPE, strict=True)}
        size = [data.draw(st.integers(1, room[a])) for a in (rows, columns)]
        slices.append((np.full((1, *size, 1)[1:3], 5, np.uint8), plane, tuple(start[a] for a in "zyx")))
        assert start[normal] < SHAPE["zyx".index(normal)]
    labels = open_labels(write_listing(tmp_path_factory.mktemp("slices"), slices), SHAPE)
    whole = labels.read((0, 0, 0), SHAPE)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in SHAPE)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, SHAPE, strict=True))
    box = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    np.testing.assert_array_equal(labels.read(start, stop), whole[box])
    assert np.count_nonzero(whole) <= sum(s[0].size for s in slices)
