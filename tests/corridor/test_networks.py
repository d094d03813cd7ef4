"""Patch networks through the command line, as trees: fit, predict, evaluate, run, kill and resume, every refusal."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile

from tests.conftest import read, snapshot
from tests.corridor.conftest import SHAPE, run
from voxclf.models.checkpoint import load_model, model_fingerprint
from voxclf.volume import create_volume

TINY = ["--model", "4conv", "--patch", "8,12,12", "--width", "0.25", "--steps", "40", "--workers", "1"]


@pytest.fixture(scope="module")
def network(project):
    """The folder of a small 4conv, trained for seconds."""
    assert run(project, "fit", "image.tif", "labels.tif", "-o", "network", *TINY) == 0
    return project / "network"


def read_provenance(path):
    return json.loads((path / "zarr.json").read_text())["attributes"]["voxclf"]["provenance"]


def fails(capsys, code, message, *arguments):
    capsys.readouterr()
    assert run(*arguments) == code
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_fit_predict_evaluate(project, network, tmp_path, capsys):
    for name in ("model.json", "weights.safetensors", "golden.npz", "history.csv", "config.toml"):
        assert (network / name).exists(), name
    assert not list(project.glob(".network*"))
    assert run(project, "predict", network, "image.tif", "-o", tmp_path / "p", "--uncertainty") == 0
    assert "patch by patch" in capsys.readouterr().out
    certificate = read_provenance(tmp_path / "p" / "probabilities.zarr")["certificate"]
    assert certificate["n_voxels"] >= 8
    assert certificate["largest_difference"] < 1e-5
    assert certificate == read_provenance(tmp_path / "p" / "labels.zarr")["certificate"]

    probabilities = read(tmp_path / "p" / "probabilities.zarr").astype(np.float64) / 255
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=0.01)
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=0) / np.log(len(probabilities))
    uncertainty = read(tmp_path / "p" / "uncertainty.zarr")[0] / 255
    np.testing.assert_allclose(uncertainty, entropy, atol=0.03)

    assert run(project, "evaluate", tmp_path / "p", "truth.tif", "--json") == 0
    held_out = json.loads(capsys.readouterr().out)["held_out"]
    assert held_out["accuracy"] > 0.5


def test_trees_write_uncertainty_too(project, tmp_path):
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path, "--uncertainty") == 0
    assert read(tmp_path / "uncertainty.zarr").shape == (1, *SHAPE)
    assert "certificate" not in read_provenance(tmp_path / "labels.zarr")


def test_save_and_load_give_the_same_prediction(network):
    first, second = load_model(network), load_model(network)
    step = first.step()
    shape = [12 + 2 * h for h in step.halo]
    block = np.random.default_rng(0).integers(0, 256, (1, *shape), dtype=np.uint8)
    np.testing.assert_array_equal(step(block), second.step()(block))
    assert first.training["split"]["note"]


def test_run_does_everything(project, tmp_path, capsys):
    out = tmp_path / "OUT"
    arguments = ("run", "image.tif", "labels.tif", "-o", out, "--validation", "truth.tif", *TINY)
    assert run(project, *arguments) == 0
    page = (out / "report.html").read_text()
    assert "Loss during training" in page
    assert "certificate" in page
    fitted = model_fingerprint(out / "model")
    assert run(project, *arguments) == 0  # again: nothing is fitted twice
    assert model_fingerprint(out / "model") == fitted


@pytest.fixture(scope="module")
def large(project, tmp_path_factory):
    """A volume large enough to kill a prediction of it."""
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    image = np.tile(tifffile.imread(project / "image.tif"), (4, 3, 3))
    create_volume(path, image.shape, 1, np.uint8, (20, 10, 10), kind="image").write((0, 0, 0), image[None])
    return path


def start_predicting(volume, model, out):
    command = [sys.executable, "-m", "voxclf.cli", "predict", str(model), str(volume), "-o", str(out),
               "--memory", "150MB", "--workers", "1"]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_and_resumed_is_byte_identical(network, large, tmp_path):
    assert start_predicting(large, network, tmp_path / "whole").wait() == 0
    log = tmp_path / "killed" / "ledger" / "done.log"
    process = start_predicting(large, network, tmp_path / "killed")
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_done = len(log.read_text().splitlines())
    assert start_predicting(large, network, tmp_path / "killed").wait() == 0
    assert len(log.read_text().splitlines()) > n_done
    # The certificate is part of what is compared: it stands in the metadata of every output.
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_a_padded_network_needs_to_be_told_how(project, tmp_path, capsys):
    tiny = ["--model", "4res", "--patch", "8", "--width", "0.25", "--steps", "3", "--workers", "1"]
    fails(capsys, 2, "4res pads, so it cannot be evaluated exactly at every voxel. Use --output-stride 4",
          project, "run", "image.tif", "labels.tif", "-o", tmp_path / "OUT", *tiny)  # fmt: skip
    assert run(project, "fit", "image.tif", "labels.tif", "-o", tmp_path / "m", *tiny) == 0
    out = capsys.readouterr().out
    assert "steps in" in out
    assert "that is few: networks want 500 steps or more" in out
    fails(capsys, 2, "backbone.0.0: pads with (1, 1, 1)",
          project, "predict", tmp_path / "m", "image.tif", "-o", tmp_path / "p")  # fmt: skip
    for name, option in {"coarse": ["--output-stride", "4"], "real": ["--real-context"]}.items():
        out = tmp_path / name
        assert run(project, "predict", tmp_path / "m", "image.tif", "-o", out, *option) == 0
        assert "approximate" in capsys.readouterr().out
        provenance = read_provenance(out / "labels.zarr")
        assert provenance["approximation"].startswith("approximate")
        assert provenance["certificate"]["largest_difference"] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "4conv", "--trees", "5"], "--trees was 5, but 4conv is a network"),
        (["--model", "4conv", "--sigmas", "5,10"], "filters come with --input-bank"),
        (["--model", "random_forest", "--loss", "focal"], "--loss was focal, but random_forest is a tree model"),
        (["--model", "random_forest", "--precision", "bf16"], "fitted on the CPU"),
        (["--model", "4conv", "--encoder", "resnet34"], "--encoder was resnet34, but 4conv has no such option"),
        (["--model", "4conv", "--final-patch", "16"], "--final-patch was 16,16,16, but 4conv classifies patches"),
        (["--model", "4conv", "--sampling", "patches", "--window", "9"], "--window was 9, but 4conv is trained on"),
        (["--model", "4res", "--spacing", "2"], "--spacing was 2, but 4res pads, so it is trained on single patches"),
        (["--model", "unet3d", "--sampling", "patches"], "--sampling was patches, but unet3d is trained on crops"),
        (["--model", "4conv", "--patch", "0"], "--patch was 0.0: input should be greater than 0"),
    ],
)
def test_options_of_another_kind_of_model_are_refused(project, tmp_path, capsys, options, message):
    fails(capsys, 2, message, project, "fit", "image.tif", "labels.tif", "-o", tmp_path / "m", *options)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("model", ["--tta"], "--tta was given, but random_forest has no such choice; it is for networks"),
        ("model", ["--output-stride", "2"], "--output-stride was given, but random_forest"),
        ("network", ["--real-context"], "has no padding to replace"),
        ("network", ["--real-context", "--output-stride", "2"], "leave one out"),
    ],
)
def test_choices_that_a_model_does_not_have(project, network, tmp_path, capsys, model, options, message):
    fails(capsys, 2, message, project, "predict", model, "image.tif", "-o", tmp_path / "p", *options)


def test_damaged_weights_are_refused(project, network, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(network, copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    fails(capsys, 4, "weights.safetensors has changed since it was saved",
          project, "predict", copy, "image.tif", "-o", tmp_path / "p")  # fmt: skip


def test_pretrain_then_fit(project, tmp_path, capsys):
    small = ["--model", "4conv", "--patch", "8,12,12", "--width", "0.25", "--steps", "4", "--workers", "1"]
    assert run(project, "pretrain", "image.tif", "-o", tmp_path / "pre", *small, "--batch", "8",
               "--voxel-size", "20,10,10") == 0  # fmt: skip
    assert "--init" in capsys.readouterr().out
    assert run(project, "fit", "image.tif", "labels.tif", "-o", tmp_path / "m", *small,
               "--init", tmp_path / "pre") == 0  # fmt: skip
    fails(capsys, 3, "exists already",
          project, "pretrain", "image.tif", "-o", tmp_path / "pre", *small, "--voxel-size", "20,10,10")  # fmt: skip
    fails(capsys, 2, "--loss was focal, which has no meaning without labels",
          project, "pretrain", "image.tif", "-o", tmp_path / "q", "--loss", "focal",
          "--voxel-size", "20,10,10")  # fmt: skip
    fails(capsys, 2, "pretraining is for patch networks",
          project, "pretrain", "image.tif", "-o", tmp_path / "q", "--model", "random_forest",
          "--voxel-size", "20,10,10")  # fmt: skip


@pytest.mark.parametrize("form", [[], ["--dense"]], ids=["patch", "dense"])
def test_export_gives_what_the_model_gives(project, network, tmp_path, form):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert run(project, "export", network, "-o", tmp_path / "m.onnx", *form) == 0
    facts = json.loads((tmp_path / "m.json").read_text())
    assert facts["centre"] == [4, 6, 6]
    model = load_model(network)
    step = model.step()
    block = tifffile.imread(project / "image.tif")[:12, :20, :20]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    z, y, x = facts["patch"] if not form else block.shape
    image = (block[:z, :y, :x].astype(np.float32) - facts["subtract"][0]) / facts["divide_by"][0]
    (logits,) = session.run(None, {"image": image[None, None]})
    found = np.exp(logits[0].reshape(len(logits[0]), -1)[:, 0])
    # Both answer for the patch in the corner, so for the voxel at its centre.
    padded = np.pad(block, [(h, h) for h in step.halo], mode="edge")
    expected = step(padded[None])[:, 4, 6, 6]
    np.testing.assert_allclose(found / found.sum(), expected, atol=1e-5)


def test_export_is_for_patch_networks(project, tmp_path, capsys):
    fails(capsys, 2, "ONNX files are written of patch networks", project, "export", "model", "-o", tmp_path / "m.onnx")
