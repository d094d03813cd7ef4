import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from voxclf.models.dense import densify
from voxclf.models.dense_simplify import NormedPool
from voxclf.models.normed_pool import normed_max_pool
from voxclf.models.registry import build

CHANNELS_LAST = torch.channels_last_3d
SHAPES = [((2, 2, 2), (2, 5, 6, 8, 10)), ((1, 2, 2), (3, 4, 3, 7, 9)), ((2, 2, 2), (1, 16, 7, 9, 11))]


def make_norm(n_channels):
    """Batch norm with factors of both signs."""
    norm = nn.BatchNorm3d(n_channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.1, 2, n_channels))
        norm.bias.copy_(torch.linspace(0.5, -1, n_channels))
    return norm


def make_input(shape, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 3
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST)


def run(function, x, norm, gradient):
    """What comes out, and the gradients of the input, the factors and the offsets, all in float64."""
    x = x.clone().requires_grad_()
    result = function(x, norm)
    result.backward(gradient.to(result.dtype))
    return [t.detach().double() for t in (result, x.grad, norm.weight.grad, norm.bias.grad)]


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
@pytest.mark.parametrize(("window", "shape"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_is_what_the_three_layers_are(activation, window, shape, dtype, tolerance):
    x, norm = make_input(shape, dtype), make_norm(shape[1])
    reference = copy.deepcopy(norm).double()
    expected_of = functional.max_pool3d(x.double(), window)
    gradient = torch.randn(expected_of.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = run(lambda x, norm: normed_max_pool(x, norm, activation, window), x, norm, gradient)
    expected = run(
        lambda x, norm: functional.max_pool3d(activation(norm(x)), window), x.double(), reference, gradient.double()
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm.running_mean.double(), reference.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), reference.running_var, rtol=1e-5, atol=1e-5)
    assert norm.num_batches_tracked == 1


def test_of_equal_voxels_the_first_gets_the_gradient():
    x = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 2.0, -4.0, 3.0]).reshape(1, 1, 1, 2, 4)
    norm = nn.BatchNorm3d(1)
    gradient = torch.tensor([1.0, 10.0]).reshape(1, 1, 1, 1, 2)
    found = run(lambda x, norm: normed_max_pool(x, norm, nn.GELU(), (1, 2, 2)), x, norm, gradient)
    reference = nn.BatchNorm3d(1).double()
    expected = run(
        lambda x, norm: functional.max_pool3d(functional.gelu(norm(x)), (1, 2, 2)), x.double(), reference, gradient
    )
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_a_negative_value_of_gelu_can_be_the_largest():
    """GELU falls up to -0.75: where all are below, the smallest is handed on."""
    x = torch.full((1, 1, 1, 2, 4), 1.0)
    x[..., :2] = torch.tensor([[-1.0, -1.1], [-1.2, -1.3]])
    found = normed_max_pool(x, nn.BatchNorm3d(1), nn.GELU(), (1, 2, 2))
    normalised = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    assert normalised[..., :2].max() < -0.76
    assert found[0, 0, 0, 0, 0].item() == pytest.approx(float(functional.gelu(normalised[0, 0, 0, 1, 1])), abs=1e-6)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()])
def test_what_is_not_a_number_is_not_hidden(activation):
    x = make_input((1, 2, 2, 4, 4))
    x[0, 1, 0, 0, 0] = float("nan")
    pooled = normed_max_pool(x, nn.BatchNorm3d(2), activation, (2, 2, 2))
    assert pooled[0, 1].isnan().all()
    assert pooled[0, 0].isfinite().all()


def test_threads_make_no_difference():
    x, gradient = make_input((4, 3, 4, 6, 8)), torch.ones(4, 3, 2, 3, 4)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            norm = make_norm(3)
            results.append(run(lambda x, norm: normed_max_pool(x, norm, nn.GELU(), (2, 2, 2)), x, norm, gradient))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_training_of_a_patch_network_goes_through_it(monkeypatch):
    """And gives the gradients that the layers one by one give."""
    network = build("4conv", 2, patch=32, width=0.25).train()
    x = make_input((2, 1, 32, 36, 36))
    gradients = []
    for works in (True, False):
        if not works:
            monkeypatch.setattr("voxclf.models.dense_simplify.find_spec", lambda name: None)
        dense = densify(network, 32, dense_axes=(False, True, True), spacing=(1, 4, 4))
        kind = NormedPool if works else nn.MaxPool3d
        assert [type(o.target) for o in dense.operations if o.kind == "max_pool"] == [kind, kind]
        network.zero_grad()
        result = dense(x)
        assert ("_NormedMaxPool" in list_nodes(result.grad_fn)) == works
        result.square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def list_nodes(function):
    """Names of what autograd will go through."""
    names, waiting = set(), [function]
    while waiting:
        one = waiting.pop()
        names.add(one.name().removesuffix("Backward"))
        waiting += [f for f, _ in one.next_functions if f is not None]
    return names
