"""Losses of the reports' networks, for many classes and for sparse labels.

Every loss takes logits (B, K, Z, Y, X), any number of spatial axes down to none, and class indices (B, Z, Y, X) in
which -1 is an unlabelled voxel. Unlabelled voxels never count: neither their logits nor their number changes the
value. Probabilities are the softmax over classes in every loss, as in prediction; with two classes that *is* the
sigmoid of the papers on binary masks, applied to the difference of the two logits.

Sums run over all labelled voxels of the batch, since one sparsely labelled crop may hold a single class. Networks
with a second, boundary output (``res_unet_r``, ``res_unet_h``) hand both over while they train: :class:`MaskedLoss`
adds the boundary's loss, whose target follows from the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

UNLABELLED = -1


class MaskedLoss(nn.Module):
    """What all losses share: the check of shapes, the mask, class weights, and the optional boundary output.

    Parameters
    ----------
    n_classes : int
        K, at least 2.
    class_weights : Tensor, shape (K,), optional
        Weight of each class: of its voxels in losses that are means over voxels, of its term in losses that are
        means over classes (Dice, Boundary DoU). Equal by default.
    """

    class_weights: Tensor

    def __init__(self, n_classes: int, class_weights: Tensor | None = None) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes was {n_classes}; a loss needs at least 2 classes: label another one")
        weights = torch.ones(n_classes) if class_weights is None else torch.as_tensor(class_weights).float()
        if weights.shape != (n_classes,) or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
            raise ValueError(
                f"class_weights were {weights.tolist()}; allowed are {n_classes} numbers of at least 0, not all 0: "
                "give one per class"
            )
        self.n_classes = n_classes
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Return the loss of a batch as a scalar; 0, with zero gradients, where no voxel is labelled.

        Parameters
        ----------
        outputs : Tensor, shape (B, K, …), or a pair of it and a Tensor of shape (B, 1, …)
            Class logits, or class logits and boundary logits.
        target : Tensor of int64, shape (B, …)
            Class indices, -1 where unlabelled.
        """
        if isinstance(outputs, tuple):
            semantic, boundary = outputs
            return self(semantic, target) + boundary_loss(boundary, target)
        if outputs.shape[1] != self.n_classes or outputs.shape[2:] != target.shape[1:]:
            raise ValueError(
                f"logits of shape {tuple(outputs.shape)} do not fit a target of shape {tuple(target.shape)} and "
                f"{self.n_classes} classes; give (B, {self.n_classes}, *space) and (B, *space)"
            )
        if not bool((target != UNLABELLED).any()):
            return outputs.sum() * 0.0
        # Sums over a million voxels need more than bfloat16.
        return self.compute(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), target)

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch in which at least one voxel is labelled."""
        raise NotImplementedError

    def _average_classes(self, terms: Tensor, is_counted: Tensor | None = None) -> Tensor:
        """Mean of one term per class, weighted; classes that do not count are left out."""
        weights = self.class_weights if is_counted is None else self.class_weights * is_counted
        return (terms * weights).sum() / weights.sum().clamp_min(torch.finfo(terms.dtype).tiny)


class CrossEntropyLoss(MaskedLoss):
    r"""Cross entropy: how surprised the network is by the labels.

    :math:`L = -\sum_i w_{y_i} \ln p_{i,y_i} / \sum_i w_{y_i}` over labelled voxels *i* of class *y*.
    """

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        return FocalLoss.average(logits, target, self.class_weights, gamma=0.0)


class FocalLoss(MaskedLoss):
    r"""Cross entropy in which voxels that are already right count little.

    :math:`L = -\sum_i w_{y_i} (1 - p_{i,y_i})^\gamma \ln p_{i,y_i} / \sum_i w_{y_i}`; gamma 0 is cross entropy.
    Lin et al., "Focal loss for dense object detection", ICCV 2017.

    Parameters
    ----------
    gamma : float
        At least 0; 2 and 4 were used on FIB-SEM.
    """

    def __init__(self, n_classes: int, class_weights: Tensor | None = None, gamma: float = 2.0) -> None:
        super().__init__(n_classes, class_weights)
        if not gamma >= 0:
            raise ValueError(f"gamma was {gamma}; it must be 0 (cross entropy) or more: 2 is usual")
        self.gamma = gamma

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        return self.average(logits, target, self.class_weights, self.gamma)

    @staticmethod
    def average(logits: Tensor, target: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
        """Weighted mean over labelled voxels."""
        rows, classes = gather_labelled(logits, target)
        log_p = functional.log_softmax(rows, dim=1).gather(1, classes[:, None])[:, 0]
        surprise = -log_p
        if gamma > 0:
            # 1 - p from the logarithm, since p rounds to 1 long before ln p rounds to 0.
            surprise = surprise * (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma
        weights = class_weights[classes]
        return (surprise * weights).sum() / weights.sum().clamp_min(torch.finfo(log_p.dtype).tiny)


class BinaryCrossEntropyLoss(MaskedLoss):
    r"""Binary cross entropy of every class against the rest, averaged over classes.

    :math:`L = -\frac{1}{N}\sum_i \frac{1}{\sum_k w_k}\sum_k w_k [ g_{ik} \ln p_{ik} + (1-g_{ik}) \ln (1-p_{ik}) ]`
    over the *N* labelled voxels, with *g* one where the label is *k*. With two classes it equals cross entropy.
    """

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        rows, classes = gather_labelled(logits, target)
        terms = one_against_rest(rows, functional.one_hot(classes, self.n_classes))
        return self._average_classes(terms.mean(dim=0))


class WeightedBinaryCrossEntropyLoss(MaskedLoss):
    r"""Binary cross entropy with foreground and background of each block made equally heavy.

    With :math:`W_f` the fraction of a block's labelled voxels that are foreground: where :math:`W_f > 1/2` background
    weighs :math:`W_f/(1-W_f)` and foreground 1, elsewhere foreground weighs :math:`(1-W_f)/W_f` and background 1;
    then the mean over labelled voxels. Each class is in turn the foreground, and their losses are averaged.
    Li et al., "Advanced deep networks for 3D mitochondria instance segmentation", 2021 (arXiv:2104.07961).
    """

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        is_labelled = target != UNLABELLED
        rows, classes = gather_labelled(logits, target)
        foreground = functional.one_hot(classes, self.n_classes)
        block = torch.arange(len(target), device=target.device).view(-1, *[1] * (target.ndim - 1))
        weights = balance_weights(foreground, block.expand_as(target)[is_labelled], len(target))
        return self._average_classes((one_against_rest(rows, foreground) * weights).mean(dim=0))


class DiceLoss(MaskedLoss):
    r"""One minus the overlap of prediction and label, with 1 added to both sides of the fraction.

    :math:`L = \operatorname{mean}_k [ 1 - (2\sum_i p_{ik} g_{ik} + 1) / (\sum_i p_{ik} + \sum_i g_{ik} + 1) ]`.
    The smoothing makes a class without labels in the batch count as predicted nowhere. Form used for ``unet3d`` and
    ``denseunet569``; after Sudre et al., "Generalised Dice overlap", DLMIA 2017.
    """

    smoothing = 1.0

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        p, g = probabilities_and_labels(logits, target)
        overlap = (2 * (p * g).sum(0) + self.smoothing) / (p.sum(0) + g.sum(0) + self.smoothing)
        return self._average_classes(1 - overlap)


class SquaredDiceLoss(MaskedLoss):
    r"""One minus the overlap of prediction and label, with squares in the denominator.

    :math:`L = \operatorname{mean}_k [ 1 - 2\sum_i p_{ik} g_{ik} / (\sum_i p_{ik}^2 + \sum_i g_{ik}^2) ]` over the
    classes that have labels in the batch; for another class the fraction is 0 whatever is predicted.
    Milletari et al., "V-Net", 3DV 2016.
    """

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        p, g = probabilities_and_labels(logits, target)
        size = g.sum(0)
        overlap = 2 * (p * g).sum(0) / ((p * p).sum(0) + size).clamp_min(torch.finfo(p.dtype).tiny)
        return self._average_classes(1 - overlap, size > 0)


class DiceBCELoss(MaskedLoss):
    """Sum of :class:`DiceLoss` and :class:`BinaryCrossEntropyLoss`: overlap, and a gradient where there is none."""

    def __init__(self, n_classes: int, class_weights: Tensor | None = None) -> None:
        super().__init__(n_classes, class_weights)
        self.dice = DiceLoss(n_classes, class_weights)
        self.bce = BinaryCrossEntropyLoss(n_classes, class_weights)

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        return self.dice.compute(logits, target) + self.bce.compute(logits, target)


class BoundaryDoULoss(MaskedLoss):
    r"""Difference over union, the heavier the smaller the boundary is against the area of a class.

    :math:`L = \operatorname{mean}_k\, (G \cup P - G \cap P) / (G \cup P - \alpha\, G \cap P)` over classes with labels
    in the batch, where :math:`G \cap P = \sum p g`, :math:`G \cup P = \sum p^2 + \sum g^2 - \sum p g`,
    :math:`\alpha = 1 - 2C/S` cut to [0, 0.8], *C* the class's boundary voxels and *S* all its voxels.
    Sun et al., "Boundary difference over union loss for medical image segmentation", MICCAI 2023.

    A voxel is on the boundary where a face neighbour has another *label*: an unlabelled neighbour, or the end of the
    crop, says nothing about where a class ends. On a single labelled slice this is the paper's 2D boundary.
    """

    largest_alpha = 0.8

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        p, g = probabilities_and_labels(logits, target)
        size = g.sum(0)
        edge = find_boundary(target)[target != UNLABELLED]
        n_boundary = (g * edge[:, None]).sum(0)
        alpha = (1 - 2 * n_boundary / size.clamp_min(1)).clamp(0.0, self.largest_alpha)
        common = (p * g).sum(0)
        union = (p * p).sum(0) + size - common
        tiny = torch.finfo(p.dtype).tiny
        return self._average_classes((union - common) / (union - alpha * common).clamp_min(tiny), size > 0)


LOSSES: dict[str, Callable[..., MaskedLoss]] = {
    "ce": CrossEntropyLoss,
    "focal": FocalLoss,
    "bce": BinaryCrossEntropyLoss,
    "weighted_bce": WeightedBinaryCrossEntropyLoss,
    "dice": DiceLoss,
    "dice_squared": SquaredDiceLoss,
    "dice_bce": DiceBCELoss,
    "boundary_dou": BoundaryDoULoss,
}
"""Loss name → its class; every one takes the number of classes and class weights, ``focal`` also ``gamma``."""


def build_loss(name: str, n_classes: int, class_weights: Tensor | None = None, **parameters: Any) -> MaskedLoss:
    """Build the loss of this name for training on sparse labels.

    Parameters
    ----------
    name : str
        A key of :data:`LOSSES`.
    n_classes : int
        K, at least 2.
    class_weights : Tensor, shape (K,), optional
        See :class:`MaskedLoss`.
    **parameters
        ``gamma`` for "focal"; the other losses have none.

    Raises
    ------
    ValueError
        If the loss is unknown, or does not have the parameter.
    """
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    unknown = sorted(set(parameters) - ({"gamma"} if name == "focal" else set()))
    if unknown:
        raise ValueError(f"loss {name!r} has no parameter {unknown[0]!r}; leave it out, or choose 'focal' for gamma")
    return LOSSES[name](n_classes, class_weights, **parameters)


def gather_labelled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled voxels of a batch as rows: logits (N, K) and classes (N,)."""
    is_labelled = target != UNLABELLED
    return logits.movedim(1, -1)[is_labelled], target[is_labelled]


def probabilities_and_labels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of the labelled voxels and their labels as 0 and 1; both (N, K)."""
    rows, classes = gather_labelled(logits, target)
    probabilities = functional.softmax(rows, dim=1)
    return probabilities, functional.one_hot(classes, rows.shape[1]).to(probabilities.dtype)


def one_against_rest(rows: Tensor, foreground: Tensor) -> Tensor:
    """Binary cross entropy of each class's softmax probability, voxel by voxel; logits and result (N, K).

    ln(1 - p_k) is taken from the other classes' logits: 1 - p_k itself rounds to 0 for a confident network, where
    the loss must go on growing.
    """
    total = torch.logsumexp(rows, dim=1)
    classes = range(rows.shape[1])
    others = [torch.logsumexp(rows[:, [j for j in classes if j != k]], dim=1) for k in classes]
    return torch.where(foreground.bool(), total[:, None] - rows, total[:, None] - torch.stack(others, dim=1))


def balance_weights(foreground: Tensor, block: Tensor, n_blocks: int) -> Tensor:
    """Weight of each voxel in the binary problem of each class, as :class:`WeightedBinaryCrossEntropyLoss` defines.

    Parameters
    ----------
    foreground : Tensor, shape (N, K)
        1 where the class is the foreground.
    block : Tensor of int64, shape (N,)
        Which block of the batch a voxel is from.
    n_blocks : int
        Blocks of the batch.

    Returns
    -------
    Tensor of float32, shape (N, K)
        1 in a block that is all foreground or all background.
    """
    counts = torch.zeros(n_blocks, foreground.shape[1], dtype=torch.int64, device=foreground.device)
    counts.index_add_(0, block, foreground)
    n_voxels = torch.bincount(block, minlength=n_blocks)[:, None]
    rest = n_voxels - counts
    # The rarer side weighs the ratio, the other 1; a side of no voxels has nothing to weigh.
    foreground_weight = (rest / counts.clamp_min(1)).clamp_min(1.0)
    background_weight = (counts / rest.clamp_min(1)).clamp_min(1.0)
    is_one_sided = (counts == 0) | (rest == 0)
    return torch.where(
        foreground.bool(),
        foreground_weight.masked_fill(is_one_sided, 1.0)[block],
        background_weight.masked_fill(is_one_sided, 1.0)[block],
    )


def find_boundary(target: Tensor) -> Tensor:
    """Say which labelled voxels have a face neighbour of another label; (B, …) bool, False where unlabelled."""
    boundary = torch.zeros_like(target, dtype=torch.bool)
    for axis in range(1, target.ndim):
        n = target.shape[axis]
        before, after = target.narrow(axis, 0, n - 1), target.narrow(axis, 1, n - 1)
        differs = (before != after) & (before != UNLABELLED) & (after != UNLABELLED)
        boundary.narrow(axis, 0, n - 1).logical_or_(differs)
        boundary.narrow(axis, 1, n - 1).logical_or_(differs)
    return boundary


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted binary cross entropy of a boundary output (B, 1, …) against the boundaries of the labels.

    The second term of the two-output networks: see :class:`WeightedBinaryCrossEntropyLoss` for the weights.
    """
    is_boundary = find_boundary(target).to(torch.int64)
    classes = torch.where(target == UNLABELLED, UNLABELLED, is_boundary)
    pair = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return WeightedBinaryCrossEntropyLoss(2).to(logits.device)(pair, classes)
