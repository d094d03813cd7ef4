"""Correlation against brute force, noise against what was added, slice defects against what was made."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from voxclf.explore.texture import (
    SliceFold,
    TextureFold,
    cut_columns,
    describe_slices,
    describe_texture,
    estimate_noise,
)
from voxclf.geometry import Region, make_block


def tissue(shape, sigma, seed=0, noise=0.0):
    """Smooth random structure of standard deviation 30 with white noise on top."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=shape), sigma, mode="wrap")
    return 128 + 30 * smooth / smooth.std() + noise * rng.normal(size=shape)


def whole(array):
    return make_block(0, Region((0, 0, 0), array.shape))


def measure(array, voxel_size_nm):
    return describe_texture(TextureFold()(whole(array), array[None]), voxel_size_nm)


def test_autocorrelation_is_the_sum_over_pairs():
    image = tissue((7, 23, 17), 1.5, noise=5)
    sums = TextureFold()(whole(image), image[None].astype(np.float32))
    centred = image - image.mean(axis=(1, 2), keepdims=True)
    for axis, lag in ((0, 1), (0, 3), (1, 4), (2, 1), (2, 8)):
        a, b = (np.moveaxis(centred, axis, 0)[part] for part in (slice(lag, None), slice(None, -lag)))
        assert sums.products[axis, lag] == pytest.approx((a * b).sum(), rel=1e-4, abs=2)
        assert sums.pairs[axis, lag] == a.size


def test_boxes_add_up():
    image = tissue((8, 24, 24), 2)
    fold = TextureFold()
    total = fold(whole(image[:4]), image[None, :4]) + fold(whole(image[4:]), image[None, 4:])
    assert total.pairs[2, 0] == image.size
    assert len(total.noise) == 2


@pytest.mark.parametrize("sigma", [2.0, 9.0])
def test_noise_is_what_was_added(sigma):
    image = tissue((6, 120, 120), 4, noise=sigma)
    assert estimate_noise(image) == pytest.approx(sigma, rel=0.04)
    texture = measure(image, (5, 5, 5))
    assert texture.noise_share == pytest.approx(sigma**2 / (sigma**2 + 900), rel=0.25)


def test_length_is_that_of_a_gaussian_structure_whatever_the_noise():
    # The autocorrelation of Gaussian-filtered noise is exp(-d² / 4 sigma²); it is one half at 2 sigma sqrt(ln 2).
    expected = 2 * 4 * np.sqrt(np.log(2)) * 5
    for noise in (0, 10):
        texture = measure(tissue((48, 160, 160), 4, noise=noise), (5, 5, 5))
        np.testing.assert_allclose(texture.length_nm, expected, rtol=0.12)


def test_implied_size_recovers_a_wrong_z():
    image = tissue((24, 160, 160), (1.5, 6, 6), noise=4)
    truth = measure(image, (20, 5, 5))
    np.testing.assert_allclose(truth.implied_size_nm, (20, 5, 5), rtol=0.15)
    wrong = measure(image, (5, 5, 5))
    assert wrong.implied_size_nm[0] == pytest.approx(20, rel=0.15)
    # Slices thinner than pixels are told as well.
    thin = measure(tissue((64, 120, 120), (8, 2.5, 2.5), noise=2), (20, 20, 20))
    assert thin.implied_size_nm[0] < 10


def slices_of(image):
    fold = SliceFold(image.shape[0])
    sums = None
    for block in cut_columns(image.shape, 10**7):
        found = fold(block, image[None][(slice(None), *block.core.slices)])
        sums = found if sums is None else sums + found
    return describe_slices(sums)


@pytest.fixture
def stack():
    return tissue((150, 40, 44), (2.5, 2, 2), noise=6)


def test_correlations_are_numpys(stack):
    order = slices_of(stack)
    for z in (0, 61, 62, 148):
        assert order.next_one[z] == pytest.approx(np.corrcoef(stack[z].ravel(), stack[z + 1].ravel())[0, 1])
    assert order.next_but_one[60] == pytest.approx(np.corrcoef(stack[60].ravel(), stack[62].ravel())[0, 1])
    assert np.isnan(order.next_one[149])
    assert np.isnan(order.next_but_one[148])


def test_clean_stacks_have_no_defect(stack):
    for seed in range(3):
        assert slices_of(tissue((150, 40, 44), (2.5, 2, 2), seed, noise=6)).defects == ()
    assert slices_of(tissue((30, 40, 44), (0.8, 4, 4), noise=6)).defects == ()
    assert slices_of(stack[:4]).defects == ()


def kinds(order):
    return [(defect.z, defect.kind) for defect in order.defects]


def test_each_defect_is_found_where_it_is(stack):
    exchanged = stack.copy()
    exchanged[[40, 41]] = stack[[41, 40]]
    assert kinds(slices_of(exchanged)) == [(40, "exchanged")]
    repeated = stack.copy()
    repeated[70] = stack[69]
    assert kinds(slices_of(repeated)) == [(70, "repeated")]
    missing = np.delete(stack, range(90, 96), axis=0)
    assert kinds(slices_of(missing)) == [(90, "jump")]
    foreign = stack.copy()
    foreign[20] = stack[120]
    assert kinds(slices_of(foreign)) == [(20, "foreign")]
    blank = stack.copy()
    blank[60:63] = 0
    assert kinds(slices_of(blank)) == [(60, "blank")]
    assert slices_of(blank).defects[0].last == 62


def test_brightness_that_flickers_is_no_defect(stack):
    factor = np.random.default_rng(1).uniform(0.6, 1.4, (150, 1, 1))
    assert slices_of(stack * factor + 50 * factor).defects == ()


def test_columns_cover_all_slices_within_the_budget():
    blocks = cut_columns((1000, 5000, 7000), 10**8)
    assert sum(block.core.n_voxels for block in blocks) <= 1.05e8
    starts = {block.core.start[1:] for block in blocks}
    covered = np.zeros(1000, int)
    for block in blocks:
        assert block.core.stop[0] <= 1000
        if block.core.start[1:] == min(starts):
            covered[block.core.start[0] : block.core.stop[0]] += 1
    assert covered.min() >= 1
    assert len(cut_columns((1, 30, 30), 10**6)) == 1
