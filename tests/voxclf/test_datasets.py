"""The phantom: reproducible, realistic in proportion, not solvable by grey value, and readable as files."""

import tomllib

import numpy as np
import pytest
import tifffile
from scipy import ndimage
from sklearn.metrics import balanced_accuracy_score
from sklearn.tree import DecisionTreeClassifier

from voxclf.datasets import (
    LABEL_COLOURS,
    LABEL_NAMES,
    PLANES,
    EndlessPhantom,
    Phantom,
    label_slices,
    make_phantom,
    sparse_labels,
    write_phantom,
)

CELL_MEMBRANE, MITOCHONDRION, MITO_MEMBRANE, SYNAPSE, VESICLE = 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(128, seed=0)


@pytest.fixture(scope="module")
def small() -> Phantom:
    return make_phantom((64, 65, 70), seed=4)


def shares(labels):
    return np.bincount(labels.ravel(), minlength=7) / labels.size


# --- the dense phantom


def test_same_seed_gives_the_same_bits_and_another_seed_other_tissue(small):
    again = make_phantom((64, 65, 70), seed=4)
    np.testing.assert_array_equal(again.image, small.image)
    np.testing.assert_array_equal(again.labels, small.labels)
    assert (make_phantom((64, 65, 70), seed=5).labels != small.labels).mean() > 0.2


def test_arrays_are_uint8_and_every_voxel_has_a_named_class(small):
    assert small.image.dtype == small.labels.dtype == np.uint8
    assert small.image.shape == small.labels.shape == (64, 65, 70)
    assert set(np.unique(small.labels)) == set(small.label_names) == set(range(1, 7))


@pytest.mark.parametrize(("size", "seed"), [(64, 0), (65, 1), (70, 2)])
def test_all_classes_occur_from_64_voxels_on(size, seed):
    labels = make_phantom(size, seed=seed).labels
    assert (np.bincount(labels.ravel(), minlength=7)[1:] > 100).all()


def test_class_shares_are_those_of_neuropil(phantom):
    share = shares(phantom.labels)
    expected = {1: (0.5, 0.65), 2: (0.15, 0.22), 3: (0.06, 0.16), 4: (0.03, 0.08), 5: (0.01, 0.04), 6: (0.02, 0.06)}
    for label, (low, high) in expected.items():
        assert low < share[label] < high, (LABEL_NAMES[label], share[label])


def test_grey_value_alone_does_not_tell_the_classes_apart(phantom):
    """The best rule on intensity, fitted and scored on the truth itself, stays below 0.6 balanced accuracy."""
    grey, truth = phantom.image.reshape(-1, 1)[::7], phantom.labels.ravel()[::7]
    rule = DecisionTreeClassifier(class_weight="balanced", max_depth=8).fit(grey, truth)
    assert 0.3 < balanced_accuracy_score(truth, rule.predict(grey)) < 0.6


def test_dark_classes_share_one_range_of_grey_values(phantom):
    median = {k: np.median(phantom.image[phantom.labels == k]) for k in (1, CELL_MEMBRANE, MITO_MEMBRANE, SYNAPSE)}
    assert np.ptp([median[CELL_MEMBRANE], median[MITO_MEMBRANE], median[SYNAPSE]]) < 15
    assert median[1] - median[CELL_MEMBRANE] > 40


def test_membranes_close_cells_off_from_each_other(phantom):
    inside = (phantom.labels != CELL_MEMBRANE) & (phantom.labels != SYNAPSE)
    cells, _ = ndimage.label(inside)
    sizes = np.bincount(cells.ravel())[1:]
    assert (sizes > 2000).sum() >= 15
    assert sizes.max() < 0.3 * inside.sum()


def test_mitochondria_are_wrapped_in_their_membrane(phantom):
    """Around a mitochondrion's inside there is only its membrane: its 6-neighbours hold (almost) no other class."""
    inside = phantom.labels == MITOCHONDRION
    around = ndimage.binary_dilation(inside) & ~inside
    assert (phantom.labels[around] == MITO_MEMBRANE).mean() > 0.995


def test_vesicles_are_about_40_nm_wide():
    labels = make_phantom(96, voxel_size_nm=(4.0, 4.0, 4.0), seed=3).labels
    found, n = ndimage.label(labels == VESICLE)
    inner = ndimage.distance_transform_edt(labels == VESICLE, sampling=4.0)
    radii = np.asarray(ndimage.maximum(inner, found, np.arange(1, n + 1)))
    assert n > 10
    assert 16 < np.median(radii) < 25


def test_tissue_keeps_its_size_when_the_voxels_are_anisotropic():
    """The same 320 nm in z, sampled at 10 nm instead of 5: the same classes at the same places."""
    fine, coarse = make_phantom((64, 64, 64), seed=1), make_phantom((32, 64, 64), (10.0, 5.0, 5.0), seed=1)
    membrane = CELL_MEMBRANE
    assert ((fine.labels[::2] == membrane) == (coarse.labels == membrane)).mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, "size is 8; allowed is"),
        ({"size": (64, 64, 2000)}, "read regions of EndlessPhantom"),
        ({"size": (64, 64)}, "one side or three"),
        ({"voxel_size_nm": (5, 0, 5)}, "three positive lengths"),
        ({"size": 512, "voxel_size_nm": (50, 10, 10)}, "take fewer or smaller voxels"),
        ({"seed": -1}, "seed is -1; allowed is 0"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(**arguments)


# --- labelled slices


def test_slices_hold_every_class_often_enough_to_learn(phantom):
    counts = sum(np.bincount(piece.labels.ravel(), minlength=7) for piece in label_slices(phantom))
    assert (counts[1:] > 500).all(), counts


def test_slices_agree_with_the_truth_and_leave_the_asked_share_open(phantom):
    for axis, piece in enumerate(label_slices(phantom, undefined_share=0.15)):
        assert piece.plane == PLANES[axis]
        truth = np.take(phantom.labels, piece.origin[axis], axis=axis)
        labelled = piece.labels != 0
        np.testing.assert_array_equal(piece.labels[labelled], truth[labelled])
        assert 1 - labelled.mean() == pytest.approx(0.15, abs=0.01)


def test_open_voxels_lie_on_edges_between_classes(phantom):
    piece = label_slices(phantom)[0]
    truth = phantom.labels[piece.origin[0]]
    uniform = ndimage.maximum_filter(truth, 3) == ndimage.minimum_filter(truth, 3)
    assert (piece.labels[uniform] != 0).all()


def test_no_share_open_labels_the_slices_fully(small):
    assert all((piece.labels > 0).all() for piece in label_slices(small, undefined_share=0))


def test_sparse_volume_is_the_three_slices_and_nothing_else(small):
    volume = sparse_labels(small)
    elsewhere = np.ones(volume.shape, bool)
    for axis, piece in enumerate(label_slices(small)):
        index = [slice(None)] * 3
        index[axis] = piece.origin[axis]
        elsewhere[tuple(index)] = False
        labelled = piece.labels != 0
        np.testing.assert_array_equal(volume[tuple(index)][labelled], piece.labels[labelled])
    assert not volume[elsewhere].any()
    assert (volume[volume > 0] == small.labels[volume > 0]).all()


def test_undefined_share_out_of_range_is_refused(small):
    with pytest.raises(ValueError, match=r"undefined_share is 0.9; allowed is 0..0.4"):
        sparse_labels(small, undefined_share=0.9)


# --- files


def test_written_folder_reads_back_with_voxel_size_and_listing(tmp_path):
    phantom = make_phantom((24, 37, 41), voxel_size_nm=(8.0, 5.0, 4.0), seed=2)
    write_phantom(tmp_path / "new" / "folder", phantom)
    folder = tmp_path / "new" / "folder"
    with tifffile.TiffFile(folder / "volume.tif") as file:
        np.testing.assert_array_equal(file.asarray(), phantom.image)
        assert file.imagej_metadata["spacing"] == 8.0
        assert file.imagej_metadata["unit"] == "nm"
        x_per_nm = file.pages[0].tags["XResolution"].value
        y_per_nm = file.pages[0].tags["YResolution"].value
    assert x_per_nm[1] / x_per_nm[0] == pytest.approx(4.0)
    assert y_per_nm[1] / y_per_nm[0] == pytest.approx(5.0)
    np.testing.assert_array_equal(tifffile.imread(folder / "truth.tif"), phantom.labels)
    unseen = tifffile.imread(folder / "unseen.tif")
    np.testing.assert_array_equal(unseen[unseen > 0], phantom.labels[unseen > 0])
    for piece in label_slices(phantom):
        axis = PLANES.index(piece.plane)
        assert not unseen.take(piece.origin[axis], axis).any()
    assert (unseen == 0).mean() < 3.1 / min(unseen.shape)

    listing = tomllib.loads((folder / "labels.toml").read_text(encoding="utf-8"))
    assert {entry["id"]: entry["name"] for entry in listing["classes"]} == LABEL_NAMES
    assert {entry["id"]: entry["colour"] for entry in listing["classes"]} == LABEL_COLOURS
    for entry, piece in zip(listing["slice"], label_slices(phantom), strict=True):
        assert (entry["plane"], tuple(entry["origin"])) == (piece.plane, piece.origin)
        np.testing.assert_array_equal(tifffile.imread(folder / entry["file"]), piece.labels)


# --- regions of an endless volume


@pytest.fixture(scope="module")
def endless() -> EndlessPhantom:
    return EndlessPhantom((500, 400, 1_000_000_000), seed=3)


def test_regions_equal_the_whole(endless):
    start, stop = (140, 300, 999_999_000), (181, 337, 999_999_043)  # across a mirror seam of every axis
    whole, truth = endless.read(start, stop), endless.read_labels(start, stop)
    for z in range(0, 41, 13):
        for y in range(0, 37, 17):
            low = (start[0] + z, start[1] + y, start[2] + 5)
            high = (min(low[0] + 13, stop[0]), min(low[1] + 17, stop[1]), stop[2] - 2)
            part = np.s_[z : high[0] - start[0], y : high[1] - start[1], 5:-2]
            np.testing.assert_array_equal(endless.read(low, high), whole[part])
            np.testing.assert_array_equal(endless.read_labels(low, high), truth[part])


def test_copies_share_tissue_but_not_noise(endless):
    first, second = ((0, 0, 0), (40, 40, 40)), ((0, 320, 640), (40, 360, 680))
    np.testing.assert_array_equal(endless.read_labels(*first), endless.read_labels(*second))
    difference = endless.read(*first).astype(float) - endless.read(*second)
    assert abs(difference.mean()) < 0.3
    # Two independent draws of shot noise at a grey of about 130: sqrt(2 * (0.45 * 130 + 9)) = 11.6.
    assert 9 < difference.std() < 14
    assert abs(np.corrcoef(difference[..., 1:].ravel(), difference[..., :-1].ravel())[0, 1]) < 0.02


def test_tissue_runs_on_across_a_seam(endless):
    labels = endless.read_labels((0, 0, 150), (40, 40, 170))
    np.testing.assert_array_equal(labels[..., 9], labels[..., 10])


def test_another_seed_gives_another_volume(endless):
    other = EndlessPhantom(endless.shape, seed=4)
    region = (0, 0, 0), (20, 20, 20)
    assert (other.read(*region) != endless.read(*region)).mean() > 0.8


@pytest.mark.parametrize("region", [((0, 0, 0), (501, 4, 4)), ((-1, 0, 0), (4, 4, 4)), ((4, 4, 4), (4, 8, 8))])
def test_regions_outside_are_refused(endless, region):
    with pytest.raises(ValueError, match="clip it first"):
        endless.read(*region)


def test_shape_without_three_sides_is_refused():
    with pytest.raises(ValueError, match=r"try \(1024, 2048, 2048\)"):
        EndlessPhantom((0, 4, 4))
