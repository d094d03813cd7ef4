"""Figures show the numbers they were given, in the classes' own colours, at the true aspect."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from voxclf import figures
from voxclf.figures import scores
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import reliability_table
from voxclf.metrics.voxelwise import score_block, score_tables

LABELS = LabelSet.from_ids([1, 2, 5], names=["membrane", "cytoplasm", "vesicle"])


@pytest.fixture(scope="module")
def tables():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (5, 23, 37))
    raw = rng.random((3, *truth.shape)) + (np.arange(3).reshape(-1, 1, 1, 1) == truth)
    return score_block(truth, raw / raw.sum(axis=0), None, 3)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_confusion_shows_row_shares_and_counts():
    confusion = np.array([[30, 10, 0], [0, 25_000, 75_000], [0, 0, 0]])
    axes = figures.draw_confusion(confusion, LABELS).axes[0]
    shown = texts(axes)
    assert shown[:6] == ["0.75", "30", "0.25", "10", "0.00", "0"]
    assert shown[6:12] == ["0.00", "0", "0.25", "25.0k", "0.75", "75.0k"]
    assert {to_hex(patch.get_facecolor()).upper() for patch in axes.patches} == set(LABELS.colours)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.00k"), (45_600_000, "45.6M"), (7 * 10**11, "700G")]
)
def test_short_counts(count, text):
    assert scores.short_count(count) == text


def test_precision_recall_lines_have_class_colours_and_end_at_full_recall(tables):
    scores = score_tables(tables)
    axes = figures.draw_precision_recall(tables, LABELS, scores.average_precision).axes[0]
    assert tuple(line.get_color() for line in axes.lines) == LABELS.colours
    for line in axes.lines:
        assert line.get_xdata()[0] == 0
        assert (line.get_xdata() == 1).sum() == 1
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[0] == f"membrane  (AP {scores.average_precision[0]:.3f})"


def test_reliability_points_are_the_table(tables):
    table = reliability_table(tables)
    upper = figures.draw_reliability(table, LABELS).axes[0]
    filled = table.count[1] > 0
    np.testing.assert_array_equal(upper.lines[2].get_xdata(), table.predicted[1][filled])
    np.testing.assert_array_equal(upper.lines[2].get_ydata(), table.observed[1][filled])


def test_label_distribution_and_importances():
    axes = figures.draw_label_distribution([750, 250, 0], LABELS).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [75, 25, 0]
    assert texts(axes)[0] == "75.0 %   750 voxels"
    assert to_hex(axes.patches[1].get_facecolor()).upper() == LABELS.colours[1]
    axes = figures.draw_importances({"a": 0.1, "b": 0.6, "c": 0.3}, top=2, errors={"b": 0.1, "c": 0.1, "a": 0}).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "c"]


def test_curves_with_band():
    curve = figures.Curve("training", [0, 1], [1, 0.5], [0.9, 0.4], [1.1, 0.6])
    axes = figures.draw_curves([curve], "epoch", "loss").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, 0.5])
    assert len(axes.collections) == 1


class Recorder:
    """An array that notes what is read from it, as a volume on disk would be asked."""

    def __init__(self, array):
        self.array, self.shape, self.n_read = array, array.shape, 0

    def __getitem__(self, box):
        part = self.array[box]
        self.n_read += part.size
        return part


def test_planes_are_cut_where_they_should_be_and_nothing_else_is_read():
    volume = np.arange(4 * 6 * 8).reshape(4, 6, 8)
    image = Recorder(volume)
    xy, xz, yz = figures.cut_planes(image, None, volume % 3, (50, 5, 4), (1, 2, 3))
    np.testing.assert_array_equal(xy.image, volume[1])
    np.testing.assert_array_equal(xz.image, volume[:, 2])
    np.testing.assert_array_equal(yz.image, volume[:, :, 3])
    np.testing.assert_array_equal(yz.predicted, volume[:, :, 3] % 3)
    assert (xy.pixel_size_nm, xz.pixel_size_nm, yz.pixel_size_nm) == ((5, 4), (50, 4), (50, 5))
    assert xz.title == "xz, y = 2"
    assert image.n_read == 6 * 8 + 4 * 8 + 4 * 6


def test_window_stays_inside_and_has_the_length_asked_for():
    volume = np.arange(10 * 20 * 30).reshape(10, 20, 30)
    xy, xz, _ = figures.cut_planes(volume, None, None, (40, 10, 10), (9, 0, 15), window_nm=100)
    np.testing.assert_array_equal(xy.image, volume[9, 0:10, 10:20])
    np.testing.assert_array_equal(xz.image, volume[8:10, 0, 10:20])


def test_a_single_slice_gives_one_plane():
    views = figures.cut_planes(np.zeros((1, 5, 5)), None, None, (50, 5, 5), (0, 2, 2))
    assert [view.title for view in views] == ["xy, z = 0"]


def test_point_outside_is_refused():
    with pytest.raises(ValueError, match=r"point \(4, 0, 0\) must lie inside"):
        figures.cut_planes(np.zeros((4, 5, 5)), None, None, (1, 1, 1), (4, 0, 0))


def overlay_axes(truth, predicted):
    views = figures.cut_planes(np.full((4, 6, 8), 100.0), truth, predicted, (50, 5, 4), (1, 2, 3))
    return figures.draw_overlays(views, LABELS).axes


def test_overlays_columns_aspect_and_colours():
    truth = np.full((4, 6, 8), -1)
    truth[1, 2, :4] = 0
    predicted = np.ones((4, 6, 8), int)
    predicted[1, 2, :2] = 0
    axes = overlay_axes(truth, predicted)
    assert [a.get_title() for a in axes[:4]] == ["image", "labels", "prediction", "differences"]
    assert [axes[4 * row].get_aspect() for row in range(3)] == [5 / 4, 50 / 4, 50 / 5]
    shown = [a.images[0].get_array() for a in axes[:4]]
    # Base grey is 0 (a flat image), lifted to 0.25 under colour, half of it mixed with the class colour.
    np.testing.assert_allclose(shown[1][2, 0], 0.125 + 0.5 * LABELS.rgb[0] / 255)
    np.testing.assert_allclose(shown[1][0, 0], 0)
    np.testing.assert_allclose(shown[2][0, 0], 0.125 + 0.5 * LABELS.rgb[1] / 255)
    coloured = np.ptp(shown[3], axis=-1) > 0
    assert np.argwhere(coloured).tolist() == [[2, 2], [2, 3]]
    np.testing.assert_allclose(shown[3][2, 2], LABELS.rgb[1] / 255)


def test_overlays_without_labels_have_two_columns():
    axes = overlay_axes(None, np.zeros((4, 6, 8), int))
    assert [a.get_title() for a in axes[:2]] == ["image", "prediction"]
    assert len(axes) == 6


@pytest.mark.parametrize(("width", "length"), [(4710, 1000), (100, 20), (3000, 1000), (61, 20), (35_000, 10_000)])
def test_scale_bar_is_round_and_at_most_a_third(width, length):
    assert figures.scale_bar_length_nm(width) == pytest.approx(length)


def test_rendering(tables):
    figure = figures.draw_confusion(tables.confusion, LABELS)
    svg = figures.render_svg(figure)
    assert svg.lstrip().startswith(b"<?xml")
    assert svg == figures.render_svg(figures.draw_confusion(tables.confusion, LABELS))
    png = Image.open(io.BytesIO(figures.render_png(figure, dpi=60)))
    jpeg = Image.open(io.BytesIO(figures.render_jpeg(figure, dpi=60)))
    assert (png.format, jpeg.format) == ("PNG", "JPEG")
    assert png.size == jpeg.size


def test_the_callers_matplotlib_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    figures.render_svg(figures.draw_bars(["a"], [1], "x"))
    assert dict(matplotlib.rcParams) == before


def test_import_does_not_load_matplotlib():
    code = "import sys, voxclf.report; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_intensity_histograms_have_equal_areas_and_class_colours():
    counts = np.array([[1, 3, 0], [0, 0, 0], [10, 20, 70]])
    axes = figures.draw_intensity_histograms([10, 20, 30], counts, LABELS, np.array([40, 40, 20])).axes[0]
    # A class without voxels has no line.
    assert [line.get_color() for line in axes.lines] == [LABELS.colours[0], LABELS.colours[2]]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [25, 75, 0])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [10, 20, 70])


def test_coverage_stacks_classes_and_keeps_a_single_slice_of_many():
    shape = (1000, 4, 5)
    profiles = [np.zeros((3, n), np.int64) for n in shape]
    profiles[0][0, 617], profiles[0][2, 617] = 10, 5
    panels = figures.draw_label_coverage(profiles, LABELS, shape).axes
    tops = [patch.get_data().values for patch in panels[0].patches]
    place = 617 // 3  # 1000 slices are drawn three to a bar
    assert [top[place] for top in tops] == [50, 50, 75]
    assert [np.count_nonzero(top) for top in tops] == [1, 1, 1]
    assert len(panels[0].lines) == 1
    assert not panels[1].patches[0].get_data().values.any()


def test_pairs_leave_unknown_blank():
    values = np.full((3, 3), np.nan)
    values[0, 1] = values[1, 0] = 0.5
    axes = figures.draw_pairs(values, LABELS, "Cohen's d").axes[0]
    assert texts(axes) == ["0.50", "0.50"]


def test_learning_curve_is_dashed_beyond_what_was_measured():
    measured = figures.Curve("measured", [1, 2], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])
    law = figures.Curve("law", [1, 2, 4], [0.5, 0.6, 0.7], [0.4, 0.5, 0.5], [0.6, 0.7, 0.9])
    axes = figures.draw_learning_curve(measured, law, "slices", "macro F1", truth=(4, 0.72)).axes[0]
    solid, dashed, points = axes.lines[:3]
    np.testing.assert_array_equal(solid.get_xdata(), [1, 2])
    np.testing.assert_array_equal(dashed.get_xdata(), [2, 4])
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    np.testing.assert_array_equal(points.get_ydata(), [0.5, 0.6])


def test_slice_fit_marks_what_is_flagged():
    curve = figures.Curve("next", [0, 1, 2, 3], [0.9, 0.2, 0.9, np.nan])
    axes = figures.draw_slice_fit([curve], {1: "jump"}, "correlation").axes[0]
    assert texts(axes) == ["1: jump"]
    assert axes.lines[1].get_xdata() == [1, 1]


def montage_views(n):
    plane = np.arange(20.0).reshape(4, 5)
    return [figures.PlaneView(f"z = {i}", plane, np.full((4, 5), i % 3), None, (4, 4)) for i in range(n)]


def test_montage_puts_labels_beside_each_slice():
    shown = [a for a in figures.draw_montage(montage_views(3), LABELS).axes if a.axison and a.images]
    assert [a.get_title(loc="left") for a in shown] == ["z = 0", "", "z = 1", "", "z = 2", ""]
    coloured = [np.ptp(a.images[0].get_array(), axis=-1).max() > 0 for a in shown]
    assert coloured == [False, True] * 3
    bare = [a for a in figures.draw_montage(montage_views(3), None).axes if a.images]
    assert len(bare) == 3


def test_probability_maps_run_from_white_to_the_class_colour():
    view = montage_views(1)[0]
    probabilities = np.zeros((3, 4, 5), np.uint8)
    probabilities[2] = 255
    panels = [a for a in figures.draw_probabilities(view, probabilities, LABELS).axes if a.images]
    assert [a.get_title() for a in panels] == ["z = 0", *LABELS.names]
    np.testing.assert_allclose(panels[1].images[0].get_array(), 1)
    np.testing.assert_allclose(panels[3].images[0].get_array()[0, 0], LABELS.rgb[2] / 255)
    with pytest.raises(ValueError, match="cut them from the same plane"):
        figures.draw_probabilities(view, probabilities[:2], LABELS)


def test_intervals_that_miss_the_truth_stand_out():
    truth = [0.5, 0.6, 0.7]
    drawn = figures.draw_intervals({"honest": [(0.4, 0.6), (0.5, 0.59), (0.7, 0.8)]}, truth, "macro F1")
    (axes,) = drawn.axes
    held, missed = axes.collections
    assert axes.get_title() == "honest: 2 of 3 hold it"
    np.testing.assert_allclose([segment[:, 0] for segment in held.get_segments()], [(0, 0), (2, 2)])
    np.testing.assert_allclose([segment[:, 1] for segment in missed.get_segments()], [(-0.1, -0.01)])
