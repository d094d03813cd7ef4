"""Which voxels a patch network looks at, and whether it can be evaluated at every voxel at once.

A value is followed from the patch to the result. For a patch of 10 voxels::

    the patch             0 1 2 3 4 5 6 7 8 9    extent 10
    convolution of 3      0 1 2 3 4 5 6 7        extent 8, neighbours 1 voxel apart: `spacing` 1
    pool of 2             0   1   2   3          extent 4, neighbours 2 voxels apart
    convolution of 3      0   1                  extent 2, still 2 apart
    pool of 2             0                      extent 1: without neighbours, so spacing counts as 1

Computed at every voxel, the same value exists at every voxel but the last `lost`, and what were neighbours in the
patch lie `spacing` voxels apart. So the receptive field is what was lost in the end, and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from voxclf.geometry import UNIT, Zyx
from voxclf.models.dense_graph import Operation, Window, read_operations, triple


@dataclass(frozen=True)
class Reach:
    """How far a value of the network reaches.

    Parameters
    ----------
    extent : Zyx
        Voxels along each axis when the network sees one patch.
    spacing : Zyx
        Distance in the volume, voxels, between neighbours of that extent; 1 along an axis with one voxel left.
    lost : Zyx
        Voxels by which the value is shorter than the volume when it is computed at every voxel.
    """

    extent: Zyx
    spacing: Zyx = UNIT
    lost: Zyx = (0, 0, 0)


@dataclass(frozen=True)
class Geometry:
    """Which voxels a patch network looks at, and whether it can be evaluated at every voxel at once.

    Parameters
    ----------
    patch : Zyx
        The patch that was asked about.
    receptive_field : Zyx
        Voxels that are really used, counted from the patch's first: a pool that does not divide its input leaves
        out the last ones, so this may be less than `patch`. A volume with N voxels along an axis has
        N - receptive_field + 1 results along it, and result i is that of the patch that starts at voxel i. Of a
        network that is not exact: the patch.
    strides : Zyx
        Product of the strides on the way.
    is_exact : bool
        Whether dense evaluation gives what the patches give.
    problems : tuple of str
        The layers that forbid it, each with the reason.
    """

    patch: Zyx
    receptive_field: Zyx
    strides: Zyx
    is_exact: bool
    problems: tuple[str, ...]


def inspect_geometry(network: nn.Module, patch: int | Zyx) -> Geometry:
    """Tell which voxels a network looks at, and whether it can be evaluated at every voxel at once.

    Parameters
    ----------
    network : nn.Module
        (B, C, Z, Y, X) to (B, K) for inputs of the patch's shape.
    patch : int or (z, y, x)
        Shape of its patches, voxels.
    """
    patch = triple(patch)
    operations, problems = read_operations(network)
    problems = find_problems(operations, problems, patch)
    used = patch if problems else triple(n + 1 for n in follow(operations, patch)[0][-1].lost)
    return Geometry(patch, used, _strides(operations), not problems, problems)


def find_problems(
    operations: Sequence[Operation],
    problems: tuple[str, ...],
    patch: Zyx,
    dense_axes: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[str, ...]:
    """Add to the problems of reading a network those of computing it at every voxel along some axes."""
    for operation in operations:
        padding = operation.window.padding
        if any(p for p, is_dense in zip(padding, dense_axes, strict=True) if is_dense):
            problems += (f"{operation.name}: pads with {padding} zeros, where its patch has neighbours in a volume",)
    if problems:  # without the layers that were refused, what is found further down would mislead
        return problems
    reaches, problems = follow(operations, patch)
    last = reaches[-1]
    if not problems and last.extent != UNIT:
        return (f"the result of a patch {patch} has {last.extent} voxels, not one: is that the network's patch?",)
    return problems


def _strides(operations: Sequence[Operation]) -> Zyx:
    """Product of the strides on one way from the input to the result; where branches meet they agree."""
    z, y, x, value = 1, 1, 1, len(operations)
    while value:
        operation = operations[value - 1]
        stride = operation.window.stride
        z, y, x, value = z * stride[0], y * stride[1], x * stride[2], operation.inputs[0]
    return z, y, x


def follow(operations: Sequence[Operation], patch: Zyx) -> tuple[list[Reach], tuple[str, ...]]:
    """Follow a patch through the network: the reach of every value, and the problems met on the way."""
    reaches, problems = [Reach(patch)], []
    for operation in operations:
        reach, problem = _reach_after(operation, [reaches[i] for i in operation.inputs])
        reaches.append(reach)
        if problem:
            problems.append(f"{operation.name}: {problem}")
    return reaches, tuple(problems)


def _reach_after(operation: Operation, inputs: Sequence[Reach]) -> tuple[Reach, str]:
    first = inputs[0]
    if operation.kind in ("convolution", "max_pool", "average_pool"):
        return _slide(operation.window, first)
    if operation.kind == "crop":
        return _crop(operation.crop, first)
    if any((i.extent, i.spacing) != (first.extent, first.spacing) for i in inputs):
        found = " and ".join(f"{i.extent} voxels, {i.spacing} apart" for i in inputs)
        return first, f"its inputs differ ({found}); crop and stride them alike"
    return Reach(first.extent, first.spacing, triple(max(n) for n in zip(*(i.lost for i in inputs), strict=True))), ""


def _slide(window: Window, before: Reach) -> tuple[Reach, str]:
    extent, spacing, lost = [], [], []
    for axis, covered in enumerate(window.covered):
        n = (before.extent[axis] + 2 * window.padding[axis] - covered) // window.stride[axis] + 1
        if n < 1:
            return before, f"covers {covered} voxels along {'zyx'[axis]}, where {before.extent[axis]} are left"
        extent.append(n)
        spacing.append(before.spacing[axis] * window.stride[axis] if n > 1 else 1)
        lost.append(before.lost[axis] + before.spacing[axis] * (covered - 1))
    return Reach(triple(extent), triple(spacing), triple(lost)), ""


def _crop(crop: Sequence[slice], before: Reach) -> tuple[Reach, str]:
    kept = [range(n)[part] for n, part in zip(before.extent, crop, strict=True)]
    if not all(kept):
        return before, f"keeps nothing of {before.extent} voxels"
    extent = triple(len(k) for k in kept)
    spacing = triple(s if n > 1 else 1 for s, n in zip(before.spacing, extent, strict=True))
    lost = triple(n + k.start * s for n, k, s in zip(before.lost, kept, before.spacing, strict=True))
    return Reach(extent, spacing, lost), ""
