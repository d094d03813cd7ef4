"""ConvNeXt in 3D: parameters by hand, and that leaving out the taps beyond the patch changes nothing."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from voxclf.models.convnext3d import Block
from voxclf.models.registry import build


def block(channels, kernel):
    """Depthwise weights and bias, layer norm, two linear layers, scale."""
    return channels * kernel + channels + 2 * channels + 8 * channels**2 + 5 * channels + channels


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("patch", "stem"), [(32, 64), (16, 8)])
def test_parameters(patch, stem):
    widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    kernels = (343, 343, 27, 1)  # of 8, 4, 2 and 1 voxels a kernel of 7 reaches at most 15, 7, 3 and 1
    expected = stem * 96 + 96 + 2 * 96
    expected += sum(d * block(w, k) for w, d, k in zip(widths, depths, kernels, strict=True))
    expected += sum(2 * a + 8 * a * b + b for a, b in pairwise(widths))
    expected += 2 * 768 + 768 * 6 + 6
    assert n_parameters(build("convnext", 6, patch)) == expected


def test_parameters_of_the_dilated_variant():
    widths, extents = (96, 192, 384, 768, 768, 768, 1024), (20, 17, 14, 11, 8, 5, 2)
    kernels = [min(7, 2 * n - 1) ** 3 for n in extents]
    expected = 64 * 96 + 96 + 2 * 96
    expected += sum(3 * block(w, k) for w, k in zip(widths, kernels, strict=True))
    expected += sum(2 * a + 8 * a * b + b for a, b in pairwise(widths))
    expected += 2 * 1024 + 8 * 1024 * 6 + 6
    with torch.device("meta"):
        assert n_parameters(build("convnext_dilated", 6)) == expected


@pytest.mark.parametrize("name", ["convnext", "convnext_dilated"])
@pytest.mark.parametrize("patch", [16, (5, 20, 16), (1, 16, 16)])
def test_one_row_of_logits_per_patch(name, patch):
    network = build(name, 4, patch, in_channels=2, width=0.04).eval()
    assert network(torch.randn(2, 2, *network.patch)).shape == (2, 4)


@pytest.mark.parametrize("extent", [(1, 1, 1), (2, 3, 1), (8, 4, 2)])
def test_a_cropped_kernel_computes_what_the_whole_one_does(extent):
    torch.manual_seed(0)
    whole = nn.Conv3d(4, 4, 7, padding=3, groups=4)
    cropped = Block(4, extent).layers[0]
    ends = [slice(3 - (k // 2), 3 + k // 2 + 1) for k in cropped.kernel_size]
    cropped.load_state_dict({"weight": whole.weight[:, :, *ends], "bias": whole.bias})
    x = torch.randn(2, 4, *extent)
    torch.testing.assert_close(cropped(x), whole(x))


def test_the_scale_starts_small_so_a_block_starts_as_the_identity():
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(Block(8, (4, 4, 4))(x), x, atol=1e-4, rtol=0)
