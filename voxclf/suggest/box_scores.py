"""What a box of voxels would teach a model: its uncertainty, its rarity, and how unlike it is to boxes chosen before.

*Uncertainty* is the mean entropy of the class probabilities over ln K: 0 where the model is sure, 1 where it knows
nothing. Entropy and not the margin of the best two classes, because it also sees doubt among three, and because a
sum over classes is one table lookup per stored probability. *Rarity* is the weight of the predicted class, averaged
over the box in proportion to the entropy, so that uncertainty x rarity is the mean of entropy x weight: a rare class
that the model is sure of does not lift a box. *Diversity* discounts what lies near, or looks like, a box chosen
before; choosing greedily by it is k-means++ without the dice.

Everything that is summed over voxels is a whole number, so scores depend neither on blocks nor on workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from voxclf.geometry import Block, VoxelSize, Zyx, round_down
from voxclf.labels import LabelSet
from voxclf.probabilities import UINT8_LEVELS
from voxclf.provenance import IntensityStatistics

LARGEST_DEFAULT_BOX, SMALLEST_DEFAULT_BOX = 64, 16
"""Width of a default box in voxels of the plane: 64 where the volume is at least eight times as wide."""
UINT16_LEVELS = 65535
ENTROPY_ONE = 1 << 16
"""The largest entropy, ln K, in the units that are summed."""
INTENSITY_ONE, INTENSITY_LIMIT = 64, 16
"""One standard deviation of the volume in the units that are summed; rarer intensities count as 16 of them."""
LEAST_SHARE = 1e-3
"""Share below which a class counts as no rarer: one stray label would otherwise outweigh everything else."""
LEAST_CANDIDATES, CANDIDATES_PER_BOX = 512, 25
SPACE_REACH = 2.0
"""Boxes this many box widths apart, centre to centre, no longer discount each other for being near."""
LOOKS_REACH = 0.25
"""Distance of signatures from which boxes no longer count as alike; identical probabilities and texture have 0."""
LOOKS_FLOOR = 0.5
"""What is left of a far box that looks the same: instances of a rare class look alike and one wants several."""


@dataclass(frozen=True, eq=False)
class BoxTable:
    """The best boxes of some blocks; tables add up and keep the best ``limit``.

    N boxes, K classes. Leaders, the best of their neighbourhood, come before all others, so that one large doubtful
    region cannot fill the table; in a volume with room for every box this changes nothing.

    Parameters
    ----------
    start, stop : ndarray of int64, shape (3, N)
        The boxes, voxels (z, y, x).
    entropy : ndarray of int64, shape (K, N)
        Entropy summed over the voxels predicted as each class, in units of 1 / ENTROPY_ONE.
    probability : ndarray of float64, shape (K, N)
        Mean probabilities.
    texture : ndarray of float64, shape (2, N)
        Mean and standard deviation of the intensity, in standard deviations of the volume; 0 without a volume.
    score : ndarray of float64, shape (N,)
        Uncertainty x rarity.
    is_leader : ndarray of bool, shape (N,)
    limit, n_open, n_labelled : int
        How many are kept, how many there were, and how many were left out because they hold labels.
    """

    start: np.ndarray
    stop: np.ndarray
    entropy: np.ndarray
    probability: np.ndarray
    texture: np.ndarray
    score: np.ndarray
    is_leader: np.ndarray
    limit: int
    n_open: int
    n_labelled: int

    _ARRAYS = ("start", "stop", "entropy", "probability", "texture", "score", "is_leader")

    def __add__(self, other: BoxTable) -> BoxTable:
        joined = {
            name: np.concatenate([getattr(self, name), getattr(other, name)], axis=-1) for name in BoxTable._ARRAYS
        }
        return BoxTable(
            **joined,
            limit=self.limit,
            n_open=self.n_open + other.n_open,
            n_labelled=self.n_labelled + other.n_labelled,
        ).best()

    def best(self) -> BoxTable:
        """Sort by leadership, score and position, and keep the first ``limit``."""
        z, y, x = self.start
        order = np.lexsort((x, y, z, -self.score, ~self.is_leader))[: self.limit]
        kept = {name: getattr(self, name)[..., order] for name in BoxTable._ARRAYS}
        return BoxTable(**kept, limit=self.limit, n_open=self.n_open, n_labelled=self.n_labelled)

    @property
    def n_voxels(self) -> np.ndarray:
        """Voxels of each box, shape (N,)."""
        return np.prod(self.stop - self.start, axis=0)

    @property
    def uncertainty(self) -> np.ndarray:
        """Mean entropy of each box over ln K, 0 to 1, shape (N,)."""
        return self.entropy.sum(axis=0) / (self.n_voxels * ENTROPY_ONE)


@dataclass(frozen=True)
class ScoreFold:
    """Scores the boxes of one block from its probabilities and predicted labels.

    Parameters
    ----------
    box, cell : (z, y, x)
        Shape of a box and of a neighbourhood of boxes, voxels; a cell is whole boxes, a block's core whole cells.
    label_set : LabelSet
        The K classes.
    weights : tuple of float, length K
        Weight of each predicted class, see :func:`rarity_weights`.
    limit : int
        Boxes kept.
    unlabelled : int, optional
        If given, a label volume follows the predicted labels, and boxes that hold labels are left out.
    intensity : IntensityStatistics, optional
        If given, the image follows last.
    """

    box: Zyx
    cell: Zyx
    label_set: LabelSet
    weights: tuple[float, ...]
    limit: int
    unlabelled: int | None = None
    intensity: IntensityStatistics | None = None

    def __call__(self, block: Block, probabilities: np.ndarray, predicted: np.ndarray, *others: np.ndarray) -> BoxTable:
        """Score a block; arrays are (K, Z, Y, X) and (1, Z, Y, X), without halo."""
        remaining = list(others)
        cuts = [_cuts(a, b, size) for a, b, size in zip(block.core.start, block.core.stop, self.box, strict=True)]
        start, stop = _corners(cuts, block.core.stop)
        n_voxels = np.prod(stop - start, axis=0)
        levels, n_levels = _as_levels(probabilities)
        entropy = _entropy(levels, n_levels)
        indices = self.label_set.remap_to_indices(predicted[0])
        sums = np.stack([sum_boxes(np.where(indices == k, entropy, 0), cuts) for k in range(self.label_set.n_classes)])
        is_open = np.ones(len(n_voxels), bool)
        if self.unlabelled is not None:
            n_labelled = sum_boxes(remaining.pop(0)[0] != self.unlabelled, cuts)
            is_open = 2 * n_labelled < _smallest_face(start, stop)
        # A sliver at the edge of the volume has the mean of few voxels, and nothing to see around them.
        is_whole = (2 * (stop - start) >= np.array(self.box)[:, None]).all(axis=0)
        score = (sums * np.array(self.weights)[:, None]).sum(axis=0) / (n_voxels * ENTROPY_ONE)
        keep = is_open & is_whole
        return BoxTable(
            start[:, keep],
            stop[:, keep],
            sums[:, keep],
            np.stack([sum_boxes(of_class, cuts) for of_class in levels])[:, keep] / (n_voxels[keep] * n_levels),
            self._texture(remaining, cuts, n_voxels)[:, keep],
            score[keep],
            _find_leaders(start[:, keep], score[keep], self.cell),
            limit=self.limit,
            n_open=int(keep.sum()),
            n_labelled=int((is_whole & ~is_open).sum()),
        ).best()

    def _texture(self, images: list[np.ndarray], cuts: list[np.ndarray], n_voxels: np.ndarray) -> np.ndarray:
        if self.intensity is None:
            return np.zeros((2, len(n_voxels)))
        deviation = (images[0][0] - np.float64(self.intensity.mean)) / max(self.intensity.std, 1e-12)
        fixed = np.rint(np.clip(deviation, -INTENSITY_LIMIT, INTENSITY_LIMIT) * INTENSITY_ONE).astype(np.int32)
        mean = sum_boxes(fixed, cuts) / n_voxels
        square = sum_boxes(fixed * fixed, cuts) / n_voxels
        return np.stack([mean, np.sqrt(np.maximum(square - mean * mean, 0))]) / INTENSITY_ONE


def _cuts(start: int, stop: int, size: int) -> np.ndarray:
    """Where boxes begin between start and stop: at multiples of their size, and at the start."""
    return np.maximum(np.arange(round_down(start, size), stop, size), start)


def _corners(cuts: list[np.ndarray], core_stop: Zyx) -> tuple[np.ndarray, np.ndarray]:
    """First and last corners of the boxes between cuts, each (3, N), in C order."""
    ends = [np.append(cut[1:], stop) for cut, stop in zip(cuts, core_stop, strict=True)]
    start, stop = (np.stack(np.meshgrid(*edges, indexing="ij")).reshape(3, -1) for edges in (cuts, ends))
    return start, stop


def sum_boxes(array: np.ndarray, cuts: list[np.ndarray]) -> np.ndarray:
    """Sum whole numbers (Z, Y, X) over every box between cuts; int64, shape (N,) in C order of the boxes.

    Notes
    -----
    Whole numbers add up to the same sum in any order; that is what makes scores independent of blocks.
    """
    for axis in (2, 1, 0):  # the longest boxes first, where it shrinks the array most
        array = np.add.reduceat(array, cuts[axis] - cuts[axis][0], axis=axis, dtype=np.int64)
    return array.ravel()


def _as_levels(probabilities: np.ndarray) -> tuple[np.ndarray, int]:
    """Probabilities as whole numbers 0 .. n_levels: as stored, or floats rounded to 16 bits."""
    if probabilities.dtype == np.uint8:
        return probabilities, UINT8_LEVELS
    return np.rint(probabilities.astype(np.float32) * np.float32(UINT16_LEVELS)).astype(np.uint16), UINT16_LEVELS


def _entropy(levels: np.ndarray, n_levels: int) -> np.ndarray:
    """Entropy of every voxel over ln K in units of 1 / ENTROPY_ONE: int32, shape (Z, Y, X).

    Probabilities stored as uint8 are off by 0.002 at most, which moves the entropy of a sure voxel by 0.01 x K.
    """
    p = np.arange(n_levels + 1) / n_levels
    terms = -p * np.log(np.maximum(p, 1e-300)) / math.log(len(levels))
    table = np.rint(terms * ENTROPY_ONE).astype(np.int32)
    total = table[levels[0]]
    for of_class in levels[1:]:
        total += table[of_class]
    return np.minimum(total, ENTROPY_ONE)


def _smallest_face(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Voxels of the smallest plane through each box: half of that in labels makes a box a labelled one."""
    z, y, x = stop - start
    return np.minimum(np.minimum(y * x, z * x), z * y)


def _find_leaders(start: np.ndarray, score: np.ndarray, cell: Zyx) -> np.ndarray:
    """Which boxes have the best score of their cell; the first in C order wins a tie."""
    cz, cy, cx = start // np.array(cell)[:, None]
    order = np.lexsort((np.arange(len(score)), -score, cx, cy, cz))
    cells = np.stack([cz, cy, cx])[:, order]
    is_first = np.ones(len(score), bool)
    is_first[1:] = (cells[:, 1:] != cells[:, :-1]).any(axis=0)
    leaders = np.zeros(len(score), bool)
    leaders[order[is_first]] = True
    return leaders


def rarity_weights(counts: np.ndarray, is_predicted: np.ndarray) -> np.ndarray:
    """Weight of every class: 1 for the rarest that is predicted, by the root of the inverse frequency for others.

    The root, because with the inverse frequency itself a class a thousand times rarer would decide alone, and false
    alarms for it would fill the list. Classes below :data:`LEAST_SHARE` count as that frequent.

    Examples
    --------
    >>> rarity_weights(np.array([640, 160, 10]), np.array([True, True, True]))
    array([0.125, 0.25 , 1.   ])
    """
    share = np.maximum(counts / max(int(counts.sum()), 1), LEAST_SHARE)
    return np.sqrt(np.minimum(share[is_predicted].min() / share, 1))


def choose_boxes(table: BoxTable, n_boxes: int, voxel_size_nm: VoxelSize, reach_nm: float) -> list[tuple[int, float]]:
    """Choose boxes one by one, each the best once its likeness to those chosen before is taken off.

    Parameters
    ----------
    table : BoxTable
        The candidates.
    n_boxes : int
        How many, at most as many as there are.
    voxel_size_nm : (z, y, x)
    reach_nm : float
        Distance of centres from which boxes do not count as near.

    Returns
    -------
    list of (row of the table, diversity)
        In the order of the choice, scores falling. Diversity is the smallest, over the boxes chosen before, of
        nearness x likeness: 1 for a box that is far from all of them and looks like none.
    """
    centre = (table.start + table.stop) / 2 * np.array(voxel_size_nm)[:, None]
    # Half the squared distance of two probability vectors is at most 1; texture counts in the same units.
    signature = np.concatenate([table.probability * math.sqrt(0.5), table.texture / 2])
    diversity = np.ones(len(table.score))
    is_free = np.ones(len(table.score), bool)
    chosen: list[tuple[int, float]] = []
    for _ in range(n_boxes):
        row = int(np.argmax(np.where(is_free, table.score * diversity, -1)))
        is_free[row] = False
        chosen.append((row, float(diversity[row])))
        far = np.minimum(_distances(centre, row) / reach_nm, 1)
        unlike = np.minimum(_distances(signature, row) / LOOKS_REACH, 1)
        diversity = np.minimum(diversity, far * (LOOKS_FLOOR + (1 - LOOKS_FLOOR) * unlike))
    return chosen


def _distances(points: np.ndarray, row: int) -> np.ndarray:
    return np.sqrt(((points - points[:, [row]]) ** 2).sum(axis=0))


def choose_box_shape(
    region_shape: Zyx, voxel_size_nm: VoxelSize, box_size: Zyx | None = None, box_size_nm: VoxelSize | None = None
) -> Zyx:
    """Shape of a box in voxels: as asked for, else as long in nm along every axis, so flat where slices are thick.

    Raises
    ------
    ValueError
        If it was asked for both in voxels and in nm.
    """
    if box_size is not None and box_size_nm is not None:
        raise ValueError(
            f"--box-size was {box_size} and --box-size-nm {box_size_nm}; only one of them is allowed: leave one out"
        )
    if box_size_nm is None:
        width = min(max(min(region_shape[1:]) // 8, SMALLEST_DEFAULT_BOX), LARGEST_DEFAULT_BOX)
        side = width * min(voxel_size_nm[1:])
        box_size_nm = (side, side, side)
    wanted = box_size or [round(length / size) for length, size in zip(box_size_nm, voxel_size_nm, strict=True)]
    z, y, x = (min(max(w, 1), n) for w, n in zip(wanted, region_shape, strict=True))
    return z, y, x
