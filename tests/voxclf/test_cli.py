"""The command line reads its options off the configurations and turns failures into words and exit codes."""

import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from voxclf import cli
from voxclf.config import COMMANDS, PredictConfig, RunConfig, load_config_file, make_config, save_config


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(kind.command in text for kind in COMMANDS)


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.command)
def test_help_of_a_command_explains_every_field_and_shows_examples(kind, capsys):
    with pytest.raises(SystemExit):
        cli.main([kind.command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for example in kind.examples:
        assert example in text
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert " ".join(field.description.split())[:30] in text


def parse(*arguments):
    values = vars(cli.build_parser().parse_args(arguments))
    kind = values.pop("kind")
    for name in ("json", "traceback", "config"):
        values.pop(name, None)
    return make_config(kind, values)


def test_options_become_a_checked_configuration():
    config = parse(
        "run", "v.tif", "l.tif", "-o", "OUT", "--voxel-size", "50,4.6,4.6", "--memory", "4GB", "--dimensions", "2",
        "--balance", "equal", "--sigmas", "5,10.5", "--probabilities", "none",
    )  # fmt: skip
    assert isinstance(config, RunConfig)
    assert config.voxel_size == (50.0, 4.6, 4.6)
    assert config.memory == 4_000_000_000
    assert config.dimensions == 2
    assert config.balance == "equal"
    assert config.sigmas == (5.0, 10.5)
    assert config.probabilities == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--voxel-size", "50,4.6"], r"--voxel-size has only 2 numbers \(z,y,x in nm"),
        (["--voxel-size", "50,0,4.6"], r"--voxel-size was 0\.0: input should be greater than 0"),
        (["--voxel-size", "five"], "--voxel-size was 'five': give numbers separated by commas"),
        (["--memory", "4 parsecs"], "--memory was '4 parsecs': give a number and a unit"),
        (["--workers", "0"], "--workers was '0': input should be greater than or equal to 1"),
        (["--probabilities", "int3"], "--probabilities was 'int3': input should be 'none', 'uint8'"),
    ],
)
def test_wrong_options_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse("predict", "m", "v", "-o", "o", *arguments)


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match=r"(?s)volume is missing: TIFF file.*--output is missing: folder"):
        parse("predict", "model")


def test_a_saved_configuration_repeats_the_run(tmp_path):
    config = parse("predict", "m", "v", "-o", "o", "--region", "0:5,:,:", "--voxel-size", "8,8,8")
    save_config(config, tmp_path / "config.toml")
    assert make_config(PredictConfig, load_config_file(tmp_path / "config.toml")) == config


def test_unknown_settings_and_broken_files_are_refused(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("volme = 3")
    with pytest.raises(ValueError, match="volme is not a setting of `voxclf predict`; known are"):
        make_config(PredictConfig, load_config_file(path))
    path.write_text("volume = [")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config_file(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_config_file(tmp_path / "none.toml")


def test_the_command_line_overrides_the_file(tmp_path, capsys, save_volume, cells):
    volume = save_volume(cells[0])
    path = tmp_path / "c.toml"
    path.write_text(f'volume = "{volume.path}"\nvoxel-size = [1, 1, 1]\n')
    assert cli.main(["info", "--config", str(path), "--voxel-size", "20,10,10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["voxel size (nm)"] == [20, 10, 10]


def test_bad_input_gives_exit_code_2_and_one_line(tmp_path, capsys):
    assert cli.main(["info", str(tmp_path / "no.tif")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("voxclf: ")
    assert "Traceback" not in error


def test_models_are_listed(capsys):
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    for name in ("decision_tree", "random_forest", "adaboost", "gradient_boosting", "xgboost", "gaussian_mixture"):
        assert name in text


def test_starting_up_imports_nothing_heavy():
    code = "import sys, voxclf.cli; voxclf.cli.build_parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "sklearn", "numba", "matplotlib", "tensorstore", "scipy", "skimage", "rich"} & set(modules)


def test_the_tree_path_does_not_import_torch():
    code = "import sys, voxclf.workflow; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "monai"} & set(modules)


@dataclass
class Piece:
    """Something finished that counts voxels."""

    n_voxels: int


def test_progress_shows_the_rate_of_the_whole_stage(capsys, monkeypatch):
    # Two blocks at once after a minute, two more a minute later: their rate is not that of a burst.
    moments = iter([0.0, 60.0, 60.01, 120.0, 120.01, 120.02])
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    blocks = [Piece(30_000_000) for _ in range(4)]
    assert list(cli.RichProgress()("predict", blocks, 120_000_000, "voxel")) == blocks
    shown = capsys.readouterr().err
    assert "1.00 Mvoxel/s" in shown
    assert "100%" in shown and "0:02:00" in shown
