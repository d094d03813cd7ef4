"""The design of the filters: every stated error is checked against the Gaussian itself."""

import numpy as np
import pytest

from crf.gaussian import (
    axis_band,
    axis_grid,
    float_levels,
    gaussian,
    intensity_basis,
    kernel_radius,
)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.3, 1.0, 10.0])
def test_bumps_sum_to_the_kernel_with_a_relative_error(sigma, tolerance):
    basis = intensity_basis((sigma,), (1.0,), 256, tolerance)
    table = basis.tables[0].astype(np.float64)
    level = np.linspace(0, 1, 256)
    wanted = gaussian(level[:, None] - level, sigma)
    # Bumps end at four and a half widths, so the relative error holds where the kernel matters.
    matters = wanted > 1e-5
    error = np.abs((table.T @ table)[matters] / wanted[matters] - 1)
    assert error.max() <= tolerance + 1e-5
    assert (table >= 0).all()


def test_the_number_of_bumps_is_what_the_docstring_says():
    for sigma in (0.02, 0.05, 0.1):
        assert intensity_basis((sigma,), (1.0,), 256, 6e-4).n_terms <= 1.3 / sigma + 5


def test_channels_multiply():
    basis = intensity_basis((0.1, 0.2), (1.0, 1.0), 64, 2e-3)
    level = np.linspace(0, 1, 64)
    i, j = np.array([10, 12]), np.array([30, 27])  # two voxels, their levels in both channels
    weight = [basis.tables[0][basis.terms[:, 0], i[v]] * basis.tables[1][basis.terms[:, 1], j[v]] for v in (0, 1)]
    wanted = gaussian(level[10] - level[12], 0.1) * gaussian(level[30] - level[27], 0.2)
    assert np.dot(*weight) == pytest.approx(wanted, rel=3e-3)


def test_too_many_terms_are_refused():
    with pytest.raises(ValueError, match="Use wider sigmas, fewer image channels"):
        intensity_basis((0.02, 0.02), (1.0, 1.0), 256, 1e-3)
    with pytest.raises(ValueError, match="scale float images so that sigma and range match"):
        intensity_basis((0.05,), (255.0,), 256, 1e-3)


@pytest.mark.parametrize("tolerance", [2.5e-2, 1.5e-3, 4.6e-4, 1e-4])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 3.0, 4.5, 8.0, 13.0, 20.0, 30.0])
def test_an_axis_on_a_grid_is_within_its_tolerance(sigma, tolerance):
    size = 97
    axis = axis_grid(size, sigma, tolerance)
    splines = axis.matrix().astype(np.float64)
    position = np.arange(size)
    wanted = gaussian(position[:, None] - position, sigma)
    assert np.abs(splines @ axis.blur_matrix() @ splines.T - wanted).max() <= 1.01 * tolerance


def test_errors_on_a_grid_cancel_in_sums():
    axis = axis_grid(400, 8.0, 4.6e-4)
    splines = axis.matrix().astype(np.float64)
    position = np.arange(400)
    error = splines @ axis.blur_matrix() @ splines.T - gaussian(position[:, None] - position, 8.0)
    assert axis.pitch == 4
    assert np.abs(error[200].sum()) < 1e-5 * gaussian(position - 200, 8.0).sum()


def test_a_wide_kernel_gets_a_coarse_grid_and_a_narrow_one_none():
    assert axis_grid(100, 20.0, 4.6e-4).pitch >= 8
    narrow = axis_grid(100, 1.0, 1.5e-3)
    assert narrow.pitch == 1
    np.testing.assert_array_equal(narrow.matrix(), np.eye(100))


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_band_is_the_normalised_gaussian(size):
    band = axis_band(size, 2.0, 1e-4)
    position = np.arange(size)
    kernel = gaussian(position[:, None] - position, 2.0)
    scale = 1 / np.sqrt(kernel.sum(axis=1))
    np.testing.assert_allclose(band.matrix(), scale[:, None] * kernel * scale, atol=3e-6)
    np.testing.assert_allclose(band.scale, scale, rtol=1e-5)


def test_radius_is_where_the_kernel_is_a_fifth_of_the_tolerance():
    radius = kernel_radius(5.0, 1e-3)
    assert gaussian(radius, 5.0) <= 2e-4 < gaussian(radius - 1, 5.0)


def test_float_levels_follow_the_width():
    assert float_levels(1.0, 2e-3) == 256
    assert float_levels(50.0, 2e-3) > float_levels(10.0, 2e-3) > 256
