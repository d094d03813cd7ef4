"""Pretraining: the masked voxels are hidden for good, the losses are what they should be, and weights carry over."""

import json

import numpy as np
import pytest
import torch

from features.bank import FilterBank
from voxclf.config import FitConfig
from voxclf.errors import ModelError
from voxclf.feature_stack import FeatureStack
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.registry import build
from voxclf.training.pretrain import (
    Autoencoder,
    Decoder,
    PatchBatch,
    PatchPlaces,
    PatchReader,
    Pretext,
    load_pretrained,
    make_pretraining,
    pretrain_network,
    save_pretrained,
)

VOXEL_SIZE_NM = (10.0, 10.0, 10.0)


def noise(seed=0, shape=(24, 40, 26)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def smooth(shape=(24, 40, 26)):
    z, y, x = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    return (120 + 40 * np.sin(z / 3) + 40 * np.sin(y / 4 + 1) + 30 * np.cos(x / 3)).astype(np.uint8)


def options(**given):
    chosen = {"steps": 60, "batch": 16, "learning_rate": 0.003, "augment": "flips", "patience": 50, **given}
    return FitConfig(volume="v", labels="l", output="o", model="3layer", **chosen)


def small_network(name="3layer", patch=8, width=0.5, **more):
    torch.manual_seed(0)
    return build(name, 3, patch=patch, width=width, **more)


def reader_of(volume, pretext, patch=(8, 8, 8), inputs=None):
    return PatchReader(volume, inputs or NetworkInput.measure(volume), patch, pretext)


# --- masking ---


@pytest.mark.parametrize(("padding", "n"), [(0, 1), (1, 27)])
def test_masked_voxels_do_not_reach_the_network(save_volume, padding, n):
    image = noise()
    changed = image.copy()
    start = (5, 6, 7)
    middle = tuple(slice(s + 4 - padding, s + 4 + padding + 1) for s in start)
    changed[middle] = 255 - changed[middle]
    first, second = save_volume(image), save_volume(changed, "changed.zarr")
    inputs = NetworkInput.measure(first)
    a, truth = reader_of(first, Pretext("center", padding), inputs=inputs).read(start)
    b, other = reader_of(second, Pretext("center", padding), inputs=inputs).read(start)
    np.testing.assert_array_equal(a, b)
    assert np.count_nonzero(truth != other) == n
    open_a, _ = reader_of(first, Pretext("vae"), inputs=inputs).read(start)
    open_b, _ = reader_of(second, Pretext("vae"), inputs=inputs).read(start)
    assert np.count_nonzero(open_a != open_b) == n


def test_features_of_masked_voxels_are_hidden_too(save_volume):
    image = noise()
    changed = image.copy()
    changed[9, 10, 11] = 255 - changed[9, 10, 11]
    first, second = save_volume(image), save_volume(changed, "changed.zarr")
    stack = FeatureStack(FilterBank("edges", 3), VOXEL_SIZE_NM)
    inputs = NetworkInput.measure(first, stack)
    a, _ = reader_of(first, Pretext("center"), inputs=inputs).read((5, 6, 7))
    b, _ = reader_of(second, Pretext("center"), inputs=inputs).read((5, 6, 7))
    np.testing.assert_array_equal(a, b)


def test_white_noise_cannot_be_predicted_and_structure_can(save_volume, tmp_path):
    """Neighbours tell nothing about noise: no network gets below its variance (1, normalised) where it was not trained.
    A copied centre would give an error near 0."""
    errors = {}
    for name, image in (("noise", noise()), ("smooth", smooth())):
        volume = save_volume(image, f"{name}.zarr")
        result = pretrain_network(
            small_network(), Pretext("center"), NetworkInput.measure(volume), volume, options(), 0, tmp_path / name, 1
        )
        errors[name] = min(entry["validation_loss"] for entry in result.history)
    assert errors["noise"] > 0.9
    assert errors["smooth"] < 0.2


def test_middle_of_a_flat_patch_keeps_to_it():
    assert Pretext("center", 1).middle((1, 8, 8)).shape == (1, 3, 3)
    with pytest.raises(ValueError, match="masks all of a patch"):
        Pretext("center", 1).middle((3, 3, 3))


def test_bad_pretexts_are_refused():
    with pytest.raises(ValueError, match="choose center or vae"):
        Pretext("rotation")
    with pytest.raises(ValueError, match="padding was -1"):
        Pretext("center", -1)


def test_validation_patches_do_not_overlap_training_patches():
    places = PatchPlaces((24, 200, 26), (8, 8, 8))
    rng = np.random.default_rng(0)
    training, validation = (places.draw(rng, 500, flag) for flag in (False, True))
    assert max(y for _, y, _ in training) + 8 <= min(y for _, y, _ in validation) == 180
    assert all(z + 8 <= 24 and y + 8 <= 200 and x + 8 <= 26 for z, y, x in training + validation)


# --- the autoencoder ---


@pytest.mark.parametrize("patch", [(32, 32, 32), (16, 16, 16), (5, 32, 30)])
def test_decoder_draws_a_patch(patch):
    decoder = Decoder(patch, latent=7, channels=(8, 6, 5, 4, 3))
    assert decoder(torch.zeros(2, 7)).shape == (2, *patch)


def test_latent_numbers_are_drawn_with_the_standard_deviation():
    """z = mean + eps exp(½ log variance): with mean 3 and variance 0.25 its spread is 0.5."""
    network = small_network()
    auto = Autoencoder(network.backbone, network.backbone_shape.channels, (8, 8, 8))
    for layer, value in ((auto.head.mean, 3.0), (auto.head.log_variance, float(np.log(0.25)))):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    seen = []
    auto.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    auto.train()(torch.randn(200, 1, 8, 8, 8))
    assert seen[0].std().item() == pytest.approx(0.5, abs=0.01)
    assert seen[0].mean().item() == pytest.approx(3.0, abs=0.01)
    auto.eval()(torch.randn(4, 1, 8, 8, 8))
    assert torch.equal(seen[1], torch.full((4, 512), 3.0))


def test_loss_of_the_autoencoder_by_hand(save_volume):
    volume = save_volume(noise())
    reader = reader_of(volume, Pretext("vae"))
    task = make_pretraining(small_network(), reader, options(), 0)
    for layer, value in ((task.network.head.mean, 2.0), (task.network.head.log_variance, 0.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    torch.nn.init.zeros_(task.network.decoder.last.weight)
    torch.nn.init.constant_(task.network.decoder.last.bias, 1.0)
    truth = torch.full((3, 8, 8, 8), 3.0)
    loss = task.loss_of(PatchBatch(torch.zeros(3, 1, 8, 8, 8), truth)).item()
    # squared error 4 a voxel; divergence ½ · 2² in each of 512 numbers, half of it spread over 512 voxels
    assert loss == pytest.approx(4.0 + 0.5 * 512 * 2.0 / 512)


@pytest.mark.parametrize("mask_center", [False, True])
def test_autoencoder_learns_structure(save_volume, tmp_path, monkeypatch, mask_center):
    monkeypatch.setattr("voxclf.training.pretrain.N_VALIDATION", 32)
    volume = save_volume(smooth())
    pretext = Pretext("vae", mask_center=mask_center)
    result = pretrain_network(
        small_network(), pretext, NetworkInput.measure(volume), volume, options(steps=30, batch=8), 0, tmp_path, 1
    )
    # Batch norm's running statistics lag behind steps this few and large, so validation would only tell later.
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert result.n_patches_seen == 30 * 8


# --- what is kept ---


@pytest.mark.parametrize("pretext", [Pretext("center", 1), Pretext("vae")])
@pytest.mark.parametrize(("name", "patch"), [("3layer", 8), ("4res", 16), ("convnext", 16)])
def test_weights_carry_over_under_a_new_head(save_volume, tmp_path, pretext, name, patch):
    volume = save_volume(noise())
    few = options(steps=1, batch=2)
    network = small_network(name, patch, width=0.125)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("voxclf.training.pretrain.N_VALIDATION", 2)
        result = pretrain_network(
            network, pretext, NetworkInput.measure(volume), volume, few, 0, tmp_path / "scratch", 1
        )
    save_pretrained(tmp_path / "saved", result, {"model": name, "task": pretext.kind})
    assert json.loads((tmp_path / "saved" / "pretrained.json").read_text())["model"] == name
    torch.manual_seed(9)
    fresh = build(name, 5, patch=patch, width=0.125)
    head = fresh.head.weight.clone()
    load_pretrained(fresh, tmp_path / "saved")
    for key, tensor in fresh.backbone.state_dict().items():
        assert torch.equal(tensor, result.weights[f"backbone.{key}"])
    assert torch.equal(fresh.head.weight, head)


def test_weights_of_another_architecture_are_refused(save_volume, tmp_path):
    volume = save_volume(noise())
    result = pretrain_network(
        small_network(), Pretext(), NetworkInput.measure(volume), volume, options(steps=1, batch=2), 0, tmp_path, 1
    )
    save_pretrained(tmp_path / "saved", result, {})
    with pytest.raises(ModelError, match="use the same --model, --patch, --width"):
        load_pretrained(small_network(width=1.0), tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_pretrained(small_network(), tmp_path)


def test_segmenters_have_nothing_to_pretrain(save_volume, tmp_path):
    volume = save_volume(noise())
    with pytest.raises(ValueError, match="no backbone to pretrain"):
        pretrain_network(
            torch.nn.Conv3d(1, 2, 1), Pretext(), NetworkInput.measure(volume), volume, options(), 0, tmp_path, 1
        )
