"""Voxel by voxel scores of a classification, from tables that add up over blocks.

Two steps, so that a volume of any size is scored in the memory of one block:

1. `score_block` counts one block into a `ScoreTables`; tables of different blocks are added with ``+``
   (`reduce_blocks` in the engine does that).
2. `score_tables` turns the summed tables into scores. Because counts are summed before anything is averaged,
   the scores of many blocks are exactly the scores of the whole volume.

Which voxels and classes count. Unlabelled voxels never count. A class without a single true voxel has no
recall, IoU or average precision: it is nan in the per-class arrays, left out of every macro mean, and listed
in `Scores.absent`; voxels wrongly given to it still cost the other classes recall. This is scikit-learn's
answer with ``labels=`` the classes present in the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

#: Probabilities are stored as uint8, so 256 levels (p = level / 255) count them without any loss.
DEFAULT_LEVELS = 256

# Float predictions may leave [0, 1] by rounding; anything further out is a mistake in the caller.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class ScoreTables:
    """What has to be counted to score a classification; tables of several blocks are added with ``+``.

    Parameters
    ----------
    confusion : ndarray of int64, shape (K, K)
        Labelled voxels by true class (row) and predicted class (column).
    class_levels, other_levels : ndarray of int64, shape (K, L)
        Labelled voxels by predicted probability of class k, rounded to L levels (p = level / (L - 1)):
        voxels that truly are class k, and voxels of all other classes. All zero where only labels were
        scored.
    """

    confusion: NDArray[np.int64]
    class_levels: NDArray[np.int64]
    other_levels: NDArray[np.int64]

    def __post_init__(self) -> None:
        K = len(self.confusion)
        if self.confusion.shape != (K, K) or self.class_levels.shape != self.other_levels.shape:
            raise ValueError(
                f"confusion {self.confusion.shape}, class_levels {self.class_levels.shape} and other_levels "
                f"{self.other_levels.shape} must be (K, K), (K, L) and (K, L); build them with score_block"
            )
        if len(self.class_levels) != K or self.class_levels.shape[1] < 2:
            raise ValueError(
                f"class_levels has shape {self.class_levels.shape}, expected ({K}, L) with L >= 2 levels; "
                "build tables with score_block"
            )
        n_with = self.class_levels.sum(axis=1) + self.other_levels.sum(axis=1)
        if n_with.any() and (n_with != self.confusion.sum()).any():
            raise ValueError(
                f"tables hold {self.confusion.sum()} labelled voxels but probabilities of {n_with.tolist()} "
                "(per class): some blocks were scored with probabilities and some without; score all alike"
            )

    def __add__(self, other: ScoreTables) -> ScoreTables:
        if self.class_levels.shape != other.class_levels.shape:
            raise ValueError(
                f"tables of shape {self.class_levels.shape} and {other.class_levels.shape} (classes, levels) "
                "cannot be added; score every block with the same classes and n_levels"
            )
        return ScoreTables(
            self.confusion + other.confusion,
            self.class_levels + other.class_levels,
            self.other_levels + other.other_levels,
        )

    @classmethod
    def zeros(cls, n_classes: int, n_levels: int = DEFAULT_LEVELS) -> ScoreTables:
        """Return empty tables, the start of a sum."""
        levels = (n_classes, n_levels)
        return cls(np.zeros((n_classes, n_classes), np.int64), np.zeros(levels, np.int64), np.zeros(levels, np.int64))

    @property
    def n_classes(self) -> int:
        """Number of classes K."""
        return len(self.confusion)

    @property
    def n_levels(self) -> int:
        """Number of probability levels L."""
        return self.class_levels.shape[1]

    @property
    def n_voxels(self) -> int:
        """Labelled voxels counted."""
        return int(self.confusion.sum())

    @property
    def support(self) -> NDArray[np.int64]:
        """Labelled voxels of each class, ndarray of int64, shape (K,)."""
        return self.confusion.sum(axis=1)

    @property
    def has_probabilities(self) -> bool:
        """Whether probabilities were counted, so that average precision and calibration can be told."""
        return bool(self.class_levels.any() or self.other_levels.any())

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as lists for JSON; :meth:`from_dict` reads them back."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreTables:
        """Read tables from the lists of :meth:`to_dict`."""
        return cls(**{field.name: np.array(values[field.name], np.int64) for field in fields(cls)})


def to_levels(probabilities: NDArray, n_levels: int = DEFAULT_LEVELS) -> NDArray[np.int64]:
    """Round probabilities to the nearest of `n_levels` equally spaced levels, p = level / (n_levels - 1)."""
    if probabilities.dtype == np.uint8:
        return probabilities.astype(np.int64)
    scaled = np.clip(probabilities.astype(np.float64), 0.0, 1.0) * (n_levels - 1)
    return (scaled + 0.5).astype(np.int64)


def score_block(
    truth: NDArray[np.integer],
    probabilities: NDArray | None,
    predicted: NDArray[np.integer] | None,
    n_classes: int,
    n_levels: int = DEFAULT_LEVELS,
) -> ScoreTables:
    """Count how the prediction of one block agrees with the labels drawn there.

    Parameters
    ----------
    truth : ndarray of int, shape (Z, Y, X) or any other
        Class indices 0 .. K-1; negative where unlabelled (as `LabelSet.remap_to_indices` gives them).
    probabilities : ndarray, shape (K, *truth.shape), or None
        Float in [0, 1], or uint8 meaning p = value / 255. None counts the confusion only.
    predicted : ndarray of int, same shape as truth, or None
        Predicted class indices 0 .. K-1. None takes the most probable class (the lowest index among equals).
    n_classes : int
        Number of classes K.
    n_levels : int
        Levels that float probabilities are rounded to; uint8 ones need 256. More levels tell apart smaller
        probabilities, which matters for classes of less than a percent of the voxels.

    Returns
    -------
    ScoreTables
        To be added to those of other blocks.

    Raises
    ------
    ValueError
        If shapes do not match, an index is out of range, or a probability is nan or outside [0, 1].

    Notes
    -----
    One pass over the block; unlabelled voxels cost a comparison. Extra memory is the tables only.
    """
    truth = np.asarray(truth)
    _check_block(truth, probabilities, predicted, n_classes, n_levels)
    if predicted is None:
        assert probabilities is not None
        predicted = probabilities.argmax(axis=0)
    tables = ScoreTables.zeros(n_classes, n_levels)
    flat_truth, flat_predicted = np.ravel(truth), np.ravel(predicted)
    if _count_confusion(flat_truth, flat_predicted, tables.confusion):
        _raise_bad_indices(truth, predicted, n_classes)
    if probabilities is None:
        return tables
    rows = probabilities.reshape(n_classes, -1)
    if _count_levels(flat_truth, rows, _scale(rows, n_levels), tables.class_levels, tables.other_levels):
        labelled = rows[:, flat_truth >= 0]
        raise ValueError(
            f"probabilities of labelled voxels run from {labelled.min()} to {labelled.max()}, allowed are "
            "0 to 1 without nan; pass probabilities after softmax, or uint8 with 255 meaning 1"
        )
    return ScoreTables(tables.confusion, tables.class_levels, tables.other_levels)


def _check_block(
    truth: NDArray, probabilities: NDArray | None, predicted: NDArray | None, n_classes: int, n_levels: int
) -> None:
    if truth.dtype.kind not in "iu":
        raise ValueError(f"truth must be integer class indices, got dtype {truth.dtype}; use LabelSet.remap_to_indices")
    if probabilities is None and predicted is None:
        raise ValueError("probabilities and predicted are both None; pass at least one of them")
    if predicted is not None and predicted.shape != truth.shape:
        raise ValueError(
            f"predicted has shape {predicted.shape}, truth {truth.shape}; they must be of one shape: score "
            "the same region of both"
        )
    if probabilities is None:
        return
    if probabilities.shape != (n_classes, *truth.shape):
        raise ValueError(
            f"probabilities has shape {probabilities.shape}, expected {(n_classes, *truth.shape)}: one "
            "channel per class first, then the shape of truth"
        )
    if probabilities.dtype == np.uint8 and n_levels != DEFAULT_LEVELS:
        raise ValueError(f"n_levels is {n_levels} but uint8 probabilities have exactly 256; leave it at 256")
    if probabilities.dtype != np.uint8 and probabilities.dtype.kind != "f":
        raise ValueError(
            f"probabilities have dtype {probabilities.dtype}, allowed are float (0 to 1) and uint8 (p = "
            "value / 255); convert them"
        )


def _scale(rows: NDArray, n_levels: int) -> float:
    return 1.0 if rows.dtype == np.uint8 else float(n_levels - 1)


def _raise_bad_indices(truth: NDArray, predicted: NDArray, n_classes: int) -> None:
    labelled = predicted[truth >= 0]
    raise ValueError(
        f"class indices of labelled voxels run up to {truth.max()} in truth and from {labelled.min()} to "
        f"{labelled.max()} in predicted, allowed are 0 to {n_classes - 1}; map label ids with "
        "LabelSet.remap_to_indices, and predict a class for every labelled voxel"
    )


@njit(cache=True, nogil=True)
def _count_confusion(truth: NDArray, predicted: NDArray, confusion: NDArray[np.int64]) -> bool:
    """Add voxels to `confusion`; True if an index is out of its range."""
    n_rows, n_columns = confusion.shape
    for i in range(truth.size):
        row = truth[i]
        if row < 0:
            continue
        column = predicted[i]
        if row >= n_rows or column < 0 or column >= n_columns:
            return True
        confusion[row, column] += 1
    return False


@njit(cache=True, nogil=True)
def _count_levels(
    truth: NDArray,
    rows: NDArray,
    scale: float,
    class_levels: NDArray[np.int64],
    other_levels: NDArray[np.int64],
) -> bool:
    """Add voxels to the level tables, class by class so that rows are read in order; True on a bad value."""
    top = class_levels.shape[1] - 1
    for k in range(rows.shape[0]):
        row = rows[k]
        for i in range(truth.size):
            if truth[i] < 0:
                continue
            scaled = float(row[i]) * scale
            # Written so that nan fails too.
            if not (-_ROUNDING * top <= scaled <= (1 + _ROUNDING) * top):
                return True
            level = min(max(int(scaled + 0.5), 0), top)
            if truth[i] == k:
                class_levels[k, level] += 1
            else:
                other_levels[k, level] += 1
    return False


@dataclass(frozen=True)
class Scores:
    """All voxelwise scores of one prediction.

    Scalars lie in [0, 1] unless said otherwise and are nan where undefined (no labelled voxel, or no
    probabilities counted). Arrays have shape (K,), nan for classes absent from the truth.

    Parameters
    ----------
    n_voxels : int
        Labelled voxels scored.
    accuracy : float
        Share of labelled voxels given their true class.
    kappa : float
        Cohen's kappa, agreement beyond chance: (p_o - p_e) / (1 - p_e), in [-1, 1].
    macro_f1, macro_precision, macro_recall : float
        Means over the classes present; recall is also known as balanced accuracy.
    mean_iou, mean_dice : float
        Means over the classes present. A class's Dice is its F1, so mean_dice equals macro_f1.
    macro_average_precision : float
        Mean over the classes present of the area under the precision-recall curve, one class against the
        rest.
    log_loss : float
        Mean of -ln(probability given to the true class), in nats; probability 0 counts as half a level.
    brier : float
        Mean over voxels of the squared distance between probabilities and truth, in [0, 2].
    precision, recall, f1, iou, average_precision : ndarray of float64, shape (K,)
        Per class: TP / (TP + FP); TP / (TP + FN); 2 TP / (2 TP + FP + FN); TP / (TP + FP + FN); see above.
    support, predicted : ndarray of int64, shape (K,)
        Labelled voxels that are, and that were predicted to be, each class.
    """

    n_voxels: int
    accuracy: float
    kappa: float
    macro_f1: float
    macro_precision: float
    macro_recall: float
    mean_iou: float
    mean_dice: float
    macro_average_precision: float
    log_loss: float
    brier: float
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    iou: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    support: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @property
    def absent(self) -> tuple[int, ...]:
        """Indices of the classes without a true voxel, which no mean includes."""
        return tuple(np.flatnonzero(self.support == 0).tolist())

    @property
    def dice(self) -> NDArray[np.float64]:
        """Dice coefficient per class; the same number as its F1."""
        return self.f1

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers and lists for JSON, None where a score is undefined."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = (
                [finite_or_none(v) for v in value.tolist()] if isinstance(value, np.ndarray) else finite_or_none(value)
            )
        return values


def finite_or_none(value: float) -> float | None:
    """None for nan: JSON has no nan."""
    return None if value != value else value


#: The scalar scores, in the order in which they are shown.
SCALAR_SCORES = (
    "macro_f1",
    "macro_average_precision",
    "kappa",
    "accuracy",
    "mean_iou",
    "mean_dice",
    "macro_precision",
    "macro_recall",
    "log_loss",
    "brier",
)


def score_tables(tables: ScoreTables) -> Scores:
    """Turn counts into scores.

    Parameters
    ----------
    tables : ScoreTables
        The sum over all blocks.

    Returns
    -------
    Scores
        See there for each definition and for what is nan.
    """
    batch = score_batch(tables.confusion, tables.class_levels, tables.other_levels, tables.support > 0)
    values: dict[str, Any] = {n: v if np.ndim(v) else float(v) for n, v in batch.items()}
    return Scores(n_voxels=tables.n_voxels, support=tables.support, predicted=tables.confusion.sum(axis=0), **values)


def _divide(numerator: NDArray, denominator: NDArray) -> NDArray[np.float64]:
    """Divide, nan where the denominator is zero."""
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)


def _mean_over(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of what is not nan."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def score_batch(
    confusion: NDArray[np.int64],
    class_levels: NDArray[np.int64],
    other_levels: NDArray[np.int64],
    present: NDArray[np.bool_],
) -> dict[str, NDArray[np.float64]]:
    """Score a batch of tables at once; leading axes are the batch, as the bootstrap needs it.

    `present` (K,) says which classes the truth holds at all.
    """
    counts = confusion.astype(np.float64)  # 1e10 voxels squared overflow int64 in kappa
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    true, given = counts.sum(axis=-1), counts.sum(axis=-2)
    total = true.sum(axis=-1)
    here = present & (true > 0)
    # A present class that was never predicted has precision 0, as scikit-learn's zero_division=0.
    precision = np.where(here, np.nan_to_num(_divide(hits, given)), np.nan)
    recall = _divide(hits, np.where(here, true, 0))
    f1 = _divide(2 * hits, np.where(here, true + given, 0))
    iou = _divide(hits, np.where(here, true + given - hits, 0))
    average_precision = _average_precision(class_levels, other_levels)
    accuracy = _divide(hits.sum(axis=-1), total)
    chance = _divide((true * given).sum(axis=-1), total**2)
    log_loss, brier = _probability_losses(class_levels, other_levels)
    return {
        "accuracy": accuracy,
        "kappa": _divide(accuracy - chance, 1 - chance),
        "macro_f1": _mean_over(f1),
        "macro_precision": _mean_over(precision),
        "macro_recall": _mean_over(recall),
        "mean_iou": _mean_over(iou),
        "mean_dice": _mean_over(f1),
        "macro_average_precision": _mean_over(average_precision),
        "log_loss": log_loss,
        "brier": brier,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "iou": iou,
        "average_precision": average_precision,
    }


def _average_precision(class_levels: NDArray[np.int64], other_levels: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP = sum over thresholds of (recall gained) x (precision there), as in scikit-learn."""
    found = np.cumsum(class_levels[..., ::-1], axis=-1)
    false = np.cumsum(other_levels[..., ::-1], axis=-1)
    precision = np.nan_to_num(_divide(found, found + false))
    gained = _divide(class_levels[..., ::-1], found[..., -1:])
    return (gained * precision).sum(axis=-1)


def _probability_losses(
    class_levels: NDArray[np.int64], other_levels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    top = class_levels.shape[-1] - 1
    p = np.arange(top + 1) / top
    n_voxels = class_levels.sum(axis=(-2, -1))
    surprise = -np.log(np.maximum(p, 0.5 / top))
    squares = class_levels * (1 - p) ** 2 + other_levels * p**2
    return (
        _divide((class_levels * surprise).sum(axis=(-2, -1)), n_voxels),
        _divide(squares.sum(axis=(-2, -1)), n_voxels),
    )


def precision_recall_curve(tables: ScoreTables, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of class `k` as the threshold on its probability falls from 1 to 0.

    Returns
    -------
    precision, recall : ndarray of float64, shape (M,)
        Recall ascending from 0; thresholds that add no voxel are left out. Empty where class `k` has no true
        voxel or no probabilities were counted.
    """
    true, other = tables.class_levels[k, ::-1], tables.other_levels[k, ::-1]
    used = (true + other) > 0
    if not true.any():
        return np.empty(0), np.empty(0)
    found, false = np.cumsum(true)[used], np.cumsum(other)[used]
    precision = found / (found + false)
    return np.concatenate([precision[:1], precision]), np.concatenate([[0.0], found / found[-1]])
