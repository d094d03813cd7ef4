"""The dense CRF as a user meets it: tuned, kept with the model, applied by predict and run, shown beside what was."""

import json
import re
import shutil
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from tests.conftest import VOXEL_SIZE_NM, read
from tests.corridor.conftest import SMALL, run
from voxclf.models.checkpoint import load_model
from voxclf.models.crf_parameters import CrfParameters
from voxclf.training import crf_search

KEPT = CrfParameters((30.0,), 0.15, (10.0,), 1.0, 1.0, 3)
"""Refines the noise of a small forest; not tuned."""


@pytest.fixture
def model(project, tmp_path):
    """A copy of the project's model that parameters may be kept in."""
    shutil.copytree(project / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prediction(project, model, tmp_path):
    """What that model predicts."""
    assert run(project, "predict", model, "image.tif", "-o", tmp_path / "OUT", "--crf", "off") == 0
    return tmp_path / "OUT"


@pytest.fixture
def other_labels(project, tmp_path):
    """Slices that the model was not trained on."""
    dense = tifffile.imread(project / "truth.tif")
    labels = np.zeros_like(dense)
    labels[[4, 20]] = dense[[4, 20]]
    tifffile.imwrite(tmp_path / "others.tif", labels)
    return tmp_path / "others.tif"


def test_parameters_kept_with_a_model_are_used_by_predict(project, model, prediction, tmp_path, capsys):
    KEPT.save(model / "crf.toml")
    load_model(model)  # the model is still whole
    assert run(project, "predict", model, "image.tif", "-o", tmp_path / "both") == 0
    assert f"refined to   {tmp_path / 'both' / 'refined'}" in capsys.readouterr().out
    before, after = read(tmp_path / "both" / "labels.zarr"), read(tmp_path / "both" / "refined" / "labels.zarr")
    np.testing.assert_array_equal(before, read(prediction / "labels.zarr"))
    assert 0.001 < np.mean(before != after) < 0.5
    by_hand = tmp_path / "by_hand"
    assert run(project, "crf-refine", prediction, "image.tif", "-o", by_hand, "--parameters", model) == 0
    np.testing.assert_array_equal(read(by_hand / "labels.zarr"), after)


def test_parameters_that_change_replace_what_older_ones_made(project, model, tmp_path):
    command = ["predict", model, "image.tif", "-o", tmp_path / "OUT"]
    found = []
    for spatial_weight in (1.0, 3.0):
        replace(KEPT, spatial_weight=spatial_weight).save(model / "crf.toml")
        assert run(project, *command) == 0
        found.append(read(tmp_path / "OUT" / "refined" / "labels.zarr"))
    assert np.mean(found[0] != found[1]) > 0.001


@pytest.mark.parametrize("crf", ["off", "auto"])
def test_no_crf_is_wanted_or_kept(project, model, tmp_path, crf):
    CrfParameters((30.0,), 0.15, (10.0,), 1.0, 1.0, 3, enabled=crf == "off").save(model / "crf.toml")
    assert run(project, "predict", model, "image.tif", "-o", tmp_path / "OUT", "--crf", crf) == 0
    assert not (tmp_path / "OUT" / "refined").exists()


def test_without_probabilities_nothing_can_be_refined(project, model, tmp_path, capsys):
    KEPT.save(model / "crf.toml")
    assert run(project, "predict", model, "image.tif", "-o", tmp_path / "OUT", "--probabilities", "none") == 2
    assert "--probabilities was none, but" in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()


def test_crf_tune_keeps_its_parameters_with_the_model(project, model, prediction, other_labels, monkeypatch, capsys):
    for name in ("N_START_POINTS", "N_SIMPLEX", "N_FACTORS"):
        monkeypatch.setattr(crf_search, name, 2)
    command = ["crf-tune", prediction, "image.tif", other_labels, "--model", model, "--n-iterations", "2"]
    assert run(project, *command) == 0
    assert f"written to   {model / 'crf.toml'}" in capsys.readouterr().out
    table = tomllib.loads((model / "crf.toml").read_text(encoding="utf-8"))
    assert table["classes"] == ["class 1", "class 2", "class 3"]
    assert table["tuning"]["volume"]["voxel_size_nm"] == list(VOXEL_SIZE_NM)
    load_model(model)
    assert run(project, *command) == 3  # it is there already


BAD_TUNING = [
    (["labels.tif"], "labels labels.tif are those that the model was trained on; .* --tune-crf"),
    (["others.tif", "-o", "crf.toml"], "--model and --output: were .*; exactly one is needed"),
    (["others.tif", "--guide", "image.tif"], "--guide image.tif was given together with --model"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_TUNING, ids=range(len(BAD_TUNING)))
def test_bad_input_of_tuning(project, model, prediction, other_labels, capsys, arguments, message):
    arguments = [other_labels if a == "others.tif" else a for a in arguments]
    assert run(project, "crf-tune", prediction, "image.tif", *arguments, "--model", model) == 2
    assert_matches(message, capsys)
    assert not (model / "crf.toml").exists()


def test_parameters_go_only_with_the_model_that_predicted(project, prediction, other_labels, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(project / "model", other)
    (other / "model.json").write_text((other / "model.json").read_text() + " ")
    assert run(project, "crf-tune", prediction, "image.tif", other_labels, "--model", other) == 2
    assert_matches("was not predicted with it as it is now", capsys)
    assert run(project, "crf-tune", prediction, "image.tif", other_labels) == 2
    assert_matches("--model and --output: neither was given", capsys)


def assert_matches(message, capsys):
    error = capsys.readouterr().err
    assert re.search(message, error), error


# --- before and after ---


def test_evaluate_shows_what_was_refined_beside_it(project, model, prediction, tmp_path, capsys):
    KEPT.save(model / "crf.toml")
    refined = tmp_path / "R"
    assert run(project, "crf-refine", prediction, "image.tif", "-o", refined, "--parameters", model) == 0
    values = {}
    for folder in (prediction, refined):
        capsys.readouterr()
        assert run(project, "evaluate", folder, "truth.tif", "-o", folder / "evaluation", "--json") == 0
        values[folder] = json.loads(capsys.readouterr().out)
    assert "refined_from" not in values[prediction]
    change = values[refined]["refined_from"]
    assert change["parent"] == str(prediction)
    one, two = (values[folder]["held_out"]["mean_iou"] for folder in (prediction, refined))
    assert change["before"]["scores"]["mean_iou"] == pytest.approx(one)
    assert change["gain"]["mean_iou"]["value"] == pytest.approx(two - one)
    assert sum(change["structure"]["after"]["specks"]) < sum(change["structure"]["before"]["specks"])
    page = (refined / "evaluation" / "report.html").read_text(encoding="utf-8")
    for text in ("Before and after refining", "holes per object", "faces between classes that never touch"):
        assert text in page
    assert run(project, "evaluate", refined, "truth.tif") == 0
    printed = capsys.readouterr().out
    assert f"refined from {prediction}: macro F1" in printed
    assert "gain         macro F1" in printed


def test_a_parent_that_is_gone_or_changed_is_not_shown(project, model, prediction, tmp_path, capsys):
    KEPT.save(model / "crf.toml")
    refined, elsewhere = tmp_path / "R", tmp_path / "elsewhere"
    assert run(project, "crf-refine", prediction, "image.tif", "-o", refined, "--parameters", model) == 0
    prediction.rename(elsewhere)
    assert run(project, "evaluate", refined, "truth.tif") == 0
    assert "refined from" not in capsys.readouterr().out
    refined.rename(elsewhere / "refined")  # moved together, as `predict` lays them out
    assert run(project, "evaluate", elsewhere / "refined", "truth.tif") == 0
    assert f"refined from {elsewhere}" in capsys.readouterr().out


def test_run_refines_with_what_its_model_keeps_and_reports_both(project, tmp_path, capsys):
    out = tmp_path / "OUT"
    command = ["run", "image.tif", "labels.tif", "-o", out, "--validation", "truth.tif", *SMALL]
    assert run(project, *command) == 0
    KEPT.save(out / "model" / "crf.toml")
    capsys.readouterr()
    assert run(project, *command) == 0
    printed = capsys.readouterr().out
    assert f"refined from {out}" in printed
    report = json.loads((out / "report.json").read_text())
    assert [table["title"] for table in report["tables"]] == ["Before and after refining", "What scores do not show"]
    assert "Before and after refining" in report["figures"]
    assert "refine" in report["times_s"]
    assert run(project, *command, "--crf", "off") == 0
    assert json.loads((out / "report.json").read_text())["tables"] == []


def test_a_crf_is_tuned_while_fitting(project, tmp_path, monkeypatch, capsys):
    for name in ("N_START_POINTS", "N_SIMPLEX", "N_FACTORS"):
        monkeypatch.setattr(crf_search, name, 3)
    model = tmp_path / "model"
    assert run(project, "fit", "image.tif", "labels.tif", "-o", model, "--tune-crf", *SMALL) == 0
    table = tomllib.loads((model / "crf.toml").read_text(encoding="utf-8"))
    assert table["tuning"]["before"]["mean_iou"] > 0.4
    assert table["enabled"] == ("the gain is significant" in table["tuning"]["reason"])
    np.testing.assert_array_equal(load_model(model).label_set.ids, [1, 2, 3])
    options = ["--tune-crf", "--calibrate"]
    assert run(project, "fit", "image.tif", "labels.tif", "-o", tmp_path / "other", *options, *SMALL) == 2
    assert_matches("--tune-crf was given together with --calibrate", capsys)
