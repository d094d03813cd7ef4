"""The report says on its page what its JSON says, stands alone, and copes with missing parts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxclf import figures
from voxclf.labels import LabelSet
from voxclf.metrics.bootstrap import bootstrap_scores
from voxclf.metrics.voxelwise import SCALAR_SCORES, ScoreTables, score_block, score_tables
from voxclf.report import (
    Report,
    ReportTable,
    ScoredLabels,
    find_warnings,
    render_html,
    standard_figures,
    write_report,
)

LABELS = LabelSet.from_ids([1, 2, 3], names=["membrane", "cytoplasm", "vesicle & <co>"])


def scored(seed, strength, note=""):
    rng = np.random.default_rng(seed)
    slabs = []
    for _ in range(5):
        truth = rng.integers(0, 3, (2, 23, 37))
        raw = rng.random((3, *truth.shape)) + strength * (np.arange(3).reshape(-1, 1, 1, 1) == truth)
        slabs.append(score_block(truth, raw / raw.sum(axis=0), None, 3))
    tables = sum(slabs[1:], start=slabs[0])
    intervals = bootstrap_scores(slabs, np.random.default_rng(0), n_draws=100)
    return ScoredLabels(score_tables(tables), note, intervals, tables)


def from_confusion(confusion):
    confusion = np.array(confusion)
    levels = np.zeros((len(confusion), 2), np.int64)
    tables = ScoreTables(confusion, levels, levels)
    return ScoredLabels(score_tables(tables), tables=tables)


@pytest.fixture(scope="module")
def full():
    held_out = scored(0, 0.5, "z 12 to 15")
    counts = [5000, 4000, 60]
    importances = {"gaussian 5 nm": 0.7, "laplacian 10 nm": 0.3}
    volume = np.random.default_rng(1).integers(0, 255, (6, 23, 37))
    views = figures.cut_planes(volume, volume % 3, volume % 3, (50, 5, 5), (3, 11, 18))
    return Report(
        title="Forest on test volume",
        model_name="random_forest",
        labels=LABELS,
        held_out=held_out,
        honest=scored(1, 0.6, "5 slabs along z"),
        naive=scored(2, 2.0),
        label_counts=counts,
        importances=importances,
        times_s={"fit": 12.3, "predict": 4000.0},
        inputs={"volume": Path("raw.tif"), "shape": np.array([6, 23, 37]), "voxel_size_nm": (50.0, 5.0, 5.0)},
        configuration={"model": {"trees": 100, "depth": None}, "overwrite": False, "sigma": float("nan")},
        versions={"voxclf": "0.1.0"},
        figures=standard_figures(LABELS, held_out, counts, importances, views),
        tables=[ReportTable("Feature sets", "Same labels.", ("features", "macro F1"), [("edges", 0.3217)])],
        warnings=["The voxel size was given by hand."],
    )


@pytest.fixture(scope="module")
def written(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    page = write_report(full, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    return page.read_text("utf-8"), json.loads((folder / "report.json").read_text("utf-8"))


def text_of(html):
    """The page without pictures, styles and tags."""
    html = re.sub(r"<style>.*?</style>|<img[^>]*>", "", html, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", html)


def test_every_number_of_the_json_stands_on_the_page(written):
    html, numbers = written
    text = text_of(html)
    for part in ("held_out", "honest", "naive"):
        stored = numbers["scores"][part]
        for name in SCALAR_SCORES:
            assert f"{stored['scores'][name]:.3f}" in text
            interval = stored["intervals"][name]
            assert f"{interval['low']:.3f} to {interval['high']:.3f}" in text
    for name in ("f1", "iou", "precision", "recall", "average_precision"):
        for value in numbers["scores"]["held_out"]["scores"][name]:
            assert f"{value:.3f}" in text
    for count in numbers["scores"]["held_out"]["scores"]["support"]:
        assert f"{count:,}" in text
    for warning in numbers["warnings"]:
        assert warning in re.sub("&amp;", "&", text).replace("&lt;", "<").replace("&gt;", ">")


def test_json_holds_the_scores_unrounded(full, written):
    _, numbers = written
    stored = numbers["scores"]["honest"]
    assert stored["scores"]["macro_f1"] == full.honest.scores.macro_f1
    assert stored["confusion"] == full.honest.tables.confusion.tolist()
    assert numbers["label_counts"] == [5000, 4000, 60]
    assert numbers["inputs"] == {"volume": "raw.tif", "shape": [6, 23, 37], "voxel_size_nm": [50.0, 5.0, 5.0]}
    assert numbers["configuration"]["sigma"] is None
    assert LabelSet.from_dict(numbers["classes"]) == LABELS


def test_page_stands_alone(written):
    html, _ = written
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", html)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    without_pictures = re.sub(r'src="data:[^"]*"', "", html)
    for forbidden in ("http:", "https:", "//", "@import", "url(", "<script", "<link", "<iframe"):
        assert forbidden not in without_pictures
    assert len(html.encode()) < 3_000_000


def test_page_shows_pictures_tables_times_and_settings(full, written):
    html, numbers = written
    assert html.count("<img") == len(full.figures) == 6
    assert numbers["figures"] == [figure.title for figure in full.figures]
    text = text_of(html)
    for expected in ("0.322", "1 h 06 min", "12 s", "model.trees", "100", "raw.tif", "50, 5, 5", "5 slabs along z"):
        assert expected in text


def test_names_are_escaped(full):
    html = render_html(replace(full, title="<script>alert(1)</script>"))
    assert "<script" not in html
    assert "vesicle &amp; &lt;co&gt;" in html


def test_bare_report_says_that_nothing_was_scored(tmp_path):
    report = Report("Bare", "decision_tree", LABELS)
    page = write_report(report, tmp_path).read_text("utf-8")
    assert "Nothing was scored" in page
    assert "<img" not in page
    numbers = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert numbers["scores"] == {"held_out": None, "honest": None, "naive": None}
    assert report.best is None


def test_scores_without_probabilities_or_intervals(tmp_path):
    part = from_confusion([[5, 1, 0], [2, 8, 0], [0, 0, 0]])
    report = Report("t", "m", LABELS, honest=part, figures=standard_figures(LABELS, part))
    text = text_of(write_report(report, tmp_path).read_text("utf-8"))
    assert "Log loss" not in text
    assert "Average precision" in text  # a column of the class table, with dashes
    assert "–" in text
    assert [figure.title for figure in report.figures] == ["Confusion matrix"]


def test_held_out_scores_come_first_then_honest_then_naive(full):
    assert full.best is full.held_out
    assert replace(full, held_out=None).best is full.honest
    assert replace(full, held_out=None, honest=None).best is full.naive


def test_warnings_found_in_the_numbers(full):
    found = "\n".join(find_warnings(full))
    assert "Class “vesicle & <co>” has only 60 labelled voxels" in found
    assert "above the honest one" in found
    assert "Expect worse elsewhere" not in found


def test_warning_of_classes_absent_or_never_predicted():
    part = from_confusion([[5, 1, 0], [2000, 0, 0], [0, 0, 0]])
    found = "\n".join(find_warnings(Report("t", "m", LABELS, held_out=part)))
    assert "“vesicle & <co>” does not occur in the labels scored" in found
    assert "never predicted" not in found
    part = from_confusion([[5, 0, 0], [2000, 0, 0], [0, 0, 1]])
    found = "\n".join(find_warnings(Report("t", "m", LABELS, held_out=part)))
    assert "“cytoplasm” was never predicted although 2,000 voxels have it" in found


def test_warning_of_naive_only_and_of_wide_intervals(full):
    only_naive = replace(full, held_out=None, honest=None)
    assert "Expect worse elsewhere" in "\n".join(find_warnings(only_naive))
    slabs = [from_confusion([[9, 1], [1, 9]]).tables, from_confusion([[2, 8], [8, 2]]).tables]
    total = slabs[0] + slabs[1]
    intervals = bootstrap_scores(slabs, np.random.default_rng(0))
    two = LabelSet.from_ids([1, 2])
    wide = Report("t", "m", two, held_out=ScoredLabels(score_tables(total), "", intervals, total))
    assert "too wide to compare" in "\n".join(find_warnings(wide))


def test_an_older_report_is_replaced(tmp_path):
    write_report(Report("first", "m", LABELS), tmp_path)
    page = write_report(Report("second", "m", LABELS), tmp_path).read_text("utf-8")
    assert "second" in page
    assert "first</h1>" not in page
