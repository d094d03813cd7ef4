"""A dense network made fast for prediction on the device at hand.

What each trick is worth is said beside it, from one core of an AMD EPYC (Zen 5) with torch 2.13 and 4conv, if it does
not name another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxclf.geometry import Zyx
from voxclf.models.dense_graph import Attribute, Operation, triple
from voxclf.models.dense_network import BACKENDS, Backend, DenseNetwork
from voxclf.models.dense_simplify import Convolution
from voxclf.models.memory_layout import use_channels_last
from voxclf.models.subnormal_numbers import subnormals_as_zero

CHANNELS_LAST = torch.channels_last_3d
LARGEST_TRIAL = 48
"""Edge of the trial tile on a CPU, voxels: from there on the two backends differ by a few percent."""
TRIALS = 2


class TunedDenseNetwork(DenseNetwork):
    """A dense network for prediction, its operations simplified; made by `tune_for_inference`.

    Parameters
    ----------
    operations : sequence of Operation
        Simplified; its layers are taken over.
    patch, backend, dense_axes
        As for `densify`.
    device, dtype
        Where and in what precision it runs.
    has_separate_bias : bool
        Whether a convolution's bias is added by an operation of its own. cuDNN has bfloat16 kernels that are many
        times slower with a bias than without (pytorch issue 167420), so this is tried out on GPUs.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        patch: Zyx,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        has_separate_bias: bool = False,
        dense_axes: tuple[bool, bool, bool] = (True, True, True),
    ) -> None:
        owners = (a.owner for o in operations for a in o.arguments if isinstance(a, Attribute))
        layers = nn.ModuleList((*(o.target for o in operations if isinstance(o.target, nn.Module)), *owners))
        layers.to(device, dtype)
        use_channels_last(layers)
        super().__init__(layers, operations, patch, dense_axes, backend)
        self.device = device
        self.dtype = dtype
        self.has_separate_bias = has_separate_bias
        self.has_fused_convolution = device.type == "cpu" and fused_convolution_works(dtype)
        self.eval()

    @torch.inference_mode()
    @subnormals_as_zero()
    def forward(self, x: Tensor) -> Tensor:
        """Logits at every voxel, (B, K, Z', Y', X')."""
        # Convolutions of 16 to 128 channels run 15 to 30 % faster with the channels of a voxel side by side.
        x = x.to(self.device, self.dtype).contiguous(memory_format=CHANNELS_LAST)
        # TF32 would round float32 inputs to 10 bits; who accepts that is better served by bfloat16.
        is_cuda = self.device.type == "cuda"
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False) if is_cuda else nullcontext():
            result = super().forward(x)
        return result if self.dtype == torch.float64 else result.float()

    def _convolve(self, x: Tensor, layer: nn.Module, stride: Zyx, dilation: Zyx, padding: Zyx) -> Tensor:
        assert isinstance(layer, Convolution)
        x = x.to(self.dtype)
        if self.has_fused_convolution:
            return fused_convolution(x, layer, stride, dilation, padding)
        if self.has_separate_bias:
            x = functional.conv3d(x, layer.weight, None, stride, padding, dilation, layer.groups)
            x += layer.bias[:, None, None, None]
        else:
            x = functional.conv3d(x, layer.weight, layer.bias, stride, padding, dilation, layer.groups)
        if isinstance(layer.activation, nn.ReLU):
            return x.relu_()
        return x if layer.activation is None else layer.activation(x)

    def _average(self, x: Tensor, layer: nn.Module, kernel: Zyx, stride: Zyx, dilation: Zyx) -> Tensor:
        """Sums of half-precision numbers are kept in float32: after simplification only K channels are left here."""
        x = x if self.dtype == torch.float64 else x.float()
        return super()._average(x, layer, kernel, stride, dilation)


def fused_convolution(x: Tensor, layer: Convolution, stride: Zyx, dilation: Zyx, padding: Zyx) -> Tensor:
    """Convolution and activation by oneDNN in one pass over the result.

    GELU by itself takes 4 ns per number. On a core of an Intel Xeon with AMX a convolution of 16 to 32 channels with
    GELU runs 5 times as fast when fused in bfloat16, twice as fast in float32. It also avoids torch's own slow
    convolution, which torch chooses for small float32 batches of one channel: 6 times slower.
    """
    name, algorithm = "none", ""
    if isinstance(layer.activation, nn.ReLU):
        name = "relu"
    elif isinstance(layer.activation, nn.GELU):
        name, algorithm = "gelu", layer.activation.approximate
    return torch.ops.mkldnn._convolution_pointwise(
        x, layer.weight, layer.bias, list(padding), list(stride), list(dilation), layer.groups, name, [], algorithm
    )


@cache
def fused_convolution_works(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have `fused_convolution` in a precision, and it computes what it should.

    The operation is one that torch's compiler emits; it has no promise of stability, so it is tried before use.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 6, 6, 6, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(4, 3, 2, 2, 2, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    bias = torch.randn(4, generator=generator).to(dtype)
    for activation in (None, nn.ReLU(), nn.GELU(), nn.GELU("tanh")):
        expected = functional.conv3d(x.double(), weight.double(), bias.double(), dilation=2)
        expected = expected if activation is None else activation(expected)
        try:
            found = fused_convolution(x, Convolution(weight, bias, 1, activation), (1, 1, 1), (2, 2, 2), (0, 0, 0))
        except (RuntimeError, AttributeError):
            return False
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        if found.shape != expected.shape or float((found.double() - expected).abs().max()) > tolerance:
            return False
    return True


def choose_fastest(
    make: Callable[[Backend, bool], TunedDenseNetwork],
    device: torch.device,
    tile: Zyx,
    backends: Sequence[Backend] = BACKENDS,
) -> TunedDenseNetwork:
    """Run each way of computing a tile a few times and keep the fastest.

    On one core the backends differ by less than 5 % from tiles of 48 on. On GPUs, where dilated convolutions may lack
    tensor core kernels, fragments can be several times faster, or not: it depends on the version of cuDNN.
    """
    is_cpu = device.type == "cpu"
    if is_cpu:
        tile = triple(min(n, LARGEST_TRIAL) for n in tile)
    fastest, shortest = None, float("inf")
    for backend in backends:
        for has_separate_bias in (False,) if is_cpu else (False, True):
            candidate = make(backend, has_separate_bias)
            seconds = _time_tile(candidate, tile)
            if seconds < shortest:
                fastest, shortest = candidate, seconds
    assert fastest is not None
    return fastest


def _time_tile(network: TunedDenseNetwork, tile: Zyx) -> float:
    """Shortest time of a few calls; the first, which compiles and allocates, does not count."""
    x = torch.zeros(1, network.in_channels, *network.input_shape(tile))
    times = []
    for _ in range(1 + TRIALS):
        started = time.perf_counter()
        network(x)
        if network.device.type == "cuda":
            torch.cuda.synchronize(network.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
