"""Eigenvalues of symmetric 2 x 2 and 3 x 3 matrices, one matrix per lane, without iteration or branches.

For 3 x 3 (after Smith 1961, "Eigenvalues of a symmetric 3 x 3 matrix"): take the mean eigenvalue m off the
diagonal, and with J2 and J3 the second invariant and the determinant of what is left, p = sqrt(J2 / 3),

    cos(theta) = J3 / (2 p^3),    eigenvalues  m + 2 p cos(theta / 3 + 2 pi i / 3),  i = 0, 1, 2.

1. Only |cos(theta)| is used, so that theta is in [0, pi / 2]; a negative sign mirrors the spectrum.  The three
   values then come out sorted.
2. No arc cosine: with h = cos(theta / 2) = sqrt((1 + cos) / 2) in [0.707, 1], cos(theta / 3) and
   sin(theta / 3) / sin(theta / 2) are smooth functions of h.  Polynomials of degree 6 meet them to 1e-9.
3. Two nearly equal eigenvalues cost half the digits, whatever the precision.  Hence float64 inside: what is
   left is 1e-8 of the spectral radius, below the rounding of the float32 entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

from features import simd

Vector = Any  # a simd.FloatVector inside compiled code

# Both functions are analytic up to h = -1: interpolating at Chebyshev nodes gains a factor 25 per degree.
_DOMAIN = [math.sqrt(0.5), 1.0]


def _polynomial(values_at_angle: Callable[[NDArray], NDArray]) -> tuple[float, ...]:
    """Coefficients, constant first, of a function of theta / 2 written in h = cos(theta / 2)."""
    fit = Chebyshev.interpolate(lambda h: values_at_angle(np.arccos(h)), 6, domain=_DOMAIN)
    return tuple(fit.convert(kind=Polynomial).coef)


COS_THIRD = _polynomial(lambda half: np.cos(2.0 / 3.0 * half))
SIN_THIRD_OVER_SIN_HALF = _polynomial(lambda half: np.sin(2.0 / 3.0 * half) / np.sin(half))
_SQRT_3 = math.sqrt(3.0)
_SMALLEST = 1e-290  # keeps 0 / 0 out of the multiples of the identity; far below any p^3 of float32 entries


@njit(nogil=True, cache=True, inline="always")
def _evaluate(coefficients: tuple[float, ...], h: Vector) -> Vector:
    value = simd.splat_like(coefficients[6], h)
    for degree in range(5, -1, -1):
        value = simd.fma(value, h, simd.splat_like(coefficients[degree], h))
    return value


@njit(nogil=True, cache=True)
def eigenvalues_3(
    xx: Vector, yy: Vector, zz: Vector, xy: Vector, xz: Vector, yz: Vector
) -> tuple[Vector, Vector, Vector]:
    """Eigenvalues, largest first, of one symmetric 3 x 3 matrix per lane; float64 vectors in and out."""
    half, third = simd.splat_like(0.5, xx), simd.splat_like(1.0 / 3.0, xx)
    one = simd.splat_like(1.0, xx)
    mean = (xx + yy + zz) * third
    a, b, c = xx - mean, yy - mean, zz - mean
    off_diagonal = simd.fma(xy, xy, simd.fma(xz, xz, yz * yz))
    j2 = simd.fma(half, simd.fma(a, a, simd.fma(b, b, c * c)), off_diagonal)
    j3 = a * (b * c - yz * yz) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz)
    p = simd.sqrt(j2 * third)
    half_cosine = j3 * simd.splat_like(0.25, xx) / simd.maximum(p * p * p, simd.splat_like(_SMALLEST, xx))
    half_cosine = simd.where_negative(half_cosine, simd.splat_like(0.0, xx) - half_cosine, half_cosine)
    half_cosine = simd.minimum(half_cosine, half)
    h = simd.sqrt(half + half_cosine)
    cosine = p * _evaluate(COS_THIRD, h)
    sine = p * simd.sqrt(half - half_cosine) * _evaluate(SIN_THIRD_OVER_SIN_HALF, h)
    sine = simd.splat_like(_SQRT_3, xx) * sine
    upper, middle, lower = cosine + cosine, sine - cosine, simd.splat_like(0.0, one) - cosine - sine
    zero = simd.splat_like(0.0, xx)
    first = simd.where_negative(j3, zero - lower, upper)
    second = simd.where_negative(j3, zero - middle, middle)
    third_value = simd.where_negative(j3, zero - upper, lower)
    return mean + first, mean + second, mean + third_value


@njit(nogil=True, cache=True)
def eigenvalues_2(xx: Vector, yy: Vector, xy: Vector) -> tuple[Vector, Vector]:
    """Eigenvalues, largest first, of one symmetric 2 x 2 matrix per lane."""
    half = simd.splat_like(0.5, xx)
    mean, difference = (xx + yy) * half, (xx - yy) * half
    radius = simd.sqrt(simd.fma(difference, difference, xy * xy))
    return mean + radius, mean - radius


@njit(nogil=True, cache=True)
def eigenvalue_rows_3(entries: NDArray, pitch: int, n: int, out: NDArray, offset: int, channel: int) -> None:
    """Write the eigenvalues of a row of matrices.

    ``entries`` holds six rows (xx, yy, zz, xy, xz, yz), ``pitch`` apart; value i goes to
    ``out[offset + i * channel : ... + n]``.
    """
    for x in range(0, n, simd.NARROW):
        values = eigenvalues_3(
            simd.to_double(simd.load_narrow(entries, x)),
            simd.to_double(simd.load_narrow(entries, x + pitch)),
            simd.to_double(simd.load_narrow(entries, x + 2 * pitch)),
            simd.to_double(simd.load_narrow(entries, x + 3 * pitch)),
            simd.to_double(simd.load_narrow(entries, x + 4 * pitch)),
            simd.to_double(simd.load_narrow(entries, x + 5 * pitch)),
        )
        simd.store_at_most(out, offset + x, simd.to_single(values[0]), n - x)
        simd.store_at_most(out, offset + x + channel, simd.to_single(values[1]), n - x)
        simd.store_at_most(out, offset + x + 2 * channel, simd.to_single(values[2]), n - x)


@njit(nogil=True, cache=True)
def eigenvalue_rows_2(entries: NDArray, pitch: int, n: int, out: NDArray, offset: int, channel: int) -> None:
    """Write the eigenvalues of a row of matrices: as :func:`eigenvalue_rows_3` with rows xx, yy, xy."""
    for x in range(0, n, simd.NARROW):
        values = eigenvalues_2(
            simd.load_narrow(entries, x),
            simd.load_narrow(entries, x + pitch),
            simd.load_narrow(entries, x + 2 * pitch),
        )
        simd.store_at_most(out, offset + x, values[0], n - x)
        simd.store_at_most(out, offset + x + channel, values[1], n - x)
