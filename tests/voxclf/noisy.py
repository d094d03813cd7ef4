"""What a prediction looks like before a CRF: the right class most of the time, and noise from voxel to voxel."""

import numpy as np

from tests.conftest import draw_cells
from voxclf.labels import LabelSet

THREE = LabelSet.from_ids([1, 2, 3], names=["inside", "membrane", "blob"])


def noisy_probabilities(labels, noise=1.2, seed=0):
    """float32 (3, Z, Y, X) around the labels 1..3, summing to one; without noise the labels are always right."""
    rng = np.random.default_rng(seed)
    score = 2.0 * np.eye(3)[labels.astype(int) - 1].transpose(3, 0, 1, 2) + rng.normal(0, noise, (3, *labels.shape))
    score = np.exp(score)
    return (score / score.sum(axis=0)).astype(np.float32)


def draw_prediction(shape, noise=1.2, seed=5):
    """Image uint8, labels 1..3 and probabilities as uint8 of a few cells."""
    image, labels = draw_cells(shape, seed)
    return image, labels, np.rint(noisy_probabilities(labels, noise, seed) * 255).astype(np.uint8)
