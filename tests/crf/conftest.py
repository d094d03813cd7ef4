"""Small synthetic tissue: cells with membranes, noise, and probabilities that are wrong in patches."""

import numpy as np
import pytest
from scipy import ndimage


def make_tissue(shape, n_classes, seed=0):
    """uint8 image (Z, Y, X) and float32 probabilities (K, Z, Y, X)."""
    rng = np.random.default_rng(seed)
    seeds = np.zeros(shape, dtype=int)
    n_cells = max(4, int(np.prod(shape) / 9**3))
    seeds[tuple(rng.integers(0, n, n_cells) for n in shape)] = np.arange(1, n_cells + 1)
    nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    cell = seeds[tuple(nearest)]
    is_membrane = ndimage.grey_dilation(cell, size=3) != cell
    label = np.where(is_membrane, 0, 1 + cell % max(1, n_classes - 1))
    image = np.linspace(0.2, 0.85, n_classes)[label] + rng.normal(0, 0.07, shape)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (n_classes, *shape)), (0, 1, 1, 1))
    score = 2.0 * np.eye(n_classes)[label].transpose(3, 0, 1, 2) + 4 * noise + rng.normal(0, 0.5, noise.shape)
    score = np.exp(score - score.max(axis=0))
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), (score / score.sum(axis=0)).astype(np.float32)


@pytest.fixture(scope="session")
def tissue():
    return make_tissue
