"""How probabilities and labels are stored: the functions between a step's float result and a volume on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from voxclf.labels import LabelSet

UINT8_LEVELS = 255


def quantise(probabilities: np.ndarray) -> np.ndarray:
    """Store probabilities as uint8, p = value / 255, rounded to the nearest; off by 0.002 at most."""
    return np.rint(probabilities * np.float32(UINT8_LEVELS)).astype(np.uint8)


def dequantise(stored: np.ndarray) -> np.ndarray:
    """Turn stored probabilities, uint8 or float, into float32 in [0, 1]."""
    if stored.dtype == np.uint8:
        return stored.astype(np.float32) / np.float32(UINT8_LEVELS)
    return stored.astype(np.float32, copy=False)


def to_float16(probabilities: np.ndarray) -> np.ndarray:
    """Store probabilities as float16."""
    return probabilities.astype(np.float16)


def to_float32(probabilities: np.ndarray) -> np.ndarray:
    """Store probabilities as they are computed."""
    return probabilities.astype(np.float32, copy=False)


def encode_uncertainty(probabilities: np.ndarray) -> np.ndarray:
    """Store entropy over its largest value ln K: probabilities (K, Z, Y, X) to (1, Z, Y, X), 0 sure, 255 no idea."""
    entropy = np.zeros(probabilities.shape[1:], np.float32)
    for share in probabilities:  # class by class, so that no second array of all classes is held
        entropy -= share * np.log(np.maximum(share, np.float32(1e-12)))
    largest = np.float32(np.log(len(probabilities)))
    return np.rint(np.clip(entropy / largest, 0, 1) * np.float32(UINT8_LEVELS)).astype(np.uint8)[None]


ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uint8": quantise,
    "float16": to_float16,
    "float32": to_float32,
}


@dataclass(frozen=True)
class MostProbableClass:
    """Turns probabilities (K, Z, Y, X) into label ids (1, Z, Y, X); the first class wins a tie."""

    label_set: LabelSet

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Choose the most probable class of every voxel."""
        return self.label_set.remap_to_ids(probabilities.argmax(axis=0))[None]
