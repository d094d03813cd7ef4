"""The training loop: the right gradient, nothing learned from what is unlabelled or held out, and resumption."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import needs_einops
from voxclf.config import FitConfig
from voxclf.labels import LabelSet
from voxclf.metrics.voxelwise import score_tables
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.patch_cnn import PatchNetwork, Shape
from voxclf.models.registry import NETWORKS, NetworkInfo, build
from voxclf.progress import last, silent
from voxclf.sampling import survey_labels
from voxclf.training import fit_torch
from voxclf.training.fit_torch import Classification, train_network
from voxclf.training.held_out import HeldOut
from voxclf.training.training_plan import Plan, step_size_factor
from voxclf.training.training_state import STATE_FILE, TrainingState, load_state
from voxclf.training.window_plan import choose_windows, crop_shape, plan_windows
from voxclf.training.windows import LabelIndex, WindowBatch, WindowReader, WindowSampler

SHAPE = (26, 48, 50)
NOTHING_HELD_OUT = HeldOut(0, -9, -9, 0, 0, 0, 0, 0)
VOXEL_SIZE_NM = (10.0, 10.0, 10.0)


def stripes(seed=0, shape=SHAPE):
    """Two textures side by side in y, told apart by how fast they change, not by how bright they are."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    is_fine = (y // 8) % 2 == 1
    image = np.where(is_fine, 40 * ((z + y + x) % 2), 40 * ((z // 3 + y // 3 + x // 3) % 2)) + 100
    labels = np.where(is_fine, 2, 1).astype(np.uint8)
    sparse = np.zeros_like(labels)
    sparse[13], sparse[:, :, 20] = labels[13], labels[:, :, 20]
    return (image + rng.normal(0, 4, shape)).astype(np.uint8), sparse, labels


def tiny_network(patch=(6, 6, 6), n_classes=2, seed=0):
    """Two convolutions with a pool between them: exact, and small enough to train in a second."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv3d(1, 6, 3, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 8, 2), nn.ReLU()
    )
    return PatchNetwork("tiny", patch, 1, n_classes, backbone, Shape(8, (1, 1, 1)))


TINY = NetworkInfo("tiny", "", "", "patch", True, 6)


@dataclass
class Job:
    """Everything that train_network takes, on the striped volume."""

    volume: object
    labels: object
    survey: object
    label_set: LabelSet
    inputs: NetworkInput

    def options(self, **given):
        chosen = {"steps": 60, "batch": 4, "window": 12, "learning_rate": 0.02, "augment": "none", **given}
        return FitConfig(volume="v", labels="l", output="o", model="4conv", **chosen)

    def train(self, folder, network=None, info=TINY, progress=silent, **given):
        network = tiny_network() if network is None else network
        return train_network(
            network,
            info,
            self.inputs,
            self.volume,
            self.labels,
            self.survey,
            self.label_set,
            self.options(**given),
            folder,
            1,
            progress,
        )

    def task(self, network, info=TINY, **given):
        """The task as train_network makes it, with nothing held out."""
        options = self.options(**given)
        index = LabelIndex(WindowReader(self.volume, self.labels, self.inputs, self.label_set), self.survey)
        windows = plan_windows(network, info, options, self.volume)[0]
        sampler = WindowSampler(index, NOTHING_HELD_OUT, windows.drawn, options.batch, "sqrt", options.seed)
        return Classification(network, options, windows, sampler, index)


@pytest.fixture
def make_job(save_volume):
    def make(image, labels):
        volume = save_volume(image, voxel_size_nm=VOXEL_SIZE_NM)
        label_volume = save_volume(labels, "labels.zarr", "labels", voxel_size_nm=VOXEL_SIZE_NM)
        survey = last(survey_labels(label_volume, 0)).total
        return Job(volume, label_volume, survey, LabelSet.from_ids([1, 2]), NetworkInput.measure(volume))

    return make


@pytest.fixture
def job(make_job):
    image, sparse, _ = stripes()
    return make_job(image, sparse)


def macro_f1(tables, n_classes=2):
    return score_tables(tables.total(n_classes)).macro_f1


# --- the gradient ---


def gradients(task, batch):
    task.network.zero_grad()
    loss = task.loss_of(batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in task.network.parameters()]


def patches_of(batch, form, patch):
    """The patches of a slab's labelled voxels, cut out one by one."""
    images, targets = [], []
    for image, target in zip(batch.images, batch.targets, strict=True):
        for position in np.argwhere(target >= 0):
            z, y, x = position * form.spacing
            images.append(image[:, z : z + patch[0], y : y + patch[1], x : x + patch[2]])
            targets.append(target[tuple(position)])
    return WindowBatch(
        np.stack(images), np.array(targets)[:, None, None, None], 0, np.zeros((len(images), 3), np.int64)
    )


def torch_batch(batch):
    return batch._replace(images=torch.from_numpy(batch.images), targets=torch.from_numpy(batch.targets))


@pytest.mark.parametrize("loss", ["ce", "focal"])
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("spacing", [1, 4])
def test_slab_has_the_loss_and_gradient_of_its_patches(make_job, loss, axis, spacing):
    """3layer, whose receptive field is its whole patch, so that every patch lies within the slab."""
    image, _, labels = stripes()
    sparse = np.zeros_like(labels)
    plane = [slice(None)] * 3
    plane[axis] = 12
    sparse[tuple(plane)] = labels[tuple(plane)]
    sparse[:, ::5] = 0  # gaps in the plane, too
    job = make_job(image, sparse)
    torch.manual_seed(1)
    network = build("3layer", 2, width=0.25).double().eval()
    options = {"loss": loss, "class_weights": "equal"}
    slabs = job.task(network, NETWORKS["3layer"], window=6, batch=2, spacing=spacing, **options)
    patches = job.task(network, NETWORKS["3layer"], sampling="patches", **options)
    patches.loss = slabs.loss = slabs.loss.double()  # one set of class weights
    batch = slabs.draw(0)
    assert slabs.windows.drawn[batch.form].normal == axis
    batch = batch._replace(images=batch.images.astype(np.float64))
    single = patches_of(batch, slabs.windows.drawn[batch.form], network.patch)
    slab_loss, slab_gradients = gradients(slabs, torch_batch(batch))
    patch_loss, patch_gradients = gradients(patches, torch_batch(single))
    assert slab_loss == pytest.approx(patch_loss, rel=1e-12)
    for a, b in zip(slab_gradients, patch_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_unlabelled_voxels_have_no_gradient(job):
    network = tiny_network().eval()
    task = job.task(network)
    batch = torch_batch(task.draw(0))
    logits = task.logits(batch).detach().requires_grad_()
    targets = batch.targets.clone()
    targets[:, :, ::2] = -1
    task.loss(logits, targets).backward()
    has_gradient = (logits.grad != 0).any(dim=1)
    assert not has_gradient[targets < 0].any()
    assert has_gradient[targets >= 0].any()


# --- training ---


def test_tiny_network_learns_a_texture(job, tmp_path):
    result = job.train(tmp_path, steps=100)
    assert macro_f1(result.validation) > 0.9
    assert macro_f1(result.training) > 0.9
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert result.split["is_gap_kept"]
    assert result.n_labelled_seen == result.history[-1]["n_labelled_seen"] > 100 * 4 * 12
    # Cells of the bootstrap hold each held-out label once.
    assert result.validation.total(2).n_voxels == result.split["n_held_out"]


def test_a_network_without_exact_slabs_learns_from_patches(job, tmp_path):
    torch.manual_seed(0)
    network = build("4res", 2, patch=8, width=0.25)
    options = {"batch": 16, "steps": 40, "learning_rate": 0.01, "sampling": "slabs"}
    result = job.train(tmp_path, network, NETWORKS["4res"], **options)
    assert macro_f1(result.training) > 0.8
    assert result.n_labelled_seen == 40 * 16


class TwoHeads(nn.Module):
    """A segmenter that hands over a boundary output while training."""

    alignment = divisor = (1, 1, 1)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()
        )
        self.classes, self.boundary = nn.Conv3d(6, 2, 1), nn.Conv3d(6, 1, 1)

    def forward(self, x):
        x = self.body(x)
        return (self.classes(x), self.boundary(x)) if self.training else self.classes(x)


@pytest.mark.parametrize("loss", ["ce", "dice"])
def test_segmenter_learns_from_crops(job, tmp_path, loss):
    info = NetworkInfo("two", "", "", "segmenter", False)
    options = {"batch": 2, "window": 16, "steps": 60, "loss": loss, "learning_rate": 0.02}
    result = job.train(tmp_path, TwoHeads(), info, **options)
    assert macro_f1(result.validation) > 0.8


class Recorder(TwoHeads):
    """Notes the shapes of the crops that it is trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(tuple(x.shape[2:]))
        return super().forward(x)


def test_last_third_is_trained_on_final_crops(job, tmp_path):
    info = NetworkInfo("two", "", "", "segmenter", False)
    network = Recorder()
    options = {"batch": 2, "patch": (8, 12, 12), "final_patch": (8, 16, 16), "steps": 30}
    job.train(tmp_path, network, info, **options)
    # Rounds of three steps: the last third begins with the first round after it.
    assert network.seen == [(8, 12, 12)] * 21 + [(8, 16, 16)] * 9


def test_same_seed_gives_the_same_network(job, tmp_path):
    a, b, c = (
        job.train(tmp_path / name, steps=8, augment="patch", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for name, tensor in a.network.state_dict().items():
        assert torch.equal(tensor, b.network.state_dict()[name])
    assert not torch.equal(a.network.head.weight, c.network.head.weight)
    assert without_time(a.history) == without_time(b.history)


def without_time(history):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


@pytest.mark.parametrize(
    ("sampling", "given", "expected"),
    [("slabs", None, "equal"), ("patches", None, "sqrt"), ("slabs", "labelled", "labelled")],
)
def test_slabs_are_drawn_around_all_classes_alike(job, tmp_path, monkeypatch, sampling, given, expected):
    balances = []

    def note_balance(*arguments):
        sampler = WindowSampler(*arguments)
        balances.append(sampler.balance)
        return sampler

    monkeypatch.setattr(fit_torch, "WindowSampler", note_balance)
    job.train(tmp_path, steps=1, sampling=sampling, balance=given)
    assert balances == [expected]


@pytest.mark.parametrize(
    ("length", "given", "batch", "side"),
    [
        (4, {}, 4, 33),
        (64, {}, 12, 17),
        (4, {"batch": 7}, 7, 33),
        (4, {"window": 21}, 12, 21),
        (64, {"window": 21, "batch": 2}, 2, 21),
        (4, {"sampling": "patches"}, 64, 1),
    ],
)
def test_slabs_are_small_where_classes_lie_in_clumps(save_volume, length, given, batch, side):
    _, y, x = np.indices((4, 128, 128)) // length
    labels = save_volume((1 + (y + x) % 2).astype(np.uint8), "labels.zarr", "labels", voxel_size_nm=(50.0, 5.0, 5.0))
    volume = save_volume(np.zeros((4, 128, 128), np.uint8), voxel_size_nm=(50.0, 5.0, 5.0))
    survey = last(survey_labels(labels, 0)).total
    index = LabelIndex(WindowReader(volume, labels, NetworkInput.measure(volume), LabelSet.from_ids([1, 2])), survey)
    options = FitConfig(volume="v", labels="l", output="o", model="4conv", **given)
    plans = plan_windows(build("4conv", 2, (3, 32, 32)), NETWORKS["4conv"], options, volume)
    samplers = [WindowSampler(index, NOTHING_HELD_OUT, plan.drawn, plan.batch, "equal", 0) for plan in plans]
    plan, sampler = choose_windows(plans, samplers)
    assert (plan.batch, plan.drawn[0].target) == (batch, (1, side, side))
    assert (sampler.n_windows, sampler.forms) == (plan.batch, plan.drawn)


@pytest.mark.parametrize("monitor", ["macro_f1", "loss"])
def test_early_stopping_keeps_the_best_weights(job, tmp_path, monitor):
    # Steps this large make good networks bad again.
    options = {"steps": 150, "patience": 3, "learning_rate": 0.3, "optimizer": "sgd", "monitor": monitor}
    result = job.train(tmp_path, **options)
    values = [entry[f"validation_{monitor}"] for entry in result.history]
    best = int(np.argmax(values) if monitor == "macro_f1" else np.argmin(values))
    assert result.best_epoch == best + 1
    assert len(values) == min(10, best + 1 + 3)
    if monitor == "macro_f1":
        # All held-out labels fit into what is monitored, so the final score is that of the best round.
        assert macro_f1(result.validation) == pytest.approx(values[best], abs=1e-6)


def test_falling_step_sizes_are_judged_in_their_last_quarter(job, tmp_path):
    # Steps this large make good networks bad, so the best round of all is one of the first.
    result = job.train(tmp_path, steps=100, schedule="cosine", learning_rate=0.3, optimizer="sgd")
    losses = [entry["validation_loss"] for entry in result.history]
    late = [i for i, entry in enumerate(result.history) if entry["step"] >= 75]
    assert int(np.argmin(losses)) not in late
    assert result.best_epoch == 1 + min(late, key=lambda i: losses[i])


def test_time_is_kept(job, tmp_path):
    result = job.train(tmp_path, steps=None, epochs=10_000, patience=10_000, time=3.0)
    assert 2.0 < result.seconds < 6.0
    assert len(result.history) >= 4  # rounds are cut to the time, so that there is a best one


def test_progress_counts_labelled_voxels(job, tmp_path, monkeypatch):
    monkeypatch.setattr("voxclf.training.step_progress.SETTLING_S", 0.0)
    counted = {}

    def progress(stage, results, total, unit):
        for item in results:
            counted[stage] = counted.get(stage, 0) + getattr(item, "n_voxels", 1)
            yield item
        counted[stage, "total"] = total

    result = job.train(tmp_path, progress=progress, steps=30)
    assert counted["train"] == result.n_labelled_seen
    assert counted["train", "total"] == pytest.approx(result.n_labelled_seen, rel=0.3)
    assert counted["score held out"] == counted["score held out", "total"] == result.split["n_held_out"]


def test_logs_are_written(job, tmp_path):
    job.train(tmp_path, steps=10)
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert "validation_macro_f1" in lines[0] and len(lines) == 11


def test_exploding_loss_says_what_to_do(job, tmp_path):
    with pytest.raises(ValueError, match="use a smaller one"):
        job.train(tmp_path, steps=40, learning_rate=1e30, optimizer="sgd")


def test_bf16_trains(job, tmp_path):
    result = job.train(tmp_path, steps=30, precision="bf16")
    assert all(np.isfinite(entry["train_loss"]) for entry in result.history)
    assert next(result.network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adagrad"])
def test_resumed_equals_uninterrupted(job, tmp_path, monkeypatch, optimizer):
    options = {"steps": 30, "optimizer": optimizer, "augment": "patch", "schedule": "one_cycle"}
    check_resumption(job, tmp_path, monkeypatch, tiny_network(), tiny_network(seed=99), 13, **options)


def test_resumed_on_final_crops_equals_uninterrupted(job, tmp_path, monkeypatch):
    options = {"steps": 30, "batch": 2, "patch": (8, 12, 12), "final_patch": (8, 16, 16)}
    info = NetworkInfo("two", "", "", "segmenter", False)
    check_resumption(job, tmp_path, monkeypatch, TwoHeads(), TwoHeads(), 25, info=info, **options)


def check_resumption(job, tmp_path, monkeypatch, network, another, n_steps, **options):
    monkeypatch.setattr("voxclf.training.step_progress.SETTLING_S", 0.0)
    start = copy.deepcopy(network)
    whole = job.train(tmp_path / "whole", network, **options)

    def interrupt(stage, results, total, unit):
        for number, item in enumerate(results):
            if stage == "train" and number == n_steps:
                raise KeyboardInterrupt
            yield item

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        job.train(tmp_path / "parts", start, progress=interrupt, **options)
    assert signal.getsignal(signal.SIGINT) == before
    assert (tmp_path / "parts" / STATE_FILE).exists()
    parts = job.train(tmp_path / "parts", another, **options)
    assert without_time(parts.history) == without_time(whole.history)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, parts.network.state_dict()[name]), name


def test_finished_training_is_not_repeated(job, tmp_path):
    first = job.train(tmp_path, steps=10)
    again = job.train(tmp_path, tiny_network(seed=5), steps=10)
    assert again.history == first.history
    assert torch.equal(again.network.head.weight, first.network.head.weight)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_fit_torch import Job, tiny_network
from voxclf.labels import LabelSet
from voxclf.models.network_inputs import NetworkInput
from voxclf.progress import last
from voxclf.sampling import survey_labels
from voxclf.volume import open_volume
volume, labels = open_volume({volume!r}), open_volume({labels!r}, kind="labels")
job = Job(volume, labels, last(survey_labels(labels, 0)).total, LabelSet.from_ids([1, 2]), NetworkInput.measure(volume))
job.train(Path({folder!r}), steps=20000, patience=1000, epochs=1000)
"""


def test_killed_process_leaves_a_state_to_go_on_from(job, tmp_path):
    folder = tmp_path / "killed"
    script = KILLED.format(
        tests=str(Path(__file__).parent), volume=job.volume.path, labels=job.labels.path, folder=str(folder)
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 240
        while not (folder / STATE_FILE).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    network = tiny_network(seed=7)
    state = load_state(folder, network, None)
    assert state.step == 500 * state.epoch == state.history[-1]["step"]
    result = job.train(folder, network, steps=20000, patience=1000, epochs=state.epoch + 1)
    assert [entry["epoch"] for entry in result.history] == list(range(1, state.epoch + 2))


@pytest.mark.parametrize(
    ("name", "options", "voxel_size_nm", "side", "crop"),
    [
        ("unet3d", {}, (10, 10, 10), None, (64, 64, 64)),
        ("unet3d", {}, (50, 5, 5), None, (6, 128, 128)),  # 64 voxels of 5 nm are 6.4 of 50 nm
        ("unet3d", {}, (50, 5, 5), 80, (8, 80, 80)),
        pytest.param("swin_unetr", {}, (10, 10, 10), None, (64, 64, 64), marks=needs_einops),
        pytest.param("swin_unetr", {}, (50, 5, 5), None, (32, 128, 128), marks=needs_einops),
        ("unet2d", {"encoder": "plain"}, (50, 5, 5), None, (1, 256, 256)),
        ("unet2d", {"encoder": "plain"}, (10, 10, 10), None, (1, 256, 256)),
        ("unet2d", {"encoder": "plain", "three_axes": True}, (10, 10, 10), None, (64, 64, 64)),
    ],
)
def test_crops_suit_the_voxels(name, options, voxel_size_nm, side, crop):
    if "voxel_size_nm" in NETWORKS[name].defaults:
        options = {**options, "voxel_size_nm": voxel_size_nm}
    network = build(name, 2, width=0.1, **options)
    assert crop_shape(network, side, voxel_size_nm) == crop


@pytest.mark.parametrize(
    ("given", "patience"),
    [
        ({}, 10),
        ({"epochs": 50}, 10),
        ({"time": 60}, math.inf),
        ({"steps": 100}, math.inf),
        ({"steps": 100, "schedule": "constant"}, 10),
        ({"schedule": "one_cycle"}, math.inf),
        ({"schedule": "cosine", "patience": 3}, 3),
    ],
)
def test_falling_steps_are_taken_to_their_end(given, patience):
    options = FitConfig(volume="v", labels="l", output="o", model="4conv", **given)
    assert Plan(options, 0, TrainingState(), 0).patience == patience


def test_step_size_follows_the_schedule():
    assert step_size_factor("constant", 0.7) == 1.0
    assert [step_size_factor("cosine", done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 1e-3])
    assert [step_size_factor("one_cycle", done) for done in (0.0, 0.3, 1.0)] == pytest.approx([0.04, 1.0, 1e-3])
    assert 0.04 < step_size_factor("one_cycle", 0.15) < 1.0


def test_rounds_are_a_part_of_the_time_however_quick_the_steps():
    def plan(**options):
        return Plan(FitConfig(volume="v", labels="l", output="o", model="4conv", **options), 0, TrainingState(), 0)

    timed = plan(time=600.0)
    assert timed.round_steps == 10  # until it is known how long steps take
    timed.state.step, timed.state.seconds = 500, 5.0
    assert timed.round_steps == 3000  # 30 s
    timed.validation_s = 20.0
    assert timed.round_steps == 18_000  # nine times as long as judging it
    timed.step_s = 0.02
    assert timed.round_steps == 9000  # by the last steps: the first ones, which set everything up, are slower
    assert timed.part_done(150.0) == 0.25
    assert timed.n_rounds_left > 10**6
    assert (plan().round_steps, plan().last_step) == (100, 20_000)
    assert (plan(steps=30_000).round_steps, plan(steps=30_000).last_step) == (100, 30_000)
    assert (plan(steps=50).round_steps, plan(steps=50).n_rounds_left) == (5, 10)
    assert plan(time=600.0, epochs=3).n_rounds_left == 3


def test_slow_scoring_is_cut_short(job, tmp_path, monkeypatch):
    monkeypatch.setattr("voxclf.training.window_plan.SCORED_SIDE", 6)  # many windows
    whole = job.train(tmp_path / "whole", steps=2)
    monkeypatch.setattr("voxclf.training.fit_torch.LEAST_SCORING_S", 0.0)
    monkeypatch.setattr("voxclf.training.fit_torch.SCORING_PART", 0.0)
    cut = job.train(tmp_path / "cut", steps=2)
    assert 0 < n_scored(cut.validation) < n_scored(whole.validation)


def n_scored(tables):
    return int(tables.total(2).confusion.sum())
