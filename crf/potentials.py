"""What the CRF is told: class costs from probabilities and penalties between classes.

The energy of a labelling x of the voxels i is

    E(x) = sum_i -ln p_i(x_i)  +  sum_{i<j} [ mu1(x_i, x_j) k1_ij + mu2(x_i, x_j) k2_ij ]

(Kraehenbuehl and Koltun 2011, Eq. 1-3), with `mu1`, `mu2` the penalty matrices made here and `k1`, `k2` the
normalised bilateral and spatial kernels of `gaussian.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROBABILITY_FLOOR = 1e-5
"""Probabilities below this are raised to it, so that one wrong zero cannot outvote every neighbour."""

SUM_TOLERANCE = 1e-2
"""How far the probabilities of a voxel may be from summing to one (8-bit storage needs K / 510)."""

Penalty = float | tuple[tuple[float, ...], ...]


def check_probabilities(probabilities: NDArray, name: str = "probabilities") -> None:
    """Refuse arrays that are not class probabilities.

    Parameters
    ----------
    probabilities : ndarray of float, shape (K, Z, Y, X)
        Values 0..1 that sum to one over K at every voxel, within `SUM_TOLERANCE`.
    name : str
        What the messages call the array.

    Raises
    ------
    TypeError
        Not floating point.
    ValueError
        Wrong number of axes, fewer than two classes, an empty axis, NaN, negative values, or sums other than one.
    """
    if probabilities.ndim != 4:
        raise ValueError(
            f"{name} has shape {probabilities.shape}; it must have four axes (K, Z, Y, X), classes first. "
            "Add an axis for a single slice, or move the class axis to the front with np.moveaxis."
        )
    if not np.issubdtype(probabilities.dtype, np.floating):
        raise TypeError(
            f"{name} has dtype {probabilities.dtype}; it must be floating point. "
            "Divide 8-bit probabilities by 255 (16-bit by 65535) first."
        )
    if probabilities.shape[0] < 2 or 0 in probabilities.shape:
        raise ValueError(
            f"{name} has shape {probabilities.shape}; it needs at least 2 classes and 1 voxel along every axis. "
            "For one foreground map f pass np.stack([1 - f, f])."
        )
    # Plane by plane: a sum over the whole volume would be a copy the size of the image.
    for z in range(probabilities.shape[1]):
        _check_plane(probabilities[:, z], z, name)


def _check_plane(plane: NDArray, z: int, name: str) -> None:
    total = plane.sum(axis=0)
    worst = float(np.abs(total - 1.0).max())
    # One comparison catches NaN too, because every comparison with NaN is false.
    if worst <= SUM_TOLERANCE and plane.min() >= 0.0:
        return
    if not np.isfinite(plane).all():
        raise ValueError(
            f"{name} holds NaN or infinity in slice z={z}; values must be 0..1. "
            "Set voxels without a prediction to 1/K in every class."
        )
    if plane.min() < 0.0:
        raise ValueError(
            f"{name} goes down to {plane.min():g} in slice z={z}; values must be 0..1. "
            "Apply a softmax if these are scores or log-probabilities."
        )
    raise ValueError(
        f"{name} sums to a value {worst:.3g} away from 1 in slice z={z}; the K classes of a voxel must sum to one "
        f"(within {SUM_TOLERANCE}). Divide by the sum over axis 0, and give unlabelled voxels 1/K in every class."
    )


def clip_probabilities(probabilities: NDArray, dtype: type = np.float64) -> NDArray:
    """Raise zeros to `PROBABILITY_FLOOR` and make every voxel sum to one again.

    Parameters
    ----------
    probabilities : ndarray of float, shape (K, Z, Y, X)
    dtype : type
        Of the result.

    Returns
    -------
    ndarray, shape (K, Z, Y, X)
    """
    clipped = np.maximum(probabilities, PROBABILITY_FLOOR, dtype=dtype)
    clipped /= clipped.sum(axis=0)
    return clipped


def parse_penalty(weight: ArrayLike, name: str) -> Penalty:
    """Check a weight and make it hashable: a number stays one, a matrix becomes nested tuples.

    Parameters
    ----------
    weight : float or array-like, shape (K, K)
    name : str
        Argument name for messages.

    Returns
    -------
    float or tuple of tuples of float

    Raises
    ------
    ValueError
        Not a number or square matrix, or not finite.
    """
    values = np.asarray(weight, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity; give finite penalties, 0 switches the kernel off.")
    if values.ndim == 0:
        return float(values)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(
            f"{name} has shape {values.shape}; it must be a number (the same penalty for every pair of different "
            "classes) or a square (K, K) matrix. For per-class weights v pass the matrix you mean, "
            "for example np.diag(v) or v[:, None] * (1 - np.eye(K))."
        )
    return tuple(tuple(float(v) for v in row) for row in values)


def penalty_matrix(weight: Penalty, n_classes: int, name: str) -> NDArray[np.float64]:
    """The (K, K) cost of neighbouring class pairs; a number w means w off the diagonal, 0 on it (Potts).

    Row = the class of a voxel, column = the class of its neighbour. Only the symmetric part of a matrix enters
    the energy, because pairs have no order. The update uses the matrix as given, as a learned compatibility
    does (Zheng et al. 2015); pydensecrf always replaces M by (M + M^T) / 2, see `symmetric_part`.

    Parameters
    ----------
    weight : float or nested tuples, shape (K, K)
    n_classes : int
    name : str
        Argument name for messages.

    Returns
    -------
    ndarray of float64, shape (K, K)

    Raises
    ------
    ValueError
        The matrix is not K × K.
    """
    if isinstance(weight, float):
        return weight * (1.0 - np.eye(n_classes))
    matrix = np.array(weight, dtype=np.float64)
    if matrix.shape != (n_classes, n_classes):
        raise ValueError(
            f"{name} is a {matrix.shape[0]}×{matrix.shape[1]} matrix but the probabilities have {n_classes} classes; "
            f"give one row and one column per class ({n_classes}×{n_classes}) or a single number."
        )
    return matrix


def symmetric_part(weight: ArrayLike) -> NDArray[np.float64]:
    """The part of a penalty matrix that pydensecrf keeps: (M + M^T) / 2.

    Parameters
    ----------
    weight : array-like, shape (K, K)

    Returns
    -------
    ndarray of float64, shape (K, K)
    """
    matrix = np.asarray(weight, dtype=np.float64)
    return 0.5 * (matrix + matrix.T)


def against_last_class(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rewrite a penalty matrix for K - 1 messages, the last class being what the others leave.

    With F_K = F(1) - sum_{c<K} F_c and costs measured against class K, the penalty of class c is
    `sum_{d<K} reduced[c, d] F_d + offset[c] F(1)`: one channel in K need not be filtered.

    Parameters
    ----------
    matrix : ndarray of float64, shape (K, K)

    Returns
    -------
    reduced : ndarray of float64, shape (K - 1, K - 1)
    offset : ndarray of float64, shape (K - 1,)
    """
    offset = matrix[:-1, -1] - matrix[-1, -1]
    reduced = matrix[:-1, :-1] - matrix[:-1, -1:] - matrix[-1:, :-1] + matrix[-1, -1]
    return reduced, offset


def per_axis(value: float | Sequence[float], n: int, name: str, unit: str = "") -> tuple[float, ...]:
    """Turn one positive number, or n of them, into a tuple of n.

    Parameters
    ----------
    value : float or sequence of n floats
    n : int
    name, unit : str
        For messages.

    Returns
    -------
    tuple of n floats

    Raises
    ------
    ValueError
        Wrong count, or not positive and finite.
    """
    values = np.asarray(value, dtype=np.float64)
    if values.ndim == 0:
        values = np.repeat(values, n)
    if values.shape != (n,):
        raise ValueError(
            f"{name} has {values.size} values {value}; give one number or {n} of them"
            + (" in the order (z, y, x)." if n == 3 else ".")
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(
            f"{name} is {value}; it must be positive and finite{f' ({unit})' if unit else ''}. "
            "To switch a kernel off give it weight 0."
        )
    return tuple(float(v) for v in values)
