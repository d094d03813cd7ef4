"""Losses against values worked out by hand, and gradients against finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxclf.training.losses import LOSSES, boundary_loss, build_loss, find_boundary

LN2, LN4 = np.log(2), np.log(4)


def logits_of(probabilities):
    """Logits (1, K, X) whose softmax is the given (X, K) probabilities."""
    return torch.log(torch.tensor(probabilities, dtype=torch.float64)).T[None]


# Four voxels of two classes; the last is unlabelled and its probabilities must not matter.
P = [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.01, 0.99]]
TARGET = torch.tensor([[0, 0, 1, -1]])

HAND_COMPUTED = {
    "ce": (2 * np.log(4 / 3) + LN2) / 3,
    "focal": (2 * np.log(4 / 3) / 16 + LN2 / 4) / 3,
    "bce": (2 * np.log(4 / 3) + LN2) / 3,  # two classes: cross entropy
    # class 0: W_f = 2/3, so the one voxel of class 1 weighs 2; class 1: W_f = 1/3, so the same voxel weighs 2
    "weighted_bce": (np.log(4 / 3) + LN2 + 2 * np.log(4 / 3)) / 3,
    # overlaps 1.25 and 0.75; sums of p 1.5 and 1.5; sums of g 2 and 1
    "dice": 1 - ((2.5 + 1) / (3.5 + 1) + (1.5 + 1) / (2.5 + 1)) / 2,
    # sums of p squared 0.875 for both classes
    "dice_squared": 1 - (2.5 / 2.875 + 1.5 / 1.875) / 2,
    "dice_bce": 1 - (3.5 / 4.5 + 2.5 / 3.5) / 2 + (2 * np.log(4 / 3) + LN2) / 3,
    # boundary between voxels 1 and 2: class 0 has C/S = 1/2, class 1 has 1/1, so alpha = 0 for both
    "boundary_dou": ((2.875 - 2.5) / (2.875 - 1.25) + (1.875 - 1.5) / (1.875 - 0.75)) / 2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_worked_out_by_hand(name):
    assert float(build_loss(name, 2)(logits_of(P), TARGET)) == pytest.approx(HAND_COMPUTED[name], abs=1e-6)


def test_alpha_of_boundary_dou_grows_with_the_area():
    # A line of ten voxels of class 0, then two of class 1: C/S is 1/10 for class 0 (alpha 0.8), 1/2 for class 1 (0).
    target = torch.tensor([[0] * 10 + [1] * 2])
    p = [[0.5, 0.5]] * 12
    expected_0 = (10 + 3 - 2 * 5) / (10 + 3 - 5 - 0.8 * 5)
    expected_1 = (2 + 3 - 2 * 1) / (2 + 3 - 1 - 0.0)
    found = build_loss("boundary_dou", 2)(logits_of(p), target)
    assert float(found) == pytest.approx((expected_0 + expected_1) / 2, abs=1e-6)


def test_bce_of_three_classes_by_hand():
    found = build_loss("bce", 3)(logits_of([[0.5, 0.25, 0.25]]), torch.tensor([[1]]))
    assert float(found) == pytest.approx((LN2 + LN4 + np.log(4 / 3)) / 3, abs=1e-6)


def test_class_weights_by_hand():
    weights = torch.tensor([1.0, 3.0])
    # cross entropy: voxels weigh 1, 1 and 3
    expected = (np.log(4 / 3) + LN2 + 3 * np.log(4 / 3)) / 5
    assert float(build_loss("ce", 2, weights)(logits_of(P), TARGET)) == pytest.approx(expected, abs=1e-6)
    # Dice: the classes' terms weigh 1 and 3
    expected = 1 - (3.5 / 4.5 + 3 * 2.5 / 3.5) / 4
    assert float(build_loss("dice", 2, weights)(logits_of(P), TARGET)) == pytest.approx(expected, abs=1e-6)


def test_blocks_are_balanced_one_by_one():
    # Two blocks with foreground fractions 1/4 and 1/2 of class 1: weights 3 and 1, not those of the pooled 3/8.
    logits = torch.zeros(2, 2, 4)
    logits[:, 1] = 1.0
    target = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    right, wrong = np.log1p(np.exp(-1)), np.log1p(np.exp(1))
    expected = (3 * wrong + 3 * right + 2 * wrong + 2 * right) / 8
    assert float(build_loss("weighted_bce", 2)(logits, target)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["ce", "focal"])
def test_mean_losses_match_torch(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 3, 3, generator=generator)
    target = torch.randint(-1, 4, (2, 5, 3, 3), generator=generator)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    parameters = {"gamma": 0.0} if name == "focal" else {}
    expected = torch.nn.functional.cross_entropy(logits, target, weight=weights, ignore_index=-1)
    assert float(build_loss(name, 4, weights, **parameters)(logits, target)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5), ()], ids=["3D", "2D", "one voxel"])
def test_unlabelled_voxels_never_count(name, shape):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3, *shape, generator=generator)
    target = torch.randint(0, 3, (6, *shape), generator=generator)
    is_labelled = torch.rand(6, *shape, generator=generator) < 0.6
    sparse = torch.where(is_labelled, target, -1)
    loss = build_loss(name, 3)
    other = torch.where(is_labelled[:, None], logits, 100 * torch.randn(logits.shape, generator=generator))
    assert torch.equal(loss(logits, sparse), loss(other, sparse))
    leaf = logits.clone().requires_grad_()
    loss(leaf, sparse).backward()
    assert float(leaf.grad.movedim(1, -1)[~is_labelled].abs().sum()) == 0
    assert float(leaf.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_slopes(name):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[0, 1, 2], [2, -1, 0]], [[1, 1, 1], [-1, 1, 0]]])
    loss = build_loss(name, 3, torch.tensor([1.0, 2.0, 0.5]))
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,))


@pytest.mark.parametrize("name", LOSSES)
def test_certain_networks_get_finite_losses_and_gradients(name):
    logits = torch.tensor([[[60.0, -60.0, 60.0], [-60.0, 60.0, -60.0]]], requires_grad=True)
    right = build_loss(name, 2)(logits, torch.tensor([[0, 1, 0]]))
    wrong = build_loss(name, 2)(logits, torch.tensor([[1, 0, 1]]))
    (right + wrong).backward()
    assert right.item() == pytest.approx(0, abs=1e-6)
    assert wrong.item() > 0.5
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_no_label_is_no_loss(name):
    logits = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    loss = build_loss(name, 2)(logits, torch.full((1, 3, 3, 3), -1))
    loss.backward()
    assert loss.item() == 0
    assert float(logits.grad.abs().sum()) == 0


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_losses_do_not_depend_on_where_voxels_lie(name, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 3, 4, 2, generator=generator)
    target = torch.randint(-1, 3, (2, 3, 4, 2), generator=generator)
    loss = build_loss(name, 3)
    flipped = loss(logits.flip(2, 4), target.flip(1, 3))
    assert float(flipped) == pytest.approx(float(loss(logits, target)), rel=1e-4, abs=1e-6)


def test_boundary_needs_two_labels():
    target = torch.tensor([[[0, 0, 1, -1], [0, 0, -1, 2], [0, 0, 0, 0]]])
    expected = torch.tensor([[[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]]).bool()
    assert torch.equal(find_boundary(target), expected)


def test_a_boundary_output_adds_its_own_loss():
    generator = torch.Generator().manual_seed(3)
    semantic, boundary = (
        torch.randn(1, 2, 2, 3, 3, generator=generator),
        torch.randn(1, 1, 2, 3, 3, generator=generator),
    )
    target = torch.randint(-1, 2, (1, 2, 3, 3), generator=generator)
    loss = build_loss("weighted_bce", 2)
    expected = loss(semantic, target) + boundary_loss(boundary, target)
    assert torch.equal(loss((semantic, boundary), target), expected)
    # By hand: of the line 0 0 0 1 two voxels are boundary, so neither side weighs more.
    line = torch.tensor([[0, 0, 0, 1]])
    assert float(boundary_loss(torch.zeros(1, 1, 4), line)) == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sharpness", 2), "choose one of ce, focal"),
        (("ce", 1), "at least 2 classes"),
        (("ce", 3, torch.tensor([1.0, 2.0])), "3 numbers of at least 0"),
        (("ce", 2, torch.tensor([1.0, -2.0])), "one per class"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_loss(*arguments)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="'dice' has no parameter 'gamma'"):
        build_loss("dice", 2, gamma=2.0)
    with pytest.raises(ValueError, match="must be 0"):
        build_loss("focal", 2, gamma=-1.0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit a target"):
        build_loss("ce", 2)(torch.zeros(1, 2, 4), torch.zeros(1, 5, dtype=torch.int64))
