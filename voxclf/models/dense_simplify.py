"""The operations of a patch network, rewritten to fewer that compute the same: only for prediction.

Passes, in this order. None of them is an approximation; results change by rounding only.

1. Dropout and identities do nothing in prediction, and go.
2. Batch norm is a factor and an offset per channel: it becomes part of the convolution before it.
3. A mean over voxels and a linear layer on each voxel can change places: first the layer, which leaves K channels in
   place of hundreds to average.
4. A linear layer on joined channels is the sum of linear layers on the parts, which lets pass 5 reach one part.
5. A convolution followed by a linear layer, with nothing between them, is one convolution. The plain branch of `dil`
   shrinks from 32 channels to K this way, half of the network's arithmetic.
6. ReLU or GELU after a convolution becomes part of it, for backends that compute it while they write the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from voxclf.geometry import UNIT
from voxclf.models.dense_graph import Attribute, Operation, Value, Window

IDLE_LAYERS = (nn.Identity, nn.Dropout, nn.Dropout3d, nn.AlphaDropout)
FUSED_ACTIVATIONS = (nn.ReLU, nn.GELU)


class Convolution(nn.Module):
    """Weights of a convolution for prediction, and the activation after it.

    Parameters
    ----------
    weight : Tensor
        Shape (out, in / groups, z, y, x).
    bias : Tensor
        Shape (out,).
    groups : int
        As in nn.Conv3d.
    activation : nn.Module, optional
        nn.ReLU or nn.GELU.
    """

    def __init__(self, weight: Tensor, bias: Tensor, groups: int = 1, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.groups = groups
        self.activation = activation


def is_linear_per_voxel(layer: nn.Module) -> bool:
    """Whether a convolution, one of the network's or of this module, is one matrix for each voxel."""
    is_plain = getattr(layer, "activation", None) is None
    return tuple(layer.weight.shape[2:]) == UNIT and layer.groups == 1 and is_plain


@dataclass(frozen=True, eq=False)
class NormedPool:
    """The layers before a max pool, where :mod:`voxclf.models.normed_pool` can compute all three in one go."""

    norm: nn.BatchNorm3d
    activation: nn.Module


class Constant(nn.Module):
    """A parameter that `forward` uses by name, copied so that it can be moved without the layer that owns it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone(), requires_grad=False)


@dataclass(eq=False)
class Node:
    """An operation and the nodes that it reads; the network's input has no operation."""

    operation: Operation | None
    inputs: list[Node] = field(default_factory=list)

    @property
    def convolution(self) -> Convolution | None:
        """Its convolution, if it is one."""
        is_one = self.operation is not None and self.operation.kind == "convolution"
        return self.operation.target if is_one else None  # type: ignore[union-attr]

    def is_layer(self, *kinds: type[nn.Module]) -> bool:
        """Whether it is a layer of these types."""
        return self.operation is not None and isinstance(self.operation.target, kinds)


def rewrite_for_training(operations: Sequence[Operation]) -> list[Operation]:
    """Pass 3 alone, and batch norm, activation and max pool joined; the layers themselves are shared, not copied."""
    return _to_operations(_rewrite(_rewrite(_to_nodes(operations), _average_last), _join_pool))


def simplify(operations: Sequence[Operation], *, with_activations: bool = True) -> list[Operation]:
    """Rewrite operations for prediction; layers of the network are read, never changed.

    ``with_activations`` is for backends that know what to do with ``Convolution.activation``.
    """
    result = _to_nodes([_copied(operation) for operation in operations])
    for improve in PASSES if with_activations else PASSES[:-1]:
        result = _rewrite(result, improve)
    return _to_operations(result)


# --- the graph ---


def _copied(operation: Operation) -> Operation:
    """With parameters of its own."""
    if operation.kind == "convolution":
        layer = operation.target
        bias = torch.zeros_like(layer.weight[:, 0, 0, 0, 0]) if layer.bias is None else layer.bias
        operation = replace(operation, target=Convolution(layer.weight, bias, layer.groups))
    return replace(operation, arguments=tuple(_with_constant(a) for a in operation.arguments))


def _with_constant(argument: Any) -> Any:
    return Attribute(Constant(argument.get()), "value") if isinstance(argument, Attribute) else argument


def _to_nodes(operations: Sequence[Operation]) -> Node:
    nodes = [Node(None)]
    for operation in operations:
        nodes.append(Node(operation, [nodes[i] for i in operation.inputs]))
    return nodes[-1]


def _to_operations(result: Node) -> list[Operation]:
    """Number the nodes again, each after those it reads."""
    order = list(_in_order(result))
    number = {id(node): i for i, node in enumerate(order)}
    operations = []
    for node in order:
        if node.operation is None:
            continue
        inputs = [number[id(n)] for n in node.inputs]
        renamed = dict(zip(node.operation.inputs, inputs, strict=True))
        arguments = tuple(_rename(a, renamed) for a in node.operation.arguments)
        keywords = {name: _rename(a, renamed) for name, a in node.operation.keywords.items()}
        operations.append(replace(node.operation, inputs=tuple(inputs), arguments=arguments, keywords=keywords))
    return operations


def _rename(argument: Any, numbers: dict[int, int]) -> Any:
    return Value(numbers[argument.index]) if isinstance(argument, Value) else argument


def _in_order(result: Node) -> Iterator[Node]:
    """All nodes, the network's input first, each once and after those it reads."""
    seen: set[int] = set()
    ordered: list[Node] = []
    waiting = [(result, False)]
    while waiting:
        node, is_ready = waiting.pop()
        if is_ready:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            waiting.append((node, True))
            waiting += [(n, False) for n in reversed(node.inputs)]
    first = [node for node in ordered if node.operation is None]
    return iter(first + [node for node in ordered if node.operation is not None])


def _rewrite(result: Node, improve: Callable[[Node, Callable[[Node], bool]], Node]) -> Node:
    """Replace every node by what a pass makes of it, from the input to the result."""
    order = list(_in_order(result))
    uses: dict[int, int] = {id(result): 1}
    for node in order:
        for n in node.inputs:
            uses[id(n)] = uses.get(id(n), 0) + 1
    replaced: dict[int, Node] = {}
    for node in order:
        old_inputs = node.inputs
        node.inputs = [replaced[id(n)] for n in old_inputs]
        for old, new in zip(old_inputs, node.inputs, strict=True):
            uses.setdefault(id(new), uses[id(old)])
        replaced[id(node)] = improve(node, lambda n: uses.get(id(n), 1) == 1)
        uses.setdefault(id(replaced[id(node)]), uses.get(id(node), 1))
    return replaced[id(result)]


# --- the passes: each takes a node and gives what stands in its place ---

IsUsedOnce = Callable[[Node], bool]


def _drop_idle(node: Node, _: IsUsedOnce) -> Node:
    return node.inputs[0] if node.is_layer(*IDLE_LAYERS) else node


def _fold_batch_norm(node: Node, is_used_once: IsUsedOnce) -> Node:
    before = node.inputs[0].convolution if node.inputs else None
    if not node.is_layer(nn.BatchNorm3d) or before is None or not is_used_once(node.inputs[0]):
        return node
    assert node.operation is not None
    norm = node.operation.target
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    offset = 0 if norm.bias is None else norm.bias.double()
    weight = before.weight.double() * factor[:, None, None, None, None]
    bias = (before.bias.double() - norm.running_mean.double()) * factor + offset
    return _with_layer(node.inputs[0], Convolution(weight.to(before.weight), bias.to(before.bias), before.groups))


def _average_last(node: Node, is_used_once: IsUsedOnce) -> Node:
    layer, pool = node.convolution, node.inputs[0] if node.inputs else node
    if layer is None or not is_linear_per_voxel(layer) or not pool.is_layer(nn.AvgPool3d):
        return node
    assert node.operation is not None
    has_more_channels = layer.weight.shape[0] > layer.weight.shape[1]
    is_strided = node.operation.window != Window()
    is_mean = pool.operation is not None and pool.operation.target.divisor_override is None
    if has_more_channels or is_strided or not is_mean or not is_used_once(pool):
        return node
    return Node(pool.operation, [Node(node.operation, pool.inputs)])


def _join_pool(node: Node, is_used_once: IsUsedOnce) -> Node:
    before = (node.inputs[0], *node.inputs[0].inputs) if node.is_layer(nn.MaxPool3d) else ()
    if len(before) != 2 or not all(map(is_used_once, before)):
        return node
    activation, norm = before
    if not activation.is_layer(*FUSED_ACTIVATIONS) or not norm.is_layer(nn.BatchNorm3d):
        return node
    assert node.operation is not None and activation.operation is not None and norm.operation is not None
    layers = NormedPool(norm.operation.target, activation.operation.target)
    is_known = getattr(layers.activation, "approximate", "none") == "none"
    is_usual = layers.norm.affine and layers.norm.track_running_stats
    if not is_known or not is_usual or find_spec("numba") is None:
        return node
    return Node(replace(node.operation, target=layers), norm.inputs)


def _split_joined(node: Node, is_used_once: IsUsedOnce) -> Node:
    layer, joined = node.convolution, node.inputs[0] if node.inputs else node
    is_joined = joined.operation is not None and joined.operation.kind == "concatenation"
    if layer is None or not is_linear_per_voxel(layer) or not is_joined or not is_used_once(joined):
        return node
    assert node.operation is not None
    parts = joined.inputs
    # Only worth it if every part is the result of a convolution, whose channels are known, and one can be merged.
    if any(_last_convolution(p) is None for p in parts) or not any(p.convolution for p in parts):
        return node
    if node.operation.window != Window():
        return node
    sizes = [_last_convolution(p).weight.shape[0] for p in parts]  # type: ignore[union-attr]
    if sum(sizes) != layer.weight.shape[1]:
        return node
    total: Node | None = None
    for part, weight in zip(parts, layer.weight.split(sizes, 1), strict=True):
        bias = layer.bias if total is None else torch.zeros_like(layer.bias)
        name = f"{node.operation.name} on {part.operation.name}"  # type: ignore[union-attr]
        share = Node(replace(node.operation, name=name, target=Convolution(weight, bias)), [part])
        total = share if total is None else _sum(total, share)
    assert total is not None
    return total


def _last_convolution(node: Node) -> Convolution | None:
    """The convolution that made a value's channels, looking through layers on each voxel."""
    while node.operation is not None and node.operation.kind == "pointwise" and len(node.inputs) == 1:
        node = node.inputs[0]
    return node.convolution


def _sum(a: Node, b: Node) -> Node:
    return Node(Operation("sum", "pointwise", (0, 1), torch.add, (Value(0), Value(1))), [a, b])


def _merge_linear(node: Node, is_used_once: IsUsedOnce) -> Node:
    layer, before = node.convolution, node.inputs[0].convolution if node.inputs else None
    if layer is None or before is None or before.activation is not None or not is_used_once(node.inputs[0]):
        return node
    assert node.operation is not None
    is_plain = is_linear_per_voxel(layer) and before.groups == 1 and node.operation.window == Window()
    if not is_plain or layer.weight.shape[0] > layer.weight.shape[1]:
        return node
    matrix = layer.weight[:, :, 0, 0, 0].double()
    weight = torch.einsum("om,mizyx->oizyx", matrix, before.weight.double())
    bias = matrix @ before.bias.double() + layer.bias.double()
    return _with_layer(node.inputs[0], Convolution(weight.to(layer.weight), bias.to(layer.bias)))


def _fuse_activation(node: Node, is_used_once: IsUsedOnce) -> Node:
    before = node.inputs[0].convolution if node.inputs else None
    if before is None or before.activation or not node.is_layer(*FUSED_ACTIVATIONS) or not is_used_once(node.inputs[0]):
        return node
    assert node.operation is not None
    activation = node.operation.target
    return _with_layer(node.inputs[0], Convolution(before.weight, before.bias, before.groups, activation))


def _with_layer(node: Node, layer: Convolution) -> Node:
    assert node.operation is not None
    return Node(replace(node.operation, target=layer), node.inputs)


PASSES = (_drop_idle, _fold_batch_norm, _average_last, _split_joined, _merge_linear, _fuse_activation)
