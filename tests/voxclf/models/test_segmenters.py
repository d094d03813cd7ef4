"""Every segmenter: sizes, parameters counted by hand, anisotropy, and whether it can learn one crop by heart."""

import os
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.conftest import needs_einops
from voxclf.errors import ModelError
from voxclf.models.registry import NETWORKS, build
from voxclf.models.res_unet import BLOCKS, ChannelAttention, View, flat_triple, local_mean
from voxclf.models.segmenter import count_parameters, plan_strides
from voxclf.training.losses import build_loss
from voxclf.training.training_state import TrainingState, load_state

SECTIONS = (30.0, 8.0, 8.0)
SMALL = {
    "unet3d": {"width": 0.25},
    "denseunet569": {"width": 0.25},
    "res_unet_r": {"width": 0.3},
    "res_unet_h": {"width": 0.3},
    "unet2d": {"width": 0.25, "encoder": "plain"},
    "dynunet": {"width": 0.25},
    "swin_unetr": {"width": 0.25},
}
"""Widths at which two cores learn a crop in seconds."""

needs_published_size = pytest.mark.skipif(
    "VOXCLF_PUBLISHED_SIZES" not in os.environ,
    reason="published sizes and training swin_unetr take minutes and 4 GB: set VOXCLF_PUBLISHED_SIZES=1",
)
networks = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_einops) if name == "swin_unetr" else name for name in SMALL]
)


def build_small(name, n_classes=2, voxel_size_nm=None, **options):
    if voxel_size_nm and "voxel_size_nm" in NETWORKS[name].defaults:
        options["voxel_size_nm"] = voxel_size_nm
    torch.manual_seed(0)
    return build(name, n_classes, **{**SMALL[name], **options})


def test_the_list_above_has_every_segmenter():
    assert set(SMALL) == {name for name, info in NETWORKS.items() if info.kind == "segmenter"}


@networks
def test_weights_and_training_state_are_saved_and_loaded(name, tmp_path):
    network, other = build_small(name).eval(), build_small(name)
    crop = torch.randn(1, 1, *[2 * a for a in network.alignment])
    optimizer = torch.optim.Adam(network.parameters())
    network(crop).sum().backward()
    optimizer.step()
    state = TrainingState(epoch=1)
    state.keep_best(network)
    state.save(tmp_path, network, optimizer)
    assert load_state(tmp_path, other, None).epoch == 1
    with torch.inference_mode():
        expected = network(crop)
        for restored in (other.eval(), deepcopy(network)):
            torch.testing.assert_close(restored(crop), expected)


@networks
@pytest.mark.parametrize("voxel_size_nm", [(5.0, 5.0, 5.0), SECTIONS], ids=["isotropic", "sections"])
def test_any_size_in_the_same_size_out(name, voxel_size_nm):
    network = build_small(name, 3, voxel_size_nm, in_channels=2).eval()
    assert (network.name, network.n_classes, network.in_channels) == (name, 3, 2)
    with torch.inference_mode():
        logits = network(torch.randn(2, 2, 7, 23, 41))
    assert logits.shape == (2, 3, 7, 23, 41)
    assert all(n % a == 0 for n, a in zip(network.patch, network.alignment, strict=True))


@networks
def test_odd_sizes_repeat_the_edge(name):
    network = build_small(name, 2, SECTIONS).eval()
    odd = [2 * a - (a > 1) for a in network.alignment]
    crop = torch.randn(1, 1, *odd)
    missing = [(0, int(a > 1)) for a in network.alignment]
    padded = np.pad(crop.numpy(), [(0, 0), (0, 0), *missing], "edge")
    with torch.inference_mode():
        whole = network(torch.from_numpy(padded))
        torch.testing.assert_close(network(crop), whole[..., : odd[0], : odd[1], : odd[2]])


@pytest.mark.parametrize(
    ("voxel_size_nm", "expected"),
    [
        ((8, 8, 8), [(2, 2, 2)] * 4),
        ((30, 8, 8), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((40, 4, 4), [(1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2)]),
        ((8, 8, 30), [(2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]),
        ((10, 8, 8), [(2, 2, 2)] * 4),
        ((40, 20, 10), [(1, 2, 2), (1, 1, 2), (2, 2, 2), (2, 2, 2)]),
    ],
)
def test_strides_lead_to_isotropic_voxels(voxel_size_nm, expected):
    assert list(plan_strides(voxel_size_nm, 4)) == expected


def test_alignments_follow_the_voxel_size():
    assert build_small("unet3d", 2, SECTIONS).alignment == (2, 8, 8)
    assert build_small("denseunet569", 2, SECTIONS).alignment == (8, 32, 32)
    assert build_small("res_unet_r", 2, SECTIONS).alignment == (1, 16, 16)
    assert build_small("res_unet_r", 2, (5, 5, 5)).alignment == (16, 16, 16)
    assert build_small("unet2d", 2, (8, 30, 8)).alignment == (16, 1, 16)
    assert build_small("unet2d", 2, three_axes=True).alignment == (16, 16, 16)
    assert build_small("unet2d", 2, (8, 30, 8)).patch == (64, 1, 64)
    assert flat_triple((30, 8, 8), 3) == (1, 3, 3)
    assert flat_triple((8, 8, 8), 5) == (5, 5, 5)


def convolution(n_in, n_out, kernel):
    """Parameters of a convolution without bias and its batch norm."""
    return kernel * n_in * n_out + 2 * n_out


def test_parameters_of_unet3d_by_hand():
    encoder = [(1, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    decoder = [(256 + 128, 128), (128, 128), (128 + 64, 64), (64, 64), (64 + 32, 32), (32, 32)]
    expected = sum(convolution(a, b, 27) for a, b in encoder + decoder) + 32 * 2 + 2
    assert expected == 5_837_474
    assert count_parameters(build("unet3d", 2)) == expected


def test_parameters_of_denseunet569_by_hand():
    def separable(n_in, n_out):
        return 27 * n_in + convolution(n_in, n_out, 1)

    def block(n, layers):
        return sum(convolution(n + 32 * i, 128, 1) + separable(128, 32) for i in range(layers))

    # 96 -4 layers-> 224 -half-> 112 -12-> 496 -> 248 -24-> 1016 -> 508 -36-> 1660
    expected = (
        convolution(1, 96, 343)
        + separable(96, 96)
        + block(96, 4)
        + separable(224, 112)
        + block(112, 12)
        + separable(496, 248)
        + block(248, 24)
        + separable(1016, 508)
        + block(508, 36)
        + separable(1660 + 1016, 504)
        + separable(504 + 496, 224)
        + separable(224 + 224, 192)
        + separable(192 + 96, 96)
        + separable(96, 64)
        + 64 * 2
        + 2
    )
    assert expected == 10_502_534
    assert count_parameters(build("denseunet569", 2)) == expected


def test_parameters_of_res_unet_r_by_hand():
    channels = (28, 36, 48, 64, 80)
    acb = {n: convolution(n, n, 9) + 2 * convolution(n, n, 27) for n in channels}
    expected = convolution(1, 28, 25) + sum(acb.values())
    for fine, coarse in pairwise(channels):
        expected += convolution(fine, coarse, 9) + convolution(coarse, fine, 1) + acb[fine]
    network = build("res_unet_r", 2, voxel_size_nm=SECTIONS)
    assert count_parameters(network) == expected + 28 * 3 + 3


def test_two_decoders_share_one_encoder():
    one, two = build("res_unet_r", 2, voxel_size_nm=SECTIONS), build("res_unet_h", 2, voxel_size_nm=SECTIONS)
    assert (len(one.decoders), len(two.decoders)) == (1, 2)
    encoder = sum(p.numel() for n, p in one.named_parameters() if not n.startswith("decoders"))
    decoder = count_parameters(one) - encoder - (28 * 3 + 3)
    assert count_parameters(two) == encoder + 2 * decoder + (28 * 2 + 2) + (28 + 1)


@pytest.mark.parametrize("name", ["res_unet_r", "res_unet_h"])
@pytest.mark.parametrize("block", BLOCKS)
def test_boundaries_are_handed_over_while_training(name, block):
    network = build_small(name, 3, SECTIONS, block=block)
    crop = torch.randn(2, 1, 5, 20, 20)
    semantic, boundary = network(crop)
    assert (semantic.shape, boundary.shape) == ((2, 3, 5, 20, 20), (2, 1, 5, 20, 20))
    build_loss("weighted_bce", 3)((semantic, boundary), torch.zeros(2, 5, 20, 20, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in network.parameters())
    network.eval()
    assert network(crop).shape == (2, 3, 5, 20, 20)
    assert network.boundaries(crop).shape == (2, 1, 5, 20, 20)
    with pytest.raises(TypeError, match="has no boundary output"):
        build_small("unet3d").boundaries(crop)


@pytest.mark.parametrize("window", [(1, 5, 5), (3, 8, 3), (3, 100, 7)])
def test_local_means_match_a_loop(window):
    x = torch.randn(2, 3, 4, 9, 11, dtype=torch.float64)
    expected = torch.empty_like(x)
    reach = [size // 2 for size in window]
    for position in np.ndindex(*x.shape[2:]):
        box = tuple(slice(max(0, p - r), p + r + 1) for p, r in zip(position, reach, strict=True))
        expected[(..., *position)] = x[(..., *box)].mean(dim=(2, 3, 4))
    torch.testing.assert_close(local_mean(x, window), expected)


def test_attention_of_small_crops_is_the_paper_s():
    x = torch.randn(2, 3, 8, 8, 8)
    for view in (View((1, 1, 1), (16, 16, 16)), View((2, 4, 4), (8, 4, 4))):
        attention = ChannelAttention(torch.nn.Sigmoid(), view)
        torch.testing.assert_close(attention.eval()(x), attention.train()(x))


def test_attention_follows_the_place():
    """Far from a change of brightness, means in cells are those of voxels; in between, factors pass smoothly."""
    x = torch.ones(1, 1, 2, 64, 64)
    x[..., 32:] = 3.0
    factors = ChannelAttention(torch.nn.Identity(), View((1, 4, 4), (2, 4, 4))).eval()(x) / x
    expected = ChannelAttention(torch.nn.Identity(), View((1, 1, 1), (2, 16, 16))).eval()(x) / x
    assert (factors - expected).abs().max() < 0.25
    torch.testing.assert_close(factors[..., :20], expected[..., :20])
    assert factors.diff(dim=-1).min() >= 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[needs_einops, needs_published_size]) if name == "swin_unetr" else name
        for name in SMALL
    ],
)
def test_learns_one_crop_by_heart(name):
    """Dice of at least 0.95 at the reduced width above, from labels on a third of the voxels."""
    rng = np.random.default_rng(0)
    shape = (2, 64, 64) if name == "unet2d" else (8, 64, 64) if name == "denseunet569" else (8, 32, 32)
    truth = ndimage.gaussian_filter(rng.normal(size=shape), (1, 3, 3)) > 0.02
    image = truth + rng.normal(size=shape) * 0.3
    sparse = np.where(rng.random(shape) < 0.33, truth, -1)
    batch = torch.from_numpy(image.astype(np.float32))[None, None].repeat(2, 1, 1, 1, 1)
    target = torch.from_numpy(sparse.astype(np.int64))[None].repeat(2, 1, 1, 1)
    network, loss = build_small(name, 2, SECTIONS), build_loss("dice_bce", 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    dice, losses = [], []
    for _ in range(40):
        optimizer.zero_grad()
        found = network(batch)
        value = loss(found, target)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        logits = found[0] if isinstance(found, tuple) else found
        dice.append(dice_of(logits[0].argmax(dim=0).numpy() == 1, truth))
        if dice[-1] >= 0.95:
            break
    assert dice[-1] >= 0.95
    assert losses[-1] < losses[0]


def dice_of(predicted, truth):
    return 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet3d", {"width": 0.0}, "width was 0"),
        ("res_unet_r", {"block": "cbam"}, "choose one of acb, res, se, eca"),
        ("unet3d", {"encoder": "vgg16"}, "no option 'encoder'"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, 2, **options)


def test_swin_unetr_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("voxclf.models.monai_networks.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install einops"):
        build("swin_unetr", 2)


@needs_published_size
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("unet3d", (128, 128, 128), {}),
        ("denseunet569", (128, 128, 128), {}),
        ("res_unet_r", (32, 256, 256), {"voxel_size_nm": SECTIONS}),
        ("res_unet_h", (36, 320, 320), {"voxel_size_nm": SECTIONS}),
        ("unet2d", (1, 384, 384), {"encoder": "plain"}),
        ("dynunet", (128, 128, 128), {}),
        pytest.param("swin_unetr", (96, 96, 96), {}, marks=needs_einops),
        pytest.param("swin_unetr", (96, 96, 96), {"window": 7}, marks=needs_einops),
    ],
)
def test_published_size(name, shape, options):
    network = build(name, 2, **options).eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 1, *shape)).shape == (1, 2, *shape)
