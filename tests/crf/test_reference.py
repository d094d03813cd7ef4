"""The three references agree with each other, and pydensecrf's conventions are what we say they are."""

import numpy as np
import pytest

from crf import DenseCRF, symmetric_part
from crf.reference import brute_force_filters, grey_level_filters

UNIT = (1.0, 1.0, 1.0)


@pytest.mark.parametrize("include_self", [False, True])
def test_grey_levels_equal_brute_force(tissue, include_self):
    image, probabilities = tissue((7, 8, 9), 3)
    problem = DenseCRF((2.0, 3.0, 4.0), 0.1, 1.0, 4.0, 2.0, include_self=include_self).problem(
        image, probabilities, UNIT
    )
    belief = probabilities.astype(np.float64)
    for by_level, by_pair in zip(grey_level_filters(problem), brute_force_filters(problem), strict=True):
        np.testing.assert_allclose(by_level(belief), by_pair(belief), atol=1e-12)


def test_one_message_by_hand():
    """Three voxels in a row, the last one of another grey level: k = exp(-d² / 2 - ΔI² / 2θβ²)."""
    image = np.array([0, 0, 51], np.uint8).reshape(1, 1, 3)  # 51 / 255 = 0.2
    belief = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]).reshape(2, 1, 1, 3)
    problem = DenseCRF(1.0, 0.2, 1.0, 1.0, 1.0).problem(image, belief, UNIT)
    k01, k02, k12 = np.exp(-0.5), np.exp(-2.0 - 0.5), np.exp(-0.5 - 0.5)
    n = 1 / np.sqrt([1 + k01 + k02, 1 + k01 + k12, 1 + k02 + k12])
    bilateral, _ = brute_force_filters(problem)
    np.testing.assert_allclose(bilateral(belief)[0, 0, 0, 0], n[0] * k02 * n[2] * 0.5)
    np.testing.assert_allclose(bilateral(belief)[1, 0, 0, 0], n[0] * (k01 * n[1] + k02 * n[2] * 0.5))


def test_brute_force_refuses_volumes_that_would_fill_the_memory():
    image = np.zeros((40, 40, 40), np.uint8)
    probabilities = np.full((2, 40, 40, 40), 0.5, np.float32)
    with pytest.raises(ValueError, match="compares every pair of 64000 voxels; at most 40000"):
        DenseCRF(1, 0.1, 1, 1, 1).refine(image, probabilities, UNIT, backend="brute_force")


def test_grey_levels_refuse_float_images(tissue):
    image, probabilities = tissue((4, 5, 6), 2)
    with pytest.raises(ValueError, match="needs one channel of integers"):
        DenseCRF(1, 0.1, 1, 1, 1).refine(image / 255, probabilities, UNIT, backend="grey_levels")


# -------------------------------------------------------------------------------------------------- pydensecrf


@pytest.fixture
def pydensecrf():
    return pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is an optional extra")


def exact_and_lattice(tissue, weights, **options):
    image, probabilities = tissue((12, 13, 14), 3)
    crf = DenseCRF(4.0, 0.15, 1.5, *weights, include_self=True, n_iterations=1, **options)
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    return exact, crf.refine(image, probabilities, UNIT, backend="pydensecrf"), probabilities


@pytest.mark.parametrize(
    "weights",
    [(2.0, 0.0), (0.0, 2.0), (2.0, 1.0), (np.array([[0, 1, 3], [1, 0, 2], [3, 2, 0.0]]), 1.0)],
    ids=["bilateral", "spatial", "both", "matrix"],
)
def test_pydensecrf_solves_the_same_problem(pydensecrf, tissue, weights):
    """Its lattice is some per cent off, so one iteration agrees to a few per cent of what it changed."""
    exact, lattice, start = exact_and_lattice(tissue, weights)
    assert np.abs(lattice - exact).mean() < 0.05 * np.abs(exact - start).mean()


def test_pydensecrf_averages_a_matrix_with_its_transpose(pydensecrf, tissue):
    matrix = np.array([[0, 1, 3], [2, 0, 2], [0, 1, 0.0]])
    with pytest.raises(ValueError, match=r"symmetric_part\(matrix\)"):
        exact_and_lattice(tissue, (matrix, 1.0))
    exact, lattice, start = exact_and_lattice(tissue, (symmetric_part(matrix), 1.0))
    assert np.abs(lattice - exact).mean() < 0.05 * np.abs(exact - start).mean()


def test_pydensecrf_counts_the_voxel_itself(tissue):
    image, probabilities = tissue((4, 5, 6), 2)
    with pytest.raises(ValueError, match="set include_self=True"):
        DenseCRF(1, 0.1, 1, 1, 1).refine(image, probabilities, UNIT, backend="pydensecrf")
    with pytest.raises(ValueError, match="has no convergence test"):
        DenseCRF(1, 0.1, 1, 1, 1, include_self=True, stop_change=0.1).refine(
            image, probabilities, UNIT, backend="pydensecrf"
        )
