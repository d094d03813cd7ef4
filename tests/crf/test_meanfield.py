"""The fast CRF against the exact one, and the contract of its interface."""

import dataclasses
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from crf import DenseCRF
from crf.compiled import SCRATCH_BYTES, PhaseLayout, compiled_filters
from crf.gaussian import kernel_radius
from crf.reference import brute_force_filters

SETTINGS = {"small": (3.0, 0.05, 1.0), "medium": (8.0, 0.1, 2.0), "large": (20.0, 0.3, 3.0)}
UNIT = (1.0, 1.0, 1.0)


def make_crf(bilateral=8.0, intensity=0.1, spatial=2.0, weights=(4.0, 2.0), **options):
    return DenseCRF(bilateral, intensity, spatial, *weights, **options)


def any_matrix(n_classes, seed=0, scale=4.0):
    """A symmetric penalty matrix with no other structure."""
    matrix = np.random.default_rng(seed).random((n_classes, n_classes)) * scale
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 0)
    return matrix


@pytest.mark.parametrize("n_classes", [2, 6, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_ten_iterations_match_brute_force(tissue, setting, n_classes):
    image, probabilities = tissue((12, 13, 11), n_classes)
    weights = (any_matrix(n_classes, 1, 6.0), any_matrix(n_classes, 2, 3.0))
    crf = DenseCRF(*SETTINGS[setting], *weights)
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    difference = np.abs(crf.refine(image, probabilities, UNIT) - exact)
    assert difference.mean() <= 1e-5
    assert difference.max() <= 5e-3
    assert np.abs(exact - probabilities).mean() > 0.05  # the comparison is of something that happened


def test_a_larger_volume_matches_the_exact_grey_level_form(tissue):
    image, probabilities = tissue((19, 26, 23), 3)
    image = image // 16 * 16  # 16 levels, because the exact form takes time for each
    crf = make_crf()
    difference = np.abs(
        crf.refine(image, probabilities, UNIT) - crf.refine(image, probabilities, UNIT, backend="grey_levels")
    )
    assert difference.mean() <= 1e-5
    assert difference.max() <= 5e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("intensity", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("bilateral", [1.0, 3.0, 5.0, 12.0, 30.0])
@pytest.mark.parametrize("tolerance", [3e-2, 2e-3, 5e-4])
def test_messages_are_within_the_tolerance_over_the_parameter_range(tissue, bilateral, intensity, dtype, tolerance):
    image, probabilities = tissue((7, 11, 12), 3)
    if dtype == np.uint16:
        image = image.astype(np.uint16) * 257
    elif dtype == np.float32:
        image = (image / 255 + np.random.default_rng(3).uniform(-0.004, 0.004, image.shape)).astype(np.float32)
    crf = make_crf(bilateral, intensity, 1.5, tolerance=tolerance, include_self=True)
    problem = crf.problem(image, probabilities, UNIT)
    wanted = brute_force_filters(problem)
    with compiled_filters(problem, n_threads=1) as filters:
        for fast, exact in zip(filters, wanted, strict=True):
            error = np.abs(fast(probabilities.astype(np.float64)) - exact(probabilities.astype(np.float64)))
            assert error.max() <= tolerance


@pytest.mark.parametrize("n_classes", [2, 5, 16])
def test_any_number_of_classes(tissue, n_classes):
    image, probabilities = tissue((8, 11, 9), n_classes)
    crf = make_crf(4.0, 0.1, 1.0)
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    np.testing.assert_allclose(crf.refine(image, probabilities, UNIT), exact, atol=2e-3)


def test_one_kernel_value_at_a_time(tissue):
    """A single bright voxel shows the kernel itself, the rare grey level included."""
    image = np.full((1, 1, 41), 60, np.uint8)
    image[0, 0, 20] = 255
    probabilities = np.full((2, 1, 1, 41), 0.5, np.float32)
    problem = make_crf(20.0, 0.05, 2.0, include_self=True).problem(image, probabilities, UNIT)
    impulse = np.zeros((2, 1, 1, 41))
    impulse[0, 0, 0, 20] = 1.0
    with compiled_filters(problem, n_threads=1) as (bilateral, _):
        message = bilateral(impulse)[0, 0, 0]
    assert message[20] == pytest.approx(1.0, abs=2e-3)  # connected to nothing but itself
    assert np.abs(np.delete(message, 20)).max() < 1e-5


def test_anisotropic_widths_and_voxels(tissue):
    image, probabilities = tissue((7, 19, 21), 3)
    crf = make_crf((90.0, 40.0, 30.0), 0.1, (60.0, 8.0, 10.0))
    voxel_size_nm = (50.0, 5.0, 4.0)
    exact = crf.refine(image, probabilities, voxel_size_nm, backend="brute_force")
    np.testing.assert_allclose(crf.refine(image, probabilities, voxel_size_nm), exact, atol=2e-3)
    # The same in voxels: lengths matter only relative to the voxel.
    in_voxels = make_crf((1.8, 8.0, 7.5), 0.1, (1.2, 1.6, 2.5))
    np.testing.assert_array_equal(
        crf.refine(image, probabilities, voxel_size_nm), in_voxels.refine(image, probabilities, UNIT)
    )


def test_two_image_channels(tissue):
    image, probabilities = tissue((9, 10, 11), 3)
    other = np.random.default_rng(5).integers(0, 256, image.shape).astype(np.uint8)
    both = np.stack([image, other])
    crf = make_crf(4.0, (0.15, 0.4), 1.0)
    exact = crf.refine(both, probabilities, UNIT, backend="brute_force")
    fast = crf.refine(both, probabilities, UNIT)
    np.testing.assert_allclose(fast, exact, atol=2e-3)
    assert np.abs(fast - make_crf(4.0, 0.15, 1.0).refine(image, probabilities, UNIT)).max() > 0.01


def test_an_asymmetric_matrix_is_used_as_given(tissue):
    image, probabilities = tissue((8, 9, 10), 3)
    matrix = np.array([[0, 1, 3], [2, 0, 5], [0, 1, 0]])
    crf = make_crf(weights=(matrix, 1.0))
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    np.testing.assert_allclose(crf.refine(image, probabilities, UNIT), exact, atol=2e-3)
    averaged = make_crf(weights=((matrix + matrix.T) / 2, 1.0)).refine(image, probabilities, UNIT)
    assert np.abs(averaged - exact).max() > 0.05


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 23, 37), (23, 1, 5), (3, 41, 2), (2, 3, 300)])
@pytest.mark.parametrize("bilateral", [1.0, 9.0])
def test_odd_shapes(tissue, shape, bilateral):
    image, probabilities = tissue(shape, 3)
    crf = make_crf(bilateral, 0.2, 1.0)
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    refined = crf.refine(image, probabilities, UNIT)
    np.testing.assert_allclose(refined, exact, atol=2e-3)
    np.testing.assert_allclose(refined.sum(axis=0), 1.0, atol=1e-5)


def test_rows_longer_than_a_tile(tissue):
    image, probabilities = tissue((1, 2, 1100), 2)
    crf = make_crf(20.0, 0.3, 2.0)
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    np.testing.assert_allclose(crf.refine(image, probabilities, UNIT), exact, atol=2e-3)


def test_threads_do_not_change_a_bit(tissue):
    image, probabilities = tissue((23, 37, 41), 4)
    crf = make_crf(5.0, 0.1, 1.0, n_iterations=3)
    alone = crf.refine(image, probabilities, UNIT, n_threads=1)
    np.testing.assert_array_equal(crf.refine(image, probabilities, UNIT, n_threads=3), alone)


def test_a_grid_that_does_not_fit_is_swept_in_parts(tissue, monkeypatch):
    image, probabilities = tissue((12, 13, 14), 3)
    crf = make_crf(3.0, 0.05, 1.0, n_iterations=3)
    whole = crf.refine(image, probabilities, UNIT)
    monkeypatch.setattr("crf.compiled.GRID_BYTES_PER_VOXEL", 1)
    np.testing.assert_allclose(crf.refine(image, probabilities, UNIT), whole, atol=1e-5)


@pytest.mark.parametrize(("setting", "n_classes"), [("small", 6), ("medium", 2), ("large", 8)])
def test_memory_stays_below_what_is_announced(tissue, setting, n_classes):
    image, probabilities = tissue((64, 64, 64), n_classes)
    crf = DenseCRF(*SETTINGS[setting], 4.0, 2.0, n_iterations=1)
    crf.refine(image[:8], probabilities[:, :8], UNIT)
    tracemalloc.start()
    try:
        crf.refine(image, probabilities, UNIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    announced = crf.memory_bytes(image.shape, n_classes, UNIT)
    assert 0.3 * announced < peak + SCRATCH_BYTES < 1.02 * announced


def test_memory_per_voxel_is_bounded():
    for setting in SETTINGS.values():
        crf = DenseCRF(*setting, 4.0, 2.0)
        assert crf.memory_bytes((256, 256, 256), 6, UNIT) < 120 * 256**3


@pytest.mark.parametrize("weights", [(0.0, 2.0), (4.0, 0.0), (0.0, 0.0)])
def test_zero_weight_switches_a_kernel_off(tissue, weights):
    image, probabilities = tissue((9, 10, 11), 3)
    crf = make_crf(weights=weights)
    exact = crf.refine(image, probabilities, UNIT, backend="brute_force")
    np.testing.assert_allclose(crf.refine(image, probabilities, UNIT), exact, atol=2e-3)


def test_inputs_are_not_changed(tissue):
    image, probabilities = tissue((6, 7, 8), 3)
    copies = image.copy(), probabilities.copy()
    make_crf().refine(image, probabilities, UNIT)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(probabilities, copies[1])


def test_views_and_other_float_types_are_read(tissue):
    image, probabilities = tissue((6, 7, 8), 3)
    crf = make_crf(n_iterations=2)
    wanted = crf.refine(image, probabilities, UNIT)
    flipped = crf.refine(image[:, ::-1], probabilities[:, :, ::-1].astype(np.float64), UNIT)
    np.testing.assert_allclose(flipped[:, :, ::-1], wanted, atol=1e-4)


def test_certain_probabilities_stay_finite(tissue):
    image, probabilities = tissue((6, 7, 8), 3)
    certain = (probabilities == probabilities.max(axis=0)).astype(np.float32)
    assert np.isfinite(make_crf().refine(image, certain, UNIT)).all()


# --------------------------------------------------------------------------------------------- energy, stopping


def test_energy_falls_and_matches_brute_force(tissue):
    image, probabilities = tissue((9, 10, 11), 3)
    crf = make_crf(4.0, 0.1, 1.0, weights=(1.0, 0.5))
    refined, energies = crf.refine_with_energies(image, probabilities, UNIT)
    _, exact = crf.refine_with_energies(image, probabilities, UNIT, backend="brute_force")
    assert len(energies) == crf.n_iterations + 1
    np.testing.assert_allclose(energies, exact, rtol=1e-4)
    assert (np.diff(energies) <= 1e-3).all()
    np.testing.assert_allclose(refined, crf.refine(image, probabilities, UNIT), atol=1e-4)


def test_energy_of_two_voxels_by_hand():
    """Two equal voxels: k12 = exp(-1/2), n² = 1 / (1 + k12)."""
    image = np.zeros((1, 1, 2), np.uint8)
    probabilities = np.array([[0.8, 0.6], [0.2, 0.4]], np.float64).reshape(2, 1, 1, 2)
    crf = make_crf(1.0, 0.5, 1.0, weights=(2.0, 0.0), n_iterations=1)
    _, energies = crf.refine_with_energies(image, probabilities, UNIT, backend="brute_force")
    link = np.exp(-0.5) / (1 + np.exp(-0.5))
    differ = 0.8 * 0.4 + 0.2 * 0.6
    # At the start Q = p, so the data term and the entropy cancel and the penalty is left.
    assert energies[0] == pytest.approx(2.0 * link * differ, rel=1e-6)


def test_stops_when_nothing_changes(tissue):
    image, probabilities = tissue((9, 10, 11), 3)
    _, energies = make_crf(n_iterations=100, stop_change=1e-3).refine_with_energies(image, probabilities, UNIT)
    assert 3 < len(energies) < 100
    stopped = make_crf(n_iterations=100, stop_change=1e-3).refine(image, probabilities, UNIT)
    exact = make_crf(n_iterations=len(energies) - 1).refine(image, probabilities, UNIT)
    np.testing.assert_allclose(stopped, exact, atol=2e-3)


# ----------------------------------------------------------------------------------------------------- interface


def test_halo_grows_with_accuracy_and_shrinks_with_the_voxel():
    crf = make_crf(40.0, 0.1, 10.0)
    assert crf.halo(1e-4, (5.0, 5.0, 5.0)) == (48, 48, 48)
    assert crf.halo(1e-4, (40.0, 5.0, 5.0)) == (6, 48, 48)
    assert crf.halo(1e-2, (5.0, 5.0, 5.0)) < crf.halo(1e-4, (5.0, 5.0, 5.0))
    assert make_crf(40.0, 0.1, 10.0, weights=(0.0, 1.0)).halo(1e-4, (5.0, 5.0, 5.0)) == (12, 12, 12)
    exact = make_crf(40.0, 0.1, 10.0, n_iterations=1).halo(1e-9, (5.0, 5.0, 5.0))
    assert exact == (kernel_radius(8.0, crf.tolerance),) * 3
    with pytest.raises(ValueError, match="fraction of labels"):
        crf.halo(0.0, (5.0, 5.0, 5.0))


def test_a_block_with_halo_equals_the_whole(tissue):
    image, probabilities = tissue((72, 20, 20), 4)
    crf = make_crf(3.0, 0.08, 1.0)
    whole = crf.refine(image, probabilities, UNIT)
    halo = crf.halo(1e-4, UNIT)[0]
    core = slice(28, 44)
    read = slice(core.start - halo, core.stop + halo)
    block = crf.refine(image[read], probabilities[:, read], UNIT)[:, halo:-halo]
    changed = np.mean(block.argmax(axis=0) != whole[:, core].argmax(axis=0))
    assert changed <= 1e-4
    assert np.abs(block - whole[:, core]).mean() < 1e-4
    bare = crf.refine(image[core], probabilities[:, core], UNIT)
    assert np.mean(bare.argmax(axis=0) != whole[:, core].argmax(axis=0)) > 1e-4


def test_the_model_is_a_frozen_value():
    crf = make_crf(weights=(np.ones((2, 2)), 1.0))
    assert crf == make_crf(weights=([[1, 1], [1, 1]], 1))
    assert hash(crf) == hash(dataclasses.replace(crf))
    with pytest.raises(dataclasses.FrozenInstanceError):
        crf.tolerance = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bilateral": 0.0}, "bilateral_sigma_nm is 0.0; it must be positive"),
        ({"spatial": (1.0, -2.0, 1.0)}, "spatial_sigma_nm .* must be positive"),
        ({"intensity": -0.1}, "intensity_sigma is -0.1; it must be positive"),
        ({"weights": (np.ones((2, 3)), 1.0)}, "bilateral_weight has shape"),
        ({"n_iterations": 0}, "n_iterations is 0"),
        ({"tolerance": 0.5}, "tolerance is 0.5; it must lie between"),
        ({"stop_change": -1.0}, "stop_change is -1.0"),
    ],
)
def test_wrong_models_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_crf(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, p: (i[:-1], p, UNIT), ValueError, "must cover the same voxels"),
        (lambda i, p: (i, np.moveaxis(p, 0, -1), UNIT), ValueError, "must sum to one"),
        (lambda i, p: (i[0, 0], p, UNIT), ValueError, r"image has shape .* must be \(Z, Y, X\) or \(C, Z, Y, X\)"),
        (lambda i, p: (i.astype(np.int32), p, UNIT), TypeError, "image has dtype int32; it must be uint8"),
        (lambda i, p: (np.full(i.shape, np.nan), p, UNIT), ValueError, "image holds NaN"),
        (lambda i, p: (i, p, (1.0, 1.0)), ValueError, "voxel_size_nm has 2 values"),
        (lambda i, p: (i, p, (1.0, 0.0, 1.0)), ValueError, "voxel_size_nm is .* must be positive"),
        (lambda i, p: (np.stack([i] * 3), p, UNIT), ValueError, "intensity_sigma has 2 values but the image has 3"),
    ],
)
def test_wrong_volumes_are_named(tissue, change, error, message):
    image, probabilities = tissue((5, 6, 7), 4)
    crf = make_crf(intensity=(0.1, 0.1) if "3" in message else 0.1)
    with pytest.raises(error, match=message):
        crf.refine(*change(image, probabilities))


def test_matrix_and_classes_must_agree(tissue):
    image, probabilities = tissue((5, 6, 7), 3)
    with pytest.raises(ValueError, match="spatial_weight is a 2×2 matrix but the probabilities have 3 classes"):
        make_crf(weights=(1.0, np.ones((2, 2)))).refine(image, probabilities, UNIT)


def test_unknown_backend_and_bad_thread_count_are_named(tissue):
    image, probabilities = tissue((5, 6, 7), 3)
    with pytest.raises(ValueError, match="choose one of compiled, torch, brute_force"):
        make_crf().refine(image, probabilities, UNIT, backend="lattice")
    with pytest.raises(ValueError, match="n_threads is 0"):
        make_crf().refine(image, probabilities, UNIT, n_threads=0)


def test_importing_crf_does_not_import_torch():
    code = "import crf, crf.compiled, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("size", "pitch"), [(8, 4), (7, 4), (601, 6), (5, 1), (1, 8)])
def test_phase_layout_is_a_permutation(size, pitch):
    layout = PhaseLayout(size, pitch)
    rows = np.arange(2 * size, dtype=np.float32).reshape(2, size)
    stored = layout.store(rows, -1.0)
    assert stored.shape[1] == -(-size // pitch) * pitch
    np.testing.assert_array_equal(layout.restore(stored), rows)
    if (size, pitch) == (8, 4):
        np.testing.assert_array_equal(stored[0], [0, 4, 1, 5, 2, 6, 3, 7])
