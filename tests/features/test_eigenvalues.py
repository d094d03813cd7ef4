"""The closed form against numpy.linalg.eigvalsh, most of all where eigenvalues meet."""

import numpy as np
import pytest

from features.eigenvalues import eigenvalue_rows_2, eigenvalue_rows_3

ORDER_3 = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
ORDER_2 = [(0, 0), (1, 1), (0, 1)]


def closed_form(matrices):
    """Eigenvalues by the compiled rows, and by NumPy in float64 on the same float32 entries."""
    n, size = matrices.shape[:2]
    order = ORDER_3 if size == 3 else ORDER_2
    pitch = -(-n // 32) * 32
    entries = np.zeros((len(order), pitch), np.float32)
    rounded = np.zeros(matrices.shape)
    for row, (a, b) in zip(entries, order, strict=True):
        row[:n] = matrices[:, a, b]
        rounded[:, a, b] = rounded[:, b, a] = row[:n]
    out = np.full((size, n), np.nan, np.float32)
    rows = eigenvalue_rows_3 if size == 3 else eigenvalue_rows_2
    rows(entries.reshape(-1), pitch, n, out.reshape(-1), 0, n)
    return out, np.linalg.eigvalsh(rounded)[:, ::-1].T


def spectra(size):
    """Names and eigenvalues: the spectra EM images make, and those that break closed forms."""
    ones = np.ones(size)
    yield "sheet", np.r_[1.0, np.zeros(size - 1)]
    yield "dark sheet", np.r_[-1.0, np.zeros(size - 1)]
    yield "all equal", ones
    yield "all zero", 0 * ones
    yield "nearly equal", ones + 1e-6 * np.arange(size)
    yield "two nearly equal", np.r_[ones[:-1], 1 - 1e-5] if size == 3 else np.r_[1.0, 1 - 1e-5]
    yield "opposite", np.r_[1.0, -1.0] if size == 2 else np.r_[1.0, 0.0, -1.0]
    yield "tube", np.r_[1.0, 1.0] if size == 2 else np.r_[1.0, 1.0, 0.0]
    yield "apart", np.arange(size) - 0.3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
@pytest.mark.parametrize(("size", "name", "values"), [(s, *v) for s in (2, 3) for v in spectra(s)])
def test_equals_numpy_for_every_kind_of_spectrum(rng, size, name, values, scale):
    directions = np.linalg.qr(rng.normal(size=(501, size, size)))[0]
    matrices = scale * np.einsum("nij,j,nkj->nik", directions, values, directions)
    ours, expected = closed_form(matrices)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-7 * scale, err_msg=name)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_equals_numpy_for_random_matrices_in_rows_of_any_length(rng, size, n):
    matrices = rng.normal(size=(n, size, size))
    ours, expected = closed_form(matrices + matrices.transpose(0, 2, 1))
    assert ours.shape == (size, n)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-7 * np.abs(expected).max())
    assert np.all(np.diff(ours, axis=0) <= 0)
