"""What grey values say about classes: statistics, tests and overlap, all from counts per grey value.

Counts of blocks add up, so a volume of any size needs the memory of one histogram per class. For 8- and 16-bit
integers every grey value has a bin of its own and nothing below is approximate: mean, variance, skewness and
kurtosis from counts are those of the voxels. Floats are counted in 65,536 even bins, so values are known to
1/131,072 of their range.

Tests: D'Agostino and Pearson's K² for normality (Biometrika 60, 1973; kurtosis after Anscombe & Glynn, Biometrika 70,
1983), one-way analysis of variance, Welch's t test of two means. Neighbouring voxels are alike, so voxels are far
from independent and every p value is too small; what to read are the effect sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_FLOAT_BINS = 65_536
#: Bins of the rule that tells classes apart and of drawn histograms: few enough to be filled by small classes.
N_COARSE_BINS = 64


@dataclass(frozen=True)
class GreyScale:
    """Which grey value each bin of a histogram stands for: ``first + step * bin``.

    Parameters
    ----------
    first : float
        Grey value at the middle of the first bin.
    step : float
        Width of a bin.
    n_bins : int
        Number of bins B.
    is_exact : bool
        Whether every possible grey value has a bin of its own.
    """

    first: float
    step: float
    n_bins: int
    is_exact: bool

    @classmethod
    def of_integers(cls, dtype: np.dtype) -> GreyScale:
        """A bin per value of an 8- or 16-bit integer type."""
        limits = np.iinfo(dtype)
        return cls(float(limits.min), 1.0, int(limits.max) - int(limits.min) + 1, True)

    @classmethod
    def of_floats(cls, low: float, high: float) -> GreyScale:
        """65,536 even bins from the lowest to the highest value that occurs."""
        step = max(high - low, 1e-12 * max(abs(low), abs(high), 1e-12)) / N_FLOAT_BINS
        return cls(low + step / 2, step, N_FLOAT_BINS, False)

    @property
    def values(self) -> NDArray[np.float64]:
        """Grey value of each bin, shape (B,)."""
        return self.first + self.step * np.arange(self.n_bins, dtype=np.float64)

    def bin_of(self, array: NDArray) -> NDArray[np.intp]:
        """Number of each voxel's bin; values beyond the ends count in the outermost bins."""
        if self.is_exact:
            return array.astype(np.intp) - int(self.first)
        scaled = (array.astype(np.float64) - self.first) / self.step + 0.5
        return np.clip(scaled, 0, self.n_bins - 1).astype(np.intp)

    def count(self, array: NDArray) -> NDArray[np.int64]:
        """Voxels per bin, shape (B,)."""
        return np.bincount(self.bin_of(array).ravel(), minlength=self.n_bins)


@dataclass(frozen=True)
class Moments:
    """What a histogram says about the voxels behind it.

    Parameters
    ----------
    n : int
        Voxels.
    mean, variance : float
        Variance with n - 1; nan below two voxels.
    skewness, kurtosis : float
        Third and fourth standardised moments with n (SciPy's defaults); kurtosis is in excess of the normal's 3.
        nan where all values are equal.
    """

    n: int
    mean: float
    variance: float
    skewness: float
    kurtosis: float

    @property
    def std(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.variance)


def measure_moments(counts: NDArray[np.integer], grey: NDArray[np.float64]) -> Moments:
    """Mean, variance, skewness and kurtosis from counts (B,) per grey value (B,)."""
    n = int(counts.sum())
    if n == 0:
        return Moments(0, math.nan, math.nan, math.nan, math.nan)
    weights = counts / n
    mean = float(weights @ grey)
    centred = grey - mean
    m2, m3, m4 = (float(weights @ centred**power) for power in (2, 3, 4))
    variance = m2 * n / (n - 1) if n > 1 else math.nan
    if m2 <= 0:
        return Moments(n, mean, variance, math.nan, math.nan)
    return Moments(n, mean, variance, m3 / m2**1.5, m4 / m2**2 - 3)


def find_percentiles(counts: NDArray[np.integer], grey: NDArray[np.float64], shares: tuple[float, ...]) -> list[float]:
    """The lowest grey values that at least these shares (0 to 1) of the voxels do not exceed."""
    reached = np.cumsum(counts)
    wanted = np.maximum(np.ceil(np.array(shares) * reached[-1]), 1)
    return [float(grey[i]) for i in np.searchsorted(reached, wanted)]


@dataclass(frozen=True)
class NormalityTest:
    """D'Agostino and Pearson's test that values are normally distributed; nan below 8 voxels."""

    statistic: float
    p: float


def check_normality(moments: Moments) -> NormalityTest:
    """Test from skewness and kurtosis whether values could come from a normal distribution.

    Equals ``scipy.stats.normaltest`` on the voxels themselves.
    """
    n = moments.n
    if n < 8 or math.isnan(moments.skewness):
        return NormalityTest(math.nan, math.nan)
    statistic = _skewness_score(moments.skewness, n) ** 2 + _kurtosis_score(moments.kurtosis, n) ** 2
    # The chi-squared distribution with two degrees of freedom is an exponential.
    return NormalityTest(statistic, math.exp(-statistic / 2))


def _skewness_score(skewness: float, n: int) -> float:
    """Z score of the skewness of n values (D'Agostino 1970)."""
    y = skewness * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    beta = 3 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    w2 = -1 + math.sqrt(2 * (beta - 1))
    return math.asinh(y / math.sqrt(2 / (w2 - 1))) / math.sqrt(0.5 * math.log(w2))


def _kurtosis_score(kurtosis: float, n: int) -> float:
    """Z score of the excess kurtosis of n values (Anscombe & Glynn 1983)."""
    expected = 3 * (n - 1) / (n + 1)
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis + 3 - expected) / math.sqrt(variance)
    beta = 6 * (n**2 - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / beta * (2 / beta + math.sqrt(1 + 4 / beta**2))
    ratio = (1 - 2 / a) / (1 + x * math.sqrt(2 / (a - 4)))
    return (1 - 2 / (9 * a) - math.copysign(abs(ratio) ** (1 / 3), ratio)) / math.sqrt(2 / (9 * a))


@dataclass(frozen=True)
class AnovaTest:
    """One-way analysis of variance: do the classes differ in mean grey value at all?

    ``eta_squared``, the effect, is the share of the grey values' variance that lies between classes.
    """

    f: float
    p: float
    eta_squared: float


def compare_means(classes: list[Moments]) -> AnovaTest:
    """Compare all class means at once; equals ``scipy.stats.f_oneway`` on the voxels."""
    from scipy.special import fdtrc

    known = [m for m in classes if m.n > 0]
    n = sum(m.n for m in known)
    if len(known) < 2 or n <= len(known):
        return AnovaTest(math.nan, math.nan, math.nan)
    grand = sum(m.n * m.mean for m in known) / n
    between = sum(m.n * (m.mean - grand) ** 2 for m in known)
    within = sum((m.n - 1) * m.variance for m in known if m.n > 1)
    if within <= 0:
        return AnovaTest(math.nan, math.nan, 1.0 if between > 0 else math.nan)
    degrees = len(known) - 1, n - len(known)
    f = (between / degrees[0]) / (within / degrees[1])
    return AnovaTest(f, float(fdtrc(*degrees, f)), between / (between + within))


@dataclass(frozen=True)
class PairTest:
    """How two classes differ in grey value.

    Parameters
    ----------
    t, degrees_of_freedom, p : float
        Welch's t test, which does not assume equal variances; two-sided.
    effect : float
        Cohen's d: difference of the means in units of the classes' standard deviation (root mean square of the two,
        so it does not depend on how much of each was labelled). 0.2 is small, 0.5 medium, 0.8 large.
    overlap : float
        Share of the two histograms that coincides, 0 (told apart by every voxel) to 1 (the same). Guessing right
        between the two by grey value alone succeeds with 1 - overlap / 2.
    """

    t: float
    degrees_of_freedom: float
    p: float
    effect: float
    overlap: float


def compare_pair(a: Moments, b: Moments, overlap: float) -> PairTest:
    """Compare two class means; t and p equal ``scipy.stats.ttest_ind(..., equal_var=False)`` on the voxels."""
    from scipy.special import stdtr

    if min(a.n, b.n) < 2 or a.variance + b.variance <= 0:
        return PairTest(math.nan, math.nan, math.nan, math.nan, overlap)
    square_a, square_b = a.variance / a.n, b.variance / b.n
    t = (a.mean - b.mean) / math.sqrt(square_a + square_b)
    degrees = (square_a + square_b) ** 2 / (square_a**2 / (a.n - 1) + square_b**2 / (b.n - 1))
    effect = (a.mean - b.mean) / math.sqrt((a.variance + b.variance) / 2)
    return PairTest(t, degrees, float(2 * stdtr(degrees, -abs(t))), effect, overlap)


@dataclass(frozen=True)
class CoarseHistograms:
    """Class histograms in at most 64 bins, which even a class of a few hundred voxels fills.

    ``counts`` has shape (K, B), ``overall`` (B,), ``grey`` (B,) holds the middle of each bin.
    """

    grey: NDArray[np.float64]
    counts: NDArray[np.int64]
    overall: NDArray[np.int64]


def coarsen(scale: GreyScale, counts: NDArray[np.int64], overall: NDArray[np.int64]) -> CoarseHistograms:
    """Join bins between the 0.1 % and 99.9 % percentiles evenly into at most 64; the tails join the outermost."""
    low, high = find_percentiles(overall, np.arange(scale.n_bins, dtype=np.float64), (0.001, 0.999))
    width = max(1, -(-(int(high) - int(low) + 1) // N_COARSE_BINS))
    n_bins = -(-(int(high) - int(low) + 1) // width)
    target = np.clip((np.arange(scale.n_bins) - int(low)) // width, 0, n_bins - 1)
    joined = np.zeros((len(counts) + 1, n_bins), np.int64)
    for row, source in enumerate((*counts, overall)):
        np.add.at(joined[row], target, source)
    middles = scale.first + scale.step * (int(low) + width * np.arange(n_bins, dtype=np.float64) + (width - 1) / 2)
    return CoarseHistograms(middles, joined[:-1], joined[-1])


@dataclass(frozen=True)
class Separability:
    """How well grey value alone tells the classes apart, by the best rule there is (Bayes' rule on histograms).

    Parameters
    ----------
    accuracy : float
        Share of labelled voxels it gets right, classes as frequent as labelled.
    chance : float
        The same for always naming the most frequent class.
    balanced_accuracy : float
        The same with all classes equally frequent, by the rule best for that; chance is 1 / K.
    recall : ndarray of float, shape (K,)
        Share of each class that the first rule gets right; nan for classes without voxels.
    """

    accuracy: float
    chance: float
    balanced_accuracy: float
    recall: NDArray[np.float64]


def measure_separability(counts: NDArray[np.int64]) -> Separability:
    """Score Bayes' rule on class histograms (K, B), each voxel left out of the histogram that judges it.

    Leaving voxels out keeps sparse bins from flattering: a bin with a single voxel knows nothing of its class.
    """
    sizes = counts.sum(axis=1)
    n = int(sizes.sum())
    if n == 0:
        return Separability(math.nan, math.nan, math.nan, np.full(len(counts), np.nan))
    right = _count_right(counts.astype(np.float64), np.ones(len(counts)))
    weights = np.divide(1.0, sizes, out=np.zeros(len(counts)), where=sizes > 0)
    balanced = _count_right(counts.astype(np.float64), weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, balanced_recall = right / sizes, balanced / sizes
    return Separability(right.sum() / n, sizes.max() / n, float(np.nanmean(balanced_recall)), recall)


def _count_right(counts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxels of each class that the rule names rightly when they are left out of the counts; ties are wrong."""
    right = np.zeros(len(counts))
    for k in range(len(counts)):
        others = np.delete(counts * weights[:, None], k, axis=0)
        strongest = others.max(axis=0, initial=0.0)
        right[k] = counts[k][(counts[k] - 1) * weights[k] > strongest].sum()
    return right


def measure_overlap(a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """Share of two histograms, each scaled to 1, that coincides; nan where one is empty."""
    if not a.any() or not b.any():
        return math.nan
    return float(np.minimum(a / a.sum(), b / b.sum()).sum())


@dataclass(frozen=True)
class Saturation:
    """Share of all voxels at the darkest and at the brightest grey value, where those stick out; else 0."""

    dark: float
    bright: float


#: A detector that saturates piles up voxels in its last value; a histogram that merely ends does not.
LEAST_PILE, PILE_FACTOR, PILE_NEIGHBOURS = 0.002, 3.0, 4


def find_saturation(counts: NDArray[np.integer]) -> Saturation:
    """Find voxels piled up at either end of a histogram (B,)."""
    used = np.flatnonzero(counts)
    if len(used) < 2 * PILE_NEIGHBOURS:
        return Saturation(0.0, 0.0)
    inner = counts[used]
    return Saturation(_pile(inner), _pile(inner[::-1]))


def _pile(counts: NDArray[np.integer]) -> float:
    share = float(counts[0] / counts.sum())
    usual = float(np.mean(counts[1 : 1 + PILE_NEIGHBOURS]))
    return share if share > LEAST_PILE and counts[0] > PILE_FACTOR * usual else 0.0


@dataclass(frozen=True)
class IntensityReport:
    """All that grey values say: per class, and about pairs of classes.

    Parameters
    ----------
    overall : Moments
        Of the image, labelled or not.
    overall_range : (float, float)
        Lowest and highest grey value that occurs.
    percentiles : mapping of str to float
        Of the image.
    classes, normality : list, length K
    anova : AnovaTest
    pairs : dict of (int, int) to PairTest
        For class indices i < j that both occur.
    separability : Separability
    saturation : Saturation
    coarse : CoarseHistograms
    is_exact : bool
        False for floats, whose values were binned.
    """

    overall: Moments
    overall_range: tuple[float, float]
    percentiles: dict[str, float]
    classes: list[Moments]
    normality: list[NormalityTest]
    anova: AnovaTest
    pairs: dict[tuple[int, int], PairTest]
    separability: Separability
    saturation: Saturation
    coarse: CoarseHistograms
    is_exact: bool

    def effects(self) -> NDArray[np.float64]:
        """Size of every pair's effect, |d|, shape (K, K); nan on the diagonal and for absent classes."""
        K = len(self.classes)
        matrix = np.full((K, K), np.nan)
        for (i, j), pair in self.pairs.items():
            matrix[i, j] = matrix[j, i] = abs(pair.effect)
        return matrix

    def to_dict(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Everything as values for JSON, classes by name."""
        return {
            "exact": self.is_exact,
            "overall": vars(self.overall) | {"std": self.overall.std, "range": self.overall_range},
            "percentiles": self.percentiles,
            "classes": {
                name: vars(moments)
                | {"normality_statistic": normality.statistic, "normality_p": normality.p, "recall": float(recall)}
                for name, moments, normality, recall in zip(
                    names, self.classes, self.normality, self.separability.recall, strict=True
                )
            },
            "anova": vars(self.anova),
            "pairs": [{"classes": [names[i], names[j]], **vars(pair)} for (i, j), pair in self.pairs.items()],
            "separability": {key: value for key, value in vars(self.separability).items() if key != "recall"},
            "saturation": vars(self.saturation),
            "histogram": {
                "grey": self.coarse.grey,
                "overall": self.coarse.overall,
                "classes": dict(zip(names, self.coarse.counts, strict=True)),
            },
        }


PERCENTILES = (0.001, 0.01, 0.5, 0.99, 0.999)


def describe_intensities(scale: GreyScale, counts: NDArray[np.int64], overall: NDArray[np.int64]) -> IntensityReport:
    """Work out everything above.

    Parameters
    ----------
    scale : GreyScale
        What the bins mean.
    counts : ndarray of int64, shape (K, B)
        Labelled voxels by class and grey value; (0, B) without labels.
    overall : ndarray of int64, shape (B,)
        Voxels of the image by grey value.

    Raises
    ------
    ValueError
        If ``overall`` counts no voxel.
    """
    if not overall.any():
        raise ValueError("overall counts no voxel; count at least one block of the image")
    grey = scale.values
    classes = [measure_moments(row, grey) for row in counts]
    coarse = coarsen(scale, counts, overall)
    pairs = {
        (i, j): compare_pair(classes[i], classes[j], measure_overlap(coarse.counts[i], coarse.counts[j]))
        for i in range(len(classes))
        for j in range(i + 1, len(classes))
        if classes[i].n and classes[j].n
    }
    shares = find_percentiles(overall, grey, PERCENTILES)
    used = np.flatnonzero(overall)
    return IntensityReport(
        overall=measure_moments(overall, grey),
        overall_range=(float(grey[used[0]]), float(grey[used[-1]])),
        percentiles={f"{100 * share:g}": value for share, value in zip(PERCENTILES, shares, strict=True)},
        classes=classes,
        normality=[check_normality(moments) for moments in classes],
        anova=compare_means(classes),
        pairs=pairs,
        separability=measure_separability(coarse.counts),
        saturation=find_saturation(overall),
        coarse=coarse,
        is_exact=scale.is_exact,
    )
