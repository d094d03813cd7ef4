"""A network at every voxel against the same network patch by patch: equal, for every network that claims it."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from voxclf.models import dense_network
from voxclf.models.dense import InexactNetworkError, densify, inspect_geometry
from voxclf.models.patch_cnn import ChannelLayerNorm, Concat, Residual
from voxclf.models.registry import NETWORKS, build

EXACT = [name for name, info in NETWORKS.items() if info.is_exact and info.kind == "patch"]
PADDED = [name for name, info in NETWORKS.items() if not info.is_exact and info.kind == "patch"]
BACKENDS = ("a_trous", "fragments")


def unsettle(network):
    """Statistics and weights as after training, so that batch norm matters."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def patch_by_patch(network, patch, volume, positions):
    """Logits (B, K) at each position, each from the patch that starts there."""
    ends = [[slice(s, s + p) for s, p in zip(position, patch, strict=True)] for position in positions]
    return [network(volume[:, :, *end]).flatten(1) for end in ends]


def largest_difference(network, patch, volume, dense, n_random=12):
    """Over all corners and some positions between them."""
    shape = [n - p + 1 for n, p in zip(volume.shape[2:], patch, strict=True)]
    rng = np.random.default_rng(0)
    corners = itertools.product(*[(0, n - 1) for n in shape])
    positions = [*corners, *(tuple(int(rng.integers(n)) for n in shape) for _ in range(n_random))]
    expected = patch_by_patch(network, patch, volume, positions)
    found = [dense[:, :, z, y, x] for z, y, x in positions]
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


PATCHES = [None, 16, (5, 32, 32), (9, 23, 32), (1, 16, 13)]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("patch", PATCHES)
@torch.no_grad()
def test_dense_equals_patch_by_patch(name, patch):
    network = unsettle(build(name, 4, patch, in_channels=2))
    volume = torch.randn(2, 2, *[n + more for n, more in zip(network.patch, (4, 2, 7), strict=True)])
    for backend in BACKENDS:
        dense = densify(network, network.patch, backend=backend)
        assert largest_difference(network, network.patch, volume, dense(volume), 4) < 1e-5


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_dense_equals_patch_by_patch_in_double_precision(name, backend):
    network = unsettle(build(name, 3)).double()
    volume = torch.randn(
        1, 1, *[n + more for n, more in zip(network.patch, (3, 6, 1), strict=True)], dtype=torch.float64
    )
    dense = densify(network, network.patch, backend=backend)(volume)
    assert largest_difference(network, network.patch, volume, dense, 4) < 1e-12


@pytest.mark.parametrize(
    ("name", "used"), [("3layer", 8), ("4conv", 30), ("dil", 30), ("4res_valid", 32), ("dilres", 32)]
)
def test_receptive_field_is_what_the_gradient_says(name, used):
    network = unsettle(build(name, 2)).double()
    geometry = inspect_geometry(network, network.patch)
    assert geometry.receptive_field == (used,) * 3
    patch = torch.randn(1, 1, *network.patch, dtype=torch.float64, requires_grad=True)
    # A voxel that loses a maximum has no gradient, so several patches are summed.
    touched = torch.zeros(network.patch, dtype=torch.bool)
    for _ in range(6):
        patch.grad = None
        patch.data.normal_()
        network(patch).sum().backward()
        touched |= patch.grad[0, 0] != 0
    reach = [int(touched.any(dim=tuple(a for a in range(3) if a != axis)).nonzero().max()) + 1 for axis in range(3)]
    assert tuple(reach) == geometry.receptive_field


def test_strides_of_a_network():
    assert inspect_geometry(build("4conv", 2), 32).strides == (8, 8, 8)
    assert inspect_geometry(build("4conv", 2, (9, 32, 32)), (9, 32, 32)).strides == (1, 8, 8)


# --- training ---


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("slab_axis", [None, 0, 1, 2])
def test_gradient_of_a_window_is_that_of_its_patches(name, slab_axis):
    network = unsettle(build(name, 3, 16 if name != "3layer" else 8, width=0.5)).double()
    window, patch = (3, 4, 5), network.patch
    axes = tuple(axis != slab_axis for axis in range(3))
    window = tuple(n if d else 1 for n, d in zip(window, axes, strict=True))
    dense = densify(network, patch, dense_axes=axes)
    volume = torch.randn(1, 1, *dense.input_shape(window), dtype=torch.float64)
    filled = torch.zeros(1, 1, *[n + p for n, p in zip(window, patch, strict=True)], dtype=torch.float64)
    filled[:, :, : volume.shape[2], : volume.shape[3], : volume.shape[4]] = volume
    target = torch.randint(3, (1, *window))

    nn.functional.cross_entropy(dense(volume), target).backward()
    from_window = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    positions = list(itertools.product(*map(range, window)))
    logits = torch.cat(patch_by_patch(network, patch, filled, positions))
    nn.functional.cross_entropy(logits, torch.stack([target[0][p] for p in positions])).backward()
    for a, parameter in zip(from_window, network.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("spacing", [(1, 2, 4), (8, 8, 8), (2, 3, 6)])
@pytest.mark.parametrize("axes", [(True, True, True), (False, True, True)])
def test_spaced_results_are_those_of_the_patches(name, spacing, axes):
    network = unsettle(build(name, 3, 16 if name != "3layer" else 8, width=0.5)).double().eval()
    dense = densify(network, network.patch, dense_axes=axes, spacing=spacing)
    shape = tuple(2 if is_dense else 1 for is_dense in axes)
    volume = torch.randn(1, 1, *dense.input_shape(shape), dtype=torch.float64)
    # What lies beyond the receptive field is part of the patch, but not looked at.
    filled = nn.functional.pad(volume, (0, 16) * 3)
    found = dense(volume)
    assert found.shape == (1, 3, *shape) and dense.output_shape(volume.shape[2:]) == shape
    for position in itertools.product(*map(range, shape)):
        at = tuple(i * s for i, s in zip(position, spacing, strict=True))
        expected = torch.cat(patch_by_patch(network, network.patch, filled, [at]))
        torch.testing.assert_close(found[(slice(None), slice(None), *position)], expected, rtol=0, atol=1e-12)


def test_strides_within_the_spacing_are_kept():
    """Exact either way; kept strides are what makes it cheap."""
    network = build("4conv", 2, 32)
    assert densify(network, 32, spacing=(1, 4, 16)).steps[-1] == (1, 4, 8)
    assert densify(network, 32, spacing=(3, 6, 12)).steps[-1] == (1, 2, 4)


def test_fragments_leave_no_voxel_out():
    with pytest.raises(ValueError, match="only 'a_trous'"):
        densify(build("4conv", 2), 32, backend="fragments", spacing=(1, 4, 4))


def test_training_the_dense_form_trains_the_network():
    network = build("4conv", 2, 16)
    dense = densify(network, 16, dense_axes=(False, True, True))
    assert {id(p) for p in dense.parameters()} == {id(p) for p in network.parameters()}
    dense.train()
    before = network.backbone[0][1].running_mean.clone()
    dense(torch.randn(2, 1, 16, 20, 20))
    assert not torch.equal(before, network.backbone[0][1].running_mean)


# --- refusals ---


@pytest.mark.parametrize("name", PADDED)
def test_padded_networks_are_refused_by_layer(name):
    network = build(name, 2, 16, width=0.1)
    with pytest.raises(InexactNetworkError, match=r"backbone\.\d.*: pads with \(\d, \d, \d\) zeros"):
        densify(network, 16)


class GlobalContext(nn.Module):
    """Weighs channels by their mean over the patch."""

    def forward(self, x):
        return x * x.mean((2, 3, 4), keepdim=True)


class Position(nn.Module):
    """Adds something that depends on where in the patch a voxel is."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 1, 1, 4, 1))

    def forward(self, x):
        return x + self.offset


class Condition(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.InstanceNorm3d(2), r"^1: InstanceNorm3d is not known"),
        (nn.GroupNorm(1, 2), r"^1: GroupNorm is not known"),
        (nn.LayerNorm((4, 4, 4)), r"^1: LayerNorm is not known"),
        (nn.AdaptiveAvgPool3d(1), r"^1: AdaptiveAvgPool3d is not known"),
        (nn.Upsample(scale_factor=2), r"^1: Upsample is not known"),
        (nn.MaxPool3d(2, ceil_mode=True), r"^1: ceil_mode"),
        (nn.MaxPool3d(3, padding=1), r"^1: pads with 1 voxels"),
        (nn.Conv3d(2, 2, 3, padding="same"), r"^1: pads with \(1, 1, 1\)"),
        (nn.Conv3d(2, 2, 3, padding=1, padding_mode="reflect"), r"^1: pads with 'reflect'"),
        (nn.Conv3d(2, 2, 2, padding="same"), r"^1: pads one side more"),
        (nn.BatchNorm3d(2, track_running_stats=False), r"^1: normalises by the batch"),
        (nn.ConvTranspose3d(2, 2, 2), r"^1: ConvTranspose3d is not known"),
        (nn.Softmax(dim=2), r"^1: Softmax is not known"),
        (GlobalContext(), r"^mean in 1: is not known"),
        (Position(), r"^1.offset: a parameter of shape \(1, 1, 1, 4, 1\) may vary"),
        (Condition(), r"cannot be traced"),
        (nn.Conv3d(2, 2, 5), r"^1: covers 5 voxels along z, where 4 are left"),
        (Concat([nn.Conv3d(2, 2, 2, stride=2), nn.Conv3d(2, 2, 3)]), r"^cat in 1: its inputs differ"),
    ],
)
def test_what_is_not_exact_is_named(layer, message):
    geometry = inspect_geometry(nn.Sequential(nn.Conv3d(1, 2, 3), layer), 6)
    assert not geometry.is_exact
    assert geometry.receptive_field == (6, 6, 6)
    assert re.search(message, geometry.problems[0]), geometry.problems


def test_a_linear_layer_behind_flatten_is_refused():
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    assert "put a convolution in its place" in inspect_geometry(network, 3).problems[0]


def test_a_patch_of_another_size_is_refused():
    assert "has (5, 5, 5) voxels, not one" in inspect_geometry(build("3layer", 2), 16).problems[0]


def test_inputs_of_the_wrong_size_are_refused():
    dense = densify(build("4conv", 2), 32, dense_axes=(False, True, True))
    with pytest.raises(ValueError, match=r"31 voxels along z, which is not dense and needs exactly the patch's 32"):
        dense(torch.zeros(1, 1, 31, 40, 40))
    with pytest.raises(ValueError, match=r"29 voxels along x, its receptive field is 30"):
        dense(torch.zeros(1, 1, 32, 40, 29))
    with pytest.raises(ValueError, match=r"backend was 'fft'; choose one of a_trous, fragments"):
        densify(build("4conv", 2), 32, backend="fft")


# --- other people's networks ---


class Branches(nn.Module):
    """A forward of its own: strides in two branches, crops by slices, a scale, a gate, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, (1, 3, 3), stride=(1, 2, 2))
        self.twice = nn.Conv3d(4, 4, (2, 2, 2))
        self.norm = ChannelLayerNorm(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1, 1))
        self.long = nn.Sequential(nn.Conv3d(4, 4, 1), nn.MaxPool3d((1, 3, 3), (1, 2, 2)))
        self.short = nn.Conv3d(4, 4, (1, 2, 2), stride=(1, 2, 2))
        self.head = nn.Conv3d(8, 3, (2, 2, 2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x[:, :, 1:, :-1, :-1] * self.scale + torch.sigmoid(self.twice(x))
        x = x[..., :-1, 1:, 1:] + self.twice(x)
        parts = [self.long(x), self.short(x)[:, :, :, :2, :2]]
        return self.head(self.drop(torch.cat(parts, dim=1))).flatten(1)


def own_networks():
    yield Branches(), (4, 17, 17)
    yield nn.Sequential(nn.Conv3d(1, 3, 3, stride=4), nn.ELU(), nn.Conv3d(3, 2, 2)), (7, 8, 10)
    yield (
        nn.Sequential(nn.MaxPool3d(3, 2), nn.Conv3d(1, 2, (1, 2, 2)), nn.AvgPool3d((2, 3, 3), 2), nn.Flatten()),
        (5, 9, 9),
    )
    yield (
        nn.Sequential(nn.MaxPool3d((2, 3, 3), 2), nn.Conv3d(1, 4, 3, groups=1), nn.Conv3d(4, 4, 2, groups=2)),
        (8, 9, 9),
    )
    yield nn.Sequential(nn.AvgPool3d(2, 1, divisor_override=3), nn.MaxPool3d(2, 2, dilation=2)), (4, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_networks_of_all_kinds(backend):
    torch.manual_seed(0)
    for network, patch in own_networks():
        network.eval().double()
        volume = torch.randn(1, 1, *[p + n for p, n in zip(patch, (6, 5, 8), strict=True)], dtype=torch.float64)
        dense = densify(network, patch, backend=backend)(volume)
        assert largest_difference(network, patch, volume, dense) < 1e-12


SIZES = st.tuples(*[st.integers(1, 3)] * 3)
STRIDES = st.tuples(*[st.integers(1, 3)] * 3)


@st.composite
def random_networks(draw):
    """Feed-forward networks of random windows, and the smallest patch they need with a few voxels more."""
    layers, channels, needed, stride = [], 1, np.ones(3, int), np.ones(3, int)
    for _ in range(draw(st.integers(1, 4))):
        size, step, wide = draw(SIZES), draw(STRIDES), draw(st.integers(1, 2))
        kind = draw(st.sampled_from(["convolution", "max", "average", "residual"]))
        after = draw(st.integers(1, 3))
        dilation = wide if kind != "average" else 1
        if kind == "convolution":
            layers += [nn.Conv3d(channels, after, size, step, dilation=dilation), nn.BatchNorm3d(after), nn.GELU()]
            channels = after
        elif kind == "max":
            layers.append(nn.MaxPool3d(size, step, dilation=dilation))
        elif kind == "average":
            layers.append(nn.AvgPool3d(size, step))
        else:
            size, step, dilation = tuple(2 * (n // 2) + 1 for n in size), (1, 1, 1), 1
            main = nn.Sequential(nn.Conv3d(channels, channels, size), nn.ReLU())
            layers.append(Residual(main, tuple(n // 2 for n in size)))
        needed += stride * dilation * (np.array(size) - 1)
        stride *= step
    layers.append(nn.Conv3d(channels, 2, 1))
    # Up to one voxel less than the product of the strides may be left over by floors.
    spare = [draw(st.integers(0, min(int(s) - 1, 3))) for s in stride]
    return nn.Sequential(*layers), tuple(int(n) + e for n, e in zip(needed, spare, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_networks(), st.tuples(*[st.integers(0, 6)] * 3))
@torch.no_grad()
def test_random_networks_are_exact(case, more):
    network, patch = case
    unsettle(network).double()
    geometry = inspect_geometry(network, patch)
    assert geometry.is_exact, geometry.problems
    volume = torch.randn(1, 1, *[p + n for p, n in zip(patch, more, strict=True)], dtype=torch.float64)
    results = [densify(network, patch, backend=backend)(volume) for backend in BACKENDS]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert largest_difference(network, patch, volume, results[0], 3) < 1e-12


def test_gradients_keep_the_memory_layout_of_their_values():
    layout = torch.channels_last_3d
    image = torch.randn(2, 4, 3, 6, 6).contiguous(memory_format=layout).requires_grad_()
    value = dense_network._with_gradient_laid_out_alike(image * 2)
    seen = []
    value.register_hook(seen.append)
    (value[:, :, :, :5] ** 2).sum().backward()  # a cut hands back gradients in the default layout
    assert seen[0].is_contiguous(memory_format=layout)
    expected = torch.zeros_like(image)
    expected[:, :, :, :5] = 8 * image.detach()[:, :, :, :5]
    torch.testing.assert_close(image.grad, expected)


def test_training_averages_classes_in_place_of_channels():
    network = build("4conv", n_classes=3, patch=32)
    kinds = [operation.kind for operation in densify(network, 32).operations]
    assert kinds[-1] == "average_pool" and "average_pool" not in kinds[:-1]
