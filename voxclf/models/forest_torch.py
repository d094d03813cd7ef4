"""The packed forest as tensors: the same arrays and the same probabilities, on whatever device torch offers.

All rows and a group of trees go down one level at a time: gather the node, gather the value it asks for, compare,
take the child; leaves point at themselves, so every row takes the same number of steps and nothing branches. On a
GPU that keeps every lane busy; on a CPU `forest_kernels.py` and `forest_bytes.py` are many times faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from voxclf.models.packed_forest import PackedForest

# Node indices held at once (8 bytes each, some five such tensors): bounds memory at about 700 MB on a GPU.
_WALKERS_AT_ONCE = 1 << 24


class TorchForest:
    """A `PackedForest` whose arrays lie on a device, ready for many blocks.

    Parameters
    ----------
    forest : PackedForest
        The model.
    device : torch.device or str
        Where it is evaluated. A device without float64 (Apple's) sums in float32.
    """

    def __init__(self, forest: PackedForest, device: torch.device | str = "cpu") -> None:
        self.n_features = forest.n_features
        self.n_classes = forest.n_classes
        self.link = forest.link
        self.divisor = forest.divisor
        self.slope = forest.slope
        self.device = torch.device(device)
        self._group_depths = _depth_of_trees(forest)
        is_leaf = forest.feature < 0
        own = np.arange(forest.n_nodes)
        self._feature = self._put(np.where(is_leaf, 0, forest.feature), torch.int64)
        self._threshold = self._put(np.where(is_leaf, np.float32(np.inf), forest.threshold), torch.float32)
        self._child = self._put(np.where(is_leaf, own, forest.child), torch.int64)
        self._leaf_row = self._put(np.where(is_leaf, forest.child, 0), torch.int64)
        self._tree_start = self._put(forest.tree_start, torch.int64)
        is_double = forest.leaf_values.dtype == np.float64 and self.device.type != "mps"
        self._precision = torch.float64 if is_double else torch.float32
        self._leaf_values = self._put(forest.leaf_values, self._precision)
        self._tree_output = self._put(forest.tree_output, torch.int64)
        self._is_vector = bool((forest.tree_output < 0).all())
        self._base = self._put(forest.base, self._precision)
        self._classes = self._put(forest.classes, torch.int64)

    def predict_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities (K, N) of float32 features (F, N) on this forest's device.

        Returns
        -------
        Tensor of float32, shape (K, N)
            Equal to `PackedForest.predict_probabilities` within 1e-6: trees are added in another order.

        Raises
        ------
        ValueError
            If the features have another shape, dtype or device.
        """
        if features.ndim != 2 or features.shape[0] != self.n_features or features.dtype != torch.float32:
            raise ValueError(
                f"features has shape {tuple(features.shape)} and dtype {features.dtype}, but the model needs "
                f"float32 ({self.n_features}, N): one row per feature, one column per voxel"
            )
        if features.device.type != self.device.type:
            raise ValueError(
                f"features lie on {features.device}, but the forest on {self.device}; move them with features.to(...)"
            )
        n = features.shape[1]
        out = torch.zeros((self.n_classes, n), dtype=torch.float32, device=self.device)
        n_at_once = max(1, min(n, _WALKERS_AT_ONCE))
        for start in range(0, n, n_at_once):
            part = features[:, start : start + n_at_once]
            out[self._classes, start : start + n_at_once] = self._link(self._sums(part)).float()
        return out

    def _sums(self, features: torch.Tensor) -> torch.Tensor:
        """What all trees add, shape (n_outputs, N)."""
        n_rows = features.shape[1]
        sums = self._base[:, None].repeat(1, n_rows)
        rows = torch.arange(n_rows, device=self.device)
        n_trees = self._tree_output.numel()
        group = max(1, _WALKERS_AT_ONCE // max(1, n_rows))
        for first in range(0, n_trees, group):
            stop = min(first + group, n_trees)
            node = self._tree_start[first:stop, None].repeat(1, n_rows)
            for _ in range(max(self._group_depths[first:stop])):
                goes_right = features[self._feature[node], rows] > self._threshold[node]
                node = self._child[node] + goes_right
            leaf = self._leaf_row[node]
            if self._is_vector:
                for of_tree in leaf:
                    sums += self._leaf_values[of_tree].T
            else:
                sums.index_add_(0, self._tree_output[first:stop], self._leaf_values[leaf, 0])
        return sums

    def _link(self, sums: torch.Tensor) -> torch.Tensor:
        if self.link == "logistic":
            positive = torch.sigmoid(self.slope * sums[0])
            return torch.stack([1 - positive, positive])
        if self.link == "softmax":
            return torch.softmax(self.slope * (sums / self.divisor), dim=0)
        return sums / self.divisor

    def _put(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        # A copy, because the forest's own arrays are read-only and torch would share their memory.
        return torch.from_numpy(np.array(array)).to(dtype).to(self.device)


def predict_probabilities_torch(forest: PackedForest, features: torch.Tensor) -> torch.Tensor:
    """Class probabilities (K, N) of features (F, N), on the device that the features lie on.

    Copies the forest to that device first; keep a `TorchForest` to evaluate many blocks.
    """
    return TorchForest(forest, features.device).predict_probabilities(features)


def _depth_of_trees(forest: PackedForest) -> list[int]:
    from voxclf.models.forest_kernels import node_depths

    depth: np.ndarray = np.maximum.reduceat(node_depths(forest.feature, forest.child), forest.tree_start[:-1])
    return [int(levels) for levels in depth]
