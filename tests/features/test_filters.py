"""The definitions, against SciPy built from the same sentences and against calculus."""

import numpy as np
import pytest
from scipy import ndimage

from features import filters

SIGMAS = [0.02, 0.3, 0.7, 1.0, 1.6, 3.5, 10.0]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_kernels_have_the_moments_they_promise(sigma):
    radius = filters.gaussian_radius(sigma)
    k = np.arange(-radius, radius + 1)
    smooth, first, second = (filters.gaussian_kernel(sigma, order) for order in range(3))
    assert len(smooth) == len(first) == len(second) == 2 * radius + 1
    np.testing.assert_allclose([smooth.sum(), k @ smooth], [1, 0], atol=1e-14)
    np.testing.assert_allclose([first.sum(), k @ first, k**2 @ first], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose([second.sum(), k @ second, k**2 @ second], [0, 0, 2], atol=1e-12)
    np.testing.assert_array_equal(first, -first[::-1])
    np.testing.assert_array_equal(second, second[::-1])


def test_kernels_far_below_a_voxel_are_finite_differences():
    np.testing.assert_allclose(filters.gaussian_kernel(0.02), [0, 1, 0], atol=1e-15)
    np.testing.assert_allclose(filters.gaussian_kernel(0.02, 1), [-0.5, 0, 0.5])
    np.testing.assert_allclose(filters.gaussian_kernel(0.02, 2), [1, -2, 1])


@pytest.mark.parametrize("order", [1, 2])
def test_derivative_kernels_are_near_the_derivatives_of_a_gaussian(order):
    sigma, radius = 4.0, filters.gaussian_radius(4.0)
    k = np.arange(-radius, radius + 1.0)
    density = np.exp(-(k**2) / 2 / sigma**2) / (sigma * np.sqrt(2 * np.pi))
    truth = k / sigma**2 * density if order == 1 else (k**2 / sigma**4 - 1 / sigma**2) * density
    kernel = filters.gaussian_kernel(sigma, order)
    assert np.linalg.norm(kernel - truth) < 0.03 * np.linalg.norm(truth)


def test_an_order_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="order is 3; a kernel is written for 0, 1 or 2"):
        filters.gaussian_kernel(1.0, 3)


@pytest.mark.parametrize("sigma", [(1.0, 1.0, 1.0), (0.4, 1.3, 2.2)])
def test_gaussian_equals_scipy_with_the_same_radius(rng, sigma):
    block = rng.random((23, 37, 41))
    radius = filters.smoothing_radius(sigma)
    whole = ndimage.gaussian_filter(block, sigma, radius=list(radius))
    np.testing.assert_allclose(filters.gaussian(block, sigma), filters.crop(whole, radius), rtol=1e-12)


@pytest.mark.parametrize("orders", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (2, 0, 0), (1, 1, 0)])
def test_derivative_equals_scipy_correlating_with_the_written_kernels(rng, orders):
    block, sigma = rng.random((19, 21, 23)), (0.8, 1.1, 1.4)
    whole = block
    for axis, order in enumerate(orders):
        whole = ndimage.correlate1d(whole, filters.gaussian_kernel(sigma[axis], order), axis) * sigma[axis] ** order
    expected = filters.crop(whole, filters.smoothing_radius(sigma))
    np.testing.assert_allclose(filters.gaussian_derivative(block, sigma, orders), expected, atol=1e-13)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_edges_equal_scipy(rng, dimensions):
    block = rng.random((5, 11, 13))
    slices = [block] if dimensions == 3 else list(block)

    def inside(filter_one):
        whole = np.stack([filter_one(s) for s in slices]).reshape(block.shape)
        return filters.crop(whole, (1,) * dimensions)

    for ours, theirs, length in (
        (filters.sobel, ndimage.sobel, filters.sobel_magnitude),
        (filters.prewitt, ndimage.prewitt, filters.prewitt_magnitude),
    ):
        expected = [inside(lambda s, a=a, f=theirs: f(s, a)) for a in range(-dimensions, 0)]
        for axis in range(-dimensions, 0):
            np.testing.assert_allclose(ours(block, axis, dimensions), expected[axis], atol=1e-12)
        np.testing.assert_allclose(length(block, dimensions), np.sqrt(np.sum(np.square(expected), 0)), atol=1e-12)
    np.testing.assert_allclose(filters.laplace(block, dimensions), inside(ndimage.laplace), atol=1e-12)


def blob(shape, voxel_size, width):
    """A Gaussian blob of the given width (same unit as the voxel size) at the centre voxel."""
    grids = np.meshgrid(*[(np.arange(n) - n // 2) * s for n, s in zip(shape, voxel_size, strict=True)], indexing="ij")
    return np.exp(-sum(g**2 for g in grids) / 2 / width**2)


def test_a_round_blob_has_equal_curvature_along_every_axis_on_anisotropic_voxels():
    voxel_size, sigma_nm, width = (20.0, 10.0, 10.0), 30.0, 60.0
    sigma = tuple(sigma_nm / s for s in voxel_size)
    radius = filters.smoothing_radius(sigma)
    block = blob([2 * r + 1 for r in radius], voxel_size, width)
    # A Gaussian of variance w^2 blurred at sigma: amplitude (w^2 / v)^(3/2), curvature -1 / v, v = w^2 + sigma^2.
    variance = width**2 + sigma_nm**2
    expected = -(sigma_nm**2) / variance * (width**2 / variance) ** 1.5
    np.testing.assert_allclose(filters.hessian_eigenvalues(block, sigma).ravel(), [expected] * 3, rtol=0.02)
    np.testing.assert_allclose(filters.laplacian_of_gaussian(block, sigma).ravel(), 3 * expected, rtol=0.02)


def test_gradient_of_a_ramp_is_sigma_times_its_slope():
    _, y, x = np.indices((15, 15, 15))
    ramp = 3.0 * x + 4.0 * y
    np.testing.assert_allclose(filters.gaussian_gradient_magnitude(ramp, (1.5,) * 3), 1.5 * 5.0)
    np.testing.assert_allclose(filters.gaussian_gradient_magnitude(ramp, (1.5,) * 2), 1.5 * 5.0)


def test_structure_tensor_of_a_ramp_has_one_direction():
    z, _, x = np.indices((19, 19, 19))
    values = filters.structure_tensor_eigenvalues(3.0 * x + 4.0 * z, (1.5,) * 3)
    np.testing.assert_allclose(values[0], (1.5 * 5.0) ** 2)
    np.testing.assert_allclose(values[1:], 0, atol=1e-10)


def test_difference_of_gaussians_is_positive_in_a_dark_spot():
    sigma = (2.0, 2.0, 2.0)
    spot = -blob([15] * 3, (1, 1, 1), 1.5)
    expected = filters.gaussian(spot, sigma) - ndimage.gaussian_filter(spot, 1.32, radius=5)[7:8, 7:8, 7:8]
    np.testing.assert_allclose(filters.difference_of_gaussians(spot, sigma), expected, rtol=1e-12)
    assert expected.item() > 0
    assert filters.laplacian_of_gaussian(spot, sigma).item() > 0


@pytest.mark.parametrize("sigma", [(1.0, 1.2), (0.5, 1.0, 1.2)])
def test_results_are_what_the_radius_says(rng, sigma):
    block = rng.random((17, 19, 23))

    def shape(radius):
        return block.shape[: 3 - len(sigma)] + tuple(
            n - 2 * r for n, r in zip(block.shape[3 - len(sigma) :], radius, strict=True)
        )

    n = len(sigma)
    smooth, tensor = shape(filters.smoothing_radius(sigma)), shape(filters.structure_tensor_radius(sigma))
    assert filters.gaussian(block, sigma).shape == smooth
    assert filters.laplacian_of_gaussian(block, sigma).shape == smooth
    assert filters.gaussian_gradient_magnitude(block, sigma).shape == smooth
    assert filters.difference_of_gaussians(block, sigma).shape == smooth
    assert filters.hessian_eigenvalues(block, sigma).shape == (n, *smooth)
    assert filters.structure_tensor_eigenvalues(block, sigma).shape == (n, *tensor)
    assert filters.intensity_radius() == 0
    assert filters.laplace(block, n).shape == shape((filters.edge_radius(),) * n)
