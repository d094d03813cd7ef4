"""Do predicted probabilities mean what they say, and how to mend them where they do not.

A classifier is calibrated if, of all voxels to which it gives a class with probability 0.8, 80 % are of that
class. Both the check and the repair read the level tables of `ScoreTables`, so they cost nothing on top of a
scoring pass, whatever the size of the volume.

The repair is one monotone map per class, followed by renormalisation over the classes (one against the rest;
Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002).
Fit it on labels that the model was not trained on; on training labels every forest looks perfectly sure of
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxclf.metrics.voxelwise import ScoreTables

CalibrationMethod = Literal["isotonic", "platt"]


@dataclass(frozen=True)
class ReliabilityTable:
    """Predicted against observed frequency, per class and bin of predicted probability.

    Parameters
    ----------
    predicted : ndarray of float64, shape (K, M)
        Mean predicted probability of the voxels in each bin; nan where a bin is empty.
    observed : ndarray of float64, shape (K, M)
        Share of those voxels that truly are of the class; nan where a bin is empty.
    count : ndarray of int64, shape (K, M)
        Voxels in the bin.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    count: NDArray[np.int64]


def reliability_table(tables: ScoreTables, n_bins: int = 15) -> ReliabilityTable:
    """Gather the probability levels into bins and compare what was predicted with what was found.

    Parameters
    ----------
    tables : ScoreTables
        Counted with probabilities.
    n_bins : int
        Bins of equal width over 0 .. 1, at most one per level.

    Raises
    ------
    ValueError
        If the tables hold no probabilities, or `n_bins` is not in 1 .. number of levels.
    """
    _check_probabilities(tables)
    L = tables.n_levels
    if not 1 <= n_bins <= L:
        raise ValueError(f"n_bins is {n_bins}, must be 1 to {L} (the levels counted); use 10 to 20")
    p = np.arange(L) / (L - 1)
    # The last bin includes 1.0.
    bin_of_level = np.minimum((p * n_bins).astype(int), n_bins - 1)
    gather = (bin_of_level[:, None] == np.arange(n_bins)).astype(np.float64)  # (L, M)
    all_levels = tables.class_levels + tables.other_levels
    count = all_levels @ gather
    with np.errstate(invalid="ignore"):
        predicted = (all_levels * p) @ gather / count
        observed = tables.class_levels @ gather / count
    return ReliabilityTable(predicted, observed, count.astype(np.int64))


def expected_calibration_error(tables: ScoreTables, n_bins: int = 15) -> NDArray[np.float64]:
    """Tell by how much probabilities are off on average: the mean gap between predicted and observed
    frequency.

    Returns
    -------
    ndarray of float64, shape (K,)
        Per class, 0 (calibrated) to 1: sum over bins of (share of voxels) x abs(observed - predicted); see
        Naeini et al., AAAI 2015. A rare class has a small error simply because most voxels have p near 0 for
        it.
    """
    table = reliability_table(tables, n_bins)
    gaps = np.nan_to_num(np.abs(table.observed - table.predicted))
    return (gaps * table.count).sum(axis=1) / table.count.sum(axis=1)


@dataclass(frozen=True)
class CalibrationMap:
    """One rising curve per class that turns a predicted probability into a calibrated one.

    Parameters
    ----------
    curves : ndarray of float32, shape (K, L)
        Calibrated probability at each of L equally spaced predicted probabilities, not decreasing along L.
    """

    curves: NDArray[np.float32]

    def __post_init__(self) -> None:
        curves = self.curves
        if curves.ndim != 2 or curves.shape[1] < 2 or not np.all(np.isfinite(curves)):
            raise ValueError(f"curves must be finite with shape (K, L), L >= 2, got {curves.shape}; fit them anew")
        if curves.min() < 0 or curves.max() > 1 or (np.diff(curves, axis=1) < 0).any():
            raise ValueError("curves must rise within 0 to 1; they were damaged: fit the calibration anew")

    def apply(self, probabilities: NDArray) -> NDArray[np.float32]:
        """Return calibrated probabilities, summing to 1 over the classes.

        Between levels the curve is interpolated linearly. Where every class is mapped to 0, the voxel keeps
        its uncalibrated probabilities. The most probable class may change: that is part of the repair.

        Parameters
        ----------
        probabilities : ndarray, shape (K, ...)
            Float in [0, 1], or uint8 meaning p = value / 255.

        Returns
        -------
        ndarray of float32, same shape
        """
        K, L = self.curves.shape
        if len(probabilities) != K:
            raise ValueError(
                f"probabilities has {len(probabilities)} channels but the calibration was fitted for {K} "
                "classes; use it with the model it was fitted for"
            )
        levels = np.linspace(0.0, 1.0, L)
        is_stored = probabilities.dtype == np.uint8
        out = np.empty(probabilities.shape, np.float32)
        for k in range(K):
            if is_stored:
                out[k] = np.interp(np.arange(256) / 255, levels, self.curves[k])[probabilities[k]]
            else:
                out[k] = np.interp(probabilities[k], levels, self.curves[k])
        total = out.sum(axis=0)
        lost = total <= 0
        if lost.any():
            out[:, lost] = probabilities[:, lost] / (255 if is_stored else 1)
            total = out.sum(axis=0)
        out /= np.where(total > 0, total, 1)
        return out

    def to_arrays(self) -> dict[str, NDArray]:
        """Return plain arrays to store with a model; :meth:`from_arrays` reads them back."""
        return {"curves": self.curves}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> CalibrationMap:
        """Read the map from stored arrays, checking them."""
        return cls(np.asarray(arrays["curves"], np.float32))


def fit_calibration(tables: ScoreTables, method: CalibrationMethod = "isotonic") -> CalibrationMap:
    """Learn from held-out labels how predicted probabilities have to be bent to come true.

    Parameters
    ----------
    tables : ScoreTables
        Counted with probabilities, on labels that the model was not trained on.
    method : {"isotonic", "platt"}
        "isotonic" fits any rising curve, good from some thousands of voxels per class on; "platt" fits a
        logistic curve in the log-odds with two numbers per class, steadier with few labels.

    Returns
    -------
    CalibrationMap
        The curve of a class without a true held-out voxel is the identity, since nothing was learned about
        it.

    Raises
    ------
    ValueError
        If the tables hold no probabilities or `method` is unknown.
    """
    _check_probabilities(tables)
    fits = {"isotonic": _isotonic_curve, "platt": _platt_curve}
    if method not in fits:
        allowed = ", ".join(map(repr, fits))
        raise ValueError(f"method is {method!r}, allowed are {allowed}; choose one of them")
    identity = np.linspace(0.0, 1.0, tables.n_levels)
    curves = [
        fits[method](true.astype(np.float64), other.astype(np.float64), identity) if true.any() else identity
        for true, other in zip(tables.class_levels, tables.other_levels, strict=True)
    ]
    return CalibrationMap(np.clip(np.array(curves), 0, 1).astype(np.float32))


def _isotonic_curve(
    true: NDArray[np.float64], other: NDArray[np.float64], identity: NDArray[np.float64]
) -> NDArray[np.float64]:
    from scipy.optimize import isotonic_regression

    # One made-up voxel per level that believes the prediction: levels nobody used stay where they were, and
    # a few voxels cannot push a level to exactly 0 or 1.
    weight = true + other + 1.0
    return isotonic_regression((true + identity) / weight, weights=weight).x


def _platt_curve(
    true: NDArray[np.float64], other: NDArray[np.float64], identity: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit sigmoid(slope * log-odds + offset) by maximum likelihood, with Platt's smoothed targets."""
    from scipy.optimize import minimize

    half = 0.5 / (len(identity) - 1)
    p = np.clip(identity, half, 1 - half)
    design = np.stack([np.log(p / (1 - p)), np.ones_like(p)])  # (2, L)
    high, low = (true.sum() + 1) / (true.sum() + 2), 1 / (other.sum() + 2)
    total = true.sum() + other.sum()
    weight, target = (true + other) / total, (true * high + other * low) / total

    def loss_and_gradient(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logit = theta @ design
        loss = (weight * np.logaddexp(0, logit) - target * logit).sum()
        return float(loss), design @ (weight * _sigmoid(logit) - target)

    theta = minimize(loss_and_gradient, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    # A falling curve: the prediction tells less than nothing, and the class's frequency is the best guess.
    if theta[0] < 0:
        return np.full_like(identity, true.sum() / total)
    return _sigmoid(theta @ design)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


def _check_probabilities(tables: ScoreTables) -> None:
    if not tables.has_probabilities:
        raise ValueError(
            "tables hold no probabilities, only labels were scored; pass probabilities to score_block "
            "(predict with probabilities kept)"
        )
