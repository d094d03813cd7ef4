"""A patch network evaluated at every voxel at once: the same answers as patch by patch, at a small part of the cost.

Neighbouring patches overlap in all but one slice, and a network without padding computes the same numbers in each of
them. Here every number is computed once. Strides are no obstacle: a patch that starts one voxel further has its pooled
voxels between those of its neighbour, and all of them are computed side by side. For 4conv that is 160 times less
arithmetic; the answers are equal up to rounding, and blocks of any size join without a seam.

Result i belongs to the patch that starts at voxel i, so to its centre voxel i + patch // 2. The border of a volume is
not padded: N voxels give N - receptive_field + 1 results along an axis.

Where to read on: ``dense_graph.py`` reads a network's operations off its code and refuses what is not exact,
``dense_geometry.py`` finds its receptive field, ``dense_network.py`` runs the operations at every voxel,
``dense_simplify.py`` and ``dense_tuning.py`` make that fast for prediction. None of them imports more than torch, NumPy
and the standard library.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import torch
from torch import nn

from voxclf.freed_memory import keep_freed_memory
from voxclf.geometry import UNIT, Zyx
from voxclf.models.dense_geometry import Geometry, find_problems, inspect_geometry
from voxclf.models.dense_graph import Operation, read_operations, triple
from voxclf.models.dense_network import BACKENDS, Backend, DenseNetwork
from voxclf.models.dense_simplify import rewrite_for_training, simplify
from voxclf.models.dense_tuning import TunedDenseNetwork, choose_fastest

__all__ = [
    "Backend",
    "DenseNetwork",
    "Geometry",
    "InexactNetworkError",
    "densify",
    "inspect_geometry",
    "read_exact_operations",
    "tune_for_inference",
]


class InexactNetworkError(ValueError):
    """The network cannot be evaluated at every voxel at once with the answers that its patches give."""


def densify(
    network: nn.Module,
    patch: int | Zyx,
    *,
    dense_axes: tuple[bool, bool, bool] = (True, True, True),
    backend: Backend = "a_trous",
    spacing: Zyx = UNIT,
) -> DenseNetwork:
    """Make the module that computes what a patch network says about every patch of a volume.

    An axis may keep the network's own strides, for training on a labelled slice: of a slab as thick as one patch only
    the centre slice is computed, but that at every voxel of the plane.

    Parameters
    ----------
    network : nn.Module
        (B, C, Z, Y, X) to (B, K) for inputs of the patch's shape. Its parameters are shared, not copied: training
        either trains both.
    patch : int or (z, y, x)
        Shape of its patches, voxels.
    dense_axes : (bool, bool, bool)
        Along which axes every voxel is a result. Along another the input is as long as a patch, and there is one
        result.
    backend : "a_trous" or "fragments"
        Two ways to the same result (:mod:`voxclf.models.dense_network`). Train with the first: the second fills
        volumes up to a multiple of the strides, and batch norm in training mode would count that in.
    spacing : (z, y, x)
        Along dense axes, results are wanted this many voxels apart, from the first on. The network keeps those of its
        strides that divide it: at a spacing of all its strides nothing is computed but what patches have in common.

    Returns
    -------
    DenseNetwork
        (B, C, Z, Y, X) to (B, K, Z', Y', X').

    Raises
    ------
    InexactNetworkError
        If a layer forbids it; the message names the layer.
    """
    patch = triple(patch)
    operations = rewrite_for_training(read_exact_operations(network, patch, dense_axes))
    return DenseNetwork(network, operations, patch, dense_axes, backend, spacing)


def tune_for_inference(
    network: nn.Module,
    patch: int | Zyx,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend | Literal["auto"] = "auto",
    tile: int | Zyx = 64,
    dense_axes: tuple[bool, bool, bool] = (True, True, True),
) -> TunedDenseNetwork:
    """Make a fast copy of a patch network for prediction at every voxel, without gradients.

    Batch norm and linear layers are merged into convolutions, activations are computed while a convolution writes its
    result, tensors lie in channels_last_3d, and of the two backends the one is taken that a short trial on the device
    finds faster. On Linux the process keeps freed memory from then on, see `keep_freed_memory`.

    Parameters
    ----------
    network : nn.Module
        As for `densify`; it stays as it is.
    patch : int or (z, y, x)
        Shape of its patches, voxels.
    device : str or torch.device
        Where it will run.
    dtype : torch.dtype
        float32, or bfloat16 or float16: twice as fast on processors that have them, with logits off by about 0.3 % of
        their spread. float64 for checks.
    backend : "auto", "a_trous" or "fragments"
        "auto" measures.
    tile : int or (z, y, x)
        Shape of the results that it will be asked for, voxels; what the trial runs on.
    dense_axes : (bool, bool, bool)
        As for `densify`. With none dense it is the network itself, tuned, padded or not: a batch of patches in, one
        voxel each out.

    Returns
    -------
    TunedDenseNetwork
        Takes inputs of any type, memory layout and device; gives float32 logits, float64 if `dtype` is.

    Raises
    ------
    InexactNetworkError
        If a layer forbids it; the message names the layer.
    """
    patch = triple(patch)
    # Merging weights in double precision rounds them once, at the end.
    copied = deepcopy(network).eval().requires_grad_(False).cpu().double()
    operations = simplify(read_exact_operations(copied, patch, dense_axes))
    if torch.device(device).type == "cpu":
        keep_freed_memory()

    def make(chosen: Backend, has_separate_bias: bool) -> TunedDenseNetwork:
        return TunedDenseNetwork(
            deepcopy(operations), patch, chosen, torch.device(device), dtype, has_separate_bias, dense_axes
        )

    if backend != "auto":
        return make(backend, False)
    return choose_fastest(make, torch.device(device), triple(tile), BACKENDS if any(dense_axes) else ("a_trous",))


def read_exact_operations(
    network: nn.Module, patch: Zyx, dense_axes: tuple[bool, bool, bool] = (True, True, True)
) -> list[Operation]:
    """Read a network's operations as they are, before any is rewritten.

    Raises
    ------
    InexactNetworkError
        If a layer forbids dense evaluation; the message names the layer.
    """
    operations, problems = read_operations(network)
    problems = find_problems(operations, problems, patch, dense_axes)
    if problems:
        raise InexactNetworkError(
            f"{type(network).__name__} cannot be evaluated at every voxel exactly: {'; '.join(problems)}. "
            "Predict it patch by patch on a coarse grid instead, or choose an exact network"
        )
    return operations
