"""``voxclf compare`` through the command line: its numbers are those of fit, predict and evaluate, and it resumes."""

import csv
import json
import re

import numpy as np
import pytest
import tifffile
from safetensors.numpy import load_file

from tests.conftest import draw_cells, read
from tests.corridor.conftest import run
from voxclf.volume import open_labels

SHAPE = (24, 64, 150)
FAST = ["--bank", "edges", "--folds", "2", "--samples", "900", "--time", "2s", "--voxel-size", "20,10,10"]
FOREST = "random_forest:trees=5"
MODELS = f"decision_tree,{FOREST},{FOREST}+autocontext,{FOREST}+crf"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A volume long enough to hold out a slab of the labels twice: to score on, and to tune a CRF on."""
    folder = tmp_path_factory.mktemp("long")
    image, dense = draw_cells(SHAPE, seed=5)
    sparse = np.zeros_like(dense)
    sparse[12], sparse[:, 20], sparse[6] = dense[12], dense[:, 20], dense[6]
    for name, array in (("image", image), ("labels", sparse), ("truth", dense)):
        tifffile.imwrite(folder / f"{name}.tif", array, imagej=True, metadata={"axes": "ZYX"})
    return folder


@pytest.fixture(scope="module")
def compared(project, tmp_path_factory):
    """A finished comparison of four contestants with two seeds, on a slab of the labels."""
    out = tmp_path_factory.mktemp("compared") / "CMP"
    assert run(project, "compare", "image.tif", "labels.tif", "-o", out, "--models", MODELS, "--seeds", "2", *FAST) == 0
    return out


def numbers(out):
    return json.loads((out / "compare.json").read_text())


def test_everything_is_there(compared):
    for name in ("compare.html", "compare.csv", "compare.json", "score_and_time.svg", "predictions.jpg", "config.toml"):
        assert (compared / name).stat().st_size > 0, name
    found = numbers(compared)
    assert sorted(c["name"] for c in found["contestants"]) == sorted(MODELS.split(","))
    assert found["failures"] == []
    scores = [c["macro_f1"]["value"] for c in found["contestants"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0.5
    assert [d["against"] for d in found["against_best"]] == [found["contestants"][0]["name"]] * 3
    assert {g["name"] for g in found["stage_gains"]} == {f"{FOREST}+autocontext", f"{FOREST}+crf"}
    for contestant in found["contestants"]:
        assert contestant["fit_s"] > 0
        assert contestant["predict_s"] > 0
        assert contestant["size"] > 5
    page = (compared / "compare.html").read_text()
    assert "What each stage adds" in page
    assert not re.search(r'(src|href)="http', page)


def test_training_and_held_out_labels_do_not_touch(project, compared):
    train, test = (open_labels(numbers(compared)["split"][part], SHAPE) for part in ("train", "held_out"))
    train, test = (part.read((0, 0, 0), SHAPE)[0] for part in (train, test))
    given = tifffile.imread(project / "labels.tif")
    assert not (train.astype(bool) & test.astype(bool)).any()
    for part in (train, test):
        np.testing.assert_array_equal(part[part > 0], given[part > 0])


@pytest.mark.parametrize("name", ["decision_tree", f"{FOREST}+autocontext"])
def test_numbers_are_those_of_fit_predict_and_evaluate(project, compared, tmp_path, capsys, name):
    found = numbers(compared)
    (contestant,) = (c for c in found["contestants"] if c["name"] == name)
    options = ["--model", name.split(":")[0], "--seed", "1", "--bank", "edges", "--folds", "2", "--samples", "900"]
    options += ["--trees", "5"] if ":" in name else []
    options += ["--autocontext", "2"] if "+" in name else []
    split = found["split"]
    assert run(project, "fit", "image.tif", split["train"], "-o", tmp_path / "m", *options) == 0
    region = ["--region", split["region"]]
    assert run(project, "predict", tmp_path / "m", "image.tif", "-o", tmp_path / "p", *region) == 0
    (kept,) = (s for s in contestant["seeds"] if s["seed"] == 1)
    np.testing.assert_array_equal(read(tmp_path / "p" / "labels.zarr"), read(f"{kept['prediction']}/labels.zarr"))
    capsys.readouterr()
    assert run(project, "evaluate", tmp_path / "p", split["held_out"], "--json") == 0
    scores = json.loads(capsys.readouterr().out)["held_out"]
    for score in ("macro_f1", "mean_iou", "macro_average_precision", "kappa"):
        assert kept[score] == scores[score]
        values = [s[score] for s in contestant["seeds"]]
        assert contestant[score]["value"] == pytest.approx(np.mean(values))
        # The volume is smaller than a cell of the bootstrap, so there is nothing to draw from.
        assert (contestant[score]["low"], contestant[score]["high"]) == (None, None)


def test_the_table_says_the_same_as_the_json(compared):
    with (compared / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, contestant in zip(rows, numbers(compared)["contestants"], strict=True):
        assert row["name"] == contestant["name"]
        assert float(row["macro_f1"]) == pytest.approx(contestant["macro_f1"]["value"], rel=1e-5)
        assert float(row["voxels_per_s"]) == pytest.approx(contestant["voxels_per_s"], rel=1e-5)


def test_only_what_is_new_is_computed(project, compared):
    before = {path: path.stat().st_mtime_ns for path in (compared / "runs").rglob("*") if path.is_file()}
    scores = {c["name"]: c["macro_f1"] for c in numbers(compared)["contestants"]}
    arguments = ("compare", "image.tif", "labels.tif", "-o", compared, *FAST, "--seeds", "2")
    assert run(project, *arguments, "--models", f"{MODELS},extra_trees:trees=4") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = {c["name"]: c["macro_f1"] for c in numbers(compared)["contestants"]}
    assert found.pop("extra_trees:trees=4")["value"] > 0.5
    assert found == scores


def test_other_settings_need_another_folder(project, compared, capsys):
    arguments = ["compare", "image.tif", "labels.tif", "-o", compared, "--models", MODELS, *FAST]
    assert run(project, *arguments, "--balance", "equal") == 3
    assert "other inputs or settings; only --models, --seeds and --memory may differ" in capsys.readouterr().err


def test_labels_to_score_on_may_be_given(project, tmp_path):
    truth = tifffile.imread(project / "truth.tif")
    held = np.zeros_like(truth)
    held[4:6, 5:40, 5:45] = truth[4:6, 5:40, 5:45]
    tifffile.imwrite(tmp_path / "held.tif", held)
    out = tmp_path / "CMP"
    arguments = ("compare", "image.tif", "labels.tif", "-o", out, *FAST, "--validation", tmp_path / "held.tif")
    code = run(project, *arguments, "--models", "decision_tree", "--seeds", "1", "--classes", "in,edge,blob")
    assert code == 0
    found = numbers(out)
    assert found["split"]["region"] == "4:6,5:40,5:45"
    assert [c["name"] for c in found["classes"]] == ["in", "edge", "blob"]
    predicted = read(found["contestants"][0]["seeds"][0]["prediction"] + "/labels.zarr")[0]
    assert predicted[4:6, 5:40, 5:45].all()
    assert not predicted[:4].any()


def test_one_that_fails_does_not_stop_the_others(project, tmp_path, capsys):
    out = tmp_path / "CMP"
    models = "decision_tree:bank=multiscale:sigmas=150,decision_tree"
    arguments = ("compare", "image.tif", "labels.tif", "-o", out, "--models", models, "--seeds", "1", *FAST)
    assert run(project, *arguments) == 0
    found = numbers(out)
    assert [c["name"] for c in found["contestants"]] == ["decision_tree"]
    assert found["failures"][0]["name"] == "decision_tree:bank=multiscale:sigmas=150"
    assert "too little to hold out slabs" in found["failures"][0]["message"]
    assert "failed" in capsys.readouterr().out
    assert "Not finished" in (out / "compare.html").read_text()
    models = "decision_tree:bank=multiscale:sigmas=150"
    assert run(project, "compare", "image.tif", "labels.tif", "-o", tmp_path / "B", "--models", models, *FAST) == 2
    assert "no contestant finished" in capsys.readouterr().err


def test_a_network_trains_for_its_time_and_takes_part(project, tmp_path):
    out = tmp_path / "CMP"
    models = "decision_tree,3layer:width=0.25"
    arguments = ("compare", "image.tif", "labels.tif", "-o", out, "--models", models, "--seeds", "1", *FAST)
    assert run(project, *arguments, "--device", "cpu") == 0
    found = {c["name"]: c for c in numbers(out)["contestants"]}
    network = found["3layer:width=0.25"]
    assert network["size_counts"] == "parameters"
    folder = out / "runs" / "3layer_width=0.25" / "seed_0" / "model"
    weights = load_file(folder / "weights.safetensors")
    # Batch norm's running means are stored as well, but measured rather than trained.
    assert network["size"] == sum(
        w.size for name, w in weights.items() if "running_" not in name and "num_" not in name
    )
    assert network["macro_f1"]["value"] > 0.3
    model = json.loads((folder / "model.json").read_text())
    assert model["training"]["options"]["time"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "forrest"], "model 'forrest' is unknown"),
        (["--models", "random_forest:trees=x"], "--models random_forest:trees=x: --trees was 'x'"),
        (["--region", "0:2,0:2,0:2"], "no labelled voxel in 0:2,0:2,0:2"),
        (["--bank", "multiscale", "--sigmas", "900"], "too little to hold out slabs"),
    ],
)
def test_what_cannot_work_is_told_before_any_work(project, tmp_path, capsys, options, message):
    out = tmp_path / "CMP"
    assert run(project, "compare", "image.tif", "labels.tif", "-o", out, *FAST, *options) == 2
    assert message in capsys.readouterr().err
    assert not (out / "runs").exists()
