"""Audit, diff and view at the end of the corridor: on what predict and fit have used and written."""

import json

import numpy as np
import tifffile

from tests.corridor.conftest import run

SIZE = ["--voxel-size", "20,10,10"]


def test_the_labels_of_a_project_are_audited(project, tmp_path):
    options = ["--trees", "8", "--samples", "4000", "--bank", "edges", "--top", "5", *SIZE]
    assert run(project, "audit", "image.tif", "labels.tif", "-o", tmp_path / "AUDIT", *options) == 0
    values = json.loads((tmp_path / "AUDIT/audit.json").read_text())
    assert values["planes"] == {"z": 1, "y": 1, "x": 1}
    assert values["n_labelled"] == int((tifffile.imread(project / "labels.tif") > 0).sum())


def test_predictions_are_compared_with_themselves_and_the_truth(project, tmp_path):
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "OUT") == 0
    out, volume = str(tmp_path / "OUT"), ["--volume", "image.tif"]
    assert run(project, "diff", out, out, "-o", tmp_path / "same", *volume) == 0
    same = json.loads((tmp_path / "same/diff.json").read_text())
    assert (same["n_changed"], same["differences"]) == (0, [])
    assert run(project, "diff", out, "truth.tif", "-o", tmp_path / "other", *volume, "--top", "2") == 0
    other = json.loads((tmp_path / "other/diff.json").read_text())
    assert np.array(other["confusion"]).sum() == np.prod(tifffile.imread(project / "truth.tif").shape)
    assert len(other["differences"]) == 2


def test_a_prediction_has_an_address(project, tmp_path, capsys):
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "OUT") == 0
    capsys.readouterr()
    assert run(project, "view", tmp_path / "OUT", "image.tif", "--print", "--json") == 0
    layers = [layer["name"] for layer in json.loads(capsys.readouterr().out)["state"]["layers"]]
    assert layers[:2] == ["image", "labels"]
    assert len(layers) == 5
