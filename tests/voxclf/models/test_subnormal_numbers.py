"""Subnormal numbers count as zero where networks compute, and nowhere else."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn

from voxclf.models.dense import tune_for_inference
from voxclf.models.subnormal_numbers import are_zero, subnormals_as_zero

pytestmark = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor always computes with them")


def test_they_are_zero_inside_and_themselves_outside():
    number = torch.tensor([1e-40])
    with subnormals_as_zero():
        assert (number * 1).item() == 0
        with subnormals_as_zero():
            assert are_zero()
        assert are_zero(), "the inner block must not end the outer one"
    assert (number * 1).item() == number.item() != 0


def test_an_error_ends_it_too():
    with pytest.raises(KeyError), subnormals_as_zero():
        raise KeyError
    assert not are_zero()


def test_threads_have_their_own():
    found = []
    with subnormals_as_zero():
        inside = Thread(target=lambda: found.append(are_zero()))
        inside.start()
        inside.join()
    outside = Thread(target=lambda: found.append(are_zero()))
    outside.start()
    outside.join()
    assert found == [True, False]


def test_a_network_with_subnormal_weights_predicts_as_if_they_were_zero():
    # 1e-40 times 1e38 is 0.01: where subnormal numbers count, the second layer brings the first one's back.
    network = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv3d(1, 1, 1, bias=False))
    with torch.no_grad():
        network[0].weight.fill_(1e-40)
        network[2].weight.fill_(1e38)
    image = torch.ones(1, 1, 4, 4, 4)
    np.testing.assert_allclose(network(image).detach().numpy(), 0.01, rtol=1e-3)
    found = tune_for_inference(network, 1, backend="a_trous")(image)
    np.testing.assert_array_equal(found.numpy(), 0)
    assert not are_zero()
