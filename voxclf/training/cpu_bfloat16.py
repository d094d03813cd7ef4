"""Gradients of convolutions in bfloat16 on CPUs, made right.

On CPUs with AMX, oneDNN 3.12 (torch 2.13) computes only a part of the weights' gradient of larger convolutions in
bfloat16: of a 3 x 3 x 3 convolution of 64 to 96 or more channels over 4 x 44 x 44 voxels it was off by 30 % of the
largest entry, and held NaN where the convolution was dilated. With AMX switched off (ONEDNN_MAX_CPU_ISA) it is right;
results and gradients of the input are right either way (0.3 %). So the weights' gradient alone is computed in
float32. It costs little: it is a part of a step whose pools, norms and activations are faster in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Float32WeightGradients(TorchDispatchMode):
    """While active, weights' gradients of bfloat16 convolutions on CPUs are computed in float32."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        gradient, image, weight, *how, mask = args
        if image.device.type != "cpu" or image.dtype != torch.bfloat16 or not mask[1]:
            return func(*args, **(kwargs or {}))
        of_image, of_weight, of_bias = None, None, None
        if mask[0]:
            of_image = func(gradient, image, weight, *how, [True, False, False])[0]
        exact = (gradient.float(), image.float(), weight.float())
        _, of_weight, of_bias = func(*exact, *how, [False, True, mask[2]])
        return of_image, of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(weight.dtype)
