"""Label ids, names and colours: mapping there and back, reading from text and files, and the messages."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from voxclf.labels import PALETTE, UNLABELLED_INDEX, LabelSet, load_label_set, parse_classes

DTYPES = ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def test_from_ids_sorts_drops_unlabelled_and_names_by_id():
    labels = LabelSet.from_ids(np.array([7, 0, 3, 7], np.uint16))
    assert labels.ids == (3, 7)
    assert labels.names == ("class 3", "class 7")
    assert labels.unlabelled == 0
    assert labels.n_classes == 2


def test_remap_by_hand():
    labels = LabelSet.from_ids([2, 5, 9])
    volume = np.array([[0, 2], [9, 5]], np.uint8)
    indices = labels.remap_to_indices(volume)
    assert indices.dtype == np.int16
    np.testing.assert_array_equal(indices, [[-1, 0], [2, 1]])
    back = labels.remap_to_ids(indices)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, volume)


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 120), min_size=1, max_size=30, unique=True),
    unlabelled=st.integers(0, 120),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_remap_round_trip_and_order(ids, unlabelled, dtype, data):
    classes = sorted(set(ids) - {unlabelled})
    if not classes:
        return
    labels = LabelSet.from_ids(ids, unlabelled=unlabelled)
    elements = st.sampled_from([*classes, unlabelled])
    volume = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3), elements=elements))
    indices = labels.remap_to_indices(volume)
    expected = [classes.index(v) if v != unlabelled else UNLABELLED_INDEX for v in volume.ravel().tolist()]
    assert indices.ravel().tolist() == expected
    np.testing.assert_array_equal(labels.remap_to_ids(indices), volume)


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=10, unique=True),
    strays=st.lists(st.integers(0, 2**41), min_size=1, max_size=3),
)
def test_unknown_ids_are_named_however_far_apart(ids, strays):
    labels = LabelSet.from_ids(ids, unlabelled=-1)
    strays = [s for s in strays if s not in ids]
    if not strays:
        return
    with pytest.raises(ValueError, match=rf"no class: {min(strays)} \(\d+ voxels\)"):
        labels.remap_to_indices(np.array([*ids, *strays], np.int64))


def test_wide_ids_use_bisection_and_agree():
    labels = LabelSet.from_ids([3, 10**12, 5_000_000])
    volume = np.array([10**12, 0, 3, 5_000_000, 3], np.int64)
    np.testing.assert_array_equal(labels.remap_to_indices(volume), [2, -1, 0, 1, 0])
    np.testing.assert_array_equal(labels.remap_to_ids(np.array([2, -1, 0])), [10**12, 0, 3])


def test_zero_may_be_a_class_and_minus_one_unlabelled():
    labels = LabelSet.from_ids([0, 1], unlabelled=-1)
    np.testing.assert_array_equal(labels.remap_to_indices(np.array([-1, 0, 1], np.int8)), [-1, 0, 1])
    np.testing.assert_array_equal(labels.remap_to_indices(np.array([0, 1], np.uint8)), [0, 1])
    assert labels.remap_to_ids(np.array([-1, 1])).dtype == np.int8


def test_unlabelled_255_wraps_nowhere():
    labels = LabelSet.from_ids([200, 250], unlabelled=255)
    np.testing.assert_array_equal(labels.remap_to_indices(np.array([250, 255, 200], np.uint8)), [1, -1, 0])


def test_boolean_and_empty_volumes():
    labels = LabelSet.from_ids([1])
    np.testing.assert_array_equal(labels.remap_to_indices(np.array([True, False])), [0, -1])
    assert labels.remap_to_indices(np.empty((0, 3), np.uint8)).shape == (0, 3)


def test_float_labels_are_refused():
    with pytest.raises(TypeError, match="labels must be integers, got dtype float32"):
        LabelSet.from_ids([1, 2]).remap_to_indices(np.ones(3, np.float32))


def test_indices_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"allowed are -1 \(unlabelled\) to 1"):
        LabelSet.from_ids([1, 2]).remap_to_ids(np.array([2]))


def test_one_class_has_its_own_message():
    labels = LabelSet.from_ids([1, 2], names=["membrane", "mito"])
    with pytest.raises(ValueError, match=r"only one class, 'mito' \(id 2, 40 voxels\).*at least two"):
        labels.check_counts([0, 40])
    with pytest.raises(ValueError, match="no labelled voxel"):
        labels.check_counts([0, 0])
    labels.check_counts([1, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ()}, "ids is empty"),
        ({"ids": (2, 1)}, "ascending order"),
        ({"ids": (-4, 1)}, "whole numbers >= 0"),
        ({"ids": (0, 1)}, "contain 0, which means unlabelled"),
        ({"ids": tuple(range(1, 2000))}, "instance segmentation"),
        ({"names": ("a",)}, "names has 1 entries"),
        ({"names": ("a", "a")}, "names must all be different"),
        ({"colours": ("red", "#000000")}, "'#4477AA', got 'red'"),
    ],
)
def test_construction_checks(fields, message):
    values = {"ids": (1, 2), "names": ("a", "b"), "colours": ("#000000", "#FFFFFF")} | fields
    if len(values["ids"]) != 2 and "names" not in fields:
        values["names"] = tuple(f"c{i}" for i in values["ids"])
        values["colours"] = ("#000000",) * len(values["ids"])
    with pytest.raises(ValueError, match=message):
        LabelSet(**values)


def test_a_class_keeps_its_colour_when_others_are_missing():
    full = LabelSet.from_ids([1, 2, 3, 4, 5, 6])
    part = LabelSet.from_ids([2, 5])
    assert part.colours == (full.colours[1], full.colours[4])
    assert full.colours == PALETTE[:6]
    np.testing.assert_array_equal(full.rgb[0], [0x44, 0x77, 0xAA])


def test_many_classes_get_different_colours():
    labels = LabelSet.from_ids([1, 13, 25, *range(40, 70)])
    assert len(set(labels.colours)) == labels.n_classes


def test_first_six_colours_stay_apart_for_colour_blind_readers():
    from skimage.color import rgb2lab

    # Viénot, Brettel & Mollon 1999, red-green dichromacy on linear RGB.
    protan = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    deutan = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    linear = (LabelSet.from_ids(range(1, 7)).rgb / 255) ** 2.2
    for matrix in (np.eye(3), np.array(protan), np.array(deutan)):
        lab = rgb2lab(np.clip(linear @ np.asarray(matrix).T, 0, 1) ** (1 / 2.2))
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(6, 1)]
        assert distance.min() > 10  # about 2.3 is just noticeable


def test_dict_and_json_round_trip():
    labels = LabelSet.from_ids([1, 9], names=["a", "b"], colours=["#010203", "#A0B0C0"], unlabelled=4)
    assert LabelSet.from_dict(json.loads(json.dumps(labels.to_dict()))) == labels


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_sidecar_files(tmp_path, suffix):
    path = tmp_path / f"classes{suffix}"
    if suffix == ".toml":
        path.write_text('[[classes]]\nid = 3\nname = "mito"\n\n[[classes]]\nid = 1\ncolour = "#123456"\n')
    else:
        path.write_text('{"classes": [{"id": 3, "name": "mito"}, {"id": 1, "colour": "#123456"}]}')
    labels = load_label_set(path)
    assert labels.ids == (1, 3)
    assert labels.names == ("class 1", "mito")
    assert labels.colours == ("#123456", PALETTE[2])


def test_short_sidecar_form(tmp_path):
    path = tmp_path / "classes.toml"
    path.write_text('unlabelled = 255\n[classes]\n0 = "background"\n1 = "mito"\n')
    assert load_label_set(path) == LabelSet.from_ids([0, 1], ["background", "mito"], unlabelled=255)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "classes = [", "c.toml cannot be used"),
        ("c.json", "[1, 2]", "must hold a table with 'classes'"),
        ("c.json", '{"names": []}', "has the fields 'classes'"),
        ("c.json", '{"classes": [{"id": 1}, {"id": 1}]}', "name an id twice"),
        ("c.json", '{"classes": [{"id": 1.5}]}', "must be a whole number, got 1.5"),
        ("c.json", '{"classes": [{"id": 1, "color": "#000000"}]}', "fields id, name and colour"),
        ("c.txt", "", "allowed are .toml and .json"),
    ],
)
def test_bad_sidecar_files_name_the_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_label_set(tmp_path / name)


def test_missing_sidecar(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml does not exist"):
        load_label_set(tmp_path / "nowhere.toml")


def test_parse_classes_names_in_order():
    assert parse_classes("cytoplasm, cell membrane").ids == (1, 2)
    assert parse_classes("cytoplasm, cell membrane").names == ("cytoplasm", "cell membrane")
    assert parse_classes("a,b,c", unlabelled=2).ids == (1, 3, 4)
    assert parse_classes("a,b", ids=[0, 4, 9]).ids == (4, 9)


def test_parse_classes_with_ids():
    labels = parse_classes("3=mito, 1=membrane")
    assert labels.ids == (1, 3)
    assert labels.names == ("membrane", "mito")


@pytest.mark.parametrize(
    ("text", "ids", "message"),
    [
        ("1=a,b", None, "mix 'name' and 'id=name'"),
        ("x=a", None, "must be a whole number, got 'x'"),
        ("1=a,1=b", None, "name an id twice"),
        ("a,b,c", [1, 2], "names has 3 entries"),
        ("a,,b", None, "not empty"),
    ],
)
def test_parse_classes_refuses(text, ids, message):
    with pytest.raises(ValueError, match=message):
        parse_classes(text, ids=ids)
