"""The same energy by slow, exact and foreign means: what the fast filters are judged by.

Three ways to the answer of `DenseCRF.refine`, chosen there by `backend=`:

- `"brute_force"`: every pair of voxels in float64. Any image; N² time and memory, so at most some 30³ voxels.
- `"grey_levels"`: exact too, for one-channel integer images: the sum over pairs is a sum over occupied grey
  levels l of separable Gaussian filters of Q·[I = l]. 64³ uint8 takes minutes of a core, not days.
- `"pydensecrf"`: the permutohedral lattice of Kraehenbuehl and Koltun as wrapped by pydensecrf2.

pydensecrf's conventions, and how they are met: the voxel itself is part of its message (`include_self=True` is
required); its normalisation is ours; a number w is the Potts penalty w; a matrix M acts as (M + M^T) / 2, so
asymmetric matrices are refused here rather than averaged in silence; a vector would act with the opposite sign
and cannot be passed. Its messages are 3-9 % off (measured against `"grey_levels"`), which moves single
probabilities by up to 0.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crf.gaussian import gaussian
from crf.potentials import clip_probabilities

if TYPE_CHECKING:
    from crf.problem import Problem

MAX_BRUTE_FORCE_VOXELS = 40_000
"""Two float64 kernels of this many voxels squared take 26 GB; 16³ takes 270 MB."""

Float = NDArray[np.float64]
Filter = Callable[[Float], Float]


def refine_exactly(problem: Problem, filters: tuple[Filter, Filter]) -> tuple[Float, list[float]]:
    """Mean field in float64 with the given normalised filters; the plain form of the algorithm.

    Parameters
    ----------
    problem : Problem
        Checked inputs with widths in voxels.
    filters : pair of callables
        Bilateral and spatial: (K, Z, Y, X) → (K, Z, Y, X), normalised, self term as the problem asks.

    Returns
    -------
    probabilities : ndarray of float64, shape (K, Z, Y, X)
    energies : list of float
        Mean-field energy before the first and after every iteration.
    """
    cost = -np.log(clip_probabilities(problem.probabilities))
    belief = np.exp(-cost)
    energies = []
    for iteration in range(problem.n_iterations + 1):
        penalty = np.zeros_like(belief)
        for matrix, apply in zip(problem.penalties, filters, strict=True):
            if matrix.any():
                penalty += np.tensordot(matrix, apply(belief), axes=1)
        entropy = -np.sum(belief * np.log(np.maximum(belief, 1e-300)))
        energies.append(float(np.sum(belief * (cost + 0.5 * penalty)) - entropy))
        if iteration == problem.n_iterations:
            break
        updated = _softmax(-cost - penalty)
        change = float(np.abs(updated - belief).max())
        belief = updated
        if change < problem.stop_change:
            break
    return belief, energies


def _softmax(scores: Float) -> Float:
    scores = np.exp(scores - scores.max(axis=0))
    return scores / scores.sum(axis=0)


# ------------------------------------------------------------------------------------------------- brute force


def brute_force_filters(problem: Problem) -> tuple[Filter, Filter]:
    """Both kernels as full N × N matrices.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    pair of callables

    Raises
    ------
    ValueError
        More than `MAX_BRUTE_FORCE_VOXELS` voxels.
    """
    shape = problem.shape
    n_voxels = int(np.prod(shape))
    if n_voxels > MAX_BRUTE_FORCE_VOXELS:
        raise ValueError(
            f"backend 'brute_force' compares every pair of {n_voxels} voxels; at most {MAX_BRUTE_FORCE_VOXELS} are "
            "allowed. Crop the volume, or use backend 'grey_levels' for integer images."
        )
    position = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(n_voxels, 3)
    intensity = problem.intensity().reshape(problem.image.shape[0], n_voxels).T
    bilateral = np.hstack([position / problem.bilateral_sigma, intensity / problem.intensity_sigma])
    spatial = position / np.asarray(problem.spatial_sigma)
    return _pair_filter(bilateral, problem.include_self), _pair_filter(spatial, problem.include_self)


def _pair_filter(features: Float, include_self: bool) -> Filter:
    squares = np.sum(features**2, axis=1)
    kernel = np.exp(np.minimum(features @ features.T - 0.5 * (squares[:, None] + squares), 0.0))
    np.fill_diagonal(kernel, 1.0)
    scale = 1.0 / np.sqrt(kernel.sum(axis=1))
    kernel *= scale[:, None] * scale
    if not include_self:
        np.fill_diagonal(kernel, 0.0)
    return lambda belief: (belief.reshape(len(belief), -1) @ kernel).reshape(belief.shape)


# ------------------------------------------------------------------------------------------------- grey levels


def grey_level_filters(problem: Problem) -> tuple[Filter, Filter]:
    """Both kernels exactly, through one separable spatial filter per occupied grey level.

    Parameters
    ----------
    problem : Problem
        With a one-channel integer image.

    Returns
    -------
    pair of callables

    Raises
    ------
    ValueError
        Float or multi-channel image.
    """
    image = problem.image
    if image.shape[0] != 1 or not np.issubdtype(image.dtype, np.integer):
        raise ValueError(
            f"backend 'grey_levels' got an image of {image.shape[0]} channels and dtype {image.dtype}; it needs one "
            "channel of integers. Use backend 'brute_force' on a small crop instead."
        )
    levels, index = np.unique(problem.intensity()[0], return_inverse=True)
    index = index.reshape(problem.shape)
    between = gaussian(levels[:, None] - levels, problem.intensity_sigma[0])
    wide = [_axis_kernel(n, s) for n, s in zip(problem.shape, problem.bilateral_sigma, strict=True)]
    narrow = [_axis_kernel(n, s) for n, s in zip(problem.shape, problem.spatial_sigma, strict=True)]

    def bilateral(belief: Float) -> Float:
        out = np.zeros_like(belief)
        for level, weights in enumerate(between):
            out += weights[index] * _separable(belief * (index == level), wide)
        return out

    def spatial(belief: Float) -> Float:
        return _separable(belief, narrow)

    return _normalised(bilateral, problem), _normalised(spatial, problem)


def _axis_kernel(size: int, sigma: float) -> Float:
    position = np.arange(size)
    return gaussian(position[:, None] - position, sigma)


def _separable(belief: Float, kernels: list[Float]) -> Float:
    along_z, along_y, along_x = kernels
    belief = along_y @ (belief @ along_x)  # the kernels are symmetric
    return (along_z @ belief.reshape(*belief.shape[:2], -1)).reshape(belief.shape)


def _normalised(kernel: Filter, problem: Problem) -> Filter:
    scale = 1.0 / np.sqrt(kernel(np.ones((1, *problem.shape))))

    def apply(belief: Float) -> Float:
        out = scale * kernel(scale * belief)
        return out if problem.include_self else out - scale**2 * belief

    return apply


# -------------------------------------------------------------------------------------------------- pydensecrf


def refine_with_pydensecrf(problem: Problem) -> tuple[NDArray[np.float32], list[float]]:
    """The same model on pydensecrf's permutohedral lattice.

    Parameters
    ----------
    problem : Problem
        With `include_self` true and symmetric penalties.

    Returns
    -------
    probabilities : ndarray of float32, shape (K, Z, Y, X)
    energies : list of float
        Empty: pydensecrf's own energy keeps the self term and cannot be compared.

    Raises
    ------
    ValueError
        Self term excluded, an asymmetric penalty, or a convergence test: pydensecrf has none of these.
    ImportError
        pydensecrf2 is not installed.
    """
    _check_pydensecrf_can(problem)
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise ImportError(
            "backend 'pydensecrf' needs the package pydensecrf2: pip install 'voxclf[pydensecrf]'."
        ) from error
    probabilities = clip_probabilities(problem.probabilities, dtype=np.float32)
    n_classes = len(probabilities)
    model = densecrf.DenseCRF(int(np.prod(problem.shape)), n_classes)
    model.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities).reshape(n_classes, -1)))
    position = np.stack(np.meshgrid(*map(np.arange, problem.shape), indexing="ij")).astype(np.float32)
    wide = position / np.asarray(problem.bilateral_sigma, np.float32)[:, None, None, None]
    channels = problem.intensity() / np.asarray(problem.intensity_sigma)[:, None, None, None]
    narrow = position / np.asarray(problem.spatial_sigma, np.float32)[:, None, None, None]
    features = (np.concatenate([wide, channels.astype(np.float32)]), narrow)
    for matrix, feature in zip(problem.penalties, features, strict=True):
        if matrix.any():
            model.addPairwiseEnergy(
                np.ascontiguousarray(feature.reshape(len(feature), -1)),
                compat=matrix.astype(np.float32),
                kernel=densecrf.DIAG_KERNEL,
                normalization=densecrf.NORMALIZE_SYMMETRIC,
            )
    refined = np.array(model.inference(problem.n_iterations), dtype=np.float32)
    return refined.reshape(probabilities.shape), []


def _check_pydensecrf_can(problem: Problem) -> None:
    if not problem.include_self:
        raise ValueError(
            "backend 'pydensecrf' always counts a voxel in its own message but include_self is False; "
            "set include_self=True to compare with it."
        )
    if problem.stop_change > 0:
        raise ValueError(
            f"backend 'pydensecrf' has no convergence test but stop_change is {problem.stop_change:g}; set it to 0."
        )
    for name, matrix in zip(("bilateral_weight", "spatial_weight"), problem.penalties, strict=True):
        if not np.allclose(matrix, matrix.T):
            raise ValueError(
                f"{name} is not symmetric and backend 'pydensecrf' would average it with its transpose; "
                "pass crf.symmetric_part(matrix) to get that, or use another backend."
            )
