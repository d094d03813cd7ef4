"""The parameters of a dense CRF as a space to search: bounds, and the penalties that labels suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from voxclf.geometry import VoxelSize
from voxclf.labels import LabelSet
from voxclf.models.crf_parameters import CrfParameters
from voxclf.models.crf_refiner import Window

# Widths in voxels of the finest axis. Weights: the kernels are normalised, so a weight of 1 moves log-odds by about 1.
BOUNDS = {
    "bilateral_sigma": (1.0, 20.0),
    "intensity_sigma": (0.02, 0.5),
    "spatial_sigma": (0.4, 6.0),
    "bilateral_weight": (0.1, 20.0),
    "spatial_weight": (0.1, 20.0),
    "image_sigma": (0.3, 4.0),
}
NARROWEST_INTENSITY = {1: 0.02, 2: 0.1, 3: 0.25}
"""By number of image channels: narrower kernels would need more than some hundred intensity terms."""
LEAST_IMAGE_SIGMA = 0.35
"""Below this many voxels a Gaussian is one voxel wide; 0 says so."""
N_SHARES = 2
"""Coordinates between 0 and 1: how far the penalties follow the contacts, and how far they spare rare classes."""
LEAST_SHARE = 0.01
"""Frequency below which a class counts as no rarer."""
STRONGEST_CONTACT = 3.0
"""Factor by which the contacts of two classes move their penalty, up or down."""
MOST_PAIRS = 6
"""Pairs of classes with a penalty of their own."""


@dataclass(frozen=True)
class SearchSpace:
    """Parameters as a point of the unit cube, and factors of the penalties of classes and pairs of classes."""

    voxel_size_nm: VoxelSize
    label_set: LabelSet
    n_iterations: int
    n_channels: int
    intensity_windows: tuple[Window, ...] | None
    contacts: np.ndarray
    counts: np.ndarray

    @property
    def n_dimensions(self) -> int:
        """Two widths in space, one in intensity, two weights, smoothing, and the shares of contacts and rarity."""
        return len(BOUNDS) + N_SHARES

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Of all but the shares, which run from 0 to 1."""
        narrowest = NARROWEST_INTENSITY[self.n_channels]
        return list({**BOUNDS, "intensity_sigma": (narrowest, BOUNDS["intensity_sigma"][1])}.values())

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of classes that touch most; a single pair is no different from the weights."""
        a, b = np.triu_indices(self.label_set.n_classes, 1)
        if len(a) < 2:
            return []
        order = np.argsort(-self.contacts[a, b], kind="stable")[:MOST_PAIRS]
        return [(int(a[i]), int(b[i])) for i in order]

    @property
    def n_factors(self) -> int:
        """One per class, then one per pair."""
        return self.label_set.n_classes + len(self.pairs)

    def locate(self, values: Sequence[float]) -> np.ndarray:
        """The point of widths in voxels, weights, smoothing and shares."""
        scaled = [np.log(v / low) / np.log(high / low) for v, (low, high) in zip(values, self.bounds, strict=False)]
        return np.clip([*scaled, *values[-N_SHARES:]], 0, 1)

    def parameters(self, point: np.ndarray, log_factors: Sequence[float] | np.ndarray = ()) -> CrfParameters:
        """The parameters of a point; factors multiply the penalties of classes, then of :attr:`pairs`."""
        values = [
            low * (high / low) ** float(u) for u, (low, high) in zip(np.clip(point, 0, 1), self.bounds, strict=False)
        ]
        finest = min(self.voxel_size_nm)
        share, rarity = np.clip(point[-N_SHARES:], 0, 1).tolist()
        n_classes = self.label_set.n_classes
        shape = (1 - share) * (1 - np.eye(n_classes)) + share * contact_penalties(self.contacts)
        factors = np.exp(log_factors) if len(log_factors) else np.ones(self.n_factors)
        for (a, b), factor in zip(self.pairs, factors[n_classes:], strict=True):
            shape[a, b] = shape[b, a] = shape[a, b] * factor
        shape *= (factors[:n_classes] * rarity_factors(self.counts) ** rarity)[:, None]
        return CrfParameters(
            bilateral_sigma_nm=(_round(values[0] * finest),),
            intensity_sigma=_round(values[1]),
            spatial_sigma_nm=(_round(values[2] * finest),),
            bilateral_weight=_as_weight(values[3] * shape),
            spatial_weight=_as_weight(values[4] * shape),
            n_iterations=self.n_iterations,
            image_sigma_nm=_round(values[5] * finest) if values[5] >= LEAST_IMAGE_SIGMA else 0.0,
            intensity_windows=self.intensity_windows,
            classes=self.label_set.names,
        )


def _round(value: float) -> float:
    """Four digits: a parameter file is read by people, and no score knows the fifth."""
    return float(f"{value:.4g}")


def _as_weight(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(_round(v) for v in row) for row in matrix.tolist())


def contact_penalties(contacts: np.ndarray) -> np.ndarray:
    """Penalties that spare pairs of classes which touch in the labels; mean 1 off the diagonal, 0 on it.

    The root of expected over counted faces, if classes met by chance according to how much each touches others,
    kept between 1/3 and 3. The root, because counted contacts are those of small labelled areas.

    Parameters
    ----------
    contacts : ndarray of int64, shape (K, K)
        From :func:`voxclf.metrics.structure.count_contacts`.

    Returns
    -------
    ndarray of float64, shape (K, K)
    """
    between = contacts - np.diag(np.diag(contacts)).astype(np.float64)
    outward = between.sum(axis=1)
    expected = np.outer(outward, outward) / max(outward.sum(), 1.0)
    penalties = np.clip(np.sqrt((expected + 1) / (between + 1)), 1 / STRONGEST_CONTACT, STRONGEST_CONTACT)
    np.fill_diagonal(penalties, 0)
    n_classes = len(contacts)
    return penalties * (n_classes * (n_classes - 1) / penalties.sum())


def rarity_factors(counts: np.ndarray) -> np.ndarray:
    """Factors of the penalties of each class, in proportion to its frequency; their geometric mean is 1.

    Examples
    --------
    >>> rarity_factors(np.array([900, 100]))
    array([3.        , 0.33333333])
    """
    logs = np.log(np.maximum(counts, LEAST_SHARE * counts.sum()))
    return np.exp(logs - logs.mean())
