"""Augmentations move image and labels alike, keep labels whole, and respect anisotropy."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from voxclf.training.augment import (
    RECIPES,
    CoarseDropout,
    CropAndResize,
    CutOut,
    Flip,
    Greyscale,
    InPlane,
    Misalignment,
    MissingSection,
    MotionBlur,
    QuarterTurn,
    _build_affine,
    _build_elastic,
    build_augmentation,
    find_isotropic_planes,
)

SHAPE = (9, 23, 37)
SECTIONS = (30.0, 8.0, 8.0)
PLANES = ((1, 2),)
AFFINE = {"rotate": np.pi, "scale": 0.2}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def window(rng):
    """Three classes in large blobs, an image that is its own label, and a fifth of the voxels unlabelled."""
    smooth = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3)
    classes = np.digitize(smooth, np.quantile(smooth, [0.33, 0.66]))
    target = np.where(rng.random(SHAPE) < 0.2, -1, classes)
    return classes[None].astype(np.float32), target


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("voxel_size", [SECTIONS, (5.0, 5.0, 5.0), (30.0, 8.0, 4.0)])
def test_recipes_keep_shape_dtype_and_whole_labels(recipe, voxel_size, window, rng):
    image, target = np.concatenate([window[0], window[0] + 3]), window[1]
    before = image.copy(), target.copy()
    augment = build_augmentation(recipe, voxel_size)
    for _ in range(6):
        changed, labels = augment(image, target, rng)
        assert (changed.shape, changed.dtype) == (image.shape, np.float32)
        assert (labels.shape, labels.dtype) == (target.shape, target.dtype)
        assert set(np.unique(labels)) <= {-1, 0, 1, 2}
        assert np.isfinite(changed).all()
        assert changed.flags.c_contiguous
        assert labels.flags.c_contiguous
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(target, before[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_seed_gives_the_same_window(recipe, window):
    one = build_augmentation(recipe, SECTIONS)(*window, np.random.default_rng(3))
    other = build_augmentation(recipe, SECTIONS)(*window, np.random.default_rng(3))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_windows_differ_from_draw_to_draw(recipe, window, rng):
    augment = build_augmentation(recipe, SECTIONS)
    draws = {augment(*window, rng)[0].tobytes() for _ in range(12)}
    assert len(draws) > 5


@pytest.mark.parametrize("recipe", ["none", "B"])
def test_tensors_come_back_as_tensors(recipe, window, rng):
    image, target = torch.from_numpy(window[0]), torch.from_numpy(window[1])
    changed, labels = build_augmentation(recipe, SECTIONS)(image, target, rng)
    assert (changed.dtype, labels.dtype) == (torch.float32, torch.int64)
    expected = build_augmentation(recipe, SECTIONS)(*window, np.random.default_rng(5))
    found = build_augmentation(recipe, SECTIONS)(image, target, np.random.default_rng(5))
    np.testing.assert_array_equal(found[0].numpy(), expected[0])


@pytest.mark.parametrize("transform", [Flip(), QuarterTurn(PLANES)], ids=lambda t: type(t).__name__)
def test_flips_and_turns_move_image_and_labels_as_one(transform, window, rng):
    image = window[1][None].astype(np.float32)
    for _ in range(10):
        changed, labels = transform.apply(image, window[1], rng)
        np.testing.assert_array_equal(changed[0], labels)


def test_turns_stay_in_planes_of_equal_voxels(rng):
    cube = np.arange(5**3).reshape(5, 5, 5)
    for _ in range(20):
        _, turned = QuarterTurn(find_isotropic_planes(SECTIONS)).apply(cube[None], cube, rng)
        for section, original in zip(turned, cube, strict=True):
            assert set(section.ravel()) == set(original.ravel())
    assert find_isotropic_planes((5, 5, 5)) == ((0, 1), (0, 2), (1, 2))
    assert find_isotropic_planes((30, 8, 8)) == ((1, 2),)
    assert find_isotropic_planes((30, 8, 4)) == ()


@pytest.mark.parametrize(
    "transform",
    [
        InPlane("affine", PLANES, 1.0, _build_affine, AFFINE),
        InPlane("elastic", PLANES, 1.0, _build_elastic),
        CropAndResize(1.0, is_centred=False),
        CropAndResize(1.0, is_centred=True),
        Misalignment(0, 1.0),
    ],
    ids=["affine", "elastic", "random crop", "centre crop", "misalignment"],
)
def test_deformations_move_image_and_labels_alike(transform, window, rng):
    image, target = window
    agreeing = []
    for _ in range(8):
        changed, labels = transform.apply(image, target, rng)
        is_labelled = labels >= 0
        assert is_labelled.mean() > 0.3
        agreeing.append((np.abs(changed[0] - labels) < 0.75)[is_labelled].mean())
    assert np.mean(agreeing) > 0.9


@pytest.mark.parametrize("build", [_build_affine, _build_elastic])
def test_in_plane_changes_keep_sections_apart(build, rng):
    image = np.broadcast_to(np.arange(4.0, dtype=np.float32)[None, :, None, None], (1, 4, 24, 24))
    target = np.broadcast_to(np.arange(4)[:, None, None], (4, 24, 24))
    options = AFFINE if build is _build_affine else {}
    changed, labels = InPlane("", PLANES, 1.0, build, options).apply(image, target, rng)
    np.testing.assert_allclose(changed, image, atol=1e-5)
    for z in range(4):
        assert set(np.unique(labels[z])) <= {-1, z}


def test_rotation_by_monai_is_the_rotation_of_scipy(window, rng, monkeypatch):
    transform = InPlane("", PLANES, 1.0, _build_affine, {"rotate": 0.0, "scale": 0.0})
    angle = 0.4
    # A range of one angle makes the draw known.
    monkeypatch.setattr(transform._transform.rand_affine.rand_affine_grid, "rotate_range", ((angle, angle),))
    smooth = ndimage.gaussian_filter(window[0], (0, 0, 2, 2))
    changed, _ = transform.apply(smooth, window[1], rng)
    inside = np.s_[:, 9:14, 12:25]
    both = [
        ndimage.rotate(smooth[0], sign * np.rad2deg(angle), axes=(1, 2), reshape=False, order=1) for sign in (1, -1)
    ]
    assert min(np.abs(changed[0][inside] - expected[inside]).max() for expected in both) < 1e-4


def test_what_rotates_in_from_outside_is_unlabelled(rng):
    target = np.zeros((1, 20, 60), dtype=np.int64)
    transform = InPlane("", PLANES, 1.0, _build_affine, {"rotate": np.pi, "scale": 0.0})
    labels = np.stack([transform.apply(target[None].astype(np.float32), target, rng)[1] for _ in range(5)])
    assert set(np.unique(labels)) == {-1, 0}


def test_misalignment_shifts_whole_sections(rng):
    target = np.arange(6 * 20 * 20).reshape(6, 20, 20)
    for _ in range(10):
        changed, labels = Misalignment(0, 1.0).apply(target[None].astype(np.float32), target, rng)
        is_labelled = labels >= 0
        np.testing.assert_array_equal(changed[0][is_labelled], labels[is_labelled])
        np.testing.assert_array_equal(labels[0], target[0])
        for z in range(6):
            moved = np.unique((labels[z] - target[z])[is_labelled[z]])
            assert len(moved) == 1


def test_missing_section_loses_one_inner_section(window, rng):
    image = window[0] + 5
    for _ in range(10):
        changed, labels = MissingSection(0, 1.0).apply(image, window[1], rng)
        lost = np.flatnonzero((changed[0] == 0).all(axis=(1, 2)))
        assert len(lost) == 1
        assert 0 < lost[0] < SHAPE[0] - 1
        assert labels is window[1]
    one_section = image[:, :1], window[1][:1]
    assert MissingSection(0, 1.0).apply(*one_section, rng)[0] is one_section[0]


def test_motion_blur_smooths_along_a_line_and_keeps_the_mean(rng):
    image = rng.normal(size=(1, 8, 40, 40)).astype(np.float32)
    changed, _ = MotionBlur(0, 1.0).apply(image, np.zeros((8, 40, 40), int), rng)
    spread = changed[0].std(axis=(1, 2))
    assert (spread < 0.6).sum() == 3
    np.testing.assert_array_equal(changed[0][spread > 0.6], image[0][spread > 0.6])
    np.testing.assert_allclose(changed.mean(axis=(2, 3)), image.mean(axis=(2, 3)), atol=0.05)


def test_cut_out_loses_one_box(window, rng):
    image = window[0] + 5
    for _ in range(10):
        changed, labels = CutOut(1.0).apply(image, window[1], rng)
        lost = np.argwhere(changed[0] == 0)
        extent = lost.max(axis=0) - lost.min(axis=0) + 1
        assert len(lost) == extent.prod()
        assert (extent <= np.array(SHAPE) // 2 + 1).all()
        assert labels is window[1]


def test_coarse_dropout_loses_small_boxes(window, rng):
    changed, labels = CoarseDropout(1.0).apply(window[0] + 5, window[1], rng)
    assert 0 < (changed == 0).sum() <= 8 * np.prod([n // 8 for n in SHAPE])
    assert labels is window[1]


def test_greyscale_is_linear_without_gamma_and_monotonic_with(window, rng):
    image = rng.normal(size=(1, *SHAPE)).astype(np.float32)
    changed, _ = Greyscale(1.0).apply(image, window[1], rng)
    slope, offset = np.polyfit(image.ravel(), changed.ravel(), 1)
    np.testing.assert_allclose(changed, slope * image + offset, atol=1e-4)
    assert 0.8 <= slope <= 1.2
    assert abs(offset) <= 0.2
    bent, _ = Greyscale(1.0, gamma=0.4).apply(image, window[1], rng)
    order = np.argsort(image.ravel())
    assert (np.diff(bent.ravel()[order]) >= -1e-5).all()
    flat = np.ones((1, *SHAPE), dtype=np.float32)
    assert np.isfinite(Greyscale(1.0, gamma=0.4).apply(flat, window[1], rng)[0]).all()


def test_crop_of_everything_changes_nothing(window, rng):
    changed, labels = CropAndResize(1.0, is_centred=True, least=1.0).apply(*window, rng)
    np.testing.assert_allclose(changed, window[0], atol=1e-6)
    np.testing.assert_array_equal(labels, window[1])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (3, 8, 8)])
def test_small_windows_survive(recipe, shape, rng):
    augment = build_augmentation(recipe, (5.0, 5.0, 5.0))
    for _ in range(10):
        changed, labels = augment(np.ones((1, *shape), np.float32), np.zeros(shape, np.int64), rng)
        assert changed.shape[1:] == labels.shape == shape


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="choose one of none, flips, patch, B, C, D"):
        build_augmentation("E", SECTIONS)


def test_the_patch_recipe_needs_no_monai():
    program = (
        "import sys, numpy as np; from voxclf.training.augment import build_augmentation as b;"
        "b('patch', (5, 5, 5))(np.zeros((1, 8, 8, 8), 'f4'), np.zeros((8, 8, 8), int), np.random.default_rng(0));"
        "assert 'monai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
