"""FilterBank: what it promises about itself, and that what it computes is what filters.py defines."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.bank import FilterBank, available_filters

ISOTROPIC, FIB_SEM, SSTEM = (10.0, 10.0, 10.0), (8.0, 4.0, 4.0), (50.0, 4.6, 4.6)
BANKS = {
    "intensity": FilterBank("intensity", 3),
    "edges_2d": FilterBank("edges", 2),
    "edges_3d": FilterBank("edges", 3),
    "multiscale_2d": FilterBank("multiscale", 2, (4.0, 9.0)),
    "multiscale_3d": FilterBank("multiscale", 3, (5.0, 11.0)),
    "edges_neighbours": FilterBank("edges", 2, neighbours=True),
    "multiscale_neighbours": FilterBank("multiscale", 2, (4.0, 9.0), neighbours=True),
}


def random_block(bank, core, voxel_size_nm, dtype=np.float32, seed=3):
    shape = [n + 2 * h for n, h in zip(core, bank.halo(voxel_size_nm), strict=True)]
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def assert_close(features, expected):
    """Within float32 rounding of sums of grey values: 2e-6 of the largest value, or of the largest grey value."""
    assert features.dtype == np.float32
    assert features.shape == expected.shape
    for ours, truth in zip(features, expected, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=0, atol=2e-6 * max(255.0, np.abs(truth).max()))


# --- what it computes ---


@pytest.mark.parametrize("voxel_size_nm", [ISOTROPIC, FIB_SEM])
@pytest.mark.parametrize("core", [(23, 37, 41), (1, 1, 1), (2, 3, 33)])
@pytest.mark.parametrize("name", BANKS)
def test_equals_the_definitions(by_definition, name, core, voxel_size_nm):
    bank = BANKS[name]
    if max(core) > 40 and bank.dimensions == 3 and bank.kind == "multiscale":
        core = (7, 34, 41)  # more than one tile along y; numpy's eigenvalues take a second per 20,000 voxels
    block = random_block(bank, core, voxel_size_nm)
    assert_close(bank.compute(block, voxel_size_nm), by_definition(bank, block, voxel_size_nm))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("name", BANKS)
def test_integers_give_what_the_same_floats_give(name, dtype):
    bank = BANKS[name]
    block = random_block(bank, (3, 5, 37), ISOTROPIC, dtype)
    expected = bank.compute(block.astype(np.float32), ISOTROPIC)
    np.testing.assert_array_equal(bank.compute(block, ISOTROPIC), expected)


def test_large_sigma_uses_larger_tiles_with_the_same_result(by_definition):
    bank = FilterBank("multiscale", 3, (4.2,), ("gaussian", "difference_of_gaussians", "hessian_eigenvalues"))
    block = random_block(bank, (3, 66, 35), (1.0, 1.0, 1.0))
    assert_close(bank.compute(block, (1, 1, 1)), by_definition(bank, block, (1, 1, 1)))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["edges", "multiscale"])
def test_any_choice_of_filters_gives_those_rows_of_the_full_bank(kind, dimensions):
    sigmas = (12.0,) if kind == "multiscale" else ()
    full = FilterBank(kind, dimensions, sigmas)
    block = random_block(full, (4, 6, 40), ISOTROPIC)
    rows = dict(zip(full.names(ISOTROPIC), full.compute(block, ISOTROPIC), strict=True))
    for name in available_filters(kind, dimensions):
        one = FilterBank(kind, dimensions, sigmas, (name,))
        margin = [a - b for a, b in zip(full.halo(ISOTROPIC), one.halo(ISOTROPIC), strict=True)]
        inner = block[tuple(slice(m, n - m) for m, n in zip(margin, block.shape, strict=True))]
        for feature, values in zip(one.names(ISOTROPIC), one.compute(inner, ISOTROPIC), strict=True):
            np.testing.assert_array_equal(values, rows[feature])


@pytest.mark.parametrize("name", BANKS)
def test_a_constant_block_has_no_edges(name):
    bank = BANKS[name]
    block = np.full_like(random_block(bank, (2, 3, 35), ISOTROPIC), 137)
    for feature, values in zip(bank.names(ISOTROPIC), bank.compute(block, ISOTROPIC), strict=True):
        level = 137 if feature.startswith(("intensity", "gaussian(")) else 0
        np.testing.assert_allclose(values, level, atol=2e-4, err_msg=feature)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(BANKS)), voxel_size_nm=st.sampled_from([ISOTROPIC, FIB_SEM]))
def test_blocks_equal_the_whole_to_the_last_bit(data, name, voxel_size_nm):
    bank, core = BANKS[name], (9, 40, 70)
    halo = bank.halo(voxel_size_nm)
    volume = random_block(bank, core, voxel_size_nm, np.uint8)
    whole = bank.compute(volume, voxel_size_nm)
    start = [data.draw(st.integers(0, n - 1)) for n in core]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, core, strict=True)]
    with_halo = tuple(slice(a, b + 2 * h) for a, b, h in zip(start, stop, halo, strict=True))
    inner = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(bank.compute(volume[with_halo], voxel_size_nm), whole[:, *inner])


@pytest.mark.parametrize("name", BANKS)
def test_a_damaged_voxel_spoils_only_what_sees_it(name):
    bank = BANKS[name]
    block = random_block(bank, (3, 40, 70), ISOTROPIC)
    before = bank.compute(block, ISOTROPIC)
    halo = bank.halo(ISOTROPIC)
    block[tuple(halo)] = np.nan  # the first voxel of the core
    after = bank.compute(block, ISOTROPIC)
    far = np.ones(after.shape[1:], bool)
    far[tuple(slice(h + 1) for h in halo)] = False
    np.testing.assert_array_equal(after[:, far], before[:, far])
    assert np.isnan(after[:, 0, 0, 0]).any()


def test_threads_do_not_disturb_each_other():
    bank = BANKS["multiscale_3d"]
    blocks = [random_block(bank, (4, 9, 40), ISOTROPIC, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda block: bank.compute(block, ISOTROPIC), blocks))
    for block, features in zip(blocks, at_once, strict=True):
        np.testing.assert_array_equal(features, bank.compute(block, ISOTROPIC))


@pytest.mark.parametrize("name", BANKS)
def test_writes_into_memory_it_is_given_and_nowhere_else(name):
    bank = BANKS[name]
    block = random_block(bank, (4, 5, 37), ISOTROPIC)
    volume = np.full((bank.n_features, 8, 5, 37), -1e30, np.float32)
    slab = volume[:, 2:6]
    assert bank.compute(block, ISOTROPIC, out=slab) is slab
    np.testing.assert_array_equal(slab, bank.compute(block, ISOTROPIC))
    assert np.all(volume[:, :2] == -1e30)
    assert np.all(volume[:, 6:] == -1e30)


# --- halo ---


def test_halo_is_the_radius_per_axis():
    bank = FilterBank("multiscale", 3, (10.0, 20.0))
    # sigma 20 nm is 2.5 voxels in z and 5 in y, x; ceil(3.5 s) + ceil(3.5 s / 2) each.
    assert bank.halo(FIB_SEM) == (9 + 5, 18 + 9, 18 + 9)
    assert FilterBank("multiscale", 2, (20.0,), ("gaussian",)).halo((50, 4, 4)) == (0, 18, 18)
    assert BANKS["edges_2d"].halo(SSTEM) == (0, 1, 1)
    assert BANKS["edges_3d"].halo(SSTEM) == (1, 1, 1)
    assert BANKS["intensity"].halo(SSTEM) == (0, 0, 0)


@pytest.mark.parametrize("name", ["edges_2d", "edges_3d", "multiscale_2d", "multiscale_3d"])
def test_the_outermost_layer_of_the_halo_is_needed(name):
    bank = BANKS[name]
    block = random_block(bank, (1, 1, 1), ISOTROPIC)
    before = bank.compute(block, ISOTROPIC)
    for axis, halo in enumerate(bank.halo(ISOTROPIC)):
        if halo:
            changed = block.copy()
            np.moveaxis(changed, axis, 0)[-1] += 1e4
            assert not np.array_equal(bank.compute(changed, ISOTROPIC), before)


def test_a_halo_that_is_one_voxel_short_is_an_error():
    bank = BANKS["multiscale_3d"]
    block = random_block(bank, (4, 5, 6), ISOTROPIC)[1:-1, 1:-1, 1:-1]
    with pytest.raises(ValueError, match="check the halo the block was read with"):
        bank.compute(block, ISOTROPIC, out=np.empty((bank.n_features, 4, 5, 6), np.float32))
    with pytest.raises(ValueError, match=r"three axes.*of at least"):
        bank.compute(random_block(bank, (1, 1, 1), ISOTROPIC)[1:-1], ISOTROPIC)


# --- what it says about itself ---


def test_names_follow_the_features():
    bank = FilterBank("multiscale", 3, (16.0, 35.5), ("hessian_eigenvalues", "gaussian"))
    assert bank.names(ISOTROPIC) == (
        "gaussian(sigma=16nm)",
        "hessian_eigenvalue_1(sigma=16nm)",
        "hessian_eigenvalue_2(sigma=16nm)",
        "hessian_eigenvalue_3(sigma=16nm)",
        "gaussian(sigma=35.5nm)",
        "hessian_eigenvalue_1(sigma=35.5nm)",
        "hessian_eigenvalue_2(sigma=35.5nm)",
        "hessian_eigenvalue_3(sigma=35.5nm)",
    )
    assert [b.n_features for b in BANKS.values()] == [1, 8, 10, 16, 20, 24, 48]
    assert all(len(b.names(ISOTROPIC)) == b.n_features for b in BANKS.values())


@pytest.mark.parametrize(
    ("voxel_size_nm", "dimensions", "sigmas"),
    [
        (ISOTROPIC, 3, (7, 10, 16, 35, 50)),
        (FIB_SEM, 3, (2.8, 4, 6.4, 14, 20)),
        (SSTEM, 2, (4.6, 9.2, 18.4, 36.8, 73.6)),
        ((30, 10, 10), 2, (10, 20, 40, 80, 160)),
    ],
)
def test_default_suits_the_voxel_size(voxel_size_nm, dimensions, sigmas):
    bank = FilterBank.default("multiscale", voxel_size_nm)
    assert (bank.dimensions, bank.sigmas_nm, bank.neighbours) == (dimensions, sigmas, dimensions == 2)
    assert FilterBank.default("edges", voxel_size_nm).filters == available_filters("edges", dimensions)
    assert FilterBank.default("intensity", voxel_size_nm).n_features == 1


@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
def test_survives_json(bank):
    assert FilterBank.from_dict(json.loads(json.dumps(bank.to_dict()))) == bank


def test_neighbours_belong_to_slices():
    with pytest.raises(ValueError, match=r"neighbours is True in 3 dimensions.*leave it out"):
        FilterBank("edges", 3, neighbours=True)
    bank = BANKS["multiscale_neighbours"]
    assert bank.halo(SSTEM) == (1, *BANKS["multiscale_2d"].halo(SSTEM)[1:])
    assert bank.names(SSTEM)[16] == "gaussian(sigma=4nm) min z±1"


def test_importing_the_bank_does_not_import_torch():
    code = "import sys, features.bank; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sharp", 3), "kind is 'sharp'; a filter bank is one of intensity, edges, multiscale"),
        (("edges", 4), "dimensions is 4; .* give 2 or 3"),
        (("edges", 2, (3.0,)), "sigmas_nm is .*has no scale.*leave it out"),
        (("multiscale", 3), "sigmas_nm is empty.*FilterBank.default"),
        (("multiscale", 3, (4.0, 2.0)), "increasing order: sort them"),
        (("multiscale", 3, (2.0, 2.0)), "increasing order"),
        (("multiscale", 3, (-1.0,)), "positive numbers of nanometres"),
        (("multiscale", 3, (float("nan"),)), "positive numbers of nanometres"),
        (("edges", 2, (), ("sobel_z",)), "an edges bank in 2D|edges bank in 2D has intensity, sobel_x"),
        (("edges", 2, (), ("laplace", "laplace")), "name each at most once"),
    ],
)
def test_impossible_banks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FilterBank(*arguments)


def test_fields_from_elsewhere_are_refused():
    with pytest.raises(ValueError, match=r"write them with FilterBank\.to_dict"):
        FilterBank.from_dict({"kind": "edges", "dimensions": 2})


@pytest.mark.parametrize("voxel_size_nm", [(4, 4), (0, 4, 4), (4, 4, float("inf"))])
def test_a_voxel_size_that_is_none_is_refused(voxel_size_nm):
    with pytest.raises(ValueError, match=r"three positive numbers \(z, y, x\) in nanometres"):
        BANKS["multiscale_3d"].halo(voxel_size_nm)


def test_a_sigma_below_the_voxels_is_refused():
    with pytest.raises(ValueError, match=r"sigmas_nm has 5, which is under 0\.3 voxels.*check the voxel size"):
        FilterBank("multiscale", 3, (5.0, 20.0)).names((20, 20, 20))


def test_blocks_and_outputs_of_the_wrong_kind_are_refused():
    bank = BANKS["edges_3d"]
    block = np.zeros((5, 5, 5), np.float32)
    with pytest.raises(TypeError, match=r"block has dtype int32.*convert it"):
        bank.compute(block.astype(np.int32), ISOTROPIC)
    with pytest.raises(TypeError, match="out has dtype float64"):
        bank.compute(block, ISOTROPIC, out=np.empty((10, 3, 3, 3)))
    with pytest.raises(ValueError, match="every channel C-contiguous"):
        bank.compute(block, ISOTROPIC, out=np.empty((10, 3, 3, 6), np.float32)[..., ::2])
    with pytest.raises(ValueError, match="three axes"):
        bank.compute(np.zeros((5, 5), np.float32), ISOTROPIC)
