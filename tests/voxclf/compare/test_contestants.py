"""What may stand after ``--models``, and what each contestant is then fitted with."""

from pathlib import Path

import pytest

from voxclf.compare.contestants import parse_contestants
from voxclf.config import CompareConfig, make_config
from voxclf.geometry import Region


def make(models, **values):
    given = {"volume": "v.tif", "labels": "l.tif", "output": "OUT", "models": models}
    return make_config(CompareConfig, {**given, **values})


def test_a_model_its_options_and_its_stages():
    plain, rich = parse_contestants("random_forest, xgboost:bank=edges:max-depth=4+autocontext=3+crf")
    assert (plain.name, plain.model, plain.rounds, plain.with_crf) == ("random_forest", "random_forest", 1, False)
    assert (rich.model, rich.rounds, rich.with_crf) == ("xgboost", 3, True)
    assert rich.options == {"bank": "edges", "max_depth": "4"}
    assert rich.without_last_stage.name == "xgboost:bank=edges:max-depth=4+autocontext=3"
    assert rich.without_last_stage.without_last_stage.name == "xgboost:bank=edges:max-depth=4"
    assert plain.without_last_stage is None
    assert rich.folder_name == "xgboost_bank=edges_max-depth=4+autocontext=3+crf"


def test_options_of_a_contestant_come_before_those_of_the_comparison():
    config = make("random_forest:trees=7:bank=edges+autocontext", bank="intensity", samples=500)
    (contestant,) = parse_contestants(config.models)
    fit = contestant.fit_config(config, "train.zarr", None, 4, Path("model"))
    assert (fit.trees, fit.bank, fit.samples, fit.autocontext, fit.seed) == (7, "edges", 500, 2, 4)
    assert (fit.labels, fit.output, fit.overwrite) == ("train.zarr", "model", True)


def test_networks_get_the_time_budget_and_trees_the_filter_bank():
    config = make("4conv:tta=true,random_forest", bank="edges", time="20s", device="cpu", memory="1GB")
    network, trees = (
        contestant.fit_config(config, "l.tif", None, 0, Path("model"))
        for contestant in parse_contestants(config.models)
    )
    assert (network.time, network.device, network.bank) == (20, "cpu", "multiscale")
    assert (trees.time, trees.bank) == (None, "edges")
    network, trees = (
        contestant.predict_config(config, Path("model"), Region((0, 1, 2), (3, 4, 5)), Path("p"))
        for contestant in parse_contestants(config.models)
    )
    assert (network.tta, network.region, network.memory, network.pyramid) == (True, "0:3,1:4,2:5", 10**9, False)
    assert not trees.tta


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("3layer:trees=4", "--models 3layer:trees=4: --trees was 4, but 3layer is a network"),
        ("3layer+autocontext", "--autocontext was 2, but 3layer is a network"),
        ("random_forest:width=2", "--width was 2.0, but random_forest is a tree model"),
        ("random_forest:tta=true", "--tta was given, but random_forest has no such choice"),
        ("4res", "4res pads, so it cannot be evaluated exactly.*--output-stride 4"),
    ],
)
def test_what_a_model_does_not_have_is_refused_before_any_work(models, message):
    config = make(models)
    (contestant,) = parse_contestants(models)
    with pytest.raises(ValueError, match=message):
        contestant.check(config)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("forrest", "model 'forrest' is unknown; known are"),
        ("random_forest,random_forest", "names random_forest twice; name each once"),
        ("random_forest:trees", r"'trees' is not option=value; write for example random_forest:trees=200"),
        ("random_forest:seed=3", "seed cannot differ between contestants"),
        ("random_forest+crf+autocontext", r"stage \+autocontext is not allowed here.*in this order"),
        ("random_forest+unet", r"stage \+unet is not allowed here"),
        ("random_forest+autocontext=9", "give 2 to 4 rounds"),
        ("random_forest+autocontext=two", "give 2 to 4 rounds"),
    ],
)
def test_what_is_not_allowed(models, message):
    with pytest.raises(ValueError, match=message):
        parse_contestants(models)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("random_forest:tress=3", "--models random_forest:tress=3: tress is not a setting of `voxclf fit`"),
        ("random_forest:trees=0", "--models random_forest:trees=0: --trees was '0'.*greater than or equal to 1"),
    ],
)
def test_options_are_checked_as_those_of_a_fit(models, message):
    config = make(models)
    (contestant,) = parse_contestants(models)
    with pytest.raises(ValueError, match=message):
        contestant.fit_config(config, "l.tif", None, 0, Path("model"))
