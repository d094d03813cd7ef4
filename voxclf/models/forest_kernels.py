"""The compiled loops that walk a packed forest over many voxels.

Strategy. A full-depth tree has some 10^4 to 10^6 nodes and a walk touches them at random, so what a forest
costs is cache misses and dependent loads, not arithmetic. Three decisions follow:

1. Tree by tree over a batch of rows: one tree (8 bytes per node) stays in the L2 cache while every row of the
   batch walks it. Row by row, each row would drag the whole forest through the cache.
2. Eight rows walk at once, written out by hand: while one waits for its node the other seven go on.
3. No branch in the walk. Feature values become integers in the same order (`order_keys`), a node is one integer
   holding threshold, feature and left child, the right child lies beside the left one, and a leaf points at
   itself.

Sums run in the order and precision of the library that trained the forest, so that ties are decided alike.
Forests with few thresholds per feature have a faster walk in `forest_bytes.py`, which shares the sums below.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

# Rows per batch: large enough that a tree, once in cache, is used by many rows; the batch itself streams.
BATCH_ROWS = 16384
# Rows walked at once.
LANES = 8
# Levels walked between two looks at whether all eight rows have arrived.
LEVELS_PER_CHECK = 4

IDENTITY, SOFTMAX, LOGISTIC = 0, 1, 2

_KEY_BITS = np.uint64(32)
_PAYLOAD = np.uint64(0xFFFFFFFF)


class WalkTables(NamedTuple):
    """A forest as `walk_forest` reads it."""

    nodes: np.ndarray  # uint64: order key of the threshold, left child within its tree, feature
    leaf_row: np.ndarray  # int32 per node: row of leaf_values
    tree_start: np.ndarray  # int64 (T + 1,)
    feature_bits: int


class SumTables(NamedTuple):
    """What leaves add, and how sums become probabilities: the second half of every walk."""

    leaf_values: np.ndarray  # (width, L): one contiguous row per output, so that one tree's part stays in L1
    tree_output: np.ndarray  # int32 (T,): -1 for all outputs
    base: np.ndarray  # (n_outputs,)
    divisor: float
    slope: float
    link: int
    columns: np.ndarray  # int32: class of each of the model's classes


def order_keys(values: np.ndarray) -> np.ndarray:
    """Map float32 values to int32 keys in the same order (-0.0 and 0.0 share a key); NaN is not allowed."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


def pack_nodes(
    feature: np.ndarray, threshold: np.ndarray, child: np.ndarray, tree_start: np.ndarray, feature_bits: int
) -> np.ndarray:
    """Pack each node into one uint64: order key of the threshold, left child within its tree, feature.

    A leaf gets the largest key, so no row passes it, and itself as left child.
    """
    n_nodes = feature.size
    is_leaf = feature < 0
    start_of_node = np.repeat(tree_start[:-1], np.diff(tree_start))
    left = np.where(is_leaf, np.arange(n_nodes), child) - start_of_node
    payload = (left.astype(np.uint64) << np.uint64(feature_bits)) | np.maximum(feature, 0).astype(np.uint64)
    key = np.where(is_leaf, np.int32(0x7FFFFFFF), order_keys(threshold))
    return (key.astype(np.int64).view(np.uint64) << _KEY_BITS) | payload


@njit(nogil=True, cache=True)
def lay_out_tree(left: np.ndarray, right: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Position of each node so that children are adjacent, behind their parent, and the likelier one is near.

    Unreachable nodes (pruned ones) get position -1.
    """
    position = np.full(left.size, -1, dtype=np.int64)
    stack = np.empty(left.size + 1, dtype=np.int64)
    position[0] = 0
    n_placed = 1
    stack[0] = 0
    depth = 1
    while depth > 0:
        depth -= 1
        node = stack[depth]
        low, high = left[node], right[node]
        if low < 0:
            continue
        position[low] = n_placed
        position[high] = n_placed + 1
        n_placed += 2
        # The heavier child is popped next and its children follow at once: most walks stay on few cache lines.
        if weight[low] > weight[high]:
            low, high = high, low
        stack[depth] = low
        stack[depth + 1] = high
        depth += 2
    return position


@njit(nogil=True, cache=True)
def node_depths(feature: np.ndarray, child: np.ndarray) -> np.ndarray:
    """Depth of every node of a forest whose children lie behind their parents; roots have depth 0."""
    depth = np.zeros(feature.size, dtype=np.int32)
    for node in range(feature.size):
        if feature[node] >= 0:
            below = depth[node] + 1
            left = child[node]
            depth[left] = max(depth[left], below)
            depth[left + 1] = max(depth[left + 1], below)
    return depth


@njit(nogil=True, cache=True)
def unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of an integer matrix in order of appearance, and for each row its place among them.

    A hash table, because sorting 10^6 leaf vectors (``np.unique``) takes longer than training a tree.
    """
    n_rows, width = rows.shape
    table_size = 16
    while table_size < 2 * n_rows:
        table_size *= 2
    table = np.full(table_size, -1, dtype=np.int64)
    first = np.empty(n_rows, dtype=np.int64)
    place = np.empty(n_rows, dtype=np.int64)
    n_unique = 0
    for row in range(n_rows):
        mixed = np.uint64(14695981039346656037)
        for column in range(width):
            mixed = (mixed ^ np.uint64(rows[row, column])) * np.uint64(1099511628211)
            mixed ^= mixed >> np.uint64(29)
        slot = np.int64(mixed & np.uint64(table_size - 1))
        while True:
            known = table[slot]
            if known < 0:
                table[slot] = n_unique
                first[n_unique] = row
                place[row] = n_unique
                n_unique += 1
                break
            same = True
            for column in range(width):
                same = same and rows[first[known], column] == rows[row, column]
            if same:
                place[row] = known
                break
            slot = (slot + 1) & (table_size - 1)
    return first[:n_unique].copy(), place


@njit(nogil=True, cache=True)
def _fill_keys(bits: np.ndarray, start: int, n_rows: int, keys: np.ndarray) -> None:
    """Order keys of a batch, one row per voxel: ``keys[row, feature]``."""
    for feature in range(bits.shape[0]):
        column = bits[feature]
        for row in range(n_rows):
            value = column[start + row]
            if value == np.int32(-2147483648):
                value = np.int32(0)  # -0.0 equals 0.0
            keys[row, feature] = value ^ ((value >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(nogil=True, cache=True, inline="always")
def _next_node(node: np.uint64, nodes: np.ndarray, keys: np.ndarray, row: int, bits: np.uint64) -> np.uint64:
    packed = nodes[node]
    payload = packed & _PAYLOAD
    feature = payload & ((np.uint64(1) << bits) - np.uint64(1))
    goes_right = np.int64(keys[row, feature]) > (np.int64(packed) >> np.int64(32))
    return (payload >> bits) + np.uint64(goes_right)


@njit(nogil=True, cache=True)
def _walk_tree(nodes: np.ndarray, keys: np.ndarray, n_rows: int, bits: np.uint64, arrived: np.ndarray) -> None:
    """Leaf that each row of the batch reaches; ``n_rows`` is a multiple of LANES."""
    zero = np.uint64(0)
    for row in range(0, n_rows, 8):
        a, b, c, d = zero, zero, zero, zero
        e, f, g, h = zero, zero, zero, zero
        moved = True
        while moved:
            for _ in range(LEVELS_PER_CHECK - 1):
                a = _next_node(a, nodes, keys, row, bits)
                b = _next_node(b, nodes, keys, row + 1, bits)
                c = _next_node(c, nodes, keys, row + 2, bits)
                d = _next_node(d, nodes, keys, row + 3, bits)
                e = _next_node(e, nodes, keys, row + 4, bits)
                f = _next_node(f, nodes, keys, row + 5, bits)
                g = _next_node(g, nodes, keys, row + 6, bits)
                h = _next_node(h, nodes, keys, row + 7, bits)
            a2 = _next_node(a, nodes, keys, row, bits)
            b2 = _next_node(b, nodes, keys, row + 1, bits)
            c2 = _next_node(c, nodes, keys, row + 2, bits)
            d2 = _next_node(d, nodes, keys, row + 3, bits)
            e2 = _next_node(e, nodes, keys, row + 4, bits)
            f2 = _next_node(f, nodes, keys, row + 5, bits)
            g2 = _next_node(g, nodes, keys, row + 6, bits)
            h2 = _next_node(h, nodes, keys, row + 7, bits)
            moved = ((a ^ a2) | (b ^ b2) | (c ^ c2) | (d ^ d2) | (e ^ e2) | (f ^ f2) | (g ^ g2) | (h ^ h2)) != zero
            a, b, c, d, e, f, g, h = a2, b2, c2, d2, e2, f2, g2, h2
        arrived[row] = a
        arrived[row + 1] = b
        arrived[row + 2] = c
        arrived[row + 3] = d
        arrived[row + 4] = e
        arrived[row + 5] = f
        arrived[row + 6] = g
        arrived[row + 7] = h


@njit(nogil=True, cache=True)
def start_sums(sums: SumTables, totals: np.ndarray) -> None:
    """Every row of the batch starts from the base of each output."""
    for output in range(totals.shape[0]):
        totals[output] = sums.base[output]


@njit(nogil=True, cache=True)
def add_leaves(leaves: np.ndarray, n_rows: int, tree: int, sums: SumTables, totals: np.ndarray) -> None:
    """Add what one tree says to the totals (n_outputs, batch); ``leaves`` are columns of ``leaf_values``.

    One output after the other over all rows: the tree's part of ``leaf_values[k]`` then fits the L1 cache, which
    makes this three times faster than adding a row's whole vector at once.
    """
    values = sums.leaf_values
    first = sums.tree_output[tree]
    n_added = 1
    if first < 0:
        first = 0
        n_added = totals.shape[0]
    for k in range(n_added):
        to, of = np.uintp(first + k), np.uintp(k)
        for row in range(n_rows):
            totals[to, row] += values[of, leaves[row]]


@njit(nogil=True, cache=True)
def write_probabilities(totals: np.ndarray, n_rows: int, sums: SumTables, out: np.ndarray, start: int) -> None:
    """Turn the batch's sums into float32 probabilities whose argmax is the argmax of the exact values."""
    columns = sums.columns
    n_columns = columns.size
    values = np.empty(n_columns, dtype=np.float64)
    for row in range(n_rows):
        if sums.link == LOGISTIC:
            values[1] = 1.0 / (1.0 + np.exp(-sums.slope * np.float64(totals[0, row])))
            values[0] = 1.0 - values[1]
        else:
            for k in range(n_columns):
                values[k] = totals[k, row] / sums.divisor
        winner = 0
        for k in range(1, n_columns):
            if values[k] > values[winner]:
                winner = k
        if sums.link == SOFTMAX:
            largest = values[winner]
            total = 0.0
            for k in range(n_columns):
                values[k] = np.exp(sums.slope * (values[k] - largest))
                total += values[k]
            for k in range(n_columns):
                values[k] /= total
        best = np.float32(values[winner])
        for k in range(n_columns):
            rounded = np.float32(values[k])
            out[columns[k], start + row] = rounded
            # Rounding can make an earlier class equal the winner; a step up keeps the winner the first maximum.
            if k < winner and rounded >= best:
                best = np.nextafter(rounded, np.float32(2))
        out[columns[winner], start + row] = best


@njit(nogil=True, cache=True)
def walk_forest(features: np.ndarray, tables: WalkTables, sums: SumTables, out: np.ndarray) -> None:
    """Write the probabilities (K, N) of features (F, N), which are float32 seen as int32."""
    n_features, n = features.shape
    keys = np.zeros((BATCH_ROWS, n_features), dtype=np.int32)
    leaves = np.zeros(BATCH_ROWS, dtype=np.uint32)
    totals = np.empty((sums.base.size, BATCH_ROWS), dtype=sums.leaf_values.dtype)
    for start in range(0, n, BATCH_ROWS):
        n_rows = min(BATCH_ROWS, n - start)
        n_walked = (n_rows + LANES - 1) // LANES * LANES
        _fill_keys(features, start, n_rows, keys)
        start_sums(sums, totals)
        for tree in range(sums.tree_output.size):
            first, stop = tables.tree_start[tree], tables.tree_start[tree + 1]
            _walk_tree(tables.nodes[first:stop], keys, n_walked, np.uint64(tables.feature_bits), leaves)
            for row in range(n_rows):
                leaves[row] = tables.leaf_row[first + leaves[row]]
            add_leaves(leaves, n_rows, tree, sums, totals)
        write_probabilities(totals, n_rows, sums, out, start)
