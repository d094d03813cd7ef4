"""The bank computed filter by filter from the definitions: what every faster form is compared with."""

import numpy as np
import pytest

from features import filters

MULTISCALE_RADIUS = {
    "gaussian": filters.smoothing_radius,
    "laplacian_of_gaussian": filters.smoothing_radius,
    "gaussian_gradient_magnitude": filters.smoothing_radius,
    "difference_of_gaussians": filters.smoothing_radius,
    "structure_tensor_eigenvalues": filters.structure_tensor_radius,
    "hessian_eigenvalues": filters.smoothing_radius,
}
AXES = {"x": -1, "y": -2, "z": -3}


def edge_by_definition(block, name, dimensions):
    if name == "intensity":
        return filters.crop(filters.intensity(block), (1,) * dimensions)
    stem, _, axis = name.partition("_")
    if axis in AXES:
        return getattr(filters, stem)(block, AXES[axis], dimensions)
    return getattr(filters, name)(block, dimensions)


def scale_by_definition(block, name, sigma, halo):
    radius = MULTISCALE_RADIUS[name](sigma)
    margin = [h - r for h, r in zip(halo[3 - len(sigma) :], radius, strict=True)]
    values = getattr(filters, name)(filters.crop(block, margin), sigma)
    return list(values) if values.ndim == 4 else [values]


def own_by_definition(bank, block, voxel_size_nm):
    if bank.kind == "intensity":
        return filters.intensity(block)[None]
    if bank.kind == "edges":
        return np.stack([edge_by_definition(block, name, bank.dimensions) for name in bank.filters])
    features = []
    for sigma_nm in bank.sigmas_nm:
        sigma = tuple(sigma_nm / size for size in voxel_size_nm[3 - bank.dimensions :])
        for name in bank.filters:
            features += scale_by_definition(block, name, sigma, bank.halo(voxel_size_nm))
    return np.stack(features)


@pytest.fixture
def by_definition():
    def compute(bank, block, voxel_size_nm):
        own = own_by_definition(bank, block, voxel_size_nm)
        if not bank.neighbours:
            return own
        both = np.stack([own[:, :-2], own[:, 2:]])
        return np.concatenate([own[:, 1:-1], both.min(axis=0), both.max(axis=0)])

    return compute


@pytest.fixture
def rng():
    return np.random.default_rng(7)
