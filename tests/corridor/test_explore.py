"""``voxclf explore`` from the command line."""

import json

import tifffile

from tests.corridor.conftest import run

SIZE = ["--voxel-size", "20,10,10"]


def test_explore_with_labels_and_learning_curve(project, tmp_path, capsys):
    code = run(
        project, "explore", "image.tif", "labels.tif", "-o", tmp_path / "look", *SIZE, "--classes",
        "inside,membrane,blob", "--learning-curve", "--bank", "edges", "--trees", "5",
    )  # fmt: skip
    assert code == 0
    values = json.loads((tmp_path / "look" / "explore.json").read_text())
    labels = tifffile.imread(project / "labels.tif")
    assert values["labels"]["counts"] == {
        name: int((labels == i).sum()) for i, name in enumerate(("inside", "membrane", "blob"), 1)
    }
    assert values["labels"]["slices"]["z"]["labelled"] == [12]
    assert values["learning_curve"]["gain_of_one_slice"]["value"] >= 0
    page = (tmp_path / "look" / "explore.html").read_text(encoding="utf-8")
    assert "What would another labelled slice bring?" in page
    printed = capsys.readouterr().out
    assert "next slice   one more labelled slice" in printed
    assert str(tmp_path / "look" / "explore.html") in printed
    assert (tmp_path / "look" / "config.toml").exists()


def test_explore_without_labels_as_json(project, tmp_path, capsys):
    assert run(project, "explore", "image.tif", "-o", tmp_path / "look", *SIZE, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    image = tifffile.imread(project / "image.tif")
    assert abs(values["intensities"]["overall"]["mean"] - image.mean()) < 1e-9
    assert values["labels"] is None


def test_what_is_wrong_is_said_before_any_work(project, tmp_path, capsys):
    assert run(project, "explore", "image.tif", "-o", tmp_path / "look", *SIZE, "--learning-curve") == 2
    assert "--learning-curve was given without LABELS; give labels" in capsys.readouterr().err
    assert run(project, "explore", "image.tif", "nothing.tif", "-o", tmp_path / "look", *SIZE) == 2
    assert "nothing.tif" in capsys.readouterr().err
    code = run(
        project, "explore", "image.tif", "labels.tif", "-o", tmp_path / "look", *SIZE, "--learning-curve",
        "--model", "forest",
    )  # fmt: skip
    assert code == 2
    assert "forest" in capsys.readouterr().err
    assert not (tmp_path / "look").exists()
