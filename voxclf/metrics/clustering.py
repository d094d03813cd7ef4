"""How well unnamed groups (the components of a Gaussian mixture) agree with the drawn classes.

Groups have no names, so confusion-matrix scores do not apply; mutual information and the adjusted Rand index
read the contingency table, which adds up over blocks like all tables here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def contingency_block(
    truth: NDArray[np.integer], groups: NDArray[np.integer], n_classes: int, n_groups: int
) -> NDArray[np.int64]:
    """Count the labelled voxels of a block by true class and by group; add the tables of all blocks.

    Parameters
    ----------
    truth : ndarray of int, any shape
        Class indices 0 .. n_classes - 1; negative where unlabelled, which never counts.
    groups : ndarray of int, same shape
        Group of each voxel, 0 .. n_groups - 1.

    Returns
    -------
    ndarray of int64, shape (n_classes, n_groups)

    Raises
    ------
    ValueError
        If shapes differ or an index is out of range.
    """
    if truth.shape != groups.shape:
        raise ValueError(
            f"groups has shape {groups.shape}, truth {truth.shape}; they must be of one shape: score the "
            "same region of both"
        )
    labelled = truth >= 0
    rows, columns = truth[labelled].astype(np.int64), groups[labelled].astype(np.int64)
    if rows.size and (rows.max() >= n_classes or columns.min() < 0 or columns.max() >= n_groups):
        raise ValueError(
            f"labelled voxels run up to class {rows.max()} and from group {columns.min()} to "
            f"{columns.max()}; allowed are classes 0 to {n_classes - 1} and groups 0 to {n_groups - 1}"
        )
    cells = np.bincount(rows * n_groups + columns, minlength=n_classes * n_groups)
    return cells.reshape(n_classes, n_groups).astype(np.int64)


def mutual_information(table: NDArray[np.integer]) -> float:
    """Tell how much knowing a voxel's group says about its class, in nats; 0 means nothing.

    Takes the table of :func:`contingency_block`. The sum of p_ij ln(p_ij / (p_i p_j)) is at most the entropy of the
    classes; nan for an empty table.
    """
    joint = table.astype(np.float64)
    total = joint.sum()
    if total == 0:
        return float("nan")
    joint /= total
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    filled = joint > 0
    return max(0.0, float((joint[filled] * np.log(joint[filled] / independent[filled])).sum()))


def adjusted_rand_index(table: NDArray[np.integer]) -> float:
    """Tell how often pairs of voxels are together in both or apart in both, beyond chance.

    Takes the table of :func:`contingency_block`. 1 for the same partition, about 0 for a random one, negative for worse
    than chance (Hubert & Arabie, "Comparing partitions", Journal of Classification 2, 1985); nan for fewer than two
    voxels.
    """

    def pairs(counts: NDArray[np.float64]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    # float64: the pairs among 1e10 voxels do not fit int64.
    counts = table.astype(np.float64)
    total = counts.sum()
    if total < 2:
        return float("nan")
    together, rows, columns = pairs(counts), pairs(counts.sum(axis=1)), pairs(counts.sum(axis=0))
    expected = rows * columns / (total * (total - 1) / 2)
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)
