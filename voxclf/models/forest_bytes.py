"""The walk for forests with at most 255 thresholds per feature: every comparison is one byte against one byte.

Histogram boosting and `fit_trees.py` cut each feature at fewer than 256 places, so the number of thresholds
below a value, its code, decides every comparison exactly and fits one byte. That changes what is cheap:

1. The top of a tree is not walked: all its nodes are compared for all rows of a batch, bottom up, and each row
   keeps the number of the slot that it falls into. That is 2^levels comparisons instead of `levels`, but each
   handles a vector of 32 or more contiguous bytes without a gather, a branch or a wait: 0.02 ns per row and
   node, against 2 ns per row and level of a walk. So tops have 7 levels, or 8 where that is the whole tree.
2. Below, eight rows walk at once as in `forest_kernels.py`, with nodes of 4 bytes and rows of F bytes.

Comparisons are arithmetic on masks (0 or 255): from a conditional between two loads the compiler makes a branch
and then gives up on vectors, which is 20 times slower. For the same reason inner loops take whole arrays and
unsigned indices: a slice per node costs more in reference counts than its 4096 comparisons.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from voxclf.models.forest_kernels import SumTables, add_leaves, node_depths, start_sums, write_probabilities

# One byte holds the codes of 255 thresholds, and the number of one of 2^8 slots.
MAX_EDGES = 255
MOST_LEVELS = 8
TOP_LEVELS = 7
ALWAYS_LEFT = 255
BATCH_ROWS = 4096
LANES = 8
_BYTE = np.uint32(255)


class ByteTables(NamedTuple):
    """A forest as `walk_bytes` reads it."""

    edges: np.ndarray  # float32 (F, 256): thresholds of each feature, rising, then infinity
    top_start: np.ndarray  # int64 (T + 1,): where the tops of the trees lie in the next three
    top_feature: np.ndarray  # int32: heap order, node 1 is the root, children of h are 2 h and 2 h + 1
    top_cut: np.ndarray  # uint8: right where code > cut
    entry: np.ndarray  # int32: per slot, a row of leaf_values, or the node where the walk goes on
    is_deep: np.ndarray  # bool (T,): whether the tree goes on below its top
    nodes: np.ndarray  # uint32: left child within its tree, feature, cut
    leaf_row: np.ndarray  # int32 per node: row of leaf_values
    tree_start: np.ndarray  # int64 (T + 1,)
    feature_bits: int


def make_byte_tables(
    feature: np.ndarray, threshold: np.ndarray, child: np.ndarray, tree_start: np.ndarray, n_features: int
) -> ByteTables | None:
    """Lay out a forest for `walk_bytes`, or None where it has too many thresholds or too large trees."""
    coded = _encode_thresholds(feature, threshold, n_features)
    is_leaf = feature < 0
    bits = max(1, (n_features - 1).bit_length())
    left = np.where(is_leaf, np.arange(feature.size), child) - np.repeat(tree_start[:-1], np.diff(tree_start))
    if coded is None or left.max() >= 1 << max(0, 24 - bits):
        return None
    edges, cut = coded
    depth = np.maximum.reduceat(node_depths(feature, child), tree_start[:-1])
    levels = np.where(depth <= MOST_LEVELS, np.maximum(depth, 1), TOP_LEVELS)
    top_start = np.concatenate([[0], np.cumsum(1 << levels)]).astype(np.int64)
    top_feature = np.zeros(top_start[-1], dtype=np.int32)
    top_cut = np.full(top_start[-1], ALWAYS_LEFT, dtype=np.uint8)
    entry = np.zeros(top_start[-1], dtype=np.int32)
    is_deep = depth > levels
    _lay_out_tops(feature, child, cut, tree_start, is_deep, top_start, top_feature, top_cut, entry)
    payload = (left.astype(np.uint32) << np.uint32(bits)) | np.maximum(feature, 0).astype(np.uint32)
    return ByteTables(
        edges=edges,
        top_start=top_start,
        top_feature=top_feature,
        top_cut=top_cut,
        entry=entry,
        is_deep=is_deep,
        nodes=(payload << np.uint32(8)) | cut,
        leaf_row=np.where(is_leaf, child, 0).astype(np.int32),
        tree_start=tree_start,
        feature_bits=bits,
    )


def _encode_thresholds(
    feature: np.ndarray, threshold: np.ndarray, n_features: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges of each feature and the place of each node's threshold among them; None if a byte is too small."""
    edges = np.full((n_features, 256), np.inf, dtype=np.float32)
    cut = np.full(feature.size, ALWAYS_LEFT, dtype=np.uint8)
    by_feature = np.argsort(feature, kind="stable")
    bounds = np.searchsorted(feature[by_feature], np.arange(n_features + 1))
    for index in range(n_features):
        nodes = by_feature[bounds[index] : bounds[index + 1]]
        distinct, place = np.unique(threshold[nodes], return_inverse=True)
        if distinct.size > MAX_EDGES:
            return None
        edges[index, : distinct.size] = distinct
        cut[nodes] = place
    return edges, cut


@njit(nogil=True, cache=True)
def _lay_out_tops(
    feature: np.ndarray,
    child: np.ndarray,
    cut: np.ndarray,
    tree_start: np.ndarray,
    is_deep: np.ndarray,
    top_start: np.ndarray,
    top_feature: np.ndarray,
    top_cut: np.ndarray,
    entry: np.ndarray,
) -> None:
    """Copy the top of every tree into heap order; below a leaf, both sides are that leaf again."""
    node_at = np.empty(1 << (MOST_LEVELS + 1), dtype=np.int64)
    for tree in range(is_deep.size):
        first = top_start[tree]
        size = top_start[tree + 1] - first
        root = tree_start[tree]
        node_at[1] = root
        for h in range(1, size):
            node = node_at[h]
            node_at[2 * h] = node
            node_at[2 * h + 1] = node
            if feature[node] >= 0:
                top_feature[first + h] = feature[node]
                top_cut[first + h] = cut[node]
                node_at[2 * h] = child[node]
                node_at[2 * h + 1] = child[node] + 1
        for slot in range(size):
            node = node_at[size + slot]
            entry[first + slot] = node - root if is_deep[tree] else child[node]


@njit(nogil=True, cache=True)
def _encode(features: np.ndarray, start: int, n_rows: int, edges: np.ndarray, codes: np.ndarray) -> None:
    """Code of a value: how many of its feature's edges lie below it; by bisection without branches."""
    for feature in range(features.shape[0]):
        values = features[feature]
        limits = edges[feature]
        for row in range(n_rows):
            value = values[start + row]
            code = np.uint32(0)
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                code += np.uint32(limits[code + np.uint32(step - 1)] < value) * np.uint32(step)
            codes[feature, row] = np.uint8(code)


@njit(nogil=True, cache=True)
def _transpose(codes: np.ndarray, n_rows: int, rows: np.ndarray) -> None:
    for feature in range(codes.shape[0]):
        for row in range(n_rows):
            rows[row, feature] = codes[feature, row]


@njit(nogil=True, cache=True)
def _split(codes: np.ndarray, feature: int, cut: int, slot: int, out: np.ndarray, place: int, n_rows: int) -> None:
    """Slot of each row below one node: ``slot`` or ``slot`` + 1, into ``out[place]``."""
    own, to, low = np.uintp(feature), np.uintp(place), np.uint8(slot)
    for row in range(n_rows):
        out[to, row] = np.uint8(low - np.uint8(-np.int8(codes[own, row] > cut)))


@njit(nogil=True, cache=True)
def _choose(
    codes: np.ndarray, feature: int, cut: int, below: np.ndarray, level: int, out: np.ndarray, place: int, n_rows: int
) -> None:
    """Take the slot of the right subtree where the code is above the cut, else of the left one."""
    own, low, high, to = np.uintp(feature), np.uintp(level), np.uintp(level + 1), np.uintp(place)
    for row in range(n_rows):
        kept = below[low, row]
        right = np.uint8(-np.int8(codes[own, row] > cut))
        out[to, row] = np.uint8(kept ^ ((kept ^ below[high, row]) & right))


@njit(nogil=True, cache=True)
def _fall_through_top(
    codes: np.ndarray,
    n_rows: int,
    first: int,
    size: int,
    feature: np.ndarray,
    cut: np.ndarray,
    even: np.ndarray,
    odd: np.ndarray,
) -> None:
    """Slot of each row below the top of a tree, into ``even[1]``.

    Subtrees are finished from left to right and merged as soon as both sides are known, so that the slots on the
    way stay in the cache: those of level l are rows l and l + 1 of ``even`` or ``odd``, never of the array that
    is being read, because memory that may be both input and output would cost the vectors.
    """
    n_bottom = size >> 1
    bottom = 0
    while (1 << bottom) < n_bottom:
        bottom += 1
    for j in range(n_bottom):
        h = n_bottom + j
        level = bottom
        if level & 1 == 0:
            _split(codes, feature[first + h], cut[first + h], 2 * j, even, level + (h & 1), n_rows)
        else:
            _split(codes, feature[first + h], cut[first + h], 2 * j, odd, level + (h & 1), n_rows)
        while h & 1 == 1 and h > 1:
            h >>= 1
            level -= 1
            if level & 1 == 0:
                _choose(codes, feature[first + h], cut[first + h], odd, level + 1, even, level + (h & 1), n_rows)
            else:
                _choose(codes, feature[first + h], cut[first + h], even, level + 1, odd, level + (h & 1), n_rows)


@njit(nogil=True, cache=True, inline="always")
def _next_node(
    node: np.uint32, nodes: np.ndarray, root: np.uintp, rows: np.ndarray, row: int, bits: np.uint32
) -> np.uint32:
    packed = nodes[root + node]
    payload = packed >> np.uint32(8)
    feature = payload & ((np.uint32(1) << bits) - np.uint32(1))
    return np.uint32((payload >> bits) + np.uint32(np.uint32(rows[row, feature]) > (packed & _BYTE)))


@njit(nogil=True, cache=True)
def _walk_below(
    nodes: np.ndarray, tree_start: int, rows: np.ndarray, n_rows: int, bits: np.uint32, leaves: np.ndarray
) -> None:
    """Follow each row from the node in ``leaves`` to its leaf, in place; ``n_rows`` is a multiple of LANES."""
    root = np.uintp(tree_start)
    for row in range(0, n_rows, LANES):
        a, b, c, d = leaves[row], leaves[row + 1], leaves[row + 2], leaves[row + 3]
        e, f, g, h = leaves[row + 4], leaves[row + 5], leaves[row + 6], leaves[row + 7]
        moved = True
        while moved:
            a1 = _next_node(a, nodes, root, rows, row, bits)
            b1 = _next_node(b, nodes, root, rows, row + 1, bits)
            c1 = _next_node(c, nodes, root, rows, row + 2, bits)
            d1 = _next_node(d, nodes, root, rows, row + 3, bits)
            e1 = _next_node(e, nodes, root, rows, row + 4, bits)
            f1 = _next_node(f, nodes, root, rows, row + 5, bits)
            g1 = _next_node(g, nodes, root, rows, row + 6, bits)
            h1 = _next_node(h, nodes, root, rows, row + 7, bits)
            a = _next_node(a1, nodes, root, rows, row, bits)
            b = _next_node(b1, nodes, root, rows, row + 1, bits)
            c = _next_node(c1, nodes, root, rows, row + 2, bits)
            d = _next_node(d1, nodes, root, rows, row + 3, bits)
            e = _next_node(e1, nodes, root, rows, row + 4, bits)
            f = _next_node(f1, nodes, root, rows, row + 5, bits)
            g = _next_node(g1, nodes, root, rows, row + 6, bits)
            h = _next_node(h1, nodes, root, rows, row + 7, bits)
            moved = ((a ^ a1) | (b ^ b1) | (c ^ c1) | (d ^ d1) | (e ^ e1) | (f ^ f1) | (g ^ g1) | (h ^ h1)) != 0
        leaves[row], leaves[row + 1], leaves[row + 2], leaves[row + 3] = a, b, c, d
        leaves[row + 4], leaves[row + 5], leaves[row + 6], leaves[row + 7] = e, f, g, h


@njit(nogil=True, cache=True)
def walk_bytes(features: np.ndarray, tables: ByteTables, sums: SumTables, out: np.ndarray) -> None:
    """Write the probabilities (K, N) of float32 features (F, N)."""
    n_features, n = features.shape
    codes = np.zeros((n_features, BATCH_ROWS), dtype=np.uint8)
    rows = np.zeros((BATCH_ROWS, n_features), dtype=np.uint8)
    even = np.zeros((MOST_LEVELS + 1, BATCH_ROWS), dtype=np.uint8)
    odd = np.zeros((MOST_LEVELS + 1, BATCH_ROWS), dtype=np.uint8)
    leaves = np.zeros(BATCH_ROWS, dtype=np.uint32)
    totals = np.empty((sums.base.size, BATCH_ROWS), dtype=sums.leaf_values.dtype)
    any_deep = tables.is_deep.any()
    for start in range(0, n, BATCH_ROWS):
        n_rows = min(BATCH_ROWS, n - start)
        n_walked = (n_rows + LANES - 1) // LANES * LANES
        _encode(features, start, n_rows, tables.edges, codes)
        if any_deep:
            _transpose(codes, n_walked, rows)
        start_sums(sums, totals)
        for tree in range(sums.tree_output.size):
            first = tables.top_start[tree]
            size = tables.top_start[tree + 1] - first
            _fall_through_top(codes, n_rows, first, size, tables.top_feature, tables.top_cut, even, odd)
            for row in range(n_walked):
                leaves[row] = tables.entry[first + even[1, row]]
            if tables.is_deep[tree]:
                root = tables.tree_start[tree]
                _walk_below(tables.nodes, root, rows, n_walked, np.uint32(tables.feature_bits), leaves)
                for row in range(n_rows):
                    leaves[row] = tables.leaf_row[root + leaves[row]]
            add_leaves(leaves, n_rows, tree, sums, totals)
        write_probabilities(totals, n_rows, sums, out, start)
