"""The same filters on tensors, for GPUs: grey-level bumps, windows and blurs as matrix products.

The design (`gaussian.py`) is shared with the CPU path, so both make the same small errors and agree to float32
rounding. Every axis is a dense matrix here: at some 10 ns per voxel a product along a short axis is what a GPU
does best. Bumps are handled a few at a time so that scratch stays below `SCRATCH_BYTES`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from crf.compiled import INTENSITY_SHARE, SPACE_SHARE
from crf.gaussian import axis_band, axis_grid, intensity_basis
from crf.potentials import clip_probabilities
from crf.problem import Problem

SCRATCH_BYTES = 1 << 30
"""Memory for products of bumps and beliefs, besides about 16·(K - 1) bytes per voxel for the volumes."""


def refine_on_device(problem: Problem, device: str = "cpu") -> NDArray[np.float32]:
    """Refine with torch.

    Parameters
    ----------
    problem : Problem
    device : str
        Any device torch knows: "cpu", "cuda", "cuda:1".

    Returns
    -------
    ndarray of float32, shape (K, Z, Y, X)

    Raises
    ------
    ValueError
        The device is not available.
    """
    target = _device(device)
    with torch.inference_mode():
        return _refine(problem, target).cpu().numpy()


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but torch finds no CUDA device; use device='cpu' or backend='compiled'.")
    return device


def _refine(problem: Problem, device: torch.device) -> torch.Tensor:
    (wide, wide_offset), (near, near_offset) = problem.reduced_penalties()
    clipped = torch.from_numpy(clip_probabilities(problem.probabilities, dtype=np.float32)).to(device)
    belief = clipped[:-1].clone()
    log_odds = clipped.log_()[:-1] - clipped[-1]
    del clipped
    terms: list[tuple[TensorBilateral | TensorSpatial, NDArray, NDArray]] = []
    if problem.penalties[0].any():
        terms.append((TensorBilateral(problem, device), wide, wide_offset))
    if problem.penalties[1].any():
        terms.append((TensorSpatial(problem, device), near, near_offset))
    for kernel, _, offset in terms:
        everything = kernel.message(torch.ones((1, *problem.shape), device=device))
        log_odds -= torch.from_numpy(offset).to(device)[:, None, None, None] * everything
    mixers = [(kernel, torch.from_numpy(matrix).to(device)) for kernel, matrix, _ in terms]
    for _ in range(problem.n_iterations):
        scores = log_odds.clone()
        for kernel, matrix in mixers:
            scores -= torch.tensordot(matrix, kernel.message(belief), dims=1)
        updated = _softmax_against_last(scores)
        step = updated - belief
        belief = updated
        # What the other classes gain, class K loses.
        if problem.stop_change > 0 and max(step.abs().max(), step.sum(dim=0).abs().max()) < problem.stop_change:
            break
    last = (1.0 - belief.sum(dim=0, keepdim=True)).clamp_min(0.0)
    return torch.cat([belief, last])


def _softmax_against_last(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over K classes of which the last has score zero and is not stored."""
    largest = scores.amax(dim=0).clamp_min_(0.0)
    scores = (scores - largest).exp_()
    return scores / (scores.sum(dim=0) + (-largest).exp_())


class TensorBilateral:
    """The bilateral kernel on a grid, without the self term unless the problem has it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        levels, n_levels = problem.levels()
        basis = intensity_basis(
            problem.intensity_sigma, problem.intensity_ranges, n_levels, INTENSITY_SHARE * problem.tolerance
        )
        self.levels = torch.from_numpy(levels.astype(np.int32)).to(device)
        self.tables = torch.from_numpy(basis.tables).to(device)
        self.terms = basis.terms
        self.to_nodes, self.to_voxels = [], []
        for size, sigma in zip(problem.shape, problem.bilateral_sigma, strict=True):
            axis = axis_grid(size, sigma, SPACE_SHARE * problem.tolerance)
            window = torch.from_numpy(axis.matrix()).to(device)
            self.to_nodes.append(torch.from_numpy(axis.blur_matrix()).to(device) @ window.T)
            self.to_voxels.append(window)
        self.include_self = problem.include_self
        ones = torch.ones((1, *problem.shape), device=device)
        self.scale = self._apply(ones)[0].clamp_min_(1.0).rsqrt_()

    def message(self, belief: torch.Tensor) -> torch.Tensor:
        """n · K (n · belief) for belief (C, Z, Y, X)."""
        scaled = self.scale * belief
        out = self._apply(scaled)
        if not self.include_self:
            out -= scaled
        return out.mul_(self.scale)

    def _apply(self, belief: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(belief)
        at_once = max(1, SCRATCH_BYTES // (3 * belief.numel() * belief.element_size()))
        for first in range(0, len(self.terms), at_once):
            bumps = self._bumps(self.terms[first : first + at_once])
            grid = _along_axes(bumps[:, None] * belief, self.to_nodes, order=(2, 1, 0))
            read = _along_axes(grid, self.to_voxels, order=(0, 1, 2))
            out += (bumps[:, None] * read).sum(dim=0)
        return out

    def _bumps(self, terms: NDArray[np.int64]) -> torch.Tensor:
        """W_b of every voxel, shape (terms, Z, Y, X), the product over image channels."""
        bumps = None
        for channel in range(len(self.levels)):
            table = self.tables[channel, torch.from_numpy(terms[:, channel]).to(self.tables.device)]
            found = table.index_select(1, self.levels[channel].flatten()).reshape(-1, *self.levels.shape[1:])
            bumps = found if bumps is None else bumps * found
        return bumps


class TensorSpatial:
    """The exact spatial kernel, without the self term unless the problem has it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        bands = [
            axis_band(size, sigma, problem.tolerance)
            for size, sigma in zip(problem.shape, problem.spatial_sigma, strict=True)
        ]
        self.matrices = [torch.from_numpy(band.matrix()).to(device) for band in bands]
        z, y, x = (torch.from_numpy(band.scale).to(device) for band in bands)
        self.self_share = (z[:, None, None] * y[:, None] * x) ** 2
        self.include_self = problem.include_self

    def message(self, belief: torch.Tensor) -> torch.Tensor:
        """n · K (n · belief) for belief (C, Z, Y, X)."""
        out = _along_axes(belief, self.matrices, order=(0, 1, 2))
        return out if self.include_self else out - self.self_share * belief


def _along_axes(volume: torch.Tensor, matrices: list[torch.Tensor], order: tuple[int, ...]) -> torch.Tensor:
    """Multiply (..., Z, Y, X) by one matrix per axis; `order` names z, y, x as 0, 1, 2."""
    for axis in order:
        if axis == 2:
            volume = volume @ matrices[2].T
        elif axis == 1:
            volume = matrices[1] @ volume
        else:
            *lead, Z, Y, X = volume.shape
            volume = (matrices[0] @ volume.reshape(*lead, Z, Y * X)).reshape(*lead, len(matrices[0]), Y, X)
    return volume
