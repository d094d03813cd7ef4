"""Networks as steps: memory, tiles, mirror images, removed padding, the certificate's log, and the model folder."""

import json
import warnings

import numpy as np
import pytest

from tests.laws.test_network_laws import make_model
from voxclf.errors import CertificateError, ModelError
from voxclf.geometry import Region, make_block
from voxclf.metrics.calibration import CalibrationMap
from voxclf.models import devices
from voxclf.models.checkpoint import load_model, model_fingerprint, save_model
from voxclf.models.dense import InexactNetworkError
from voxclf.models.devices import Inference, check_inference, choose_device, choose_executor, make_step
from voxclf.models.network_certificate import SeamCertificate
from voxclf.models.network_step import CoarsePatchStep, PatchNetworkStep, make_network_step
from voxclf.models.patch_classifier import choose_flips
from voxclf.models.real_context import remove_padding

torch = pytest.importorskip("torch")


def random_block(step, core=(6, 7, 9), seed=0):
    shape = [n + 2 * h for n, h in zip(core, step.halo, strict=True)]
    return np.random.default_rng(seed).integers(0, 256, (1, *shape), dtype=np.uint8)


def test_the_halo_is_what_a_patch_reaches():
    step = make_network_step(make_model("4conv", (9, 32, 31)))
    assert step.halo == (4, 16, 15)
    assert step.alignment == (1, 1, 1)


def test_tiles_fit_the_memory_and_change_nothing():
    model = make_model("3layer", (8, 8, 8))
    small, large = (make_network_step(model, "cpu", Inference(memory_bytes=b)) for b in (3_000_000, 2_000_000_000))
    assert max(small.tile_shape) < max(large.tile_shape)
    block = random_block(small, (25, 33, 41))
    np.testing.assert_allclose(small(block), large(block), atol=1e-6)
    core = (256, 256, 256)
    assert small.working_bytes(core) < large.working_bytes(core)


def test_callers_share_the_activations():
    model = make_model("4conv", (12, 16, 16))
    alone, shared = (make_network_step(model, "cpu", Inference(n_callers=n)) for n in (1, 2))
    core = (64, 64, 64)
    blocks = 4 * (64 + 12) * (64 + 16) ** 2 + (12 * 3 + 8) * 64**3
    assert shared.working_bytes(core) - blocks == pytest.approx((alone.working_bytes(core) - blocks) / 2, rel=1e-6)


def test_too_little_memory_says_how_much_is_enough():
    with pytest.raises(ValueError, match=r"too little even for one of \(8, 8, 8\) voxels; give at least"):
        make_network_step(make_model("4conv", (12, 16, 16)), "cpu", Inference(memory_bytes=10_000))


def test_mirror_images_are_those_of_axes_with_the_finest_voxels():
    assert len(choose_flips((8, 8, 8))) == 8
    assert set(choose_flips((30, 8, 8))) == {(), (1,), (2,), (1, 2)}
    assert choose_flips((8, 8.2, 40))[-1] == (0, 1)


def test_mirrored_prediction_is_symmetric():
    """Averaged over all mirror images, a mirrored volume gives the mirrored probabilities."""
    step = make_network_step(make_model("3layer", (8, 8, 8)), "cpu", Inference(flips=True))
    block = random_block(step)
    for axis in (1, 2, 3):
        np.testing.assert_allclose(step(np.flip(block, axis).copy()), np.flip(step(block), axis), atol=1e-6)


def test_a_coarse_grid_is_exact_on_its_voxels_and_linear_between():
    model = make_model("4res", (8, 8, 8))
    step = make_network_step(model, "cpu", Inference(output_stride=4))
    assert isinstance(step, CoarsePatchStep)
    assert step.alignment == (4, 4, 4)
    found = step(random_block(step, (8, 8, 12)))
    assert found.shape == (3, 8, 8, 12)
    np.testing.assert_allclose(found[..., 2], (found[..., 0] + found[..., 4]) / 2, atol=1e-6)
    np.testing.assert_allclose(found[:, 1], 0.75 * found[:, 0] + 0.25 * found[:, 4], atol=1e-6)


def test_padded_networks_are_refused_by_layer():
    with pytest.raises(
        InexactNetworkError, match=r"backbone\.0\.0: pads.*--output-stride 4.*--real-context.*4res_valid"
    ):
        make_network_step(make_model("4res", (16, 16, 16)))


def test_without_padding_a_constant_volume_gives_what_a_padless_patch_gives():
    """The stripped 4res sees 102 voxels (Σ of kernels x spacings by hand) and has the weights of the padded one."""
    model = make_model("4res", (16, 16, 16))
    bare, patch = remove_padding(model.network, model.patch)
    # Padding of one voxel in 1 + 3 + 3 + 3 convolutions whose voxels are 1, 2, 4, 8 apart: 1 + 6 + 12 + 24.
    assert patch == (16 + 2 * 43,) * 3
    # Around a patch in the middle of a constant volume, circular padding is as good as real context.
    for module in model.network.modules():
        if isinstance(module, torch.nn.Conv3d) and any(module.padding):
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1] * 6
    with torch.inference_mode():
        circular = model.network(torch.full((1, 1, 16, 16, 16), 0.7))
        stripped = bare(torch.full((1, 1, *patch), 0.7))
    np.testing.assert_allclose(stripped.numpy(), circular.numpy(), atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    model = make_model("4conv", (12, 16, 16))
    golden = np.random.default_rng(0).integers(0, 256, (1, *(8 + 2 * h for h in model.golden_halo)), dtype=np.uint8)
    save_model(model, golden, tmp_path / "model", {"history.csv": b"epoch\n1\n"})
    return tmp_path / "model"


def test_a_saved_network_is_the_same_network(folder):
    loaded = load_model(folder)
    assert isinstance(loaded.step(), PatchNetworkStep)
    block = random_block(loaded.step())
    np.testing.assert_array_equal(loaded.step()(block), make_model("4conv", (12, 16, 16)).step()(block))
    description = json.loads((folder / "model.json").read_text())
    assert description["kind"] == "network"
    assert set(description["files"]) == {"golden.npz", "history.csv", "weights.safetensors"}
    assert model_fingerprint(folder) == model_fingerprint(folder)


def forge(folder, name, content):
    """Change a file and its recorded hash with it."""
    from voxclf.models.checkpoint import _hash_file

    (folder / name).write_bytes(content)
    description = json.loads((folder / "model.json").read_text())
    description["files"][name] = _hash_file(folder / name)
    (folder / "model.json").write_text(json.dumps(description))


def test_weights_of_another_network_are_refused(folder):
    from voxclf.models.network_files import save_weights

    save_weights(make_model("3layer", (8, 8, 8)).network, folder / "other")
    forge(folder, "weights.safetensors", (folder / "other").read_bytes())
    with pytest.raises(ModelError, match="does not hold the weights of this network"):
        load_model(folder)


def test_forged_weights_fail_the_golden_patch(folder):
    from voxclf.models.network_files import save_weights

    other = make_model("4conv", (12, 16, 16))
    with torch.no_grad():
        other.network.head.bias += torch.tensor([0.1, 0.0, 0.0])
    save_weights(other.network, folder / "other")
    forge(folder, "weights.safetensors", (folder / "other").read_bytes())
    with pytest.raises(ModelError, match="golden patch differs"):
        load_model(folder)


def test_a_calibrated_network_keeps_its_calibration(tmp_path):
    model = make_model("3layer", (8, 8, 8))
    curves = np.tile(np.linspace(0, 1, 256) ** 2, (3, 1)).astype(np.float32)
    object.__setattr__(model, "calibration", CalibrationMap.from_arrays({"curves": curves}))
    save_model(model, np.zeros((1, 16, 16, 16), np.uint8), tmp_path / "m")
    block = random_block(model.step())
    plain = make_model("3layer", (8, 8, 8)).step()(block)
    calibrated = load_model(tmp_path / "m").step()(block)
    np.testing.assert_allclose(calibrated, plain**2 / (plain**2).sum(axis=0), atol=0.01)


def test_blocks_of_a_network_take_turns(folder):
    model = load_model(folder)
    assert choose_executor(model, "cpu", "processes", 8).n_workers == 2
    assert choose_device(model, "auto", 10) == "cpu" or devices.sees("cuda")


def test_a_gpu_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(devices, "sees", lambda device: False)
    with pytest.raises(ValueError, match="torch finds no such GPU"):
        make_step(load_model(folder), "cuda")


@pytest.mark.parametrize(
    ("precision", "device", "is_supported", "is_slow"),
    [
        ("bf16", "cpu", False, True),
        ("bf16", "cpu", True, False),
        ("bf16", "cuda", False, False),
        ("32", "cpu", False, False),
    ],
)
def test_a_processor_without_bfloat16_is_named(monkeypatch, precision, device, is_supported, is_slow):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devices.warn_of_slow_precision(precision, device)
    assert [("no instructions for bfloat16" in str(w.message)) for w in caught] == [True] * is_slow


@pytest.mark.parametrize(
    ("name", "inference", "message"),
    [
        ("unet3d", Inference(output_stride=2), "--output-stride was given, but unet3d.*it is for patch networks"),
        ("xgboost", Inference(precision="bf16"), "--precision bf16 was given, but xgboost"),
        ("4res", Inference(output_stride=2, real_context=True), "leave one out"),
    ],
)
def test_choices_are_checked_by_name(name, inference, message):
    with pytest.raises(ValueError, match=message):
        check_inference(name, inference)


class _Wrong:
    """A reference that says something else than the step."""

    halo = (1, 1, 1)

    def classify_windows(self, windows):
        return np.full((len(windows), 2), 0.5, np.float32)


@pytest.mark.parametrize("value", [0.6, np.nan], ids=["off", "not a number"])
def test_the_certificate_names_the_voxel(save_volume, tmp_path, value):
    volume = save_volume(np.zeros((8, 8, 8), np.uint8))
    certificate = SeamCertificate(_Wrong(), volume, tmp_path / "log", tolerance=0.01)
    block = make_block(3, Region((0, 0, 0), (8, 8, 8)))
    certificate(block, np.full((2, 8, 8, 8), 0.505, np.float32))
    with pytest.raises(CertificateError, match=r"voxel \(\d, \d, \d\) \(z, y, x\) differ .* more than the 0.01"):
        certificate(block, np.full((2, 8, 8, 8), value, np.float32))


def test_the_certificate_counts_every_block_once_and_ignores_torn_lines(save_volume, tmp_path):
    volume = save_volume(np.zeros((8, 8, 16), np.uint8))
    certificate = SeamCertificate(_Wrong(), volume, tmp_path / "log", tolerance=0.1)
    for index, value in ((0, 0.58), (0, 0.52), (1, 0.5)):
        block = make_block(index, Region((0, 0, 8 * index), (8, 8, 8 * index + 8)))
        certificate(block, np.full((2, 8, 8, 8), value, np.float32))
    with (tmp_path / "log").open("a") as file:
        file.write('{"block": 2, "n_vox')
    summary = certificate.summarise()
    # Sixteen voxels a block, less those drawn twice.
    assert 26 <= summary["n_voxels"] <= 32
    assert summary["largest_difference"] == 0.02
    assert summary["mean_difference"] == pytest.approx(0.01, abs=0.002)


def test_equal_differences_are_told_apart_by_block_not_by_which_was_done_first(save_volume, tmp_path):
    volume = save_volume(np.zeros((8, 8, 16), np.uint8))
    blocks = [make_block(i, Region((0, 0, 8 * i), (8, 8, 8 * i + 8))) for i in range(2)]
    summaries = []
    for name, order in (("one", blocks), ("other", blocks[::-1])):
        certificate = SeamCertificate(_Wrong(), volume, tmp_path / name, tolerance=0.1)
        for block in order:
            certificate(block, np.full((2, 8, 8, 8), 0.52, np.float32))
        summaries.append(certificate.summarise())
    assert summaries[0] == summaries[1]
    assert summaries[0]["at_voxel"][2] < 8
