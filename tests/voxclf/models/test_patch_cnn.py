"""Patch networks: parameters and shapes by hand, per axis."""

import pytest
import torch
from torch import nn

from voxclf.models.patch_cnn import ChannelLayerNorm, Concat, Residual
from voxclf.models.registry import NETWORKS, build, check_model_name, default_patch

PATCH_CNNS = ("3layer", "4conv", "4res", "4res_ln", "4res_valid", "dil", "dilres")


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def conv(before, after, kernel=27, norm=True):
    """Weights of a convolution, and two numbers per channel for the norm, or a bias."""
    return kernel * before * after + (2 * after if norm else after)


def expected_parameters(name, n_classes=6, left=1):
    """By hand from the table of layers; `left` voxels meet the head."""
    first = conv(1, 16)
    pairs = {c: 2 * conv(c, c) for c in (32, 64, 128)}
    residual = first + conv(16, 32) + pairs[32] + conv(32, 64) + pairs[64] + conv(64, 128) + pairs[128]
    # Layer norm does not subtract a channel's mean over the volume, so its convolutions keep their biases.
    biases = 16 + 3 * (32 + 64 + 128)
    backbones = {
        "3layer": (first + conv(16, 32) + conv(32, 64), 64),
        "4conv": (first + conv(16, 32) + conv(32, 64) + conv(64, 128), 128),
        "4res": (residual, 128),
        "4res_ln": (residual + biases, 128),
        # The last pair of convolutions has one voxel left.
        "4res_valid": (residual - pairs[128] + 2 * conv(128, 128, kernel=1), 128),
        "dil": (first + conv(16, 32) + conv(32, 32) + conv(16, 32, kernel=125, norm=False), 64),
        # The pair of dilation 8 has two voxels left.
        "dilres": (conv(1, 32) + 6 * conv(32, 32) + 2 * conv(32, 32, kernel=1) + conv(32, 64, kernel=1), 64),
    }
    backbone, channels = backbones[name]
    return backbone + left * channels * n_classes + n_classes


@pytest.mark.parametrize("name", PATCH_CNNS)
def test_parameters_of_the_published_cube(name):
    left = 8 if name in ("4res", "4res_ln", "dilres") else 1
    assert n_parameters(build(name, 6)) == expected_parameters(name, left=left)


@pytest.mark.parametrize("name", ["4res", "4res_ln", "dil"])
def test_parameters_of_the_published_cube_of_16(name):
    assert n_parameters(build(name, 6, 16)) == expected_parameters(name)


@pytest.mark.parametrize("name", PATCH_CNNS)
@pytest.mark.parametrize("patch", [None, 16, (5, 32, 32), (3, 23, 32), (1, 16, 16), (9, 32, 32)])
def test_one_row_of_logits_per_patch(name, patch):
    network = build(name, 4, patch, in_channels=2).eval()
    assert network(torch.randn(3, 2, *network.patch)).shape == (3, 4)
    assert (network.name, network.in_channels) == (name, 2)


def extents(network):
    """Extent of one patch after every layer of the backbone."""
    x, found = torch.zeros(1, 1, *network.patch), []
    for layer in network.eval().backbone:
        x = layer(x)
        found.append((x.shape[1], tuple(x.shape[2:])))
    return found


def test_extents_of_4conv():
    sides = [(16, 30), (16, 15), (32, 13), (32, 6), (64, 4), (128, 2), (128, 1)]
    assert extents(build("4conv", 2)) == [(channels, (n, n, n)) for channels, n in sides]


def test_extents_of_4conv_on_thick_slices():
    """z is convolved while it lasts, and pooled only once the plane is about as coarse."""
    expected = [(16, (7, 30, 30)), (16, (7, 15, 15)), (32, (5, 13, 13)), (32, (5, 6, 6)), (64, (3, 4, 4))]
    found = extents(build("4conv", 2, (9, 32, 32)))
    assert found[:3] == expected[:3]
    # 5 voxels beside 13 are fewer than half, so not pooled; then 5 beside 6 shrink with the rest.
    assert found[3:] == [(32, (5, 6, 6)), (64, (3, 4, 4)), (128, (1, 2, 2)), (128, (1, 1, 1))]


def test_kernels_are_1_where_an_axis_has_run_out():
    network = build("4conv", 2, (3, 32, 32))
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert kernels == [(3, 3, 3), (1, 3, 3), (1, 3, 3), (1, 3, 3), (1, 1, 1)]


@pytest.mark.parametrize(("patch", "has_pool", "dilation"), [(32, True, 3), (16, False, 3), ((9, 32, 32), None, None)])
def test_dil_follows_its_patch(patch, has_pool, dilation):
    network = build("dil", 2, patch)
    small = network.backbone[2].branches[0][0][0]
    if has_pool is None:
        assert (network.backbone[1].kernel_size, small.dilation) == ((1, 2, 2), (1, 3, 3))
    else:
        assert network.backbone[1].kernel_size == ((2, 2, 2) if has_pool else (1, 1, 1))
        assert small.dilation == (dilation,) * 3


def test_head_of_4res_covers_what_is_left():
    assert build("4res", 2, 32).head.kernel_size == (2, 2, 2)
    assert build("4res", 2, 16).head.kernel_size == (1, 1, 1)


def test_valid_residual_adds_the_middle_of_its_input():
    main = nn.Sequential(nn.Conv3d(1, 1, (1, 3, 3), bias=False))
    nn.init.zeros_(main[0].weight)
    x = torch.arange(2 * 5 * 4.0).reshape(1, 1, 2, 5, 4)
    assert torch.equal(Residual(main, (0, 1, 1))(x), x[:, :, :, 1:-1, 1:-1])


def test_concat_joins_channels():
    x = torch.ones(1, 2, 1, 1, 1)
    assert Concat([nn.Identity(), nn.Identity()])(x).shape == (1, 4, 1, 1, 1)


def test_layer_norm_over_channels_by_hand():
    x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 2, 1, 1)
    torch.testing.assert_close(ChannelLayerNorm(2)(x)[0, :, 1, 0, 0], torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)


def test_width_scales_channels():
    network = build("4conv", 3, width=0.5)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv3d)] == [8, 16, 32, 64, 3]
    residual = build("4res_valid", 3, width=0.5)
    assert [m.out_channels for m in residual.modules() if isinstance(m, nn.Conv3d)][-1:] == [3]
    assert residual.backbone_shape.channels == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("5conv", 3), r"network '5conv' is unknown; known are 3layer, "),
        (("4conv", 1), r"n_classes was 1; 4conv needs at least 2"),
        (("4conv", 3, 0), r"patch was 0; give one edge or three \(z, y, x\) of at least 1 voxel, such as 32"),
        (("4conv", 3, (32, 32)), r"patch was \(32, 32\)"),
        (("4conv", 3, 32, 0), r"in_channels was 0"),
    ],
)
def test_build_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("options", "message"), [({"depth": 3}, r"4conv has no option 'depth'; .*width"), ({"width": 0}, r"width was 0")]
)
def test_build_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        build("4conv", 3, **options)


@pytest.mark.parametrize(
    ("name", "voxel_size_nm", "patch"),
    [
        ("4conv", (5.0, 5.0, 5.0), (32, 32, 32)),
        ("4conv", (30.0, 8.0, 8.0), (9, 32, 32)),  # 32 * 8 / 30 = 8.5
        ("4conv", (50.0, 4.0, 4.0), (3, 32, 32)),  # 2.6
        ("3layer", (50.0, 4.0, 4.0), (1, 8, 8)),  # 0.6
        ("3layer", (8.0, 8.0, 4.0), (5, 5, 8)),  # 4 is as near to 3 as to 5
    ],
)
def test_default_patch_has_one_length_in_nm(name, voxel_size_nm, patch):
    assert default_patch(name, voxel_size_nm) == patch


def test_networks_are_known_models():
    for name in NETWORKS:
        check_model_name(name)
    with pytest.raises(ValueError, match=r"model '4convs' is unknown; known are .*random_forest.*4conv"):
        check_model_name("4convs")
