"""The engine's laws for networks: blocks equal the whole, a halo of one voxel less fails, threads share a network."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from tests.conftest import draw_cells
from voxclf.engine.executors import SerialExecutor, ThreadExecutor
from voxclf.engine.run import Output, map_blocks
from voxclf.errors import BlockError
from voxclf.geometry import UNIT, split_into_blocks, subtract
from voxclf.labels import LabelSet
from voxclf.models.devices import Inference
from voxclf.models.network_certificate import SeamCertificate
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.network_model import NetworkModel
from voxclf.models.network_step import make_network_step
from voxclf.models.registry import build
from voxclf.provenance import IntensityStatistics
from voxclf.volume import create_volume, open_volume

VOXEL_SIZE_NM = (10.0, 10.0, 10.0)
CASES = {
    "4conv": ("4conv", (12, 16, 16), Inference()),
    "odd patch": ("4conv", (5, 15, 13), Inference()),
    "dil": ("dil", (16, 16, 16), Inference()),
    "small tiles": ("3layer", (8, 8, 8), Inference(memory_bytes=3_000_000)),
    "mirrored": ("3layer", (8, 8, 8), Inference(flips=True)),
    "coarse": ("4res", (8, 8, 8), Inference(output_stride=4)),
    "coarse and mirrored": ("4res_ln", (8, 8, 8), Inference(output_stride=6, flips=True)),
    "real context": ("4res", (4, 4, 4), Inference(real_context=True)),
    "bf16": ("4conv", (12, 16, 16), Inference(precision="bf16")),
}


def settle(network, patch):
    """Give batch norm the statistics of an image and the head a spread of logits of 1, as training would."""
    import torch

    image = (draw_cells((36, 40, 40), seed=3)[0].astype(np.float32) - 110) / 50
    starts = np.random.default_rng(0).integers(0, np.array(image.shape) - patch, (64, 3))
    patches = [image[tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True))] for start in starts]
    batch = torch.from_numpy(np.stack(patches))[:, None]
    with torch.no_grad():
        for _ in range(30):
            network.train()(batch)
        logits = network.eval()(batch)
        network.head.weight /= logits.std(dim=0)[:, None, None, None, None]
        network.head.bias -= network(batch).mean(dim=0)


def make_model(name, patch, voxel_size_nm=VOXEL_SIZE_NM):
    import torch

    torch.manual_seed(0)
    architecture = {"n_classes": 3, "in_channels": 1, "patch": list(patch), "width": 0.25}
    network = build(name, **architecture)
    settle(network, patch)
    return NetworkModel(
        name,
        architecture,
        network,
        NetworkInput((110.0,), (50.0,)),
        LabelSet.from_ids([1, 2, 3]),
        voxel_size_nm,
        IntensityStatistics(110, 50, 0, 255),
        {},
    )


@pytest.fixture(scope="module", params=CASES)
def step(request):
    name, patch, inference = CASES[request.param]
    return make_network_step(make_model(name, patch), "cpu", inference)


def predict(step, volume, path, core_shape, executor=None, check=None):
    output = create_volume(path, volume.shape, 3, np.float32, VOXEL_SIZE_NM, (8, 8, 8), kind="probabilities")
    blocks = split_into_blocks(volume.shape, core_shape, step.halo, step.alignment)
    list(map_blocks(step, [volume], [Output(output, np.asarray)], blocks, executor, check=check))
    return open_volume(path).read((0, 0, 0), volume.shape)


def test_blocks_equal_whole(step, cells, save_volume, tmp_path):
    volume = save_volume(cells[0], voxel_size_nm=VOXEL_SIZE_NM)
    tolerance = 2e-6 if step.tolerance < 1e-3 else 0.02
    # Cores are multiples of the chunks of 8 and of the stride.
    unit = math.lcm(8, max(step.alignment))
    whole = predict(step, volume, tmp_path / "whole.zarr", (48, 48, 48))
    assert whole.std(axis=(1, 2, 3)).max() > 0.02
    np.testing.assert_allclose(whole.sum(axis=0), 1, atol=1e-5)
    for i, core in enumerate([(8, 16, 24), (24, 8, 16)]):
        core = tuple(unit * max(1, n // unit) for n in core)
        blocks = predict(step, volume, tmp_path / f"blocks{i}.zarr", core)
        np.testing.assert_allclose(blocks, whole, atol=tolerance)


def test_the_certificate_holds(step, cells, save_volume, tmp_path):
    volume = save_volume(cells[0], voxel_size_nm=VOXEL_SIZE_NM)
    certificate = SeamCertificate.of_step(step, volume, tmp_path / "certificate.log")
    predict(step, volume, tmp_path / "out.zarr", (24, 24, 24), check=certificate)
    summary = certificate.summarise()
    assert summary["n_voxels"] >= 32
    assert summary["largest_difference"] <= (1e-5 if step.tolerance < 1e-3 else 0.05)


def test_threads_agree_with_one_after_the_other(step, cells, save_volume, tmp_path):
    volume = save_volume(cells[0], voxel_size_nm=VOXEL_SIZE_NM)
    serial = predict(step, volume, tmp_path / "serial.zarr", (24, 24, 24), SerialExecutor())
    np.testing.assert_array_equal(predict(step, volume, tmp_path / "t.zarr", (24, 24, 24), ThreadExecutor(2)), serial)


@dataclass(frozen=True)
class ShortSighted:
    """A step that reads one voxel less than it needs, and repeats the edge in its place."""

    step: object
    pads: bool
    alignment: tuple = UNIT
    out_channels: int = 3

    @property
    def halo(self):
        return subtract(self.step.halo, UNIT)

    def __call__(self, image):
        return self.step(np.pad(image, [(0, 0), (1, 1), (1, 1), (1, 1)], mode="edge") if self.pads else image)


@pytest.mark.parametrize("pads", [False, True], ids=["short", "padded"])
def test_a_halo_of_one_voxel_less_fails(save_volume, tmp_path, pads):
    # An odd patch uses all of its halo on both sides.
    step = make_network_step(make_model("3layer", (9, 9, 9)))
    volume = save_volume(draw_cells((24, 24, 24))[0], voxel_size_nm=VOXEL_SIZE_NM)
    certificate = SeamCertificate.of_step(step, volume, tmp_path / "certificate.log")
    message = r"voxel \(\d+, \d+, \d+\).*differ by .*patch alone" if pads else "block 0"
    with pytest.raises(BlockError, match=message):
        predict(ShortSighted(step, pads), volume, tmp_path / "short.zarr", (8, 8, 8), check=certificate)


def test_patch_by_patch_is_read_off_the_definition(cells):
    """Voxel by voxel with NumPy's own mirroring: neither the engine's reading nor the step's tiles take part."""
    import torch

    model = make_model("4conv", (12, 16, 16))
    step = make_network_step(model)
    image = cells[0]
    padded = np.pad(image, [(h, h) for h in step.halo], mode="symmetric")
    found = step(padded[None])
    rng = np.random.default_rng(0)
    corners = np.array([[0, 0, 0], np.array(image.shape) - 1])
    for z, y, x in np.concatenate([corners, rng.integers(0, image.shape, (12, 3))]):
        # Centre voxel number patch // 2, so the patch starts there in the image padded by patch // 2.
        patch = padded[z : z + 12, y : y + 16, x : x + 16].astype(np.float32)
        with torch.inference_mode():
            logits = model.network(torch.from_numpy((patch - 110) / 50)[None, None])[0]
        np.testing.assert_allclose(found[:, z, y, x], logits.softmax(0).numpy(), atol=1e-5)
