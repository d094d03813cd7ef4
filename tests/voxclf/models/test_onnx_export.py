"""ONNX files give in onnxruntime what the network gives in torch."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from voxclf.models import onnx_export  # noqa: E402
from voxclf.models.dense import InexactNetworkError, densify  # noqa: E402
from voxclf.models.onnx_export import export_dense_network, export_patch_network  # noqa: E402
from voxclf.models.registry import build  # noqa: E402


def run(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image.numpy()})[0]


@pytest.mark.parametrize(("name", "patch"), [("4res", (5, 16, 16))])
@torch.no_grad()
def test_patch_form(name, patch, tmp_path):
    network = build(name, 3, patch, in_channels=2).eval()
    path = export_patch_network(network, network.patch, 2, tmp_path / "patch.onnx")
    for batch in (1, 5):
        patches = torch.randn(batch, 2, *network.patch)
        np.testing.assert_allclose(run(path, patches), network(patches), atol=1e-5)


@pytest.mark.parametrize(("name", "patch"), [("4conv", (5, 16, 16)), ("dil", 16)])
@torch.no_grad()
def test_dense_form_takes_volumes_of_any_size(name, patch, tmp_path):
    network = build(name, 3, patch).eval()
    path = export_dense_network(network, network.patch, 1, tmp_path / "dense.onnx")
    dense = densify(network, network.patch)
    for batch, more in ((1, (0, 0, 0)), (2, (3, 11, 4))):
        volume = torch.randn(batch, 1, *[r + n for r, n in zip(dense.receptive_field, more, strict=True)])
        np.testing.assert_allclose(run(path, volume), dense(volume), atol=1e-5)


def test_networks_without_a_dense_form_are_refused(tmp_path):
    with pytest.raises(InexactNetworkError, match=r"backbone\.0\.0: pads"):
        export_dense_network(build("4res", 2, 16), 16, 1, tmp_path / "dense.onnx")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx, .*pip install 'voxclf\[export\]'"):
        export_patch_network(build("3layer", 2), 8, 1, tmp_path / "patch.onnx")
