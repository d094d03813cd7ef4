"""The device step on CPU tensors gives what the compiled step gives; the device is chosen without importing torch."""

import dataclasses
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

from features.bank import FilterBank
from tests.conftest import VOXEL_SIZE_NM, draw_cells
from voxclf import cli, predict
from voxclf.feature_stack import FeatureStack
from voxclf.labels import LabelSet
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models import devices
from voxclf.models.checkpoint import save_model
from voxclf.models.devices import choose_device, make_step
from voxclf.models.gaussian_mixture import GaussianMixture
from voxclf.models.packed_forest import PackedForest
from voxclf.models.trees import TreeModel, TreePredictor
from voxclf.provenance import IntensityStatistics
from voxclf.volume import open_volume

pytest.importorskip("torch")

BANKS = [
    FilterBank("edges", 3),
    FilterBank("multiscale", 2, (10.0, 25.0)),
    FilterBank("multiscale", 3, (20.0,)),
    FilterBank("intensity", 3),
]


def make_model(bank, classifier=None):
    """A model fitted on the features of a small block, whatever is asked of it."""
    image, labels = draw_cells((9, 24, 26), seed=1)
    halo = bank.halo(VOXEL_SIZE_NM)
    padded = np.pad(image, [(h, h) for h in halo], mode="symmetric")
    rows = bank.compute(padded, VOXEL_SIZE_NM).reshape(bank.n_features, -1).T
    if classifier is None:
        classifier = RandomForestClassifier(9, max_depth=7, random_state=0)
    forest = PackedForest.from_sklearn(classifier.fit(rows, labels.ravel().astype(int) - 1), n_classes=3)
    statistics = IntensityStatistics(float(image.mean()), float(image.std()), 0, 255)
    return TreeModel(
        "random_forest", bank, (forest,), LabelSet.from_ids([1, 2, 3]), VOXEL_SIZE_NM, statistics, hyperparameters={}
    )


def trees_torch():
    from voxclf.models import trees_torch

    return trees_torch


def torch_step(model, **options):
    step = model.step()
    return trees_torch().TorchTreePredictor(step.stack, step.classifier, "cpu", step.calibration, **options)


def block_for(step, core=(5, 13, 17), dtype=np.uint8, seed=3):
    shape = tuple(n + 2 * h for n, h in zip(core, step.halo, strict=True))
    image = draw_cells(shape, seed=seed)[0].astype(dtype)[None]
    image.flags.writeable = False
    return image


def assert_same_probabilities(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    # A feature within rounding of a threshold may go the other way in one tree; that is a few voxels at most.
    differs = np.abs(found - expected).max(axis=0) > 1e-5
    assert differs.mean() < 0.002
    ranked = np.sort(expected, axis=0)
    clear = ~differs & (ranked[-1] - ranked[-2] > 1e-4)
    np.testing.assert_array_equal(found.argmax(axis=0)[clear], expected.argmax(axis=0)[clear])


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.kind}_{bank.dimensions}d")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_equals_the_compiled_step(bank, dtype):
    model = make_model(bank)
    ours, theirs = torch_step(model), model.step()
    assert (ours.halo, ours.alignment, ours.out_channels) == (theirs.halo, theirs.alignment, theirs.out_channels)
    image = block_for(ours, dtype=dtype)
    assert_same_probabilities(ours(image), theirs(image))


def test_boosting_in_float64_equals_the_compiled_step():
    model = make_model(BANKS[0], GradientBoostingClassifier(n_estimators=4, random_state=0))
    ours = torch_step(model)
    image = block_for(ours)
    assert_same_probabilities(ours(image), model.step()(image))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_round_with_context_and_calibration_equals_the_compiled_step(dimensions):
    bank = FilterBank("edges", dimensions)
    context = FilterBank("multiscale", dimensions, (10.0, 20.0), ("gaussian",), neighbours=dimensions == 2)
    stack = FeatureStack(bank, VOXEL_SIZE_NM, context, ("a", "b", "c"))
    rng = np.random.default_rng(4)
    rows = rng.uniform(0, 255, (600, stack.n_features)).astype(np.float32)
    classes = np.digitize(rows[:, 0] + rows[:, -1], (180, 320))
    forest = PackedForest.from_sklearn(RandomForestClassifier(9, random_state=0).fit(rows, classes))
    curves = np.sort(rng.uniform(size=(3, 11)), axis=1).astype(np.float32)
    theirs = TreePredictor(stack, forest, CalibrationMap(curves))
    ours = trees_torch().TorchTreePredictor(stack, forest, "cpu", CalibrationMap(curves))
    ours = dataclasses.replace(ours, part_bytes=ours.device_bytes((3, 7, 9)))
    image = block_for(theirs)
    probabilities = rng.integers(0, 256, (3, *image.shape[1:])).astype(np.uint8)
    assert_same_probabilities(ours(image, probabilities), theirs(image, probabilities))


@pytest.mark.parametrize("bank", BANKS[:3], ids=lambda bank: f"{bank.kind}_{bank.dimensions}d")
def test_parts_that_fit_the_device_equal_the_whole_block(bank):
    model = make_model(bank)
    whole = torch_step(model)
    small = torch_step(model, part_bytes=whole.device_bytes((3, 7, 9)))
    image = block_for(whole)
    parts = small._part_shape((5, 13, 17))
    assert small.device_bytes(parts) <= small.part_bytes
    assert parts != (5, 13, 17)
    assert_same_probabilities(small(image), whole(image))


def test_a_step_can_be_sent_to_another_process_after_use():
    step = torch_step(make_model(BANKS[0]))
    image = block_for(step)
    expected = step(image)
    again = pickle.loads(pickle.dumps(step))
    assert "_on_device" not in vars(again)
    np.testing.assert_array_equal(again(image), expected)


def test_threads_take_turns():
    step = torch_step(make_model(BANKS[0]))
    images = [block_for(step, seed=seed) for seed in range(4)]
    expected = [step(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(step, images), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_host_memory_grows_with_what_is_read_and_written():
    step = torch_step(make_model(FilterBank("edges", 3)))
    assert step.working_bytes((8, 8, 8)) == 8 * 10**3 + 12 * 3 * 8**3


def test_a_volume_is_predicted_on_the_device_through_the_engine(save_volume, tmp_path, monkeypatch, capsys):
    model = make_model(BANKS[1])
    save_model(model, block_for(model.step(), core=(2, 4, 4)), tmp_path / "model")
    volume = save_volume(draw_cells((23, 37, 41), seed=8)[0])
    command = ["predict", str(tmp_path / "model"), volume.path, "--probabilities", "float32", "-o"]
    assert cli.main([*command, str(tmp_path / "compiled")]) == 0
    assert "device" not in capsys.readouterr().out
    # Stands in for a GPU: the same step, executor and outputs, with tensors on the CPU.
    monkeypatch.setattr(predict, "choose_device", lambda model, device, n_voxels: "cuda")
    monkeypatch.setattr(predict, "make_step", lambda model, *_, **__: torch_step(model, part_bytes=2_000_000))
    assert cli.main([*command, str(tmp_path / "device")]) == 0
    assert "device       cuda: one block at a time" in capsys.readouterr().out
    found, expected = (
        open_volume(tmp_path / name / "probabilities.zarr").read((0, 0, 0), (23, 37, 41))
        for name in ("device", "compiled")
    )
    assert_same_probabilities(found, expected)
    labels = open_volume(tmp_path / "device" / "labels.zarr", kind="labels")
    assert labels.metadata["provenance"]["device"] == "cuda"


def test_asking_for_a_gpu_that_is_not_there_stops_before_any_work(save_volume, tmp_path, monkeypatch, capsys):
    model = make_model(BANKS[1])
    save_model(model, block_for(model.step(), core=(2, 4, 4)), tmp_path / "model")
    volume = save_volume(draw_cells((9, 9, 9))[0])
    pretend(monkeypatch, False, False)
    out = tmp_path / "out"
    assert cli.main(["predict", str(tmp_path / "model"), volume.path, "-o", str(out), "--device", "cuda"]) == 2
    assert "--device was cuda, but torch finds no such GPU" in capsys.readouterr().err
    assert not out.exists()


# --- which device ---


@pytest.fixture
def large_model():
    return make_model(BANKS[2])


def pretend(monkeypatch, has_device, torch_sees):
    monkeypatch.setattr(devices, "has_nvidia_device", lambda: has_device)
    monkeypatch.setattr(devices, "sees", lambda device: torch_sees)


@pytest.mark.parametrize(
    ("has_device", "torch_sees", "n_voxels", "expected"),
    [
        (True, True, None, "cuda"),
        (True, True, 10**9, "cuda"),
        (True, True, 10**6, "cpu"),
        (True, False, 10**9, "cpu"),
        (False, True, 10**9, "cpu"),
    ],
)
def test_auto_takes_a_gpu_for_large_jobs_only(large_model, monkeypatch, has_device, torch_sees, n_voxels, expected):
    pretend(monkeypatch, has_device, torch_sees)
    assert choose_device(large_model, "auto", n_voxels) == expected


def test_auto_keeps_small_models_on_the_cpu(monkeypatch):
    pretend(monkeypatch, True, True)
    assert choose_device(make_model(BANKS[0])) == "cpu"
    many = RandomForestClassifier(40, max_depth=7, random_state=0)
    assert choose_device(make_model(BANKS[0], many)) == "cuda"


def test_a_gpu_that_is_asked_for_is_used_whatever_the_size(large_model, monkeypatch):
    pretend(monkeypatch, False, True)
    assert choose_device(large_model, "cuda", 10) == "cuda"
    step = make_step(large_model, "cuda", 10)
    assert step.device == "cuda"
    assert isinstance(make_step(large_model, "cpu"), TreePredictor)


def test_a_gpu_that_is_not_there_is_named(large_model, monkeypatch):
    pretend(monkeypatch, False, False)
    with pytest.raises(ValueError, match=r"--device was cuda, but torch finds no such GPU .* use --device cpu or auto"):
        choose_device(large_model, "cuda")


def test_models_that_do_not_run_on_a_gpu_are_named(large_model, monkeypatch):
    pretend(monkeypatch, True, True)
    with pytest.raises(ValueError, match="need float64, which mps does not have"):
        choose_device(large_model, "mps")
    assert choose_device(make_model(BANKS[0]), "mps") == "mps"
    mixture = GaussianMixture(np.ones((2, 1, 1)), np.zeros((2, 1)), np.zeros(2), np.array([0, 1], np.int32), 2)
    other = TreeModel(
        "gaussian_mixture", BANKS[3], (mixture,), LabelSet.from_ids([1, 2]), VOXEL_SIZE_NM, large_model.intensity, {}
    )
    with pytest.raises(ValueError, match="gaussian_mixture is not made of trees and runs on cpu only"):
        choose_device(other, "cuda")
    assert choose_device(other) == "cpu"


def test_torch_is_not_imported_where_there_is_no_nvidia_device():
    script = (
        "import sys; from voxclf.models import devices; devices.has_nvidia_device = lambda: False; "
        "devices.is_worth_a_gpu = lambda model: True; "
        "print(devices.choose_device(None), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False"]
