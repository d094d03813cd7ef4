"""Exploring a volume: statistics are those of its voxels, sampled evenly where large, and each defect is warned of."""

import json
import re

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import gaussian_filter

from voxclf.config import ExploreConfig, make_config
from voxclf.explore.data_warnings import find_warnings
from voxclf.explore.exploration import Exploration, choose_blocks, explore
from voxclf.explore.page import render_page, write_exploration

VOXEL_SIZE = (10.0, 10.0, 10.0)


@pytest.fixture(scope="module")
def tissue():
    """Clean data: isotropic structure with noise, and three slices of labels on it."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=(40, 60, 64)), 3, mode="wrap")
    image = np.clip(128 + 30 * smooth / smooth.std() + 4 * rng.normal(size=smooth.shape), 1, 254).astype(np.uint8)
    dense = 1 + (smooth > 0).astype(np.uint8) + (smooth > smooth.std()).astype(np.uint8)
    labels = np.zeros_like(dense)
    labels[12], labels[:, 30], labels[:, :, 32] = dense[12], dense[:, 30], dense[:, :, 32]
    return image, labels


@pytest.fixture
def look(save_volume, tmp_path):
    """Explore arrays; returns what was found and the configuration."""

    def run(image, labels=None, **options):
        size = options.pop("voxel_size", VOXEL_SIZE)
        paths = {"volume": save_volume(image, "image.zarr", voxel_size_nm=size, overwrite=True).path}
        if labels is not None:
            paths["labels"] = save_volume(labels, "labels.zarr", kind="labels", overwrite=True).path
        config = make_config(
            ExploreConfig, {**paths, "output": str(tmp_path / "look"), "executor": "serial", **options}
        )
        return explore(config), config

    return run


def test_statistics_are_those_of_the_voxels(look, tissue):
    image, labels = tissue
    found, _ = look(image, labels)
    groups = [image[labels == i].astype(float) for i in (1, 2, 3)]
    for values, moments, normality in zip(groups, found.intensities.classes, found.intensities.normality, strict=True):
        assert moments.mean == pytest.approx(values.mean())
        assert normality.statistic == pytest.approx(stats.normaltest(values).statistic)
    assert found.intensities.anova.f == pytest.approx(stats.f_oneway(*groups).statistic)
    welch = stats.ttest_ind(groups[0], groups[2], equal_var=False)
    assert found.intensities.pairs[0, 2].t == pytest.approx(welch.statistic)
    assert found.intensities.overall.mean == pytest.approx(image.mean())
    assert found.labels.profiles.n_labelled == np.count_nonzero(labels)
    assert found.labels.profiles.counts.tolist() == [len(values) for values in groups]
    assert found.sampled["intensities"].is_whole
    json.dumps(found.to_dict(), default=lambda value: value.tolist())


def test_executors_agree(look, tissue):
    a, _ = look(*tissue)
    b, _ = look(*tissue, executor="threads", workers=2)
    assert a.intensities.overall == b.intensities.overall
    np.testing.assert_array_equal(a.slices.next_one, b.slices.next_one)
    assert a.texture.length_nm == b.texture.length_nm


def test_float_volumes(look, tissue):
    image, labels = tissue
    found, config = look((image / np.float32(255)).astype(np.float32), labels)
    assert found.intensities.overall.mean == pytest.approx(image.mean() / 255, rel=1e-4)
    assert not found.intensities.is_exact
    assert "65,536 bins" in render_page(found, config)


def test_large_volumes_are_sampled_evenly():
    blocks = choose_blocks((10_000, 10_000, 10_000), 500_000_000, seed=0)
    assert len(blocks) == 500_000_000 // (64 * 256 * 256)
    assert sum(block.core.n_voxels for block in blocks) <= 500_000_000
    starts = np.array([block.core.start for block in blocks])
    # Along every axis each quarter holds a fair part of the boxes.
    for axis in range(3):
        quarters = np.bincount(starts[:, axis] * 4 // 10_000, minlength=4)
        assert quarters.min() > 0.12 * len(blocks)
    assert list(choose_blocks((100, 300, 300), 10**9, 0))[-1].core.stop == (100, 300, 300)


def test_sampling_is_said(look):
    rng = np.random.default_rng(1)
    image = rng.integers(60, 190, (70, 260, 270)).astype(np.uint8)
    found, config = look(image, voxels=1_500_000)
    part = found.sampled["intensities"]
    assert not part.is_whole
    assert part.n_voxels < image.size
    assert f"{part.n_voxels:,} of {image.size:,} voxels" in render_page(found, config)
    assert found.intensities.overall.mean == pytest.approx(image.mean(), abs=0.5)


# --- warnings ---


def warnings_of(look, image, labels=None, **options):
    return find_warnings(look(image, labels, **options)[0])


def test_clean_data_have_none(look, tissue):
    assert warnings_of(look, *tissue) == []
    assert warnings_of(look, tissue[0]) == []


def test_class_with_few_voxels(look, tissue):
    image, labels = tissue[0], tissue[1].copy()
    few = np.flatnonzero(labels == 3)
    labels.ravel()[few[99:]] = 2
    (warning,) = warnings_of(look, image, labels)
    assert "Class “class 3” has 99 labelled voxels" in warning
    labels.ravel()[few[:100]] = 3
    assert warnings_of(look, image, labels) == []


def test_labels_on_one_slice_only(look, tissue):
    labels = np.zeros_like(tissue[1])
    labels[12] = tissue[1][12]
    (warning,) = warnings_of(look, tissue[0], labels)
    assert "single xy slice (z = 12)" in warning


def test_saturated_intensities(look, tissue):
    image = np.minimum(tissue[0], 170)
    (warning,) = warnings_of(look, image, tissue[1])
    share = (image == 170).mean()
    assert f"{100 * share:.1f} % of the voxels have the brightest grey value there is, 170" in warning
    assert "darkest" in warnings_of(look, np.maximum(tissue[0], 90), tissue[1])[0]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda a: np.concatenate([a[:20], a[27:]]), "much less like the one before than slices usually are: 20."),
        (lambda a: a[[*range(15), 16, 15, *range(17, 40)]], "probably exchanged with the next: 15."),
        (lambda a: a[[*range(25), 24, *range(26, 40)]], "a copy of the slice before: 25."),
        (lambda a: np.where(np.arange(40)[:, None, None] == 8, 0, a).astype(np.uint8), "blank (one grey value"),
    ],
)
def test_slices_missing_shuffled_duplicated_blank(look, tissue, spoil, text):
    (warning,) = [w for w in warnings_of(look, spoil(tissue[0])) if "Slices along z" in w]
    assert text in warning


def test_voxel_size_that_the_picture_contradicts(look, tissue):
    (warning,) = warnings_of(look, *tissue, voxel_size=(50.0, 10.0, 10.0))
    assert "voxel size along z is stated as 50 nm" in warning
    implied = float(re.search(r"as voxels ([\d.]+) nm apart", warning)[1])
    assert implied == pytest.approx(10, rel=0.2)
    assert "along y is stated as 40 nm" in warnings_of(look, *tissue, voxel_size=(10.0, 40.0, 10.0))[-1]


# --- page ---


def test_page_refers_to_nothing_outside_and_shows_everything(look, tissue):
    found, config = look(*tissue, classes="dark,grey,<bright>")
    page = write_exploration(found, config).read_text(encoding="utf-8")
    for match in re.findall(r'(?:src|href)="([^"]{0,40})', page):
        assert match.startswith("data:image/")
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "&lt;bright&gt;" in page
    assert "<bright>" not in page
    for part in ("Where the labels are", "Class by class", "One-way ANOVA", "Pairs of classes", "Isotropy", "Slices"):
        assert part in page
    values = json.loads((write_exploration(found, config).parent / "explore.json").read_text())
    assert values["warnings"] == []
    assert values["labels"]["counts"]["dark"] == int((tissue[1] == 1).sum())
    assert values["intensities"]["pairs"][0]["classes"] == ["dark", "grey"]
    assert values["slices"]["correlation_with_next"][-1] is None


def test_page_without_labels_and_with_warnings(look, tissue):
    found, config = look(np.minimum(tissue[0], 170))
    page = render_page(found, config)
    assert "Read this first" in page
    assert "Where the labels are" not in page
    assert isinstance(found, Exploration)


def test_thin_volumes_are_explored(look):
    rng = np.random.default_rng(2)
    image = rng.integers(0, 255, (1, 40, 50)).astype(np.uint8)
    labels = np.zeros_like(image)
    labels[0, :20], labels[0, 20:] = 1, 2
    found, config = look(image, labels)
    assert np.isnan(found.texture.implied_size_nm[0])
    assert find_warnings(found) == []
    assert "Neighbouring slices" in render_page(found, config)


def test_learning_curve_needs_labels(look, tissue):
    with pytest.raises(ValueError, match="--learning-curve was given without LABELS"):
        look(tissue[0], learning_curve=True)
