"""The order in which a network's kernels lie in memory."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def use_channels_last(network: nn.Module) -> None:
    """Lay out kernels with channels last: convolutions run 15 to 30 % faster on CPUs, and max pools in 3D 20 times.

    A kernel with one input channel is contiguous in both layouts, so `Tensor.contiguous` would leave it as it is, and
    torch would take it for channels first, and the result too: in bfloat16 that convolution takes three times as long,
    and its result has to be turned around.
    """
    for parameter in network.parameters():
        if parameter.dim() in CHANNELS_LAST:
            parameter.data = parameter.data.to(memory_format=CHANNELS_LAST[parameter.dim()])
