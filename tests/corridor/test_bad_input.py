"""Bad input of every kind: a message of its own, the right exit code, and nothing written or lost."""

import json
import shutil

import numpy as np
import pytest
import tifffile

from tests.corridor.conftest import SHAPE, SMALL, run
from voxclf import volume as volume_module
from voxclf.models.checkpoint import load_model
from voxclf.volume import open_volume


def fails(capsys, code, message, *arguments, **options):
    import re

    assert run(*arguments, **options) == code
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_a_truncated_tiff(project, tmp_path, capsys):
    path = tmp_path / "cut.tif"
    path.write_bytes((project / "image.tif").read_bytes()[:20000])
    fails(capsys, 2, r"cut\.tif.*(truncated|ends|beyond)", project, "predict", "model", path, "-o", tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def test_a_missing_voxel_size(project, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "plain.tif", np.zeros(SHAPE, np.uint8))
    code = run_without_size(tmp_path, "fit", "plain.tif", project / "labels.tif", "-o", "m")
    assert code == 2
    assert "--voxel-size 50,4.6,4.6" in capsys.readouterr().err


def run_without_size(folder, *arguments):
    from voxclf import cli

    resolved = [str(folder / a) if str(a).endswith(".tif") else str(a) for a in arguments]
    return cli.main(resolved)


def test_labels_of_another_shape(project, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "l.tif", np.ones((24, 44, 51), np.uint8))
    message = r"\(24, 44, 51\).*\(24, 44, 50\)|\(24, 44, 50\).*\(24, 44, 51\)"
    fails(capsys, 2, message, project, "fit", "image.tif", tmp_path / "l.tif", "-o", tmp_path / "m")


def test_labels_with_only_one_class(project, tmp_path, capsys):
    labels = np.zeros(SHAPE, np.uint8)
    labels[3] = 2
    tifffile.imwrite(tmp_path / "l.tif", labels)
    arguments = ("fit", "image.tif", tmp_path / "l.tif", "-o", tmp_path / "m")
    fails(capsys, 2, "only one class.*at least two", project, *arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_volume_with_nan_or_infinity(project, tmp_path, capsys, value):
    image = np.ones(SHAPE, np.float32)
    image[5, 6, 7] = value
    tifffile.imwrite(tmp_path / "f.tif", image)
    message = r"NaN or infinity at voxel \(5, 6, 7\)"
    fails(capsys, 5, message, project, "predict", "model", tmp_path / "f.tif", "-o", tmp_path / "OUT")
    fails(capsys, 5, message, project, "fit", tmp_path / "f.tif", "labels.tif", "-o", tmp_path / "m")
    assert not (tmp_path / "OUT").exists()


def test_an_unknown_model(project, tmp_path, capsys):
    arguments = ("run", "image.tif", "labels.tif", "-o", tmp_path / "OUT", "--model", "forrest")
    fails(capsys, 2, r"model 'forrest' is unknown; known are decision_tree, random_forest", project, *arguments)
    assert not (tmp_path / "OUT").exists()


def test_an_output_of_another_job(project, tmp_path, capsys):
    out = tmp_path / "OUT"
    assert run(project, "predict", "model", "image.tif", "-o", out, "--region", "0:10,:,:") == 0
    before = open_volume(out / "labels.zarr", kind="labels").read((0, 0, 0), SHAPE)
    message = "was written by another job.*region was.*--overwrite"
    fails(capsys, 3, message, project, "predict", "model", "image.tif", "-o", out)
    np.testing.assert_array_equal(open_volume(out / "labels.zarr", kind="labels").read((0, 0, 0), SHAPE), before)
    assert run(project, "predict", "model", "image.tif", "-o", out, "--overwrite") == 0
    assert open_volume(out / "labels.zarr", kind="labels").read((0, 0, 0), SHAPE)[0, 20].all()


def test_outputs_that_voxclf_did_not_write_are_never_touched(project, tmp_path, capsys):
    (tmp_path / "labels.zarr").mkdir()
    (tmp_path / "labels.zarr" / "thesis.txt").write_text("all of it")
    fails(capsys, 3, "exists", project, "predict", "model", "image.tif", "-o", tmp_path)
    assert run(project, "predict", "model", "image.tif", "-o", tmp_path, "--overwrite") != 0
    assert (tmp_path / "labels.zarr" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("kept")
    fit = ("fit", "image.tif", "labels.tif", "-o", tmp_path / "notes", "--overwrite", *SMALL)
    fails(capsys, 3, "is not a model folder", project, *fit)
    assert (tmp_path / "notes" / "a.txt").read_text() == "kept"


def test_a_full_disk(project, tmp_path, capsys, monkeypatch):
    """The third block finds no space: its failure is named, the first two stay, and the next run goes on."""
    write = volume_module.Volume.write
    calls = []

    def write_until_full(self, start, array):
        calls.append(start)
        if len(calls) > 4:  # two volumes per block
            raise OSError(28, "No space left on device", self.path)
        write(self, start, array)

    large = np.tile(tifffile.imread(project / "image.tif"), (3, 3, 3))
    tifffile.imwrite(tmp_path / "large.tif", large)
    arguments = ("predict", "model", tmp_path / "large.tif", "-o", tmp_path / "OUT", "--executor", "serial")
    monkeypatch.setattr(volume_module.Volume, "write", write_until_full)
    fails(capsys, 5, "(?s)No space left on device.*what is finished is kept", project, *arguments)
    monkeypatch.undo()
    assert len((tmp_path / "OUT" / "ledger" / "done.log").read_text().splitlines()) == 2
    assert run(project, *arguments) == 0
    assert "2 of them were there already" in capsys.readouterr().out
    assert open_volume(tmp_path / "OUT" / "labels.zarr", kind="labels").read((0, 0, 0), large.shape).all()


def test_a_model_of_another_voxel_size(project, tmp_path, capsys):
    arguments = ("predict", "model", "image.tif", "-o", tmp_path / "OUT", "--voxel-size", "20,12,12")
    fails(capsys, 4, r"trained at voxel size \(20.0, 10.0, 10.0\) nm.*\(20.0, 12.0, 12.0\)", project, *arguments)
    assert not (tmp_path / "OUT").exists()


def test_no_model_there(project, tmp_path, capsys):
    fails(capsys, 2, "is not a model folder", project, "predict", "image.tif", "image.tif", "-o", tmp_path / "OUT")


@pytest.fixture
def model_copy(project, tmp_path):
    shutil.copytree(project / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["arrays.npz", "golden.npz"])
def test_a_tampered_model_file(project, tmp_path, capsys, model_copy, name):
    content = bytearray((model_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model_copy / name).write_bytes(content)
    message = f"{name} has changed since it was saved"
    fails(capsys, 4, message, project, "predict", model_copy, "image.tif", "-o", tmp_path / "OUT")


def edit_model(folder, change):
    """Change the arrays of a model and its recorded hashes with them, as a careful forger would."""
    with np.load(folder / "arrays.npz") as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(folder / "arrays.npz", **arrays)
    from voxclf.models.checkpoint import _hash_file

    description = json.loads((folder / "model.json").read_text())
    description["files"]["arrays.npz"] = _hash_file(folder / "arrays.npz")
    (folder / "model.json").write_text(json.dumps(description))


def test_a_forged_model_is_refused_before_it_can_crash(project, tmp_path, capsys, model_copy):
    def point_outside(arrays):
        child = next(name for name in arrays if name.endswith(".child"))
        arrays[child][:] = 2**30

    edit_model(model_copy, point_outside)
    assert run(project, "predict", model_copy, "image.tif", "-o", tmp_path / "OUT") == 4
    assert capsys.readouterr().err.startswith("voxclf: ")


def test_a_model_that_gives_other_answers_is_refused(project, tmp_path, capsys, model_copy):
    def move_thresholds(arrays):
        threshold = next(name for name in arrays if name.endswith(".threshold"))
        arrays[threshold] = (arrays[threshold] * 1.2).astype(np.float32)

    edit_model(model_copy, move_thresholds)
    message = "golden patch differs"
    fails(capsys, 4, message, project, "predict", model_copy, "image.tif", "-o", tmp_path / "OUT")


@pytest.mark.parametrize(
    "content", ["", "{}", '{"format": "onnx"}', '{"format": "voxclf-model", "format_version": 99}']
)
def test_a_damaged_model_description(project, tmp_path, capsys, model_copy, content):
    (model_copy / "model.json").write_text(content)
    fails(capsys, 4, "model.json", project, "predict", model_copy, "image.tif", "-o", tmp_path / "OUT")


def test_save_and_load_give_the_same_prediction(project):
    first, second = load_model(project / "model"), load_model(project / "model")
    block = np.random.default_rng(0).integers(0, 256, (1, 12, 13, 14), dtype=np.uint8)
    np.testing.assert_array_equal(first.step()(block), second.step()(block))
