"""The engine's laws for the step that carries trees: filters at several scales and a packed forest, in 2D and 3D."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from features.bank import FilterBank
from voxclf.engine.executors import ProcessExecutor, SerialExecutor, ThreadExecutor
from voxclf.engine.run import Output, map_blocks
from voxclf.errors import BlockError
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import UNIT, split_into_blocks, subtract
from voxclf.models.trees import TreePredictor
from voxclf.probabilities import quantise
from voxclf.training.fit_trees import fit_tree_model
from voxclf.volume import create_volume, open_volume

VOXEL_SIZE_NM = (20.0, 10.0, 10.0)
BANKS = {
    "3D": FilterBank("multiscale", 3, (10.0, 25.0)),
    "per slice": FilterBank("multiscale", 2, (10.0, 25.0), neighbours=True),
    "edges": FilterBank("edges", 3),
}


@pytest.fixture(scope="module", params=BANKS)
def step(request):
    stack = FeatureStack(BANKS[request.param], VOXEL_SIZE_NM)
    rng = np.random.default_rng(0)
    rows = rng.normal(100, 40, (400, stack.n_features)).astype(np.float32)
    fitted = fit_tree_model("random_forest", rows, (rows[:, 0] > rows[:, 1]).astype(int), 2, n_trees=5, n_jobs=1)
    return TreePredictor(stack, fitted.model)


def predict(step, volume, path, core_shape, executor=None):
    output = create_volume(path, volume.shape, 2, np.uint8, VOXEL_SIZE_NM, (8, 8, 8), kind="probabilities")
    blocks = split_into_blocks(volume.shape, core_shape, step.halo)
    list(map_blocks(step, [volume], [Output(output, quantise)], blocks, executor))
    return open_volume(path).read((0, 0, 0), volume.shape)


@pytest.mark.parametrize("core_shape", [(8, 8, 8), (16, 24, 8), (8, 40, 48)])
def test_blocks_equal_whole_bit_for_bit(step, cells, save_volume, tmp_path, core_shape):
    volume = save_volume(cells[0], voxel_size_nm=VOXEL_SIZE_NM)
    whole = predict(step, volume, tmp_path / "whole.zarr", (24, 40, 48))
    padded = np.pad(cells[0], [(h, h) for h in step.halo], mode="symmetric")
    np.testing.assert_array_equal(whole, quantise(step(padded[None])))
    np.testing.assert_array_equal(predict(step, volume, tmp_path / "blocks.zarr", core_shape), whole)


@pytest.mark.parametrize("executor", [ThreadExecutor(2), ProcessExecutor(2)], ids=["threads", "processes"])
def test_executors_agree_bit_for_bit(step, cells, save_volume, tmp_path, executor):
    volume = save_volume(cells[0], voxel_size_nm=VOXEL_SIZE_NM)
    serial = predict(step, volume, tmp_path / "serial.zarr", (8, 16, 16), SerialExecutor())
    np.testing.assert_array_equal(predict(step, volume, tmp_path / "other.zarr", (8, 16, 16), executor), serial)


@dataclass(frozen=True)
class ShortSighted:
    """A step that asks for one voxel less than it needs."""

    step: TreePredictor
    alignment: tuple = UNIT
    out_channels: int = 2

    @property
    def halo(self):
        return subtract(self.step.halo, UNIT)

    def __call__(self, image):
        return self.step(image)


def test_a_halo_of_one_voxel_less_fails(step, cells, save_volume, tmp_path):
    if min(step.halo) < 1:
        step = replace(step, stack=FeatureStack(BANKS["3D"], VOXEL_SIZE_NM))
    volume = save_volume(cells[0], voxel_size_nm=VOXEL_SIZE_NM)
    with pytest.raises(BlockError, match="block 0"):
        predict(ShortSighted(step), volume, tmp_path / "short.zarr", (8, 8, 8))
