"""Every statistic from counts equals SciPy's on the voxels themselves."""

import numpy as np
import pytest
from scipy import stats

from voxclf.explore.intensities import (
    GreyScale,
    coarsen,
    compare_pair,
    describe_intensities,
    find_percentiles,
    find_saturation,
    measure_moments,
    measure_overlap,
    measure_separability,
)

CLOSE = {"rel": 1e-9}


@pytest.fixture(scope="module")
def voxels():
    """Grey values of three classes of unequal size, spread and shape, as uint8."""
    rng = np.random.default_rng(0)
    classes = [rng.normal(90, 12, 5000), rng.gamma(4, 9, 700) + 60, rng.normal(140, 30, 1311)]
    return [np.clip(np.rint(values), 0, 255).astype(np.uint8) for values in classes]


@pytest.fixture(scope="module")
def report(voxels):
    scale = GreyScale.of_integers(np.dtype(np.uint8))
    counts = np.stack([scale.count(values) for values in voxels])
    return describe_intensities(scale, counts, counts.sum(axis=0))


def test_moments_are_scipys(voxels, report):
    for values, moments in zip(voxels, report.classes, strict=True):
        values = values.astype(float)
        assert moments.n == len(values)
        assert moments.mean == pytest.approx(values.mean(), **CLOSE)
        assert moments.variance == pytest.approx(values.var(ddof=1), **CLOSE)
        assert moments.skewness == pytest.approx(stats.skew(values), rel=1e-8)
        assert moments.kurtosis == pytest.approx(stats.kurtosis(values), rel=1e-8)
    everything = np.concatenate(voxels).astype(float)
    assert report.overall.std == pytest.approx(everything.std(ddof=1), **CLOSE)
    assert report.overall_range == (everything.min(), everything.max())


def test_normality_is_scipys(voxels, report):
    for values, test in zip(voxels, report.normality, strict=True):
        expected = stats.normaltest(values.astype(float))
        assert test.statistic == pytest.approx(expected.statistic, rel=1e-7)
        assert test.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)


def test_normal_values_are_not_rejected():
    scale = GreyScale.of_integers(np.dtype(np.uint16))
    values = np.rint(np.random.default_rng(1).normal(30_000, 4000, 400)).astype(np.uint16)
    report = describe_intensities(scale, scale.count(values)[None], scale.count(values))
    assert report.normality[0].p == pytest.approx(stats.normaltest(values.astype(float)).pvalue, rel=1e-6)
    assert report.normality[0].p > 0.05


def test_anova_is_scipys(voxels, report):
    expected = stats.f_oneway(*[values.astype(float) for values in voxels])
    assert report.anova.f == pytest.approx(expected.statistic, **CLOSE)
    assert report.anova.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)
    everything = np.concatenate(voxels).astype(float)
    within = sum(((v - v.mean()) ** 2).sum() for v in map(np.float64, voxels))
    assert report.anova.eta_squared == pytest.approx(1 - within / ((everything - everything.mean()) ** 2).sum())


def test_welch_is_scipys_and_the_effect_is_cohens(voxels, report):
    assert sorted(report.pairs) == [(0, 1), (0, 2), (1, 2)]
    for (i, j), pair in report.pairs.items():
        a, b = voxels[i].astype(float), voxels[j].astype(float)
        expected = stats.ttest_ind(a, b, equal_var=False)
        assert pair.t == pytest.approx(expected.statistic, **CLOSE)
        assert pair.degrees_of_freedom == pytest.approx(expected.df, **CLOSE)
        assert pair.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)
        assert pair.effect == pytest.approx((a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    effects = report.effects()
    assert effects[0, 2] == effects[2, 0] == abs(report.pairs[0, 2].effect)
    assert np.isnan(effects[1, 1])


def test_alike_means_have_a_large_p_and_no_effect():
    scale = GreyScale.of_integers(np.dtype(np.uint8))
    rng = np.random.default_rng(2)
    a, b = (np.rint(rng.normal(100, 10, n)).astype(np.uint8) for n in (300, 200))
    moments = [measure_moments(scale.count(v), scale.values) for v in (a, b)]
    expected = stats.ttest_ind(a.astype(float), b.astype(float), equal_var=False)
    pair = compare_pair(*moments, overlap=1.0)
    assert pair.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert pair.p > 0.05


def test_signed_integers_and_floats():
    rng = np.random.default_rng(3)
    signed = rng.integers(-120, 90, 500).astype(np.int8)
    scale = GreyScale.of_integers(signed.dtype)
    assert measure_moments(scale.count(signed), scale.values).mean == pytest.approx(signed.mean(dtype=float))
    floats = rng.normal(0.2, 0.05, 10_000).astype(np.float32)
    scale = GreyScale.of_floats(float(floats.min()), float(floats.max()))
    moments = measure_moments(scale.count(floats), scale.values)
    # Values are known to half a bin, 1/131,072 of their range.
    assert moments.n == len(floats)
    assert moments.mean == pytest.approx(floats.mean(dtype=float), abs=float(np.ptp(floats)) / 131_072)
    assert moments.std == pytest.approx(floats.std(ddof=1, dtype=float), rel=1e-5)
    assert moments.kurtosis == pytest.approx(stats.kurtosis(floats.astype(float)), abs=1e-3)


def test_a_flat_image_has_no_shape():
    scale = GreyScale.of_integers(np.dtype(np.uint8))
    counts = scale.count(np.full(50, 7, np.uint8))
    report = describe_intensities(scale, counts[None], counts)
    assert (report.overall.mean, report.overall.variance) == (7, 0)
    assert np.isnan(report.normality[0].p)
    assert np.isnan(report.anova.f)


def test_percentiles_are_those_of_the_sorted_voxels(voxels):
    values = np.sort(voxels[0])
    counts = np.bincount(values, minlength=256)
    found = find_percentiles(counts, np.arange(256.0), (0.001, 0.5, 0.99))
    assert found == [values[int(np.ceil(share * len(values))) - 1] for share in (0.001, 0.5, 0.99)]


def brute_force_rule(counts, weights):
    """Leave each voxel out in turn and name the class with the largest weighted count in its bin; ties are wrong."""
    right = np.zeros(len(counts))
    for k, row in enumerate(counts):
        for b, n in enumerate(row):
            for _ in range(n):
                left = counts[:, b].astype(float)
                left[k] -= 1
                left *= weights
                right[k] += all(left[k] > left[j] for j in range(len(counts)) if j != k)
    return right


def test_separability_equals_leaving_every_voxel_out():
    rng = np.random.default_rng(4)
    counts = np.stack([np.bincount(rng.binomial(11, p, n), minlength=12) for p, n in ((0.3, 200), (0.6, 60), (0.9, 9))])
    sizes = counts.sum(axis=1)
    result = measure_separability(counts)
    right = brute_force_rule(counts, np.ones(3))
    assert result.accuracy == pytest.approx(right.sum() / sizes.sum())
    assert result.chance == 200 / 269
    np.testing.assert_allclose(result.recall, right / sizes)
    assert result.balanced_accuracy == pytest.approx((brute_force_rule(counts, 1 / sizes) / sizes).mean())


def test_voxels_alone_in_their_bins_do_not_flatter():
    assert measure_separability(np.eye(6, dtype=np.int64)).accuracy == 0


def test_overlap():
    assert measure_overlap(np.array([4, 0]), np.array([0, 9])) == 0
    assert measure_overlap(np.array([5, 5]), np.array([30, 10])) == pytest.approx(0.75)
    assert np.isnan(measure_overlap(np.array([0, 0]), np.array([1, 0])))


def test_coarse_bins_keep_every_voxel():
    scale = GreyScale.of_integers(np.dtype(np.uint16))
    values = np.random.default_rng(5).normal(20_000, 3000, 4000).astype(np.uint16)
    counts = scale.count(values)
    coarse = coarsen(scale, counts[None], counts)
    assert len(coarse.grey) <= 64
    assert coarse.overall.sum() == coarse.counts[0].sum() == 4000
    step = coarse.grey[1] - coarse.grey[0]
    middle = coarse.grey[30]
    inside = (values >= middle - step / 2) & (values <= middle + step / 2)
    assert coarse.overall[30] == inside.sum()


def test_saturation_is_a_pile_at_the_end_and_nothing_else():
    smooth = np.bincount(np.clip(np.random.default_rng(6).normal(128, 40, 100_000), 1, 254).astype(int), minlength=256)
    smooth[[1, 254]] = smooth[[2, 253]]
    assert vars(find_saturation(smooth)) == {"dark": 0.0, "bright": 0.0}
    piled = smooth.copy()
    piled[255] = 3000
    assert find_saturation(piled).bright == pytest.approx(3000 / piled.sum())
    assert find_saturation(piled).dark == 0
    black_border = smooth.copy()
    black_border[0] = 20_000
    assert find_saturation(black_border).dark == pytest.approx(20_000 / black_border.sum())


def test_refusal():
    with pytest.raises(ValueError, match="counts no voxel"):
        describe_intensities(GreyScale.of_integers(np.dtype(np.uint8)), np.zeros((0, 256), int), np.zeros(256, int))
