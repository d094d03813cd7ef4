"""Every segmenter through the command line: fit from sparse labels, predict a volume, predict it again in blocks."""

import os

import numpy as np
import pytest

from tests.conftest import needs_einops, read
from tests.corridor.conftest import SHAPE, run
from voxclf.models.registry import NETWORKS

OPTIONS = {
    "unet3d": [],
    "denseunet569": [],
    "res_unet_r": ["--block", "se"],
    "res_unet_h": ["--block", "eca"],
    "unet2d": ["--encoder", "plain"],
    "dynunet": [],
    "swin_unetr": [],
}
TINY = ["--width", "0.1", "--patch", "16", "--batch", "2", "--steps", "4", "--workers", "1"]
needs_minutes = pytest.mark.skipif(
    "VOXCLF_PUBLISHED_SIZES" not in os.environ, reason="swin_unetr takes minutes: set VOXCLF_PUBLISHED_SIZES=1"
)


def test_the_list_above_has_every_segmenter():
    assert set(OPTIONS) == {name for name, info in NETWORKS.items() if info.kind == "segmenter"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[needs_einops, needs_minutes]) if name == "swin_unetr" else name for name in OPTIONS],
)
def test_fit_and_predict(project, tmp_path, capsys, name):
    fit = ["fit", "image.tif", "labels.tif", "-o", tmp_path / "model", "--model", name, *OPTIONS[name], *TINY]
    assert run(project, *fit) == 0
    assert "4 steps in" in capsys.readouterr().out
    predict = ["predict", tmp_path / "model", "image.tif", "--no-pyramid", "--memory", "9GB", "--workers", "1"]
    assert run(project, *predict, "-o", tmp_path / "whole") == 0
    assert run(project, *predict, "-o", tmp_path / "part", "--region", "8:16,10:30,0:50") == 0
    whole, part = (read(tmp_path / out / "probabilities.zarr").astype(float) for out in ("whole", "part"))
    assert whole.shape[1:] == SHAPE
    np.testing.assert_allclose(whole.sum(axis=0), 255, atol=2.5)
    # Cut off at the measured reach, probabilities move by 0.01 at most; and they are stored in steps of 1 / 255.
    inside = (slice(None), slice(8, 16), slice(10, 30))
    assert np.abs(whole[inside] - part[inside]).max() <= 0.01 * 255 + 1
    labels = read(tmp_path / "whole" / "labels.zarr")[0]
    assert set(np.unique(labels)) <= {1, 2, 3, 4}
