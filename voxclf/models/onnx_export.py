"""Networks as ONNX files, for programs that do not run Python, or not torch.

Two forms of a patch network: the patch as it was trained, any number at a time, and the dense form, which takes a
volume of any size and gives the logits of every voxel. Both are written in standard operators.
"""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from voxclf.geometry import Zyx
from voxclf.models.dense import read_exact_operations
from voxclf.models.dense_graph import triple
from voxclf.models.dense_network import DenseNetwork
from voxclf.models.dense_simplify import simplify

OPSET = 18
SPARE_VOXELS = (9, 6, 7)
"""How much longer than the receptive field the example volume is: unlike, so that no axis is taken for another."""


def export_patch_network(network: nn.Module, patch: int | Zyx, in_channels: int, path: str | Path) -> Path:
    """Write a patch network: input "image" (B, C, *patch), output "logits" (B, K), B free.

    Parameters
    ----------
    network : nn.Module
        (B, C, *patch) to (B, K).
    patch : int or (z, y, x)
        Shape of its patches, voxels.
    in_channels : int
        C.
    path : str or Path
        File to write.

    Raises
    ------
    ModuleNotFoundError
        If onnx or onnxscript is not installed.
    """
    example = torch.zeros(2, in_channels, *triple(patch))
    return _export(deepcopy(network).cpu().float(), example, {0: "batch"}, path)


def export_dense_network(network: nn.Module, patch: int | Zyx, in_channels: int, path: str | Path) -> Path:
    """Write the dense form of a patch network: "image" (B, C, Z, Y, X), "logits" (B, K, Z', Y', X'), all free but C, K.

    Logit i along an axis is that of the patch which starts at voxel i, see :mod:`voxclf.models.dense`. Parameters and
    errors are those of `export_patch_network`, and besides:

    Raises
    ------
    InexactNetworkError
        If the network has no dense form.
    """
    patch = triple(patch)
    exact = read_exact_operations(deepcopy(network).cpu().float().eval(), patch)
    operations = simplify(exact, with_activations=False)
    layers = nn.ModuleList(o.target for o in operations if isinstance(o.target, nn.Module))
    dense = DenseNetwork(layers, operations, patch, (True, True, True), "a_trous")
    shape = [r + more for r, more in zip(dense.receptive_field, SPARE_VOXELS, strict=True)]
    example = torch.zeros(2, in_channels, *shape)
    return _export(dense, example, {0: "batch", 2: "z", 3: "y", 4: "x"}, path)


def _export(network: nn.Module, example: torch.Tensor, free_axes: dict[int, str], path: str | Path) -> Path:
    for module in ("onnx", "onnxscript"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(
                f"ONNX export needs {module}, which is not installed: pip install 'voxclf[export]'"
            )
    path = Path(path)
    least = {axis: 1 if axis == 0 else example.shape[axis] - SPARE_VOXELS[axis - 2] for axis in free_axes}
    free = {axis: torch.export.Dim(name, min=least[axis]) for axis, name in free_axes.items()}
    torch.onnx.export(
        network.eval(),
        (example,),
        path,
        input_names=["image"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=(free,),
        external_data=False,
        verbose=False,
    )
    return path
