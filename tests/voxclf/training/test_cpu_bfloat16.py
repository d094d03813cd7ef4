"""Gradients of convolutions in bfloat16 on a CPU, against those in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from voxclf.training.cpu_bfloat16 import SafeConvolutionGradients

CONVOLUTIONS = {
    (2, False): functional.conv2d,
    (3, False): functional.conv3d,
    (2, True): functional.conv_transpose2d,
    (3, True): functional.conv_transpose3d,
}
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def check_gradients(image_shape, weight_shape, is_transposed=False, is_channels_last=True, **form):
    """Gradients of image, weights and bias, to bfloat16's rounding."""
    torch.manual_seed(0)
    n_axes = len(image_shape) - 2
    n_out = weight_shape[1] * form.get("groups", 1) if is_transposed else weight_shape[0]
    values = [torch.randn(image_shape), 0.1 * torch.randn(weight_shape), torch.randn(n_out)]
    # Both start from values that bfloat16 has, so that only the gradients differ.
    values = [v.bfloat16() for v in values]
    if is_channels_last:
        values[:2] = [v.contiguous(memory_format=LAYOUTS[n_axes]) for v in values[:2]]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [v.to(dtype).requires_grad_() for v in values]
        result = CONVOLUTIONS[n_axes, is_transposed](*leaves, **form)
        gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        with SafeConvolutionGradients():
            result.backward(gradient.to(dtype))
        found[dtype] = [leaf.grad for leaf in leaves]
    for rough, exact in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("dilation", [1, 4])
def test_flat_volumes(dilation):
    """The sizes of 4conv's last convolution, where oneDNN's own gradient of the weights is wrong on CPUs with AMX."""
    check_gradients((2, 64, 4, 44, 44), (128, 64, 3, 3, 3), dilation=(1, dilation, dilation))
    check_gradients((2, 64, 4, 44, 44), (64, 64, 3, 3, 3), padding=1)
    check_gradients((2, 32, 1, 64, 64), (32, 32, 3, 3, 3), padding=1)


def test_strides():
    """An image that the kernel's steps do not cover; a stride along any axis, and along several."""
    check_gradients((1, 16, 4, 32, 32), (128, 16, 3, 3, 3), stride=(2, 1, 1), dilation=(1, 2, 2))
    check_gradients((1, 16, 9, 12, 14), (8, 16, 3, 3, 3), stride=(1, 1, 2))
    check_gradients((2, 32, 16, 24, 24), (64, 32, 3, 3, 3), stride=2, padding=1)
    check_gradients((16, 96, 6, 1), (32, 96, 5, 3), stride=2, padding=(2, 1))


def test_few_channels():
    check_gradients((2, 1, 9, 20, 22), (48, 1, 3, 5, 4), padding=(1, 2, 0), dilation=(2, 1, 1))
    check_gradients((2, 2, 30, 31), (16, 2, 7, 7), stride=2, padding=3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_convolution(data):
    n_axes = data.draw(st.sampled_from([2, 3]))
    groups = data.draw(st.sampled_from([1, 1, 1, 2, 16]))
    n_in = 16 if groups > 1 else data.draw(st.sampled_from([1, 3, 16, 48]))
    n_out = data.draw(st.sampled_from([16, 32, 96]))
    size = [data.draw(st.sampled_from([1, 2, 5, 8, 13, 24])) for _ in range(n_axes)]
    kernel = [data.draw(st.integers(1, 4)) for _ in range(n_axes)]
    # With a stride longer than its kernel, oneDNN's 3D convolutions in bfloat16 write outside their memory.
    stride = [data.draw(st.integers(1, min(2, k))) for k in kernel]
    dilation = [data.draw(st.sampled_from([1, 1, 2])) for _ in kernel]
    padding = [data.draw(st.integers(0, k // 2)) * d for k, d in zip(kernel, dilation, strict=True)]
    is_transposed = data.draw(st.booleans())
    if is_transposed:
        weight, padding = (n_in, n_out // groups, *kernel), [0] * n_axes
    else:
        weight = (n_out, n_in // groups, *kernel)
        # The kernel must fit.
        size = [max(n, (k - 1) * d + 1) for n, k, d in zip(size, kernel, dilation, strict=True)]
    check_gradients(
        (data.draw(st.sampled_from([1, 2])), n_in, *size),
        weight,
        is_transposed,
        data.draw(st.booleans()),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
