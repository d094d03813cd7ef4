"""Batch norm, activation and max pool in one go, for training on CPUs.

Early in a network, where it has most voxels, these three take most of a training step: each walks over all of them, and
back again, though of eight voxels only the largest goes on and gets a gradient. Here

- the activation is computed for the largest and the smallest of the voxels that are pooled. GELU falls, then rises, so
  the largest of its values is at one of the two; ReLU only rises;
- on the way back, its derivative is computed for that one voxel;
- what is kept in between is the convolution's result, and of each window one voxel's value and number.

Loops run along whole rows, voxels and channels alike, so that the compiler makes vector instructions of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor, nn

from voxclf.geometry import Zyx

CHANNELS_LAST = torch.channels_last_3d
RELU, GELU = 0, 1

_fast = numba.njit(
    nogil=True,
    fastmath={"contract", "reassoc", "nsz", "arcp"},
    error_model="numpy",  # Python's asks of every divisor whether it is zero, one by one
    cache=True,
)


def normed_max_pool(x: Tensor, norm: nn.BatchNorm3d, activation: nn.Module, window: Zyx) -> Tensor:
    """Maximum over windows side by side of the activated, normalised input, as in training.

    Parameters
    ----------
    x : Tensor
        (B, C, Z, Y, X) on a CPU, float32 or bfloat16.
    norm : nn.BatchNorm3d
        In training mode: it normalises by the batch, and its running statistics are updated.
    activation : nn.ReLU or nn.GELU
    window : (z, y, x)
        Shape of the windows, voxels.
    """
    kind = GELU if isinstance(activation, nn.GELU) else RELU
    pooled, mean, variance = _NormedMaxPool.apply(x, norm.weight, norm.bias, norm.eps, kind, window)
    with torch.no_grad():
        n = x.numel() // x.shape[1]
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (n / max(1, n - 1)), share)
    return pooled


def compile_for(dtype: torch.dtype) -> None:
    """Compile what :func:`normed_max_pool` needs, or load what was compiled before: 7 s, or one."""
    x = torch.zeros(1, 1, 2, 2, 2, dtype=dtype, requires_grad=True)
    normed_max_pool(x, nn.BatchNorm3d(1), nn.GELU(), (2, 2, 2)).sum().backward()


class _NormedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: int, window: Zyx) -> Any:
        x = x.contiguous(memory_format=CHANNELS_LAST)
        rows, n = _rows(x), x.numel() // x.shape[1]
        shift = x[0, :, 0, 0, 0].float().numpy()  # sums of squares keep their digits
        total, square = np.array(_each(_sum_up, rows, shift)).sum(axis=0)
        mean = shift + total / n
        variance = np.maximum(square / n - (total / n) ** 2, 0)
        scale = (weight.detach().numpy() / np.sqrt(variance + eps)).astype(np.float32)
        offset = (bias.detach().numpy() - mean * scale).astype(np.float32)
        shape = [n // w for n, w in zip(x.shape[2:], window, strict=True)]
        size = (*x.shape[:2], *shape)
        pooled, kept = (torch.empty(size, dtype=x.dtype, memory_format=CHANNELS_LAST) for _ in range(2))
        of_pooled = _rows(pooled)
        chosen = np.empty(of_pooled.shape, np.uint8)
        _each(_pool, rows, of_pooled, _rows(kept), chosen, scale, offset, kind, window)
        ctx.save_for_backward(x, weight, kept)
        ctx.rest = chosen, mean, variance, eps, scale, offset, kind, window
        found = torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(variance.astype(np.float32))
        ctx.mark_non_differentiable(*found)
        return pooled, *found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, kept = ctx.saved_tensors
        chosen, mean, variance, eps, scale, offset, kind, window = ctx.rest
        gradient = gradients[0].to(x.dtype).contiguous(memory_format=CHANNELS_LAST)
        rows, slope = _rows(x), np.empty(chosen.shape, np.float32)
        sums = _each(_slope, _rows(kept), _rows(gradient), slope, scale, offset, mean.astype(np.float32), kind)
        total, product = np.array(sums).sum(axis=0)
        deviation = np.sqrt(variance + eps)
        of_weight, of_bias = product / deviation, total
        n = x.numel() // x.shape[1]
        # d/dx = scale · (gradient − total / n − normalised · of_weight / n) = scale · gradient + constant + factor · x
        factor = -scale * of_weight / (n * deviation)
        constant = -scale * total / n - factor * mean
        result = torch.empty_like(x)
        _each(
            *(_spread, rows, _rows(result), chosen, slope, scale),
            *(factor.astype(np.float32), constant.astype(np.float32), window),
        )
        as_tensor = [torch.from_numpy(a.astype(np.float32)).to(weight.dtype) for a in (of_weight, of_bias)]
        return result, *as_tensor, None, None, None


# --- what walks over the voxels: rows are (B, Z, Y, X · C), bfloat16 as the upper half of a float32 ---


def _rows(x: Tensor) -> np.ndarray:
    lines = x.detach().permute(0, 2, 3, 4, 1).flatten(3)
    return lines.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else lines.numpy()


def _each(kernel: Callable[..., Any], rows: np.ndarray, *arguments: Any) -> list[Any]:
    """Results of a kernel for each volume of a batch, on as many threads as torch uses."""
    n_threads = min(len(rows), torch.get_num_threads())
    if n_threads == 1:
        return [kernel(b, rows, *arguments) for b in range(len(rows))]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(lambda b: kernel(b, rows, *arguments), range(len(rows))))


def _widen(source: Any, line: Any, bits: Any) -> None:
    """Float32 of a row; ``bits`` are those of ``line``."""


def _narrow(line: Any, bits: Any, target: Any) -> None:
    """The row of a line of float32, rounded to the nearest, ties to even."""


@overload(_widen)
def _choose_widen(source: Any, line: Any, bits: Any) -> Any:
    def from_half(source: Any, line: Any, bits: Any) -> None:
        for i in range(source.size):
            bits[i] = np.uint32(source[i]) << np.uint32(16)

    def from_single(source: Any, line: Any, bits: Any) -> None:
        for i in range(source.size):  # `line[:] = source` takes longer
            line[i] = source[i]

    return from_half if source.dtype == types.uint16 else from_single


@overload(_narrow)
def _choose_narrow(line: Any, bits: Any, target: Any) -> Any:
    def to_half(line: Any, bits: Any, target: Any) -> None:
        for i in range(target.size):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            target[i] = np.uint16(np.uint32(bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    def to_single(line: Any, bits: Any, target: Any) -> None:
        for i in range(target.size):
            target[i] = line[i]

    return to_half if target.dtype == types.uint16 else to_single


@_fast
def _sum_up(b: int, rows: Any, shift: Any) -> Any:
    """Sums over voxels of each channel's distance from ``shift``, and of its square, (2, C)."""
    n_channels = shift.size
    shifts = _along_row(shift, rows.shape[3])
    line = np.empty(rows.shape[3], np.float32)
    bits = line.view(np.uint32)
    total = np.zeros((2, n_channels))
    for z in range(rows.shape[1]):
        first, second = np.zeros(line.size, np.float32), np.zeros(line.size, np.float32)
        for y in range(rows.shape[2]):
            _widen(rows[b, z, y], line, bits)
            for i in range(line.size):
                distance = line[i] - shifts[i]
                first[i] += distance
                second[i] += distance * distance
        for i in range(line.size):
            total[0, i % n_channels] += first[i]
            total[1, i % n_channels] += second[i]
    return total


@_fast
def _along_row(values: Any, n: int) -> Any:
    """What each channel has, for the voxels of a row one after the other."""
    row = np.empty(n, np.float32)
    for i in range(n):
        row[i] = values[i % values.size]
    return row


@_fast
def _take(values: Any, places: Any, target: Any) -> None:
    for i in range(target.size):
        target[i] = values[places[i]]


@_fast
def _take_one_each(row: Any, n_channels: int, kx: int, line: Any) -> None:
    """Float32 of the first voxel of each window of a row."""
    bits = line.view(np.uint32)
    for i in range(0, line.size, n_channels):  # voxel by voxel: gathering them by a list of places takes longer
        here = slice(i, i + n_channels)
        _widen(row[i * kx : i * kx + n_channels], line[here], bits[here])


# Each number is read once, into a variable of its own, and one loop writes two arrays at most: else the compiler does
# not make vector instructions of it, and it takes ten times as long.


@_fast
def _keep_largest(values: Any, number: Any, largest: Any, of_largest: Any) -> None:
    """Largest value so far of each window, and its number; of equal ones the first counts, as in torch."""
    for i in range(largest.size):
        value, best = values[i], largest[i]
        of_largest[i] = number if value > best else of_largest[i]
        largest[i] = max(value, best)


@_fast
def _keep_smallest(values: Any, number: Any, smallest: Any, of_smallest: Any) -> None:
    for i in range(smallest.size):
        value, best = values[i], smallest[i]
        of_smallest[i] = number if value < best else of_smallest[i]
        smallest[i] = min(value, best)


@_fast
def _replace_where_larger(value: Any, than: Any, other: Any, target: Any) -> None:
    for i in range(target.size):
        v, t, o, kept = value[i], than[i], other[i], target[i]
        target[i] = o if v > t else kept


@_fast
def _gelu(values: Any, result: Any) -> None:
    for i in range(values.size):
        result[i] = values[i] * (np.float32(0.5) + np.float32(0.5) * _erf(values[i] * np.float32(math.sqrt(0.5))))


@numba.njit(inline="always")
def _erf(x: Any) -> Any:
    """Rational approximation of the error function, right to 3e-7 (the one that Eigen and TensorFlow use)."""
    x = min(max(x, np.float32(-4.0)), np.float32(4.0))
    s = x * x
    p = np.float32(-2.72614225801306e-10)
    p = p * s + np.float32(2.77068142495902e-08)
    p = p * s + np.float32(-2.10102402082508e-06)
    p = p * s + np.float32(-5.69250639462346e-05)
    p = p * s + np.float32(-7.34990630326855e-04)
    p = p * s + np.float32(-2.95459980854025e-03)
    p = p * s + np.float32(-1.60960333262415e-02)
    q = np.float32(-1.45660718464996e-05)
    q = q * s + np.float32(-2.13374055278905e-04)
    q = q * s + np.float32(-1.68282697438203e-03)
    q = q * s + np.float32(-7.37332916720468e-03)
    q = q * s + np.float32(-1.42647390514189e-02)
    return x * p / q


@_fast
def _activate(values: Any, scales: Any, offsets: Any, kind: int, normalised: Any, activated: Any) -> None:
    for i in range(values.size):
        normalised[i] = scales[i] * values[i] + offsets[i]
    if kind == GELU:
        _gelu(normalised, activated)
    else:
        for i in range(values.size):
            activated[i] = np.float32(0.0) if normalised[i] <= 0 else normalised[i]


@_fast
def _pool(
    b: int, rows: Any, pooled: Any, kept: Any, chosen: Any, scale: Any, offset: Any, kind: int, window: Any
) -> None:
    """Largest activated value of each window, the value it was made of (``kept``), and its voxel's number."""
    (kz, ky, kx), n, n_channels = window, pooled.shape[3], scale.size
    scales, offsets = _along_row(scale, n), _along_row(offset, n)
    voxels, normalised = np.empty(n, np.float32), np.empty(n, np.float32)
    top, of_top, value_of_top = np.empty(n, np.float32), np.empty(n, np.int32), np.empty(n, np.float32)
    low, of_low, value_of_low = np.empty(n, np.float32), np.empty(n, np.int32), np.empty(n, np.float32)
    for z in range(pooled.shape[1]):
        for y in range(pooled.shape[2]):
            top[:], low[:] = -np.inf, np.inf
            of_top[:], of_low[:] = 0, 0
            for r in range(kz * ky):
                row = rows[b, z * kz + r // ky, y * ky + r % ky]
                for dx in range(kx):
                    _take_one_each(row[dx * n_channels :], n_channels, kx, voxels)
                    _keep_largest(voxels, np.int32(r * kx + dx), top, of_top)
                    _keep_smallest(voxels, np.int32(r * kx + dx), low, of_low)
            _activate(top, scales, offsets, kind, normalised, value_of_top)
            _activate(low, scales, offsets, kind, normalised, value_of_low)
            _replace_where_larger(value_of_low, value_of_top, low, top)
            _replace_where_larger(value_of_low, value_of_top, of_low, of_top)
            _replace_where_larger(value_of_low, value_of_top, value_of_low, value_of_top)
            for i in range(n):
                chosen[b, z, y, i] = np.uint8(of_top[i])
            _narrow(value_of_top, value_of_top.view(np.uint32), pooled[b, z, y])
            _narrow(top, top.view(np.uint32), kept[b, z, y])


@_fast
def _slope(b: int, kept: Any, gradient: Any, slope: Any, scale: Any, offset: Any, mean: Any, kind: int) -> Any:
    """Gradient of the normalised value of the voxel that each window hands on.

    Returns its sum over windows, and that of its product with the voxel's distance from the mean, (2, C).
    """
    n, n_channels = slope.shape[3], scale.size
    scales, offsets, means = _along_row(scale, n), _along_row(offset, n), _along_row(mean, n)
    values, line = np.empty(n, np.float32), np.empty(n, np.float32)
    total = np.zeros((2, n_channels))
    for z in range(slope.shape[1]):
        first, second = np.zeros(n, np.float32), np.zeros(n, np.float32)
        for y in range(slope.shape[2]):
            slopes = slope[b, z, y]
            _widen(kept[b, z, y], values, values.view(np.uint32))
            for i in range(n):
                line[i] = scales[i] * values[i] + offsets[i]
            if kind == GELU:
                _gelu_slope(line, slopes)
            else:
                for i in range(n):
                    slopes[i] = np.float32(1.0) if line[i] > 0 else np.float32(0.0)
            _widen(gradient[b, z, y], line, line.view(np.uint32))
            for i in range(n):
                slopes[i] *= line[i]
            for i in range(n):
                first[i] += slopes[i]
                second[i] += slopes[i] * (values[i] - means[i])
        for i in range(n):
            total[0, i % n_channels] += first[i]
            total[1, i % n_channels] += second[i]
    return total


@_fast
def _gelu_slope(values: Any, result: Any) -> None:
    """Derivative of GELU: Φ(v) + v φ(v)."""
    bits = result.view(np.uint32)
    for i in range(values.size):
        v = min(max(values[i], np.float32(-6.0)), np.float32(6.0))
        exponent = v * v * np.float32(-0.5 / math.log(2))
        whole = np.floor(exponent)
        f = exponent - whole
        power = np.float32(1.321549e-06)
        power = power * f + np.float32(1.525273e-05)
        power = power * f + np.float32(1.540353e-04)
        power = power * f + np.float32(1.333356e-03)
        power = power * f + np.float32(9.618129e-03)
        power = power * f + np.float32(5.550411e-02)
        power = power * f + np.float32(2.402265e-01)
        power = power * f + np.float32(6.931472e-01)
        result[i] = power * f + np.float32(1.0)  # 2^f; the whole part is added to the exponent of the float
        bits[i] = np.uint32(bits[i] + np.uint32(np.int32(whole) << np.int32(23)))
    for i in range(values.size):
        v = values[i]
        density = result[i] * np.float32(1 / math.sqrt(2 * math.pi))
        result[i] = np.float32(0.5) + np.float32(0.5) * _erf(v * np.float32(math.sqrt(0.5))) + v * density


@_fast
def _spread(
    b: int, rows: Any, result: Any, chosen: Any, slope: Any, scale: Any, factor: Any, constant: Any, window: Any
) -> None:
    """Gradient of the input: ``factor`` · input + ``constant`` everywhere, and ``scale`` · slope where chosen."""
    (kz, ky, kx), n_channels = window, scale.size
    n, width = slope.shape[3], rows.shape[3]
    scales, factors, constants = _along_row(scale, width), _along_row(factor, width), _along_row(constant, width)
    # Of each number of a row: where its window stands in a row of windows, and the number of its voxel in the window.
    places, in_window = np.zeros(width, np.uint32), np.full(width, kz * ky * kx, np.int32)
    for i in range(n // n_channels * kx * n_channels):
        places[i] = i // (kx * n_channels) * n_channels + i % n_channels
        in_window[i] = i // n_channels % kx
    line, parts = np.empty(width, np.float32), np.empty(width, np.float32)
    numbers = np.empty(width, np.int32)
    for z in range(-(-rows.shape[1] // kz)):
        for y in range(-(-rows.shape[2] // ky)):
            if z < slope.shape[1] and y < slope.shape[2]:
                _take(slope[b, z, y], places, parts)
                _take(chosen[b, z, y], places, numbers)
                for i in range(width):
                    parts[i] *= scales[i]
                    numbers[i] -= in_window[i]  # what is left is the number of the row's first voxel, or below 0
            else:
                numbers[:] = -1
            for r in range(kz * ky):
                z_of_row, y_of_row = z * kz + r // ky, y * ky + r % ky
                if z_of_row >= rows.shape[1] or y_of_row >= rows.shape[2]:
                    continue
                _widen(rows[b, z_of_row, y_of_row], line, line.view(np.uint32))
                for i in range(width):
                    line[i] = factors[i] * line[i] + constants[i]
                number = np.int32(r * kx)
                for i in range(width):
                    line[i] += parts[i] if numbers[i] == number else np.float32(0.0)
                _narrow(line, line.view(np.uint32), result[b, z_of_row, y_of_row])
