"""The 2D UNet over sections: encoders of the library, weights that are never silently random, and sections."""

import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from urllib.error import URLError

import pytest
import torch

from voxclf.errors import ModelError
from voxclf.models import unet2d
from voxclf.models.registry import build
from voxclf.models.segmenter import count_parameters

needs_library = pytest.mark.skipif(
    find_spec("segmentation_models_pytorch") is None, reason="segmentation-models-pytorch is not installed"
)
ENCODERS = ("resnest14d", "resnet34", "resnest50d", "resnet101", "resnest200e", "vgg16", "vgg19")


def test_parameters_of_the_plain_unet_by_hand():
    channels = (64, 128, 256, 512, 1024)

    def double(n_in, n_out):
        return 9 * n_in * n_out + 9 * n_out * n_out + 4 * n_out

    expected = double(1, 64) + 64 * 2 + 2
    for fine, coarse in pairwise(channels):
        expected += double(fine, coarse) + (4 * coarse * fine + fine) + double(2 * fine, fine)
    assert expected == 31_036_546
    assert count_parameters(build("unet2d", 2, encoder="plain")) == expected


@needs_library
@pytest.mark.parametrize("encoder", ENCODERS)
def test_library_encoders_have_the_library_s_parameters(encoder):
    smp = unet2d._import_library()
    network = build("unet2d", 2, in_channels=1, encoder=encoder, encoder_weights="none")
    name = f"timm-{encoder}" if encoder.startswith("resnest") else encoder
    with torch.device("meta"):
        expected = smp.Unet(name, encoder_weights=None, in_channels=1, classes=2)
    assert count_parameters(network) == count_parameters(expected)
    with torch.inference_mode():
        assert network.eval()(torch.randn(1, 1, 2, 33, 65)).shape == (1, 2, 2, 33, 65)


def test_sections_are_segmented_one_by_one():
    network = build("unet2d", 3, encoder="plain", width=0.06, voxel_size_nm=(8, 30, 8)).eval()
    crop = torch.randn(2, 1, 16, 5, 32)
    with torch.inference_mode():
        whole = network(crop)
        for y in range(5):
            alone = network.sections(crop[:, :, :, y])
            torch.testing.assert_close(whole[:, :, :, y], alone)


class OfflineLibrary:
    """The library on a machine without a network: it builds, and cannot get weights."""

    @staticmethod
    def Unet(name, encoder_weights, **options):
        if name == "nosuch":
            raise KeyError("Wrong encoder name `nosuch`")
        if encoder_weights is not None:
            raise URLError("no route to host")
        return torch.nn.Identity()


def test_offline_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(unet2d, "_import_library", lambda: OfflineLibrary)
    with pytest.raises(ModelError, match=r"'imagenet' of 'resnet34'.*no route to host.*--encoder-weights none"):
        build("unet2d", 2)
    assert isinstance(build("unet2d", 2, encoder_weights="none").sections, torch.nn.Identity)
    with pytest.raises(ModelError, match=r"'nosuch' could not be built.*choose plain, resnest14d"):
        build("unet2d", 2, encoder="nosuch")


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(unet2d, "prepare_torchvision", lambda: False)
    monkeypatch.setattr(unet2d, "import_module", refuse)
    with pytest.raises(ModelError, match=r"install voxclf\[unet2d\], or use --encoder plain"):
        build("unet2d", 2)


BROKEN_TORCHVISION = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""


def run_with(folder, program):
    search = f"import sys; sys.path.insert(0, {str(folder)!r});"
    return subprocess.run([sys.executable, "-c", search + program], capture_output=True, text=True, check=False)


def test_operators_are_declared_where_torchvision_needs_it(tmp_path):
    """As the wheels built for CUDA beside a CPU build of torch: registering a shape for an operator that is missing."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN_TORCHVISION)
    assert "operator torchvision::nms does not exist" in run_with(tmp_path, "import torchvision").stderr
    prepare = "from voxclf.models.torchvision_import import prepare_torchvision as p; assert p(); import torchvision"
    assert run_with(tmp_path, prepare).returncode == 0


def test_other_failures_of_torchvision_are_not_hidden(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('something else')")
    prepare = "from voxclf.models.torchvision_import import prepare_torchvision as p; p()"
    assert "something else" in run_with(tmp_path, prepare).stderr
    missing = "import sys; sys.modules['torchvision'] = None;" + prepare.replace("p()", "assert p() is False")
    assert run_with(tmp_path, missing).returncode == 0


@needs_library
def test_lightning_survives_torchvision():
    prepare = "from voxclf.models.torchvision_import import prepare_torchvision as p; assert p(); import lightning"
    assert subprocess.run([sys.executable, "-c", prepare], check=False).returncode == 0
