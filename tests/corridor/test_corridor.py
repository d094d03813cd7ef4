"""File to report on a small volume, as a user runs it: every stage, resumed runs, and every kind of bad input."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile

from tests.conftest import read, snapshot
from tests.corridor.conftest import SHAPE, SMALL, run
from voxclf.models.checkpoint import load_model
from voxclf.volume import create_volume, open_volume


def test_the_main_job_in_one_command(project, tmp_path, capsys):
    out = tmp_path / "OUT"
    code = run(
        project, "run", "image.tif", "labels.tif", "-o", out, "--validation", "truth.tif",
        "--classes", "inside,membrane,blob", *SMALL,
    )  # fmt: skip
    assert code == 0
    for name in ("labels.zarr", "probabilities.zarr", "model", "report.html", "report.json", "config.toml"):
        assert (out / name).exists(), name
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert scores["held_out"]["scores"]["macro_f1"] > 0.75
    assert scores["honest"]["scores"]["macro_f1"] > 0.6
    labels, probabilities = read(out / "labels.zarr"), read(out / "probabilities.zarr")
    assert labels.shape == (1, *SHAPE)
    assert probabilities.shape == (3, *SHAPE)
    assert probabilities.dtype == np.uint8
    np.testing.assert_allclose(probabilities.astype(int).sum(axis=0), 255, atol=2)
    # Rounding to 1/255 makes ties, so the label is among the most probable classes rather than the first.
    chosen = np.take_along_axis(probabilities, labels.astype(int) - 1, axis=0)
    np.testing.assert_array_equal(chosen[0], probabilities.max(axis=0))
    stored = open_volume(out / "labels.zarr", kind="labels")
    assert [entry["name"] for entry in stored.metadata["classes"]] == ["inside", "membrane", "blob"]
    assert stored.metadata["provenance"]["model_name"] == "random_forest"
    assert stored.voxel_size_nm == (20, 10, 10)
    printed = capsys.readouterr().out
    assert "honest" in printed
    assert str(out / "report.html") in printed


def test_blocks_equal_whole_through_the_command_line(project, tmp_path):
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "a", "--executor", "serial") == 0
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "b", "--executor", "processes",
               "--workers", "2") == 0  # fmt: skip
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    model = load_model(project / "model")
    step = model.step()
    padded = np.pad(tifffile.imread(project / "image.tif"), [(h, h) for h in step.halo], mode="symmetric")
    whole = step(padded[None])
    np.testing.assert_array_equal(read(tmp_path / "a" / "labels.zarr")[0], whole.argmax(axis=0) + 1)
    np.testing.assert_array_equal(read(tmp_path / "a" / "probabilities.zarr"), np.rint(whole * 255).astype(np.uint8))


def test_a_region_alone_equals_that_part_of_the_whole(project, tmp_path):
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "whole") == 0
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "part", "--region", "3:20,10:30,:") == 0
    whole, part = (read(tmp_path / name / "labels.zarr")[0] for name in ("whole", "part"))
    np.testing.assert_array_equal(part[3:20, 10:30], whole[3:20, 10:30])
    assert not part[:3].any()


def test_labels_only(project, tmp_path):
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path, "--probabilities", "none") == 0
    assert not (tmp_path / "probabilities.zarr").exists()
    assert read(tmp_path / "labels.zarr").any()


def test_each_step_alone(project, tmp_path, capsys):
    assert run(project, "features", "image.tif", "-o", tmp_path / "f.zarr", "--bank", "edges") == 0
    features = open_volume(tmp_path / "f.zarr")
    assert features.n_channels == 10
    assert features.channel_names[0] == "intensity"
    np.testing.assert_array_equal(
        features.read((0, 0, 0), SHAPE)[0], tifffile.imread(project / "image.tif").astype(np.float16)
    )
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path / "p") == 0
    assert run(project, "evaluate", tmp_path / "p", "truth.tif", "-o", tmp_path / "e") == 0
    assert (tmp_path / "e" / "report.html").exists()
    assert run(project, "convert", tmp_path / "p" / "labels.zarr", tmp_path / "labels.tif") == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "labels.tif"), read(tmp_path / "p" / "labels.zarr")[0])
    assert run(project, "convert", "image.tif", tmp_path / "image.zarr") == 0
    np.testing.assert_array_equal(read(tmp_path / "image.zarr")[0], tifffile.imread(project / "image.tif"))
    capsys.readouterr()
    assert run(project, "info", tmp_path / "p" / "labels.zarr", "--json") == 0
    assert json.loads(capsys.readouterr().out)["shape (z, y, x)"] == list(SHAPE)


@pytest.mark.parametrize("model", ["decision_tree", "xgboost", "gaussian_mixture", "adaboost", "gradient_boosting"])
def test_every_kind_of_model_fits_saves_and_predicts(project, tmp_path, model):
    options = ["--bank", "edges", "--folds", "2", "--samples", "900"]
    if model not in {"decision_tree", "gaussian_mixture"}:
        options += ["--trees", "5"]
    assert run(project, "fit", "image.tif", "labels.tif", "-o", tmp_path / "m", "--model", model, *options) == 0
    assert run(project, "predict", tmp_path / "m", "image.tif", "-o", tmp_path / "p") == 0
    truth = tifffile.imread(project / "truth.tif")
    assert (read(tmp_path / "p" / "labels.zarr")[0] == truth).mean() > 0.5


def test_an_interrupted_run_does_not_fit_again(project, tmp_path):
    arguments = ("run", "image.tif", "labels.tif", "-o", tmp_path / "OUT", *SMALL)
    assert run(project, *arguments) == 0
    first = (tmp_path / "OUT" / "model" / "model.json").read_bytes()
    before = snapshot(tmp_path / "OUT")
    shutil.rmtree(tmp_path / "OUT" / "ledger")
    shutil.rmtree(tmp_path / "OUT" / "labels.zarr")
    shutil.rmtree(tmp_path / "OUT" / "probabilities.zarr")
    assert run(project, *arguments) == 0
    assert (tmp_path / "OUT" / "model" / "model.json").read_bytes() == first
    assert snapshot(tmp_path / "OUT") == before


def start_predicting(volume, model, out):
    command = [sys.executable, "-m", "voxclf.cli", "predict", str(model), str(volume), "-o", str(out),
               "--voxel-size", "20,10,10", "--memory", "150MB", "--workers", "2"]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_ten_times_at_random_and_resumed_is_byte_identical(project, tmp_path):
    image = np.tile(tifffile.imread(project / "image.tif"), (8, 6, 6))
    path = tmp_path / "large.zarr"
    create_volume(path, image.shape, 1, np.uint8, (20, 10, 10), kind="image").write((0, 0, 0), image[None])
    assert start_predicting(path, project / "model", tmp_path / "whole").wait() == 0
    rng = random.Random(0)
    ledger = tmp_path / "killed" / "ledger" / "done.log"
    for _ in range(10):
        process = start_predicting(path, project / "model", tmp_path / "killed")
        before = ledger.stat().st_size if ledger.exists() else 0
        # Wait until it has got somewhere, then a random moment longer, so kills fall between and inside blocks.
        while process.poll() is None and (not ledger.exists() or ledger.stat().st_size == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, "it was done before it could be killed ten times; make the volume larger"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start_predicting(path, project / "model", tmp_path / "killed").wait() == 0
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
