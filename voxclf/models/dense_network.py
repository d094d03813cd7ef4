"""The operations of a patch network, run at every voxel of a volume: see ``dense.py`` for what that is.

Two ways, both exact, which differ in where they keep the voxels that were neighbours in a patch:

``a_trous``    every operation runs at stride 1, and the kernels after a stride s touch every s-th voxel (dilation).
               Li, Zhao and Wang 2014, https://arxiv.org/abs/1412.4526
``fragments``  the result of an operation at stride 1 is dealt out to s³ smaller volumes, each of them what some
               patches see, which go through the rest of the network as a batch.
               Giusti et al. 2013, https://arxiv.org/abs/1302.1700
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxclf.geometry import UNIT, Zyx
from voxclf.models.dense_geometry import Reach, follow
from voxclf.models.dense_graph import Attribute, Operation, Value, triple
from voxclf.models.dense_simplify import NormedPool

Backend = Literal["a_trous", "fragments"]
BACKENDS: tuple[Backend, ...] = ("a_trous", "fragments")
SPATIAL = (2, 3, 4)


class DenseNetwork(nn.Module):
    """A patch network at every voxel: (B, C, Z, Y, X) to (B, K, Z', Y', X'); made by `densify`.

    Along a dense axis Z' = (Z - receptive_field) // spacing + 1; along another Z = patch and Z' = 1.

    Parameters
    ----------
    network : nn.Module
        Owner of the parameters.
    operations : sequence of Operation
        What it does, in order.
    patch, dense_axes, backend, spacing
        As for `densify`.
    """

    def __init__(
        self,
        network: nn.Module,
        operations: Sequence[Operation],
        patch: Zyx,
        dense_axes: tuple[bool, bool, bool],
        backend: Backend,
        spacing: Zyx = UNIT,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend was {backend!r}; choose one of {', '.join(BACKENDS)}")
        if backend == "fragments" and spacing != UNIT:
            raise ValueError(f"spacing was {spacing} with backend 'fragments'; only 'a_trous' leaves voxels out")
        self.network = network
        self.operations = list(operations)
        self.patch = patch
        self.dense_axes = dense_axes
        self.backend = backend
        self.spacing = spacing
        self.reaches = follow(self.operations, patch)[0]
        self.steps = _steps(self.operations, spacing)
        self.receptive_field = triple(n + 1 for n in self.reaches[-1].lost)
        self.last_uses = {index: i for i, operation in enumerate(self.operations) for index in operation.inputs}

    def extra_repr(self) -> str:
        """What the representation adds to that of the network."""
        return f"patch={self.patch}, dense_axes={self.dense_axes}, backend={self.backend!r}, spacing={self.spacing}"

    def output_shape(self, shape: Zyx) -> Zyx:
        """Spatial shape of the result for an input of this spatial shape.

        Raises
        ------
        ValueError
            If the input is too short along a dense axis, or not a patch long along another.
        """
        for axis, name in enumerate("zyx"):
            needed, found = self.receptive_field[axis], shape[axis]
            if self.dense_axes[axis] and found < needed:
                raise ValueError(f"the input has {found} voxels along {name}, its receptive field is {needed}; pad it")
            if not self.dense_axes[axis] and found != self.patch[axis]:
                raise ValueError(
                    f"the input has {found} voxels along {name}, which is not dense and needs exactly the patch's "
                    f"{self.patch[axis]}"
                )
        # Not through int(): while a network is exported, lengths are symbols.
        z, y, x = (
            (n - r) // s + 1 if d else 1
            for n, r, s, d in zip(shape, self.receptive_field, self.spacing, self.dense_axes, strict=True)
        )
        return z, y, x

    def input_shape(self, out_shape: Zyx) -> Zyx:
        """Spatial shape of the input that gives a result of this spatial shape."""
        return triple(
            (n - 1) * s + r if d else p
            for n, r, s, d, p in zip(
                out_shape, self.receptive_field, self.spacing, self.dense_axes, self.patch, strict=True
            )
        )

    def working_bytes(self, out_shape: Zyx, batch: int = 1) -> int:
        """Memory for one call without gradients, input and result included; scratch of the libraries comes on top.

        Parameters
        ----------
        out_shape : (z, y, x)
            Spatial shape of the result.
        batch : int
            Volumes in the input.
        """
        bytes_each = next(self.parameters()).element_size()
        shape = self.input_shape(out_shape)
        channels = self._channels()

        def size(value: int) -> int:
            reach = self.reaches[value]
            lengths = [
                (n - gone - 1) // step + 1 if d else e
                for n, gone, step, d, e in zip(
                    shape, reach.lost, self.steps[value], self.dense_axes, reach.extent, strict=True
                )
            ]
            return channels[value] * math.prod(lengths)

        alive, peak = {0}, size(0)
        for i, operation in enumerate(self.operations):
            # Pools work axis by axis, and dealing out copies: each time a second array as large as the result.
            copies = 2 if operation.kind in ("max_pool", "average_pool") or self.backend == "fragments" else 1
            peak = max(peak, sum(map(size, alive)) + copies * size(i + 1))
            alive = {v for v in (*alive, i + 1) if self.last_uses.get(v, len(self.operations)) > i}
        return batch * bytes_each * peak

    @property
    def in_channels(self) -> int:
        """Channels of its input."""
        layers = (o.target for o in self.operations if o.kind == "convolution")
        first = next(layers, None)
        return 1 if first is None else first.weight.shape[1] * first.groups

    def _channels(self) -> list[int]:
        """Channels of every value."""
        channels = [self.in_channels]
        for operation in self.operations:
            if operation.kind == "convolution":
                channels.append(operation.target.weight.shape[0])
            else:
                inputs = [channels[i] for i in operation.inputs]
                channels.append(sum(inputs) if operation.kind == "concatenation" else inputs[0])
        return channels

    def forward(self, x: Tensor) -> Tensor:
        """Logits at every voxel, (B, K, Z', Y', X')."""
        z, y, x_ = self.output_shape((x.shape[2], x.shape[3], x.shape[4]))
        values: dict[int, Tensor] = {0: x}
        for i, operation in enumerate(self.operations):
            result = self._run(operation, values)
            if self.backend == "fragments":
                before, after = (self._fragments(self.reaches[n]) for n in (operation.inputs[0], i + 1))
                between = triple(min(b, a) for b, a in zip(before, after, strict=True))
                result = deal_out(join(result, before, between), between, after)
            values[i + 1] = _with_gradient_laid_out_alike(result)
            for used in operation.inputs:
                if self.last_uses[used] == i:  # without gradients this is what frees the memory
                    values.pop(used, None)
        sz, sy, sx = (s // step for s, step in zip(self.spacing, self.steps[-1], strict=True))
        return values[len(self.operations)][:, :, : z * sz : sz, : y * sy : sy, : x_ * sx : sx]

    def _fragments(self, reach: Reach) -> Zyx:
        """Number of fragments along each axis that a value consists of."""
        return triple(s if d else 1 for s, d in zip(reach.spacing, self.dense_axes, strict=True))

    def _run(self, operation: Operation, values: dict[int, Tensor]) -> Tensor:
        if operation.kind == "pointwise":
            return _apply(operation, values)
        first = values[operation.inputs[0]]
        if operation.kind == "concatenation":
            return torch.cat(_to_one_shape([values[i] for i in operation.inputs]), 1)
        before, step = self.reaches[operation.inputs[0]], self.steps[operation.inputs[0]]
        # Neighbours of the patch lie `apart` voxels of the tensor at hand from each other: one in fragments.
        is_spread = self.backend == "a_trous"
        apart = triple(
            max(1, far // near) if d and is_spread else 1
            for far, near, d in zip(before.spacing, step, self.dense_axes, strict=True)
        )
        if operation.kind == "crop":
            return self._crop(first, operation, before, apart)
        window = operation.window
        kept = _strides_kept(window.stride, step, self.spacing)
        stride = triple(k if d else s for k, s, d in zip(kept, window.stride, self.dense_axes, strict=True))
        dilation = triple(d * a for d, a in zip(window.dilation, apart, strict=True))
        if operation.kind == "convolution":
            padding = triple(0 if d else p for p, d in zip(window.padding, self.dense_axes, strict=True))
            return self._convolve(first, operation.target, stride, dilation, padding)
        if operation.kind == "max_pool":
            if isinstance(operation.target, NormedPool):
                return _pool_normed(first, operation.target, window.kernel, stride, dilation)
            return max_pool(first, window.kernel, stride, dilation)
        return self._average(first, operation.target, window.kernel, stride, dilation)

    def _convolve(self, x: Tensor, layer: nn.Module, stride: Zyx, dilation: Zyx, padding: Zyx) -> Tensor:
        if _trains_on_cpu(layer, x) and x.shape[1] == 1 and padding[0] == 0:
            return convolve_planes(x, layer.weight, layer.bias, stride, dilation, padding)
        return functional.conv3d(x, layer.weight, layer.bias, stride, padding, dilation, layer.groups)

    def _average(self, x: Tensor, layer: nn.Module, kernel: Zyx, stride: Zyx, dilation: Zyx) -> Tensor:
        return average_pool(x, kernel, stride, dilation, layer.divisor_override)

    def _crop(self, x: Tensor, operation: Operation, before: Reach, apart: Zyx) -> Tensor:
        """Crop the start; at a dense axis's end the excess is harmless, and cut where values meet."""
        for axis, dimension in enumerate(SPATIAL):
            kept = range(before.extent[axis])[operation.crop[axis]]
            if self.dense_axes[axis]:
                start = kept.start * apart[axis]
                x = x.narrow(dimension, start, x.shape[dimension] - start)
            else:
                x = x.narrow(dimension, kept.start, len(kept))
        return x


def _steps(operations: Sequence[Operation], spacing: Zyx) -> list[Zyx]:
    """Distance in the volume of neighbours in the tensor that holds a value along dense axes, for every value."""
    steps = [UNIT]
    for operation in operations:
        step, *others = (steps[i] for i in operation.inputs)
        if any(other != step for other in others):
            raise ValueError(f"spacing was {spacing}; {operation.name} joins branches that do not both allow it")
        kept = _strides_kept(operation.window.stride, step, spacing)
        steps.append(triple(a * b for a, b in zip(step, kept, strict=True)))
    return steps


def _strides_kept(stride: Zyx, step: Zyx, spacing: Zyx) -> Zyx:
    """An operation's own stride where that leaves out none of the results wanted, 1 elsewhere."""
    return triple(n if wanted % (n * near) == 0 else 1 for n, near, wanted in zip(stride, step, spacing, strict=True))


def _with_gradient_laid_out_alike(value: Tensor) -> Tensor:
    """The value, whose gradient will have its memory layout.

    Cuts and average pools hand back gradients in torch's default layout. Batch norm and activations that were computed
    in channels_last_3d then read two layouts at once, which takes them ten times as long as the convolutions.
    """
    layout = torch.channels_last_3d
    if value.requires_grad and value.is_contiguous(memory_format=layout) and not value.is_contiguous():
        value.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))
    return value


def _apply(operation: Operation, values: dict[int, Tensor]) -> Tensor:
    """Run a pointwise operation on values cut to one shape."""
    tensors = dict(zip(operation.inputs, _to_one_shape([values[i] for i in operation.inputs]), strict=True))

    def look_up(argument: Any) -> Any:
        if isinstance(argument, Value):
            return tensors[argument.index]
        return argument.get() if isinstance(argument, Attribute) else argument

    arguments = [look_up(a) for a in operation.arguments]
    return operation.target(*arguments, **{k: look_up(a) for k, a in operation.keywords.items()})


def _to_one_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut values at their end to the shortest of them: all are anchored at their start."""
    if len(tensors) == 1:
        return list(tensors)
    z, y, x = (min(t.shape[dimension] for t in tensors) for dimension in SPATIAL)
    return [t[:, :, :z, :y, :x] for t in tensors]


def _trains_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    return layer.training and torch.is_grad_enabled() and x.device.type == "cpu"


def convolve_planes(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Zyx, dilation: Zyx, padding: Zyx) -> Tensor:
    """Convolution of one channel, as one in 2D of the planes that the kernel spans.

    Forward and backward together take half the time in bfloat16, where most of it goes into moving the one channel.
    """
    n = (x.shape[2] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    spanned = [_every(x, 2, j * dilation[0], n, stride[0])[:, 0] for j in range(weight.shape[2])]
    planes = torch.stack(spanned, -1).flatten(0, 1).movedim(-1, 1)  # (B · Z', kernel, Y, X), channels last
    result = functional.conv2d(planes, weight[:, 0], bias, stride[1:], padding[1:], dilation[1:])
    return result.unflatten(0, (len(x), n)).movedim(1, 2)


# --- pools ---


def _pool_normed(x: Tensor, layers: NormedPool, kernel: Zyx, stride: Zyx, dilation: Zyx) -> Tensor:
    """Batch norm, activation and maximum over a window; in one go where a CPU trains on windows side by side."""
    norm, activation = layers.norm, layers.activation
    are_side_by_side = kernel == stride and dilation == UNIT
    if _trains_on_cpu(norm, x) and are_side_by_side and x.dtype in (torch.float32, torch.bfloat16):
        # It needs numba, which a machine that only predicts may lack.
        from voxclf.models.normed_pool import normed_max_pool

        return normed_max_pool(x, norm, activation, kernel)
    return max_pool(activation(norm(x)), kernel, stride, dilation)


def max_pool(x: Tensor, kernel: Zyx, stride: Zyx, dilation: Zyx) -> Tensor:
    """Maximum over a window.

    For training torch's own, whose backward is one pass. Without gradients one axis after the other: it takes 6
    comparisons for 8 voxels' window instead of 8 and runs at 2 ns per voxel and channel in any memory layout, where
    torch's takes 3 ns in channels_last_3d and 40 to 70 ns otherwise (one core of an AMD EPYC).
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return functional.max_pool3d(x, kernel, stride, 0, dilation)
    return _axis_by_axis(torch.maximum, x, kernel, stride, dilation)


def average_pool(x: Tensor, kernel: Zyx, stride: Zyx, dilation: Zyx, divisor: int | None = None) -> Tensor:
    """Mean over a window, which torch does not have with dilation."""
    total = _axis_by_axis(torch.add, x, kernel, stride, dilation)
    return total / (divisor or kernel[0] * kernel[1] * kernel[2])


def _axis_by_axis(combine: Any, x: Tensor, kernel: Zyx, stride: Zyx, dilation: Zyx) -> Tensor:
    """Combine the voxels of a window that is a product of three lines."""
    for dimension, k, s, d in zip(SPATIAL, kernel, stride, dilation, strict=True):
        n = (x.shape[dimension] - d * (k - 1) - 1) // s + 1
        parts = [_every(x, dimension, j * d, n, s) for j in range(k)]
        x = parts[0]
        for part in parts[1:]:
            x = combine(x, part)
    return x


def _every(x: Tensor, dimension: int, start: int, n: int, step: int) -> Tensor:
    index = [slice(None)] * 5
    index[dimension] = slice(start, start + step * (n - 1) + 1, step)
    return x[tuple(index)]


# --- fragments ---


def deal_out(x: Tensor, before: Zyx, after: Zyx) -> Tensor:
    """Deal the voxels of each fragment out to more fragments, along the axes where `after` has more than `before`.

    Fragments stand in front of the batch, (Fz * Fy * Fx * B, C, Z, Y, X), ordered by the voxel they start at; an axis
    that does not divide evenly is filled up with zeros, which the last cut removes.
    """
    factor = triple(a // b if a > b else 1 for a, b in zip(after, before, strict=True))
    if factor == (1, 1, 1):
        return x
    filled = [-n % f for n, f in zip(x.shape[2:], factor, strict=True)]
    if any(filled):
        x = functional.pad(x, (0, filled[2], 0, filled[1], 0, filled[0]))
    batch = x.shape[0] // (before[0] * before[1] * before[2])
    z, y, w = (n // f for n, f in zip(x.shape[2:], factor, strict=True))
    fz, fy, fx = factor
    x = x.reshape(*before, batch, x.shape[1], z, fz, y, fy, w, fx)
    #             0..2     3      4           5  6   7  8   9  10
    x = x.permute(6, 0, 8, 1, 10, 2, 3, 4, 5, 7, 9)
    return x.reshape(-1, x.shape[7], z, y, w)


def join(x: Tensor, before: Zyx, after: Zyx) -> Tensor:
    """Put fragments together again along the axes where `after` is 1: nothing later looks at neighbours there."""
    joined = triple(b if a == 1 else 1 for b, a in zip(before, after, strict=True))
    if joined == (1, 1, 1):
        return x
    kept = triple(b // j for b, j in zip(before, joined, strict=True))
    batch = x.shape[0] // (before[0] * before[1] * before[2])
    channels, z, y, w = x.shape[1:]
    pairs = [n for pair in zip(joined, kept, strict=True) for n in pair]
    x = x.reshape(*pairs, batch, channels, z, y, w)
    # An axis is joined or kept as a whole, so of its pair of fragment axes one has length 1.
    x = x.permute(1, 3, 5, 6, 7, 8, 0, 9, 2, 10, 4)
    return x.reshape(-1, channels, z * joined[0], y * joined[1], w * joined[2])
