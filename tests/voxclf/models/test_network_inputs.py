"""What a network reads: normalised intensities and features, by the training volume's statistics."""

import numpy as np
import pytest

from features.bank import FilterBank
from voxclf.feature_stack import FeatureStack
from voxclf.models.network_inputs import NetworkInput

VOXEL_SIZE_NM = (20.0, 10.0, 10.0)


def test_intensity_alone(cells, save_volume):
    image = cells[0]
    inputs = NetworkInput.measure(save_volume(image))
    assert inputs.n_channels == 1
    assert inputs.halo == (0, 0, 0)
    found = inputs.compute(image)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0] * inputs.std[0] + inputs.mean[0], image, atol=1e-3)
    # The sample boxes overlap in so small a volume, so its statistics are near, not equal to, those of all voxels.
    assert abs(found.mean()) < 0.1
    assert abs(found.std() - 1) < 0.1


def test_features_beside_it(cells, save_volume):
    stack = FeatureStack(FilterBank.default("edges", VOXEL_SIZE_NM), VOXEL_SIZE_NM)
    inputs = NetworkInput.measure(save_volume(cells[0]), stack)
    assert inputs.n_channels == 1 + stack.n_features
    assert inputs.halo == stack.halo
    found = inputs.compute(cells[0])
    core = tuple(n - 2 * h for n, h in zip(cells[0].shape, stack.halo, strict=True))
    assert found.shape == (inputs.n_channels, *core)
    expected = (stack.compute(cells[0]).copy() - np.array(inputs.mean[1:])[:, None, None, None]) / np.array(
        inputs.std[1:]
    )[:, None, None, None]
    np.testing.assert_allclose(found[1:], expected, atol=1e-4)
    assert np.abs(found.mean(axis=(1, 2, 3))).max() < 0.3
    assert NetworkInput.from_dict(inputs.to_dict()).compute(cells[0]).tobytes() == found.tobytes()


def test_a_constant_volume_is_only_centred(save_volume):
    inputs = NetworkInput.measure(save_volume(np.full((9, 10, 11), 7, np.uint8)))
    assert not inputs.compute(np.full((2, 2, 2), 7, np.uint8)).any()


def test_statistics_of_another_input_are_refused():
    with pytest.raises(ValueError, match="mean and std have 2 and 1 entries; 1 are needed"):
        NetworkInput((1.0, 2.0), (1.0,))
