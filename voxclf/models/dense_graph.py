"""What a patch network computes, read off its code: its operations in order.

``dense.py`` evaluates these operations at every voxel. That is exact as long as each of them treats a voxel by what
lies around it and by nothing else, so every layer is looked up in a short list of those that do; whatever is not in
the list is named as a problem. A network may be any ``nn.Module`` that ``torch.fx`` can trace: valid 3D convolutions,
max and average pools, layers that act on each voxel by itself, sums, concatenations, crops by slices.

A layer of one's own that mixes channels but never voxels says so with a class attribute ``acts_per_voxel = True``.

The files ``dense*.py`` import torch, NumPy and the standard library only, so they run on any machine with torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional

from voxclf.geometry import UNIT, Zyx, zyx

Kind = Literal["convolution", "max_pool", "average_pool", "pointwise", "concatenation", "crop"]
NO_CROP = (slice(None),) * 3

POINTWISE_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
)
POINTWISE_FUNCTIONS: frozenset[Callable] = frozenset(
    (
        *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.relu, torch.sigmoid, torch.tanh, torch.maximum),
        *(
            functional.relu,
            functional.relu6,
            functional.leaky_relu,
            functional.elu,
            functional.selu,
            functional.gelu,
            functional.silu,
            functional.mish,
            functional.hardswish,
            functional.softplus,
        ),
    )
)
POINTWISE_METHODS = frozenset(("add", "sub", "mul", "div", "neg", "relu", "sigmoid", "tanh", "contiguous"))
UNKNOWN_LAYER = "is not known to treat every voxel by its surroundings alone"


@dataclass(frozen=True)
class Window:
    """Kernel, stride, dilation and padding of an operation, each along z, y, x."""

    kernel: Zyx = UNIT
    stride: Zyx = UNIT
    dilation: Zyx = UNIT
    padding: Zyx = (0, 0, 0)

    @property
    def covered(self) -> Zyx:
        """Voxels from the first to the last that the kernel touches."""
        return triple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


@dataclass(frozen=True)
class Value:
    """Stands for the result of an operation among the arguments of another; 0 is the network's input."""

    index: int


@dataclass(frozen=True, eq=False)
class Attribute:
    """Stands for a parameter that `forward` uses by name; looked up at each call, since devices may change."""

    owner: nn.Module
    name: str

    def get(self) -> torch.Tensor:
        """The tensor as it is now."""
        return getattr(self.owner, self.name)


@dataclass(frozen=True, eq=False)
class Operation:
    """One step of the network; operation i makes value i + 1.

    Parameters
    ----------
    name : str
        The layer's path within the network, for messages.
    kind : str
        What it does with the voxels.
    inputs : tuple of int
        The values it reads, each named once, but for a concatenation, where the order counts.
    target : nn.Module or callable
        The layer itself, whose parameters are used where they are, or the function.
    arguments, keywords
        Of a pointwise operation, with a `Value` or `Attribute` where a tensor goes.
    window : Window
        Of convolutions and pools.
    crop : tuple of slice
        What a crop keeps along z, y, x.
    """

    name: str
    kind: Kind
    inputs: tuple[int, ...]
    target: Any = None
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    window: Window = Window()
    crop: tuple[slice, ...] = NO_CROP


def triple(values: Any) -> Zyx:
    """Three whole numbers from an iterable, or one repeated."""
    return zyx((values,) * 3 if isinstance(values, int) else values)


def read_operations(network: nn.Module) -> tuple[list[Operation], tuple[str, ...]]:
    """Read a network's operations off its code, and name the layers that keep it from being exact."""
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        name = type(network).__name__
        return [], (f"{name}: its forward cannot be traced ({error}); write it without conditions on tensors",)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return _Reader(network).read(graph)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "acts_per_voxel", False) or super().is_leaf_module(m, module_qualified_name)


class _RefusalError(Exception):
    """Why a layer cannot be evaluated at every voxel; becomes a problem that names the layer."""


class _Reader:
    """Turns the nodes of a trace into operations, in order."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.operations: list[Operation] = []
        self.problems: list[str] = []
        self.values: dict[fx.Node, Value | Attribute] = {}
        self.is_flat: set[fx.Node] = set()

    def read(self, graph: fx.Graph) -> tuple[list[Operation], tuple[str, ...]]:
        for node in graph.nodes:
            name = str(node.target) if node.op in ("call_module", "get_attr") else _describe(node)
            try:
                self._read_node(node, name)
            except _RefusalError as reason:
                self.problems.append(f"{name}: {reason}")
                self.values[node] = Value(len(self.operations))
        return self.operations, tuple(self.problems)

    def _read_node(self, node: fx.Node, name: str) -> None:
        if node.op == "placeholder":
            if self.values:
                raise _RefusalError("a second input; dense evaluation knows networks of one input")
            self.values[node] = Value(0)
        elif node.op == "get_attr":
            self.values[node] = self._read_attribute(str(node.target))
        elif node.op == "output":
            self._check_result(node.args[0])
        elif _drops_axes(node, self.network):
            # Computed at every voxel, a result keeps its axes; so dropping them is not an operation here.
            source = node.all_input_nodes[0]
            self.values[node] = self.values[source]
            self.is_flat.add(node)
        else:
            self.operations.append(self._read_operation(node, name))
            self.values[node] = Value(len(self.operations))

    def _read_attribute(self, path: str) -> Attribute:
        owner, _, name = path.rpartition(".")
        attribute = Attribute(self.network.get_submodule(owner), name)
        shape = tuple(attribute.get().shape)
        if any(n != 1 for n in shape[-3:]):
            raise _RefusalError(f"a parameter of shape {shape} may vary over space; give it three last axes of 1")
        return attribute

    def _read_operation(self, node: fx.Node, name: str) -> Operation:
        if self.is_flat.intersection(node.all_input_nodes):
            raise _RefusalError(
                "works on a result without its spatial axes; put a convolution in its place before they go"
            )
        found = [self.values[n] for n in node.all_input_nodes]
        inputs = tuple(dict.fromkeys(v.index for v in found if isinstance(v, Value)))
        if not inputs:
            raise _RefusalError("does not depend on the input")
        if node.op == "call_module":
            return read_layer(name, inputs, self.network.get_submodule(name))
        if node.target in (torch.cat, torch.concat):
            return self._read_concatenation(node, name)
        if node.target is operator.getitem:
            return Operation(name, "crop", inputs, crop=_read_crop(node.args[1]))
        if node.op == "call_method" and node.target in POINTWISE_METHODS:
            function = getattr(torch.Tensor, str(node.target))
        elif node.target in POINTWISE_FUNCTIONS:
            function = node.target
        else:
            raise _RefusalError(f"{UNKNOWN_LAYER}; if it does, write it as a layer (such as nn.MaxPool3d)")
        arguments = fx.node.map_arg(node.args, self.values.__getitem__)
        keywords = fx.node.map_arg(node.kwargs, self.values.__getitem__)
        return Operation(name, "pointwise", inputs, function, tuple(arguments), dict(keywords))

    def _read_concatenation(self, node: fx.Node, name: str) -> Operation:
        tensors, *more = node.args
        axis = node.kwargs.get("dim", more[0] if more else 0)
        if axis != 1:
            raise _RefusalError(f"joins axis {axis}; only channels, axis 1, can be joined")
        parts = [self.values[n] for n in tensors]
        return Operation(name, "concatenation", tuple(part.index for part in parts if isinstance(part, Value)))

    def _check_result(self, result: Any) -> None:
        if not isinstance(result, fx.Node) or self.values.get(result) != Value(len(self.operations)):
            raise _RefusalError("forward should return one tensor, the last that it computes")


def read_layer(name: str, inputs: tuple[int, ...], layer: nn.Module) -> Operation:
    """Describe what a layer does with voxels; raises what `read_operations` reports for layers that do not fit."""
    if isinstance(layer, nn.Conv3d):
        padding = _padding(layer)
        if any(padding) and layer.padding_mode != "zeros":
            raise _RefusalError(f"pads with {layer.padding_mode!r}; only zeros can be told from what is there")
        window = Window(triple(layer.kernel_size), triple(layer.stride), triple(layer.dilation), padding)
        return Operation(name, "convolution", inputs, layer, window=window)
    if isinstance(layer, nn.MaxPool3d | nn.AvgPool3d):
        if any(triple(layer.padding)):
            raise _RefusalError(f"pads with {layer.padding} voxels that are not there when its patch is in a volume")
        if layer.ceil_mode or getattr(layer, "return_indices", False):
            raise _RefusalError("ceil_mode and return_indices have no counterpart at every voxel; leave them out")
        stride = layer.kernel_size if layer.stride is None else layer.stride
        window = Window(triple(layer.kernel_size), triple(stride), triple(getattr(layer, "dilation", 1)))
        kind: Kind = "max_pool" if isinstance(layer, nn.MaxPool3d) else "average_pool"
        return Operation(name, kind, inputs, layer, window=window)
    if isinstance(layer, nn.BatchNorm3d):
        if layer.running_mean is None:
            raise _RefusalError("normalises by the batch even in eval mode; set track_running_stats=True")
    elif not (isinstance(layer, POINTWISE_LAYERS) or getattr(layer, "acts_per_voxel", False) or _is_softmax(layer)):
        raise _RefusalError(f"{type(layer).__name__} {UNKNOWN_LAYER}")
    return Operation(name, "pointwise", inputs, layer, (Value(inputs[0]),))


def _is_softmax(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Softmax | nn.LogSoftmax) and layer.dim == 1


def _padding(layer: nn.Conv3d) -> Zyx:
    if layer.padding == "valid":
        return (0, 0, 0)
    if layer.padding != "same":
        return triple(layer.padding)
    total = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if any(n % 2 for n in total):
        raise _RefusalError("pads one side more than the other; choose an odd kernel")
    return triple(n // 2 for n in total)


def _drops_axes(node: fx.Node, network: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), nn.Flatten)
    return node.target in (torch.flatten, torch.squeeze, "flatten", "squeeze")


def _read_crop(index: Any) -> tuple[slice, ...]:
    parts = index if isinstance(index, tuple) else (index,)
    if parts and parts[0] is Ellipsis:
        parts = parts[1:] if len(parts) == 4 else ()
    elif len(parts) == 5 and all(part == slice(None) for part in parts[:2]):
        parts = parts[2:]
    is_plain = len(parts) == 3 and all(isinstance(p, slice) and isinstance(p.start, int | None) for p in parts)
    if not is_plain or any(not isinstance(p.stop, int | None) or p.step not in (None, 1) for p in parts):
        raise _RefusalError("cuts out something else than a box; use three slices of whole numbers for z, y, x")
    return tuple(parts)


def _describe(node: fx.Node) -> str:
    """Name a function by itself and the module whose forward calls it."""
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    modules = [path for path in node.meta.get("nn_module_stack", {}) if path]
    return f"{function} in {modules[-1]}" if modules else str(function)
