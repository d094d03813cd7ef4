"""A segmenter in blocks is the segmenter on the whole volume, within the tolerance at which its reach was measured."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from features.bank import FilterBank
from voxclf.engine.transfer import crop_to_core, read_block
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import round_up, split_into_blocks
from voxclf.models.devices import Inference
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.registry import build
from voxclf.models.segmenter_reach import LARGEST_MARGIN, Reach, measure_reach
from voxclf.models.segmenter_step import REACH_KEY, SegmenterStep, make_segmenter_step
from voxclf.training.losses import build_loss
from voxclf.volume import create_volume, open_volume

SHAPE = (23, 37, 41)
SECTIONS = (30.0, 8.0, 8.0)
TOLERANCE = 0.05
"""Looser than the default, so that margins are short and the tests fast."""
INPUTS = NetworkInput((0.5,), (0.6,))
NO_LIMIT = 10**12


def make_cells(shape, rng):
    """Blobs whose class shows only in their middle: a network must look several voxels around itself."""
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), (2, 4, 4))
    truth = (smooth > 0).astype(np.int64)
    image = truth * (ndimage.gaussian_filter(rng.normal(size=shape), 3) > 0) + rng.normal(size=shape) * 0.3
    return image.astype(np.float32), truth


def train(network, n_steps=25):
    rng = np.random.default_rng(0)
    shape = (1 if network.alignment[0] == 1 else 16, 32, 32)
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=1e-2), build_loss("dice_bce", 2)
    for step in range(n_steps + 8):
        pairs = [make_cells(shape, rng) for _ in range(2)]
        logits = network(torch.from_numpy(np.stack([INPUTS.compute(image) for image, _ in pairs])))
        if step < n_steps:
            optimizer.zero_grad()
            loss(logits, torch.from_numpy(np.stack([truth for _, truth in pairs]))).backward()
            optimizer.step()
        if step == n_steps - 1:
            # Few steps do not settle the running averages of batch norm: the last crops are averaged evenly instead.
            for layer in network.modules():
                if isinstance(layer, torch.nn.BatchNorm3d | torch.nn.BatchNorm2d):
                    layer.reset_running_stats()
                    layer.momentum = None
    return network.eval()


@pytest.fixture(scope="module")
def cells():
    return make_cells(SHAPE, np.random.default_rng(5))[0]


@pytest.fixture(scope="module")
def volume(cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("segmenter") / "cells.zarr"
    volume = create_volume(path, SHAPE, 1, np.float32, SECTIONS, (8, 8, 8), kind="image")
    volume.write((0, 0, 0), cells[None])
    return open_volume(path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return train(build("unet3d", 2, width=0.1, voxel_size_nm=SECTIONS))


@pytest.fixture(scope="module")
def reach(network, cells):
    return measure_reach(network, INPUTS.compute(cells), TOLERANCE)


@pytest.fixture(scope="module")
def step(network, reach):
    return SegmenterStep(network, INPUTS, reach, NO_LIMIT)


@pytest.fixture(scope="module")
def whole(step, volume):
    return predict(step, volume, (64, 64, 64))


def predict(step, volume, core_shape):
    """As the engine does, but in float32: quantised probabilities would hide what is measured here."""
    out = np.full((2, *volume.shape), np.nan, np.float32)
    for block in split_into_blocks(volume.shape, core_shape, step.halo, step.alignment):
        out[(slice(None), *block.core.slices)] = crop_to_core(step(read_block(volume, block)), block)
    return out


def with_margin(step, margin):
    return replace(step, reach=Reach(margin, TOLERANCE, 0.0))


def test_blocks_equal_whole_within_the_tolerance(step, volume, whole):
    np.testing.assert_allclose(whole.sum(axis=0), 1, atol=1e-5)
    assert 0.1 < (whole[0] > 0.5).mean() < 0.9
    for core_shape in [(24, 24, 24), (12, 40, 48)]:
        assert np.abs(predict(step, volume, core_shape) - whole).max() <= TOLERANCE


def test_half_the_halo_shows(step, volume, whole):
    half = with_margin(step, tuple(m // 2 for m in step.margin))
    assert max(half.margin) < max(step.margin)
    assert np.abs(predict(half, volume, (24, 24, 24)) - whole).max() > TOLERANCE


def test_the_reach_is_whole_alignments_and_shorter_for_looser_tolerances(network, reach, cells):
    assert reach.error <= reach.tolerance == TOLERANCE
    assert all(m % a == 0 for m, a in zip(reach.margin, network.alignment, strict=True))
    assert 8 <= reach.margin[1] <= LARGEST_MARGIN
    loose = measure_reach(network, INPUTS.compute(cells), 0.5)
    assert sum(loose.margin) < sum(reach.margin)
    assert Reach.from_dict(reach.to_dict()) == reach


def test_a_pointwise_network_reaches_nowhere():
    network = build("unet3d", 2, width=0.1).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 5 and weight.shape[2] == 3:
                centre = weight[:, :, 1, 1, 1].clone()
                weight.zero_()
                weight[:, :, 1, 1, 1] = centre
            # What came from below is ignored; pooling and upsampling would look at neighbours.
            if name.startswith("decoder") and weight.ndim == 5 and weight.shape[1] > weight.shape[0]:
                weight[:, : weight.shape[1] - weight.shape[0]] = 0
    assert measure_reach(network).margin == (0, 0, 0)


def test_tiles_within_a_block_agree(step, cells):
    image = np.pad(cells[:22, :32, :40], [(h, h) for h in step.halo], mode="symmetric")[None]
    whole = step(image)
    for tile in [(12, 32, 40), (24, 16, 40)]:
        limited = replace(step, tile_budget=step.tile_bytes(tile))
        assert limited.working_bytes((22, 32, 40)) < step.working_bytes((22, 32, 40))  # so it is cut
        assert np.abs(limited(image) - whole).max() <= TOLERANCE


def test_probabilities_are_the_softmax_of_the_network(step, cells):
    image = np.pad(cells[:8, :16, :16], [(h, h) for h in step.halo], mode="symmetric")
    z, y, x = (slice(h, n - h) for h, n in zip(step.halo, image.shape, strict=True))
    with torch.inference_mode():
        expected = step.network(torch.from_numpy(INPUTS.compute(image))[None]).softmax(dim=1)[0, :, z, y, x]
    np.testing.assert_allclose(step(image[None]), expected, atol=1e-5)


def test_mirror_images_are_averaged(step, cells):
    image = np.pad(cells[:8, :16, :16], [(h, h) for h in step.halo], mode="symmetric")[None]
    mirrored = step(image[..., ::-1])[..., ::-1]
    both = replace(step, flips=((), (2,)))(image)
    np.testing.assert_allclose(both, (step(image) + mirrored) / 2, atol=1e-5)


def test_filter_bank_channels_bring_their_own_halo(volume):
    stack = FeatureStack(FilterBank("edges", 3), SECTIONS)
    n = stack.n_features
    inputs = NetworkInput((0.5, *[0.0] * n), (0.6, *[1.0] * n), stack)
    torch.manual_seed(0)
    network = build("unet3d", 2, in_channels=1 + n, width=0.1, voxel_size_nm=SECTIONS).eval()
    reach = measure_reach(network)
    whole_step = SegmenterStep(network, inputs, reach, NO_LIMIT)
    step = replace(whole_step, tile_budget=whole_step.tile_bytes((16, 32, 32)))
    assert all(h >= m + 1 and h % a == 0 for h, m, a in zip(step.halo, step.margin, step.alignment, strict=True))
    whole = predict(whole_step, volume, (64, 64, 64))
    assert np.abs(predict(step, volume, (24, 24, 48)) - whole).max() <= reach.tolerance


@pytest.fixture(scope="module")
def sections():
    torch.manual_seed(0)
    options = {"encoder": "plain", "width": 0.06, "voxel_size_nm": SECTIONS}
    return train(build("unet2d", 2, **options))


def test_sections_need_no_neighbours(sections, cells, volume):
    reach = measure_reach(sections, INPUTS.compute(cells), TOLERANCE)
    step = SegmenterStep(sections, INPUTS, reach, NO_LIMIT)
    assert (step.halo[0], step.alignment[0]) == (0, 1)
    assert step.halo[1] > 0
    whole = predict(step, volume, (64, 64, 64))
    np.testing.assert_allclose(predict(step, volume, (6, 64, 64)), whole, atol=1e-5)
    assert np.abs(predict(step, volume, (23, 32, 32)) - whole).max() <= TOLERANCE


def test_three_axes_are_averaged(sections, cells, volume):
    options = {"encoder": "plain", "width": 0.06}
    networks = [build("unet2d", 2, **options, voxel_size_nm=size) for size in [(9, 1, 1), (1, 9, 1), (1, 1, 9)]]
    average = build("unet2d", 2, **options, three_axes=True).eval()
    for network in (*networks, average):
        network.load_state_dict(sections.state_dict())
        network.eval()
    crop = torch.from_numpy(INPUTS.compute(cells[:16, :32, :32]))[None]
    with torch.inference_mode():
        expected = sum(network(crop).softmax(dim=1) for network in networks) / 3
        torch.testing.assert_close(average(crop).softmax(dim=1), expected)
    reach = measure_reach(average, INPUTS.compute(cells), TOLERANCE)
    step = SegmenterStep(average, INPUTS, reach, NO_LIMIT)
    assert min(step.halo) > 0
    whole = predict(step, volume, (32, 48, 48))
    assert np.abs(predict(step, volume, (16, 32, 48)) - whole).max() <= TOLERANCE


def test_steps_are_made_from_models(network, reach, cells):
    model = SimpleNamespace(
        network=network, inputs=INPUTS, training={REACH_KEY: reach.to_dict()}, voxel_size_nm=SECTIONS, calibration=None
    )
    step = make_segmenter_step(model, "cpu", Inference(flips=True, n_callers=2))
    assert step.reach == reach
    assert len(step.flips) == 4
    assert step.tile_budget == 2 * 10**9
    model.training = {}
    assert make_segmenter_step(model).reach.margin != (0, 0, 0)


def test_bfloat16_is_close(step, cells):
    image = np.pad(cells[:8, :16, :16], [(h, h) for h in step.halo], mode="symmetric")[None]
    difference = np.abs(replace(step, is_bf16=True)(image) - step(image))
    assert 0 < difference.max() < 0.1


def test_memory_decides_the_tiles(step):
    budgets = (300_000_000, 1_000_000_000, 3_000_000_000)
    needs = [replace(step, tile_budget=budget).working_bytes((48, 192, 192)) for budget in budgets]
    assert needs == sorted(set(needs))
    with pytest.raises(ValueError, match="too little even for one of"):
        replace(step, tile_budget=1_000_000).check_tile_budget()


@pytest.mark.parametrize("core", [(4, 256, 256), (64, 64, 64), (20, 512, 96), (3, 5, 7)])
def test_tiles_compute_the_fewest_voxels_that_fit(step, core):
    """Against trying all ways of cutting."""
    limited = replace(with_margin(step, (4, 16, 8)), tile_budget=200_000_000)

    def n_computed(tile):
        n_tiles = np.prod([-(-n // t) for n, t in zip(core, tile, strict=True)])
        return int(n_tiles * np.prod(np.add(tile, np.multiply(limited.margin, 2))))

    chosen = limited._divide(core)
    assert limited.tile_bytes(chosen) <= limited.tile_budget
    sides = [
        {round_up(-(-n // count), a) for count in range(1, max(1, n // 16) + 1)}
        for n, a in zip(core, limited.alignment, strict=True)
    ]
    fitting = [t for t in itertools.product(*sides) if limited.tile_bytes(t) <= limited.tile_budget and max(t) <= 256]
    assert n_computed(chosen) == min(map(n_computed, fitting))


def test_bad_arguments_are_refused(network):
    with pytest.raises(ValueError, match="a change of probability"):
        measure_reach(network, tolerance=0.0)
    with pytest.raises(ValueError, match="with C = 1"):
        measure_reach(network, np.zeros((2, 8, 8, 8), np.float32))
