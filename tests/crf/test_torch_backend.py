"""The tensor form against the compiled one, on the CPU and on a GPU where there is one."""

import numpy as np
import pytest

from crf import DenseCRF

torch = pytest.importorskip("torch")
UNIT = (1.0, 1.0, 1.0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("setting", [(3.0, 0.05, 1.0), (8.0, 0.1, 2.0), (20.0, 0.3, 3.0)])
def test_tensors_and_compiled_loops_agree(tissue, setting, include_self, device):
    image, probabilities = tissue((11, 18, 23), 4)
    crf = DenseCRF(*setting, 4.0, 2.0, include_self=include_self)
    compiled = crf.refine(image, probabilities, UNIT)
    tensor = crf.refine(image, probabilities, UNIT, backend="torch", device=device)
    assert tensor.dtype == np.float32
    np.testing.assert_allclose(tensor, compiled, atol=5e-4)
    assert np.abs(tensor - compiled).mean() < 1e-6


def test_two_channels_a_float_image_and_small_scratch(tissue, monkeypatch):
    image, probabilities = tissue((8, 9, 10), 3)
    both = np.stack([image / 255, image[::-1] / 255]).astype(np.float32)
    crf = DenseCRF(3.0, 0.3, 1.0, 4.0, np.array([[0, 1, 2], [3, 0, 1], [1, 1, 0]]))
    wanted = crf.refine(both, probabilities, UNIT)
    monkeypatch.setattr("crf.torch_backend.SCRATCH_BYTES", 1)
    np.testing.assert_allclose(crf.refine(both, probabilities, UNIT, backend="torch"), wanted, atol=5e-4)


def test_stops_when_nothing_changes(tissue):
    image, probabilities = tissue((8, 9, 10), 3)
    crf = DenseCRF(3.0, 0.3, 1.0, 4.0, 2.0, n_iterations=100, stop_change=1e-3)
    np.testing.assert_allclose(
        crf.refine(image, probabilities, UNIT, backend="torch"), crf.refine(image, probabilities, UNIT), atol=5e-4
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_named(tissue):
    image, probabilities = tissue((4, 5, 6), 2)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        DenseCRF(1, 0.1, 1, 1, 1).refine(image, probabilities, UNIT, backend="torch", device="cuda")
