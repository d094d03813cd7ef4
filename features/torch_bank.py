"""The same filter bank on tensors, for a GPU: :func:`compute_torch` equals ``FilterBank.compute``.

A correlation along one axis is here a product with a banded matrix.  That spends arithmetic on zeros, but it
keeps a GPU's float32 units busy where a convolution with one channel would wait for memory.  Results agree with
the compiled bank within 1e-5 of the largest value of each feature (sums run in another order); blocks equal the
whole to the same tolerance, not to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from features import filters
from features.bank import FilterBank, VoxelSize


def compute_torch(bank: FilterBank, block: torch.Tensor, voxel_size_nm: VoxelSize) -> torch.Tensor:
    """Turn a block of grey values into features on the device the block is on.

    Parameters
    ----------
    bank : FilterBank
        Filters and scales.
    block : tensor of any real dtype, shape (Z + 2 hz, Y + 2 hy, X + 2 hx)
        Grey values with a margin of ``bank.halo(voxel_size_nm)`` on every side.
    voxel_size_nm : (z, y, x)
        Size of a voxel in nanometres.

    Returns
    -------
    tensor of float32, shape (F, Z, Y, X), on the same device

    Raises
    ------
    ValueError
        If the block has no voxel inside its halo.

    Notes
    -----
    Needs some 40 floats per voxel of the block beside the output.  Float32 products must not be rounded to
    TF32: torch's default, ``torch.set_float32_matmul_precision("highest")``.
    """
    halo = bank.halo(voxel_size_nm)
    if block.ndim != 3 or any(n <= 2 * h for n, h in zip(block.shape, halo, strict=True)):
        raise ValueError(
            f"block has shape {tuple(block.shape)}; with a halo of {halo} on each side it must have three axes "
            f"(z, y, x) of at least {tuple(2 * h + 1 for h in halo)} voxels: read a larger block or use smaller "
            "sigmas"
        )
    own = _own_features(bank, block.to(torch.float32), halo, voxel_size_nm)
    if not bank.neighbours:
        return own
    before, after = own[:, :-2], own[:, 2:]
    return torch.cat([own[:, 1:-1], torch.minimum(before, after), torch.maximum(before, after)])


def _own_features(
    bank: FilterBank, values: torch.Tensor, halo: Sequence[int], voxel_size_nm: VoxelSize
) -> torch.Tensor:
    if bank.kind == "intensity":
        return values[None]
    if bank.kind == "edges":
        return torch.stack([_edge_feature(values, name, bank.dimensions) for name in bank.filters])
    features: list[torch.Tensor] = []
    for sigma in bank.sigmas_in_voxels(voxel_size_nm):
        features += _scale_features(values, sigma, halo[3 - bank.dimensions :], bank.filters)
    return torch.stack(features)


# --- the 3 x 3 (x 3) set ---


def _edge_feature(block: torch.Tensor, name: str, dimensions: int) -> torch.Tensor:
    stem, _, which = name.partition("_")
    if stem == "intensity":
        return _crop(block, (1,) * dimensions)
    if stem == "laplace":
        return _laplace(block, dimensions)
    smoothing = filters.SOBEL_SMOOTHING if stem == "sobel" else filters.PREWITT_SMOOTHING
    axes = range(-dimensions, 0) if which == "magnitude" else ["zyx".index(which) - 3]
    responses = [_edge(block, axis, dimensions, smoothing.tolist()) for axis in axes]
    return _length(responses) if which == "magnitude" else responses[0]


def _edge(block: torch.Tensor, along: int, dimensions: int, smoothing: Sequence[float]) -> torch.Tensor:
    for axis in range(-dimensions, 0):
        block = _three_taps(block, axis, filters.DIFFERENCE.tolist() if axis == along else smoothing)
    return block


def _laplace(block: torch.Tensor, dimensions: int) -> torch.Tensor:
    total = -2.0 * dimensions * _crop(block, (1,) * dimensions)
    for along in range(-dimensions, 0):
        neighbours = block
        for axis in range(-dimensions, 0):
            neighbours = _three_taps(neighbours, axis, (1.0, 0.0, 1.0) if axis == along else (0.0, 1.0, 0.0))
        total = total + neighbours
    return total


def _three_taps(block: torch.Tensor, axis: int, weights: Sequence[float]) -> torch.Tensor:
    n = block.shape[axis] - 2
    taps = [weight * block.narrow(axis, i, n) for i, weight in enumerate(weights) if weight != 0.0]
    return torch.stack(taps).sum(0)


# --- the multi-scale set ---


def _scale_features(
    block: torch.Tensor, sigma: tuple[float, ...], halo: Sequence[int], wanted: Sequence[str]
) -> list[torch.Tensor]:
    """Features of one sigma, in the order of ``wanted``."""
    radius = filters.smoothing_radius(sigma)
    near = _crop(block, [h - r for h, r in zip(halo, radius, strict=True)])
    hessian = functools.cache(lambda: _hessian(near, sigma))
    make: dict[str, Callable[[], list[torch.Tensor]]] = {
        "gaussian": lambda: [_derivative(near, sigma)],
        "laplacian_of_gaussian": lambda: [torch.stack(_diagonal(hessian())).sum(0)],
        "gaussian_gradient_magnitude": lambda: [_length(_gradient(near, sigma))],
        "difference_of_gaussians": lambda: [_difference_of_gaussians(near, sigma, radius)],
        "structure_tensor_eigenvalues": lambda: _structure_tensor_eigenvalues(block, sigma, halo),
        "hessian_eigenvalues": lambda: _eigenvalues(hessian()),
    }
    return [feature for name in wanted for feature in make[name]()]


def _difference_of_gaussians(block: torch.Tensor, sigma: tuple[float, ...], radius: Sequence[int]) -> torch.Tensor:
    narrow = tuple(filters.DIFFERENCE_OF_GAUSSIANS_INNER * s for s in sigma)
    margin = [r - n for r, n in zip(radius, filters.smoothing_radius(narrow), strict=True)]
    return _derivative(block, sigma) - _derivative(_crop(block, margin), narrow)


def _structure_tensor_eigenvalues(
    block: torch.Tensor, sigma: tuple[float, ...], halo: Sequence[int]
) -> list[torch.Tensor]:
    radius = filters.structure_tensor_radius(sigma)
    gradient = _gradient(_crop(block, [h - r for h, r in zip(halo, radius, strict=True)]), sigma)
    outer = tuple(filters.STRUCTURE_TENSOR_OUTER * s for s in sigma)
    return _eigenvalues({(a, b): _derivative(gradient[a] * gradient[b], outer) for a, b in _pairs(len(sigma))})


def _gradient(block: torch.Tensor, sigma: tuple[float, ...]) -> list[torch.Tensor]:
    return [_derivative(block, sigma, a) for a in range(len(sigma))]


def _hessian(block: torch.Tensor, sigma: tuple[float, ...]) -> dict[tuple[int, int], torch.Tensor]:
    return {(a, b): _derivative(block, sigma, a, b) for a, b in _pairs(len(sigma))}


def _diagonal(entries: dict[tuple[int, int], torch.Tensor]) -> list[torch.Tensor]:
    return [values for (a, b), values in entries.items() if a == b]


def _derivative(block: torch.Tensor, sigma: Sequence[float], *axes: int) -> torch.Tensor:
    """Scale-normalised derivative along ``axes`` of the blurred block; the blur alone without any."""
    for axis, s in enumerate(sigma):
        order = axes.count(axis)
        kernel = torch.as_tensor(filters.gaussian_kernel(s, order) * s**order)
        block = _correlate(block, axis - len(sigma), kernel.to(block))
    return block


def _correlate(block: torch.Tensor, axis: int, kernel: torch.Tensor) -> torch.Tensor:
    """Valid correlation along one of the last three axes, as a product with a banded matrix."""
    n = block.shape[axis] - len(kernel) + 1
    band = kernel.new_zeros(n, block.shape[axis])
    start = torch.arange(n, device=band.device)[:, None]
    band.scatter_(1, start + torch.arange(len(kernel), device=band.device), kernel.expand(n, -1))
    if axis == -1:
        return block @ band.T
    if axis == -2:
        return band @ block
    return (band @ block.flatten(-2)).unflatten(-1, block.shape[-2:])


def _eigenvalues(entries: dict[tuple[int, int], torch.Tensor]) -> list[torch.Tensor]:
    """Eigenvalues of a symmetric matrix per voxel, largest first; see ``eigenvalues.py`` for the method."""
    if (2, 2) not in entries:
        mean, difference = (entries[0, 0] + entries[1, 1]) / 2, (entries[0, 0] - entries[1, 1]) / 2
        radius = torch.hypot(difference, entries[0, 1])
        return [mean + radius, mean - radius]
    zz, zy, zx, yy, yx, xx = (entries[pair].double() for pair in _pairs(3))
    mean = (xx + yy + zz) / 3
    a, b, c = xx - mean, yy - mean, zz - mean
    j2 = (a * a + b * b + c * c) / 2 + yx * yx + zx * zx + zy * zy
    j3 = a * (b * c - zy * zy) - yx * (yx * c - zy * zx) + zx * (yx * zy - b * zx)
    p = torch.sqrt(j2 / 3)
    angle = torch.acos((j3 / (2 * p**3).clamp_min(1e-290)).clamp(-1, 1)) / 3
    first, last = 2 * p * torch.cos(angle), 2 * p * torch.cos(angle + 2 * math.pi / 3)
    return [(mean + shift).float() for shift in (first, -first - last, last)]


def _length(components: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([c * c for c in components]).sum(0).sqrt()


def _crop(block: torch.Tensor, margin: Sequence[int]) -> torch.Tensor:
    for axis, r in zip(range(-len(margin), 0), margin, strict=True):
        block = block.narrow(axis, r, block.shape[axis] - 2 * r)
    return block


def _pairs(n: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(n) for b in range(a, n)]
