"""What every filter of the bank is: one pure function per filter and, beside it, its radius.

These functions are the definition; ``kernels.py`` and ``torch_bank.py`` compute the same numbers faster and
are tested against them.  Three conventions hold for all of them.

**Valid part only.**  A filter of radius r gets a block that is r voxels larger on each side and returns what
it can know exactly: every filtered axis gets shorter by 2r.  No value is ever invented at a border here;
padding at the volume's edge is the business of whoever cut the block.

**The last axes are filtered.**  ``sigma`` has one entry per filtered axis, in voxels: three of them filter a
volume (Z, Y, X), two filter each slice (Y, X) of a stack on its own.

**Written-down kernels.**  The sampled Gaussian ``exp(-k^2 / 2 sigma^2)`` for ``|k| <= ceil(3.5 sigma)`` and
its first and second derivative, normalised by their moments (see :func:`gaussian_kernel`).  Derivatives are
scale normalised (Lindeberg 1998: multiplied by sigma once per order), which makes them dimensionless along
every axis: on anisotropic voxels a gradient of so much grey value per nanometre counts the same in z as in
x, and values at different sigmas are comparable.

Arithmetic is in float64; cost is that of SciPy's separable filters and NumPy's ``eigvalsh``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# At 3.5 sigma the kernels differ from the untruncated ones by < 0.1 % (Gaussian), 0.7 % (first derivative)
# and 4 % (second) in the L2 sense at sigma = 10; at 3.0 it is 0.5, 3 and 13 %, at 4.0 0.02, 0.1 and 0.8 %.
TRUNCATE = 3.5
# Two further scales derived from the one the user gives, both as ilastik has them.
STRUCTURE_TENSOR_OUTER = 0.5
DIFFERENCE_OF_GAUSSIANS_INNER = 0.66

SMALLEST_RADIUS = 1  # a derivative needs a neighbour, however small the sigma

Floats = NDArray[np.float64]


# --- one-dimensional kernels ---


def gaussian_radius(sigma: float) -> int:
    """How many voxels a Gaussian of this width, or one of its derivatives, reaches on each side."""
    return max(SMALLEST_RADIUS, math.ceil(TRUNCATE * sigma))


def gaussian_kernel(sigma: float, order: int = 0) -> Floats:
    """Weights of a Gaussian (order 0) or of its first or second derivative, to be used as a correlation.

    With ``g[k] = exp(-k^2 / 2 sigma^2)`` for ``|k| <= r = gaussian_radius(sigma)``:

    - order 0: ``g``, scaled to sum 1;
    - order 1: ``k g[k]``, scaled so that a ramp of slope 1 gives 1 (sum k w = 1, sum w = 0);
    - order 2: ``(k^2 - m) g[k]`` with m the variance of g, scaled so that x^2 gives 2
      (sum k^2 w = 2, sum k w = 0, sum w = 0).

    For sigma well below one voxel these become the delta, ``[-1/2, 0, 1/2]`` and ``[1, -2, 1]``.

    Parameters
    ----------
    sigma : float
        Width in voxels, > 0.
    order : int
        0, 1 or 2.

    Returns
    -------
    ndarray of float64, shape (2 r + 1,)
        Symmetric (order 0, 2) or antisymmetric (order 1) about the centre, exactly.

    Raises
    ------
    ValueError
        If the order is not 0, 1 or 2.
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order is {order}; a kernel is written for 0, 1 or 2 only: pass one of these")
    radius = gaussian_radius(sigma)
    k = np.arange(1, radius + 1, dtype=np.float64)
    # Relative to the first neighbour, so that a tiny sigma cannot underflow the whole side to zero.
    side = np.exp((1.0 - k * k) / (2.0 * sigma * sigma))
    first_neighbour = math.exp(-1.0 / (2.0 * sigma * sigma))
    if order == 1:
        side = k * side
        side /= 2.0 * np.sum(k * side)
        return np.concatenate([-side[::-1], [0.0], side])
    if order == 2:
        variance = 2.0 * first_neighbour * np.sum(k * k * side) / (1.0 + 2.0 * first_neighbour * np.sum(side))
        side = (k * k - variance) * side
        side /= np.sum(k * k * side)
        return np.concatenate([side[::-1], [-2.0 * np.sum(side)], side])
    side = side * first_neighbour
    return np.concatenate([side[::-1], [1.0], side]) / (1.0 + 2.0 * np.sum(side))


def correlate_valid(block: NDArray, weights: Sequence[Floats]) -> Floats:
    """Correlate the last ``len(weights)`` axes with one kernel each and keep the valid part."""
    result = np.asarray(block, dtype=np.float64)
    for axis, kernel in zip(range(-len(weights), 0), weights, strict=True):
        result = ndimage.correlate1d(result, kernel, axis=axis)
    return crop(result, [len(kernel) // 2 for kernel in weights])


def crop(block: NDArray, radius: Sequence[int]) -> NDArray:
    """Cut ``radius`` voxels off both ends of the last ``len(radius)`` axes."""
    unfiltered = block.ndim - len(radius)
    inner = (slice(r, n - r) for r, n in zip(radius, block.shape[unfiltered:], strict=True))
    return block[(*(slice(None),) * unfiltered, *inner)]


# --- intensity and the 3 x 3 (x 3) set ---

DIFFERENCE = np.array([-1.0, 0.0, 1.0])
SOBEL_SMOOTHING = np.array([1.0, 2.0, 1.0])
PREWITT_SMOOTHING = np.array([1.0, 1.0, 1.0])
EDGE_RADIUS = 1


def intensity_radius() -> int:
    """Intensity looks at no neighbour."""
    return 0


def intensity(block: NDArray) -> Floats:
    """The grey value itself."""
    return np.asarray(block, dtype=np.float64)


def edge_radius() -> int:
    """Sobel, Prewitt and Laplace filters see the direct neighbours only."""
    return EDGE_RADIUS


def sobel(block: NDArray, axis: int, dimensions: int) -> Floats:
    """Edge strength along one axis, smoothed a little along the others (Sobel).

    ``[-1, 0, 1]`` along ``axis`` and ``[1, 2, 1]`` along every other filtered axis, not normalised: what
    ``scipy.ndimage.sobel`` computes.  In voxels: the set has no physical scale.

    Parameters
    ----------
    block : ndarray, shape (Z, Y, X)
        Grey values, one voxel larger than the result on each side of every filtered axis.
    axis : int
        -1 is x, -2 is y, -3 is z.
    dimensions : int
        2 filters each slice, 3 the volume.
    """
    return _edge(block, axis, dimensions, SOBEL_SMOOTHING)


def prewitt(block: NDArray, axis: int, dimensions: int) -> Floats:
    """Edge strength along one axis, averaged evenly along the others (Prewitt).

    As :func:`sobel` with ``[1, 1, 1]`` in place of ``[1, 2, 1]``: what ``scipy.ndimage.prewitt`` computes.
    """
    return _edge(block, axis, dimensions, PREWITT_SMOOTHING)


def sobel_magnitude(block: NDArray, dimensions: int) -> Floats:
    """Edge strength in any direction: the length of the vector of all Sobel responses."""
    return _length([sobel(block, axis, dimensions) for axis in range(-dimensions, 0)])


def prewitt_magnitude(block: NDArray, dimensions: int) -> Floats:
    """Edge strength in any direction: the length of the vector of all Prewitt responses."""
    return _length([prewitt(block, axis, dimensions) for axis in range(-dimensions, 0)])


def laplace(block: NDArray, dimensions: int) -> Floats:
    """How much darker or brighter a voxel is than its neighbours.

    The sum of ``[1, -2, 1]`` along every filtered axis, not normalised, as
    ``scipy.ndimage.laplace`` has it.
    """
    second = np.array([1.0, -2.0, 1.0])
    delta = np.array([0.0, 1.0, 0.0])
    return sum(
        (
            correlate_valid(block, [second if a == axis else delta for a in range(dimensions)])
            for axis in range(dimensions)
        ),
        start=np.zeros(1),
    )


def _edge(block: NDArray, axis: int, dimensions: int, smoothing: Floats) -> Floats:
    along = dimensions + axis
    return correlate_valid(block, [DIFFERENCE if a == along else smoothing for a in range(dimensions)])


def _length(components: Sequence[Floats]) -> Floats:
    return np.sqrt(sum((c * c for c in components), start=np.zeros(1)))


# --- the multi-scale set ---


def smoothing_radius(sigma: Sequence[float]) -> tuple[int, ...]:
    """Radius per axis of :func:`gaussian` and of every filter made of one pass of derivatives."""
    return tuple(gaussian_radius(s) for s in sigma)


def gaussian(block: NDArray, sigma: Sequence[float]) -> Floats:
    """The image blurred at one scale.

    Parameters
    ----------
    block : ndarray, shape (Z, Y, X)
        Grey values, larger than the result by the radius on each side of every filtered axis.
    sigma : sequence of float
        Width in voxels for each of the last ``len(sigma)`` axes.

    Returns
    -------
    ndarray of float64
        Blurred grey values, same unit as the block.
    """
    return correlate_valid(block, [gaussian_kernel(s) for s in sigma])


def gaussian_derivative(block: NDArray, sigma: Sequence[float], orders: Sequence[int]) -> Floats:
    """Scale-normalised derivative of the blurred image: ``orders`` per axis, times sigma once per order.

    Same unit as the grey value, because sigma in voxels over the voxel's width is the same length everywhere.
    """
    response = correlate_valid(block, [gaussian_kernel(s, order) for s, order in zip(sigma, orders, strict=True)])
    return response * math.prod(s**order for s, order in zip(sigma, orders, strict=True))


def laplacian_of_gaussian(block: NDArray, sigma: Sequence[float]) -> Floats:
    """Blob filter: positive in dark spots of about this scale, negative in bright ones.

    The sum of the scale-normalised second derivatives, which is the trace of the Hessian.
    """
    n = len(sigma)
    return sum((gaussian_derivative(block, sigma, _orders(n, a, a)) for a in range(n)), start=np.zeros(1))


def gaussian_gradient_magnitude(block: NDArray, sigma: Sequence[float]) -> Floats:
    """Edge strength at one scale: the length of the vector of scale-normalised first derivatives."""
    n = len(sigma)
    return _length([gaussian_derivative(block, sigma, _orders(n, a)) for a in range(n)])


def difference_of_gaussians(block: NDArray, sigma: Sequence[float]) -> Floats:
    """Band filter: what a blur at sigma changes in an image blurred at 0.66 sigma.

    ``gaussian(sigma) - gaussian(0.66 sigma)``: positive in dark spots, as the Laplacian of Gaussian.
    """
    narrow = [DIFFERENCE_OF_GAUSSIANS_INNER * s for s in sigma]
    margin = [gaussian_radius(s) - gaussian_radius(t) for s, t in zip(sigma, narrow, strict=True)]
    return gaussian(block, sigma) - gaussian(crop(block, margin), narrow)


def structure_tensor_radius(sigma: Sequence[float]) -> tuple[int, ...]:
    """Radius per axis: that of the derivatives plus that of the smoothing of their products."""
    return tuple(gaussian_radius(s) + gaussian_radius(STRUCTURE_TENSOR_OUTER * s) for s in sigma)


def structure_tensor_eigenvalues(block: NDArray, sigma: Sequence[float]) -> Floats:
    """How strongly, and along how many directions, the image changes around a voxel.

    Products of scale-normalised first derivatives at sigma, each smoothed by a Gaussian of 0.5 sigma; the
    eigenvalues of that matrix, largest first.  One large: a sheet.  Two: a tube.  Three: a corner.

    Returns
    -------
    ndarray of float64, shape (n, ...)
        n = ``len(sigma)`` eigenvalues, >= 0 to rounding, in squared grey values.
    """
    n = len(sigma)
    gradient = [gaussian_derivative(block, sigma, _orders(n, a)) for a in range(n)]
    outer = [STRUCTURE_TENSOR_OUTER * s for s in sigma]
    return symmetric_eigenvalues({(a, b): gaussian(gradient[a] * gradient[b], outer) for a, b in _upper_triangle(n)})


def hessian_eigenvalues(block: NDArray, sigma: Sequence[float]) -> Floats:
    """How the image curves around a voxel: dark sheets, tubes and spots give one, two and three large values.

    Eigenvalues of the matrix of scale-normalised second derivatives, largest first.

    Returns
    -------
    ndarray of float64, shape (n, ...)
        n = ``len(sigma)`` eigenvalues, in grey values.
    """
    n = len(sigma)
    return symmetric_eigenvalues(
        {(a, b): gaussian_derivative(block, sigma, _orders(n, a, b)) for a, b in _upper_triangle(n)}
    )


def symmetric_eigenvalues(entries: dict[tuple[int, int], Floats]) -> Floats:
    """Eigenvalues, largest first, of a symmetric matrix at every voxel, from its upper triangle."""
    n = max(a for a, _ in entries) + 1
    matrix = np.empty((*entries[0, 0].shape, n, n))
    for (a, b), values in entries.items():
        matrix[..., a, b] = matrix[..., b, a] = values
    return np.moveaxis(np.linalg.eigvalsh(matrix)[..., ::-1], -1, 0)


def _orders(n: int, *axes: int) -> tuple[int, ...]:
    return tuple(axes.count(a) for a in range(n))


def _upper_triangle(n: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(n) for b in range(a, n)]
