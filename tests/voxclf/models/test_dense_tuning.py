"""What makes dense networks fast changes rounding only."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from voxclf.models import dense_tuning
from voxclf.models.dense import InexactNetworkError, densify, tune_for_inference
from voxclf.models.dense_network import average_pool, max_pool
from voxclf.models.registry import NETWORKS, build

EXACT = [name for name, info in NETWORKS.items() if info.is_exact and info.kind == "patch"]
BACKENDS = ("a_trous", "fragments")


def trained(name, patch=None, **options):
    """A network with the statistics and weights of one that was trained."""
    torch.manual_seed(5)
    network = build(name, 4, patch, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def volume_for(network, more=(5, 2, 8), batch=1):
    return torch.randn(batch, network.in_channels, *[p + n for p, n in zip(network.patch, more, strict=True)])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_tuned_equals_dense(name, backend):
    network = trained(name, in_channels=2)
    volume = volume_for(network, batch=2)
    expected = densify(network, network.patch)(volume)
    found = tune_for_inference(network, network.patch, backend=backend)(volume)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_tuned_equals_dense_in_double_precision(name):
    network = trained(name, 16 if name != "3layer" else 8).double()
    volume = volume_for(network).double()
    found = tune_for_inference(network, network.patch, dtype=torch.float64, backend="fragments")(volume)
    torch.testing.assert_close(found, densify(network, network.patch)(volume), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("has_separate_bias", [False, True])
@torch.no_grad()
def test_without_fused_convolutions(name, has_separate_bias, monkeypatch):
    """As on GPUs, and where torch lacks the fused operation."""
    network = trained(name, (5, 16, 16))
    volume = volume_for(network)
    tuned = tune_for_inference(network, network.patch, backend="a_trous")
    monkeypatch.setattr(tuned, "has_fused_convolution", False)
    monkeypatch.setattr(tuned, "has_separate_bias", has_separate_bias)
    torch.testing.assert_close(tuned(volume), densify(network, network.patch)(volume), rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_close():
    network = trained("4conv", 16)
    volume = volume_for(network)
    expected = densify(network, network.patch)(volume)
    found = tune_for_inference(network, network.patch, dtype=torch.bfloat16, backend="a_trous")(volume)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.05 * float(expected.std()) + 0.005


@pytest.mark.parametrize("name", ["4conv", "4res", "4res_ln", "convnext"])
@torch.no_grad()
def test_patches_tuned_are_the_network_itself(name):
    """Padding is no obstacle where no axis is dense."""
    network = trained(name, 16, width=0.25)
    patches = torch.randn(3, 1, 16, 16, 16)
    tuned = tune_for_inference(network, 16, dense_axes=(False, False, False))
    torch.testing.assert_close(tuned(patches)[..., 0, 0, 0], network(patches), rtol=0, atol=1e-5)
    with pytest.raises(InexactNetworkError if name != "4conv" else ValueError, match=r"pads with|voxels along z"):
        tune_for_inference(network, 16, dense_axes=(False, True, True), backend="a_trous")(patches[:, :, 1:])


def test_the_network_stays_as_it_is():
    network = trained("4conv", 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tune_for_inference(network, 16, dtype=torch.bfloat16, backend="a_trous")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        # conv, pool, conv, pool, conv, conv, head, mean: norms and activations are gone, the head comes before the mean
        ("4conv", ["convolution", "max_pool"] * 2 + ["convolution"] * 3 + ["average_pool"]),
        # conv, pool, two dilated ones, their share of the head, the plain branch with its share, their sum, mean
        ("dil", ["convolution", "max_pool", *["convolution"] * 4, "pointwise", "average_pool"]),
    ],
)
def test_operations_left_over(name, kinds):
    tuned = tune_for_inference(trained(name), 32, backend="a_trous")
    assert [operation.kind for operation in tuned.operations] == kinds


def test_the_plain_branch_of_dil_has_one_channel_per_class():
    tuned = tune_for_inference(trained("dil"), 32, backend="a_trous")
    shapes = [tuple(o.target.weight.shape) for o in tuned.operations if o.kind == "convolution"]
    assert (4, 16, 5, 5, 5) in shapes


def test_a_head_with_more_channels_than_its_input_is_not_moved():
    network = nn.Sequential(nn.Conv3d(1, 2, 2), nn.AvgPool3d(2), nn.Conv3d(2, 9, 1))
    kinds = [o.kind for o in tune_for_inference(network, 3, backend="a_trous").operations]
    assert kinds == ["convolution", "average_pool", "convolution"]


class Shared(nn.Module):
    """A convolution whose result is used twice, so that nothing may be merged into it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 2)
        self.norm = nn.BatchNorm3d(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1, 1))
        self.head = nn.Conv3d(8, 2, 1)
        self.drop = nn.Dropout()
        self.pool = nn.AvgPool3d(2, divisor_override=5)

    def forward(self, x):
        x = self.drop(self.conv(x))
        joined = torch.cat([self.norm(x) * self.scale, torch.relu(x)], 1)
        return self.head(self.pool(joined)).flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_what_is_used_twice_is_kept(backend):
    torch.manual_seed(1)
    network = Shared().eval()
    network.norm.running_mean.normal_()
    volume = torch.randn(1, 1, 5, 6, 7)
    tuned = tune_for_inference(network, 3, backend=backend)
    torch.testing.assert_close(tuned(volume), densify(network, 3)(volume), rtol=0, atol=1e-6)


def test_auto_takes_the_fastest(monkeypatch):
    seconds = {"a_trous": 2.0, "fragments": 1.0}
    monkeypatch.setattr(dense_tuning, "_time_tile", lambda network, tile: seconds[network.backend])
    assert tune_for_inference(trained("4conv", 16), 16).backend == "fragments"


def test_auto_measures_both():
    assert tune_for_inference(trained("3layer"), 8, tile=8).backend in BACKENDS


def test_in_another_precision_the_fused_operation_is_not_used():
    assert not dense_tuning.fused_convolution_works(torch.float64)


def test_a_fused_operation_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(dense_tuning, "fused_convolution", lambda x, *_: torch.zeros(1, 4, 4, 4, 4))
    assert not dense_tuning.fused_convolution_works.__wrapped__(torch.float32)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [((2, 2, 2), (1, 1, 1), (3, 1, 2)), ((3, 2, 1), (2, 1, 3), (1, 2, 1)), ((1, 3, 3), (1, 2, 2), (1, 1, 1))],
)
def test_pools_by_axis_are_torchs(kernel, stride, dilation):
    x = torch.randn(2, 3, 9, 8, 11)
    expected = functional.max_pool3d(x, kernel, stride, 0, dilation)
    assert torch.equal(max_pool(x, kernel, stride, dilation), expected)
    assert torch.equal(max_pool(x.requires_grad_(), kernel, stride, dilation), expected)
    spread = torch.zeros(3, 1, *[d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)])
    spread[:, :, :: dilation[0], :: dilation[1], :: dilation[2]] = 1
    sums = functional.conv3d(x, spread, stride=stride, groups=3)
    torch.testing.assert_close(average_pool(x, kernel, stride, dilation), sums / (kernel[0] * kernel[1] * kernel[2]))


@pytest.mark.parametrize(("name", "backend"), list(itertools.product(EXACT, BACKENDS)))
def test_working_bytes_cover_what_is_allocated(name, backend):
    """The estimate against the sum of live tensors that torch itself reports."""
    network = trained(name, 16 if name != "3layer" else 8)
    tuned = tune_for_inference(network, network.patch, backend=backend)
    tile = (24, 20, 28)
    volume = torch.randn(1, 1, *tuned.input_shape(tile))
    tuned(volume)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        tuned(volume)
    held = peak = 4 * volume.numel()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.9 * peak < tuned.working_bytes(tile) < 2.5 * peak
