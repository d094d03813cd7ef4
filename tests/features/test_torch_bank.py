"""The tensor form against the compiled one, on CPU tensors."""

import numpy as np
import pytest

from features.bank import FilterBank

torch = pytest.importorskip("torch")
from features.torch_bank import compute_torch  # noqa: E402

VOXEL_SIZE = (8.0, 4.0, 4.0)
BANKS = [
    FilterBank("intensity", 3),
    FilterBank("edges", 2),
    FilterBank("edges", 3),
    FilterBank("multiscale", 2, (2.8, 6.0)),
    FilterBank("multiscale", 3, (2.8, 6.0)),
    FilterBank("multiscale", 3, (6.0,), ("hessian_eigenvalues", "difference_of_gaussians")),
]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("bank", BANKS, ids=lambda b: f"{b.kind}_{b.dimensions}d_{len(b.filters)}")
def test_equals_the_compiled_bank(rng, bank, dtype):
    shape = [n + 2 * h for n, h in zip((5, 13, 21), bank.halo(VOXEL_SIZE), strict=True)]
    block = rng.integers(0, 256, shape).astype(dtype)
    expected = bank.compute(block, VOXEL_SIZE)
    features = compute_torch(bank, torch.from_numpy(block), VOXEL_SIZE)
    assert features.dtype == torch.float32
    assert features.shape == expected.shape
    for ours, theirs in zip(features.numpy(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(255.0, np.abs(theirs).max()))


def test_a_constant_block_has_no_edges():
    bank = FilterBank("multiscale", 3, (4.0,))
    block = torch.full([1 + 2 * h for h in bank.halo(VOXEL_SIZE)], 50.0)
    features = compute_torch(bank, block, VOXEL_SIZE).flatten()
    assert features[0] == pytest.approx(50)
    np.testing.assert_allclose(features[1:], 0, atol=1e-3)


def test_a_block_without_room_for_its_halo_is_refused():
    with pytest.raises(ValueError, match="read a larger block"):
        compute_torch(BANKS[4], torch.zeros(3, 3, 3), VOXEL_SIZE)
