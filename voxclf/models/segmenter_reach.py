"""How far a segmenter looks: the margin beyond which the volume changes no probability by more than a tolerance.

A UNet's receptive field on paper is hundreds of voxels, most of which it hardly uses. What matters for seams is the
error that a block makes for not seeing further, and that is measured: along each axis, the trained network is run on
a long window and on the same window cut off at a margin on both sides; the largest change of a probability in the
middle is the error of that margin. Both ends of the cut are the ones that a block has, so the padding of convolutions
counts too. After Luo et al., "Understanding the effective receptive field", NeurIPS 2016, which uses gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from voxclf.engine.transfer import mirror_indices
from voxclf.geometry import Zyx, round_up
from voxclf.models.segmenter import Segmenter

SEAM_TOLERANCE = 0.01
"""Largest change of a probability at a seam: less than three of the 255 levels in which probabilities are stored."""
LARGEST_MARGIN = 256
"""Voxels. A network that looks further is cut off here, and what that costs is told."""
N_WINDOWS = 2
ACROSS, MOST_ACROSS = 32, 64
"""Extent of a window across the axis that is measured, at least; two alignments if those are more, but not above the
second."""


@dataclass(frozen=True)
class Reach:
    """What was measured: the margin of a trained network, and the error that it leaves.

    Parameters
    ----------
    margin : (z, y, x)
        Voxels on each side, multiples of the network's alignment.
    tolerance : float
        What was asked for: largest change of a probability, all axes together.
    error : float
        What was measured at the margin, summed over the axes. Above the tolerance only if :data:`LARGEST_MARGIN` was
        too little.
    """

    margin: Zyx
    tolerance: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"margin": list(self.margin), "tolerance": self.tolerance, "error": self.error}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Reach:
        """Read back what :meth:`to_dict` gave."""
        z, y, x = values["margin"]
        return cls((z, y, x), values["tolerance"], values["error"])


def measure_reach(
    network: Segmenter,
    sample: np.ndarray | None = None,
    tolerance: float = SEAM_TOLERANCE,
    rng: np.random.Generator | None = None,
    device: str = "cpu",
) -> Reach:
    """Measure the margin that a trained segmenter needs for seams within a tolerance.

    Parameters
    ----------
    network : Segmenter
        Trained, in eval mode, on ``device``.
    sample : ndarray of float32, shape (C, Z, Y, X), optional
        A normalised piece of the volume, mirrored where windows are longer. Smooth noise by default, which is less
        like what the network will see.
    tolerance : float
        Largest change of a probability. Each axis gets a third: at a block's corner three errors add.
    rng : numpy.random.Generator, optional
        Where the windows lie.
    device : str
        Where the network is.

    Returns
    -------
    Reach
        Its margin is a multiple of the alignment (of 4 at least): of those tried, each about three quarters of the one
        before, the last that was within the tolerance.

    Notes
    -----
    Takes a few dozen runs on windows of 32 by 32 voxels and some hundred long.

    Raises
    ------
    ValueError
        If the tolerance is not between 0 and 1, or the sample has other channels than the network.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance was {tolerance}; it is a change of probability between 0 and 1: 0.01 is usual")
    rng = rng or np.random.default_rng(0)
    sample = _draw_noise(network, rng) if sample is None else sample
    if sample.ndim != 4 or len(sample) != network.in_channels:
        raise ValueError(
            f"sample has shape {sample.shape}; {network.name} needs (C, Z, Y, X) with C = {network.in_channels}: give "
            "the channels that it was trained on"
        )
    found = [_measure_axis(network, sample, axis, tolerance / 3, rng, device) for axis in range(3)]
    z, y, x = (margin for margin, _ in found)
    return Reach((z, y, x), tolerance, sum(error for _, error in found))


def _measure_axis(
    network: Segmenter, sample: np.ndarray, axis: int, tolerance: float, rng: np.random.Generator, device: str
) -> tuple[int, float]:
    """Margin along one axis and its error.

    Strategy: a window twice as long as the longest margin tried stands for the whole volume. Margins are tried from
    long to short until one is too short, so that a short one that happens to do is not mistaken for enough. If
    already the longest is too short, all is tried again twice as long.
    """
    step = round_up(4, network.alignment[axis])
    core = round_up(8, network.alignment[axis])
    longest = min(4 * step, LARGEST_MARGIN // 2)
    while True:
        windows = _draw_windows(network, sample, axis, core + 4 * longest, rng).to(device)
        reference = _probabilities_in_the_middle(network, windows, axis, core)
        enough = None
        for margin in _descend(longest, step):
            short = windows.narrow(axis + 2, 2 * longest - margin, core + 2 * margin)
            error = float((_probabilities_in_the_middle(network, short, axis, core) - reference).abs().max())
            if error > tolerance:
                break
            enough = margin, error
        if enough is not None:
            return enough
        if longest >= LARGEST_MARGIN:
            return longest, error
        longest = min(2 * longest, round_up(LARGEST_MARGIN, step))


def _descend(longest: int, step: int) -> Iterator[int]:
    """Margins from ``longest`` to 0, multiples of ``step``, each about three quarters of the one before."""
    margin = longest
    while margin > 0:
        yield margin
        margin = min(margin - step, round_up(3 * margin // 4, step))
    yield 0


def _probabilities_in_the_middle(network: Segmenter, window: torch.Tensor, axis: int, core: int) -> torch.Tensor:
    margin = (window.shape[axis + 2] - core) // 2
    with torch.inference_mode():
        logits = network(window)
    assert isinstance(logits, torch.Tensor)
    return logits.narrow(axis + 2, margin, core).float().softmax(dim=1)


def _draw_windows(
    network: Segmenter, sample: np.ndarray, axis: int, length: int, rng: np.random.Generator
) -> torch.Tensor:
    """Long windows (B, C, …) anywhere in the sample, mirrored beyond its edges as blocks are beyond the volume's."""
    across = (max(round_up(ACROSS, n), min(2 * n, MOST_ACROSS)) for n in network.alignment)
    shape = [length if a == axis else n for a, n in enumerate(across)]
    windows = []
    for _ in range(N_WINDOWS):
        window = sample
        for a, (wanted, available) in enumerate(zip(shape, sample.shape[1:], strict=True)):
            start = int(rng.integers(available))
            window = window.take(mirror_indices(start, start + wanted, available), axis=a + 1)
        windows.append(window)
    return torch.from_numpy(np.stack(windows)).contiguous(memory_format=torch.channels_last_3d)


def _draw_noise(network: Segmenter, rng: np.random.Generator) -> np.ndarray:
    """Noise with structure over a few voxels, of mean 0 and standard deviation 1."""
    from scipy import ndimage

    noise = ndimage.gaussian_filter(rng.normal(size=(network.in_channels, 48, 96, 96)), (0, 1.5, 1.5, 1.5))
    return (noise / noise.std()).astype(np.float32)
