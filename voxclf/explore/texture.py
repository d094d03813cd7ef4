"""How fast the picture changes along each axis: correlation lengths, noise, and whether slices lie in order.

Two passes, both additive over blocks:

- :class:`TextureFold` over some boxes: autocorrelation along z, y and x, and the noise level. Every xy plane is first
  freed of its own mean, so that slices of different brightness do not pass for structure.
- :class:`SliceFold` over columns that run through all slices: how well each slice fits the next one and the one after
  that. What it finds (slices missing, repeated, out of order, blank) spoils every 3D filter around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.geometry import Block, Region, VoxelSize, Zyx, make_block

MOST_LAGS = 64
#: A plane narrower than this says nothing about in-plane lengths or noise.
LEAST_PLANE = 8


@dataclass(frozen=True)
class TextureSums:
    """Sums behind autocorrelation and noise; those of several boxes add up.

    Parameters
    ----------
    products, pairs : ndarray of float64, shape (3, L)
        Along z, y, x: sum of the products of voxels `lag` apart, and how many pairs there were.
    noise : tuple of float
        Noise of each box, grey values.
    """

    products: NDArray[np.float64]
    pairs: NDArray[np.float64]
    noise: tuple[float, ...]

    def __add__(self, other: TextureSums) -> TextureSums:
        return TextureSums(self.products + other.products, self.pairs + other.pairs, self.noise + other.noise)


@dataclass(frozen=True)
class TextureFold:
    """Measures one box of the image."""

    def __call__(self, block: Block, image: NDArray[Any]) -> TextureSums:
        """Sum up ``image`` (C, Z, Y, X), first channel."""
        box = image[0].astype(np.float32)
        noise = (estimate_noise(box),) if min(box.shape[1:]) >= LEAST_PLANE else ()
        box -= box.mean(axis=(1, 2), keepdims=True)
        products, pairs = np.zeros((3, MOST_LAGS)), np.zeros((3, MOST_LAGS))
        for axis, n in enumerate(box.shape):
            # Beyond half a box few pairs are left, and those share the box's own trend.
            n_lags = min(MOST_LAGS, max(1, n // 2) + 1) if n > 1 else 1
            products[axis, :n_lags] = _lagged_products(box, axis, n_lags)
            pairs[axis, :n_lags] = box.size / n * (n - np.arange(n_lags))
        return TextureSums(products, pairs, noise)


def _lagged_products(box: NDArray[np.float32], axis: int, n_lags: int) -> NDArray[np.float64]:
    """Sum of ``box[i] * box[i + lag]`` along an axis for every lag, through the power spectrum."""
    from scipy import fft

    n = box.shape[axis]
    others = tuple(a for a in range(3) if a != axis)
    length = fft.next_fast_len(n + n_lags, real=True)
    power = np.abs(fft.rfft(box, length, axis=axis)) ** 2
    summed = power.sum(axis=others, dtype=np.float64)
    return fft.irfft(summed, length)[:n_lags]


def estimate_noise(box: NDArray[np.floating]) -> float:
    """Standard deviation of what differs from voxel to voxel without pattern, in grey values.

    Each xy plane is filtered with the difference of two Laplacians, which cancels whatever varies smoothly (Immerkær,
    CVIU 64, 1996); the median in place of its mean leaves membranes out. Noise that is correlated between neighbours,
    as after denoising or lossy compression, goes unseen.
    """
    columns = box[:, :, :-2] - 2 * box[:, :, 1:-1] + box[:, :, 2:]
    filtered = columns[:, :-2] - 2 * columns[:, 1:-1] + columns[:, 2:]
    # The filter's weights have a sum of squares of 36; 0.6745 is the quartile of the normal distribution.
    return float(np.median(np.abs(filtered))) / (6 * 0.67448975)


@dataclass(frozen=True)
class Texture:
    """Correlation and noise of a volume.

    Parameters
    ----------
    autocorrelation : three ndarrays of float
        Along z, y, x: correlation of voxels 0, 1, 2 … apart; 1 at lag 0.
    length_nm : (z, y, x)
        Distance at which the correlation of the structure, without the noise, has fallen to one half; nan where no
        measured lag reaches it or the axis is a single voxel.
    noise : float
        Standard deviation of the noise, grey values: median over boxes.
    noise_share : float
        Part of the image's variance that is noise, 0 to 1.
    implied_size_nm : (z, y, x)
        Voxel size along each axis at which the picture would change as fast per nm as along the other in-plane axis
        (y and x), or as in the plane (z); nan where it cannot be told.
    """

    autocorrelation: tuple[NDArray[np.float64], ...]
    length_nm: tuple[float, float, float]
    noise: float
    noise_share: float
    implied_size_nm: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything as values for JSON, lengths by axis."""
        return {
            "autocorrelation": dict(zip("zyx", self.autocorrelation, strict=True)),
            "length_nm": dict(zip("zyx", self.length_nm, strict=True)),
            "noise": self.noise,
            "noise_share": self.noise_share,
            "implied_voxel_size_nm": dict(zip("zyx", self.implied_size_nm, strict=True)),
        }


def describe_texture(sums: TextureSums, voxel_size_nm: VoxelSize) -> Texture:
    """Turn sums into correlation lengths, noise, and the voxel size that the picture itself suggests."""
    curves = []
    for products, pairs in zip(sums.products, sums.pairs, strict=True):
        known = pairs > 0
        covariance = products[known] / pairs[known]
        curves.append(covariance / covariance[0] if covariance[0] > 0 else np.full(len(covariance), np.nan))
    variance = sums.products[2, 0] / max(sums.pairs[2, 0], 1)
    noise = float(np.median(sums.noise)) if sums.noise else math.nan
    share = min(noise**2 / variance, 1.0) if variance > 0 else math.nan
    z, y, x = (
        _half_length(curve, 0.0 if math.isnan(share) else share) * size
        for curve, size in zip(curves, voxel_size_nm, strict=True)
    )
    return Texture(tuple(curves), (z, y, x), noise, share, _implied_sizes(curves, voxel_size_nm))


def _half_length(curve: NDArray[np.float64], noise_share: float) -> float:
    """Lag, in voxels, at which the noise-free correlation falls to one half."""
    structure = curve / max(1 - noise_share, 1e-6)
    structure = np.concatenate([[1.0], np.minimum(structure[1:], 1.0)])
    return _first_crossing(structure, 0.5)


def _first_crossing(curve: NDArray[np.float64], level: float) -> float:
    """Lag at which a curve first falls to a level, between lags by a straight line; nan if it never does."""
    below = np.flatnonzero(curve <= level)
    if not len(below) or below[0] == 0:
        return math.nan
    i = int(below[0])
    return i - 1 + float((curve[i - 1] - level) / (curve[i - 1] - curve[i]))


def _implied_sizes(curves: Sequence[NDArray[np.float64]], voxel_size_nm: VoxelSize) -> tuple[float, float, float]:
    """Find, for each axis, the distance in the reference plane at which voxels are as alike as neighbours here.

    The idea of measuring a section's thickness by its likeness to the next (Sporring et al., J. Microscopy 253, 2014).
    White noise lowers all correlations beyond lag 0 alike and so cancels.
    """
    z, y, x = curves
    _, size_y, size_x = voxel_size_nm
    from_x, from_y = _distance_in(x, size_x, y), _distance_in(y, size_y, x)
    in_plane = [d for d in (_distance_in(x, size_x, z), _distance_in(y, size_y, z)) if not math.isnan(d)]
    from_plane = math.exp(float(np.mean(np.log(in_plane)))) if in_plane else math.nan
    return from_plane, from_x, from_y


#: Lags are compared as long as this share of the neighbours' correlation is left; beyond, tissue differs by chance.
LEAST_LEFT = 0.3
#: Neighbours that are less alike than this are mostly noise to each other and tell nothing about distances.
LEAST_CORRELATION = 0.1


def _distance_in(reference: NDArray[np.float64], size_nm: float, curve: NDArray[np.float64]) -> float:
    """Length of one step along a curve, nm, judged by where on a reference axis correlation is the same."""
    if min(len(curve) + 1, len(reference)) < 3 or not min(curve[1], reference[1]) > LEAST_CORRELATION:
        return math.nan
    steps = [_find_level(reference, float(curve[1]))]
    for lag in range(2, len(curve)):
        if curve[lag] < LEAST_LEFT * curve[1]:
            break
        steps.append(_find_level(reference, float(curve[lag])) / lag)
    known = [step for step in steps if not math.isnan(step)]
    return size_nm * math.exp(float(np.mean(np.log(known)))) if known else math.nan


def _find_level(reference: NDArray[np.float64], level: float) -> float:
    """Lag, not whole, at which a curve reaches a level."""
    if level < reference[1]:
        return _first_crossing(np.concatenate([[1.0], reference[1:]]), level)
    # Nearer than a voxel: there correlation falls with the square of the distance, from a top that noise hides.
    drop = float(reference[1] - reference[2])
    return math.sqrt(max(1 - 3 * (level - float(reference[1])) / drop, 1 / 64)) if drop > 0 else math.nan


# --- slices ---


@dataclass(frozen=True)
class SliceSums:
    """How each slice relates to the two that follow it; sums of several columns add up.

    ``products`` has shape (3, Z): sums over the columns' pixels of slice z times slice z, z + 1 and z + 2, each column
    of a slice freed of its mean.
    """

    products: NDArray[np.float64]

    def __add__(self, other: SliceSums) -> SliceSums:
        return SliceSums(self.products + other.products)


@dataclass(frozen=True)
class SliceFold:
    """Measures the slices of one block; blocks along z overlap by :data:`OVERLAP` slices."""

    n_slices: int

    def __call__(self, block: Block, image: NDArray[Any]) -> SliceSums:
        """Sum up ``image`` (C, Z, Y, X), first channel."""
        column = image[0].astype(np.float64)
        column -= column.mean(axis=(1, 2), keepdims=True)
        first, is_last = block.core.start[0], block.core.stop[0] == self.n_slices
        own = len(column) if is_last else len(column) - OVERLAP
        products = np.zeros((3, self.n_slices))
        for lag in range(3):
            n = min(own, len(column) - lag)
            if n > 0:
                products[lag, first : first + n] = np.einsum("zyx,zyx->z", column[:n], column[lag : lag + n])
        return SliceSums(products)


OVERLAP = 2
SLICES_PER_BLOCK = 62


def cut_columns(shape: Zyx, most_voxels: int, side: int = 256) -> list[Block]:
    """Blocks that follow columns through all slices: as many columns, evenly spread, as a budget of voxels allows."""
    Z, Y, X = shape
    n_columns = max(1, most_voxels // (Z * min(side, Y) * min(side, X)))
    if n_columns == 1:
        side = max(16, min(side, math.isqrt(most_voxels // Z)))
    per_axis = max(1, math.isqrt(n_columns))
    starts_y, starts_x = (_even_starts(n, min(side, n), per_axis) for n in (Y, X))
    starts_z = range(0, max(1, Z - OVERLAP), SLICES_PER_BLOCK)
    regions = [
        Region((z, y, x), (min(z + SLICES_PER_BLOCK + OVERLAP, Z), min(y + side, Y), min(x + side, X)))
        for y in starts_y
        for x in starts_x
        for z in starts_z
    ]
    return [make_block(index, region) for index, region in enumerate(regions)]


def _even_starts(n: int, side: int, count: int) -> list[int]:
    """Starts of at most ``count`` windows of ``side`` voxels that do not overlap, evenly spread over ``n``."""
    count = min(count, max(1, n // side))
    if count == 1:
        return [(n - side) // 2]
    return [round(i * (n - side) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class SliceDefect:
    """Slices ``z`` to ``last`` that do not follow the others as they should."""

    z: int
    last: int
    kind: str
    text: str


@dataclass(frozen=True)
class SliceOrder:
    """How slices follow each other along z.

    Parameters
    ----------
    next_one, next_but_one : ndarray of float, shape (Z,)
        Correlation of each slice with the next and the one after; nan at the end and at blank slices.
    defects : tuple of SliceDefect
        In the order of z.
    """

    next_one: NDArray[np.float64]
    next_but_one: NDArray[np.float64]
    defects: tuple[SliceDefect, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as values for JSON."""
        return {
            "correlation_with_next": self.next_one,
            "correlation_with_next_but_one": self.next_but_one,
            "defects": [vars(defect) for defect in self.defects],
        }


#: Fewer slices than this have no usual behaviour to differ from.
LEAST_SLICES = 8


def describe_slices(sums: SliceSums) -> SliceOrder:
    """Find blank, repeated, exchanged and foreign slices, and jumps where slices may be missing.

    Every rule compares a slice with the volume's own usual behaviour: the loss of correlation from the next slice to
    the one after. Where that loss is hardly measurable (very thin or very noisy slices) only blank and repeated slices
    can be told.
    """
    variance = sums.products[0]
    blank = variance <= 1e-3 * np.median(variance[variance > 0]) if (variance > 0).any() else variance <= 0
    near, far = (_correlate(sums.products[lag], variance, blank, lag) for lag in (1, 2))
    defects = [SliceDefect(a, b, "blank", "blank") for a, b in _runs(np.flatnonzero(blank))]
    if np.isfinite(near).sum() >= LEAST_SLICES:
        repeated = _find_repeated(near)
        defects += [SliceDefect(z, z, "repeated", f"the same as {z - 1}") for z in repeated]
        defects += _find_disorder(near, far, set(repeated))
    return SliceOrder(near, far, tuple(sorted(defects, key=lambda defect: defect.z)))


def _correlate(
    products: NDArray[np.float64], variance: NDArray[np.float64], blank: NDArray[np.bool_], lag: int
) -> NDArray[np.float64]:
    correlation = np.full(len(variance), np.nan)
    known = ~blank[:-lag] & ~blank[lag:] if len(variance) > lag else np.zeros(0, bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = products[:-lag] / np.sqrt(variance[:-lag] * variance[lag:])
    correlation[: len(known)][known] = values[known]
    return correlation


def _runs(numbers: NDArray[np.intp]) -> list[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) > 1)
    firsts, lasts = numbers[np.concatenate([[0], breaks + 1])], numbers[np.concatenate([breaks, [-1]])]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _find_repeated(near: NDArray[np.float64]) -> list[int]:
    """Slices that differ from the one before by under a twentieth of what is usual: a copy, perhaps compressed."""
    difference = 1 - near
    usual = float(np.nanmedian(difference))
    if usual <= 1e-9:
        return []
    return (np.flatnonzero(difference < 0.05 * usual) + 1).tolist()


#: Robust standard deviations beyond which a slice's fit is no accident, and share of the usual loss it must reach.
JUMP_SPREADS, LEAST_GAIN = 6.0, 0.5
#: Differences of correlation below this are not worth telling.
LEAST_LOSS = 0.01


def _find_disorder(near: NDArray[np.float64], far: NDArray[np.float64], repeated: set[int]) -> list[SliceDefect]:
    usual, usual_far = float(np.nanmedian(near)), float(np.nanmedian(far))
    loss = usual - usual_far
    if loss < LEAST_LOSS:
        return []
    defects: list[SliceDefect] = []
    explained: set[int] = set()  # pairs (z, z + 1) whose poor fit has found its reason
    for z in _find_exchanged(near, far, LEAST_GAIN * 2 * loss):
        defects.append(SliceDefect(z, z + 1, "exchanged", f"exchanged with {z + 1}?"))
        explained.update((z - 1, z, z + 1))
    spread = 1.4826 * float(np.nanmedian(np.abs(near - usual)))
    limit = min(usual_far, usual - JUMP_SPREADS * spread)
    # What lies about a repeated slice is no worse than usual, so repeats need no exception here.
    poor = {z for z in np.flatnonzero(near < limit).tolist() if z not in explained}
    for z in sorted(poor):
        if z + 1 in poor and far[z] > max(near[z], near[z + 1]) + LEAST_GAIN * loss:
            defects.append(SliceDefect(z + 1, z + 1, "foreign", "does not fit its neighbours"))
            explained.update((z, z + 1))
    defects += [
        SliceDefect(z + 1, z + 1, "jump", f"jump after {z}")
        for z in sorted(poor - explained)
        if z + 1 not in repeated and z not in repeated
    ]
    return defects


def _find_exchanged(near: NDArray[np.float64], far: NDArray[np.float64], least_gain: float) -> list[int]:
    """Slices z that, exchanged with z + 1, would fit their neighbours better."""
    inner = np.arange(1, len(near) - 2)
    if not len(inner):
        return []
    as_is = near[inner - 1] + near[inner + 1]
    exchanged = far[inner - 1] + far[inner]
    found: list[int] = []
    for z in inner[exchanged - as_is > least_gain].tolist():
        if not found or z - found[-1] > 1:
            found.append(z)
    return found
