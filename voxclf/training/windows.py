"""From sparse labels to training windows: pieces of the image with the labels that lie in their middle.

Three forms of window feed the one training loop (``P`` patch, ``R`` receptive field, both per axis)::

    slab    every s-th of 1 × w × w labels      image P × (w + R - 1) × (w + R - 1), for exact patch networks
    patch   one labelled voxel                  image P × P × P
    crop    a box of labels                     the same box of the image, for segmenters

A slab holds the patches of many voxels of a plane: the loss over it has the gradient of the batch of those patches at a
small part of the work. The plane's normal is the axis across which labels are thin: z for labelled xy slices, y for xz
slices, any where labels are dense in 3D. Where the network has strides, it is cheapest at a spacing s of those strides:
voxels that far apart share all that is computed, and say more than neighbours do.

Windows are drawn around labelled voxels, class by class. What is drawn depends on the seed and the number of the step
only, so training that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import numpy as np

from voxclf.config import Balance
from voxclf.engine.transfer import read_block
from voxclf.geometry import Region, VoxelSize, Zyx, add, make_block, subtract, zyx
from voxclf.labels import UNLABELLED_INDEX, LabelSet
from voxclf.models.network_inputs import NetworkInput
from voxclf.sampling import LabelSurvey, target_shares
from voxclf.training.held_out import HeldOut
from voxclf.volume import Volume

Augmentation = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

GOOD_NORMAL = 0.5
"""A plane is as good as the best one if a window in it holds this share of the best one's labels."""
MAX_DRAWS = 64
"""Voxels drawn per window wanted, in search of those with the step's normal; then any will do."""
KEPT_BYTES = 2**27
"""Lists of labelled voxels that are kept: those of 30 million voxels."""


@dataclass(frozen=True)
class WindowForm:
    """Shape of a window: the box of labels in its middle, and how much image lies around it.

    Parameters
    ----------
    target : (z, y, x)
        Box whose labels count.
    before, after : (z, y, x)
        Voxels of image on the lower and upper side of it.
    normal : int, optional
        Axis across which the network is applied at its native stride; None for patches and crops.
    spacing : (z, y, x)
        Labels that count lie so far from each other; the box begins and ends with one that does.
    """

    target: Zyx
    before: Zyx = (0, 0, 0)
    after: Zyx = (0, 0, 0)
    normal: int | None = None
    spacing: Zyx = (1, 1, 1)

    def pick(self, target: np.ndarray) -> np.ndarray:
        """The labels of the box that count."""
        z, y, x = self.spacing
        return target[::z, ::y, ::x]

    @property
    def image_shape(self) -> Zyx:
        """Shape of the image that goes into the network."""
        return add(add(self.before, self.target), self.after)

    @property
    def dense_axes(self) -> tuple[bool, bool, bool]:
        """Along which axes outputs are wanted at every voxel."""
        z, y, x = (axis != self.normal for axis in range(3))
        return z, y, x


def slab_forms(patch: Zyx, receptive_field: Zyx, side: Zyx, spacing: Zyx = (1, 1, 1)) -> tuple[WindowForm, ...]:
    """Slabs across z, y and x, for a network that sees ``receptive_field`` of its patch from the patch's start on.

    A slab has about the length of ``side``: the longest that is not longer and begins and ends with a voxel that
    counts.
    """
    forms = []
    for normal in range(3):
        apart = list(spacing)
        # Flipped or turned, the voxels that count must lie where others did.
        target = [(n - 1) // s * s + 1 for n, s in zip(side, spacing, strict=True)]
        after = [r - 1 - p // 2 for p, r in zip(patch, receptive_field, strict=True)]
        apart[normal] = target[normal] = 1
        after[normal] = patch[normal] - 1 - patch[normal] // 2
        forms.append(WindowForm(zyx(target), zyx(p // 2 for p in patch), zyx(after), normal, zyx(apart)))
    return tuple(forms)


def patch_form(patch: Zyx) -> WindowForm:
    """The patch around one voxel, which is at its index P // 2."""
    return WindowForm((1, 1, 1), zyx(p // 2 for p in patch), zyx(p - 1 - p // 2 for p in patch))


def crop_form(shape: Zyx, margin: Zyx = (0, 0, 0)) -> WindowForm:
    """A crop whose labels count except within ``margin`` of its faces."""
    return WindowForm(subtract(shape, add(margin, margin)), margin, margin)


def window_side(side: int, voxel_size_nm: VoxelSize) -> Zyx:
    """Side of a window per axis, voxels: ``side`` along the finest axis, the same length in nm along the others."""
    finest = min(voxel_size_nm)
    return zyx(max(1, round(side * finest / size)) for size in voxel_size_nm)


def unravel(flat: int, shape: Zyx) -> Zyx:
    """Position in a box of a voxel given by its flat index."""
    return zyx(np.unravel_index(flat, shape))


class Window(NamedTuple):
    """One window: its channels and its labels.

    Parameters
    ----------
    image : ndarray of float32, shape (C, *form.image_shape)
    target : ndarray of int64, shape form.target, or of what counts of it
        Class index, -1 where nothing is labelled.
    """

    image: np.ndarray
    target: np.ndarray


class WindowBatch(NamedTuple):
    """Windows of one form: images (B, C, ...), targets (B, ...), the form's number, where targets start (B, 3)."""

    images: np.ndarray
    targets: np.ndarray
    form: int
    starts: np.ndarray

    @classmethod
    def of(cls, windows: Sequence[Window], form: int, starts: Sequence[Zyx]) -> WindowBatch:
        """Stack windows."""
        images, targets = (np.stack(arrays) for arrays in zip(*windows, strict=True))
        return cls(images, targets, form, np.array(starts, np.int64))

    @property
    def n_labelled(self) -> int:
        """Labelled voxels in it."""
        return int((self.targets >= 0).sum())


@dataclass(frozen=True)
class WindowReader:
    """Reads windows: the image through the network's input, mirrored at the volume's edge, and the labels.

    Parameters
    ----------
    image, labels : Volume
    inputs : NetworkInput
        Makes channels of grey values.
    label_set : LabelSet
    """

    image: Volume
    labels: Volume
    inputs: NetworkInput
    label_set: LabelSet

    def read_classes(self, region: Region) -> np.ndarray:
        """Class indices of a box, -1 where unlabelled or outside the volume; int64 (z, y, x)."""
        inside = region.intersect(Region((0, 0, 0), self.labels.shape))
        classes = np.full(region.shape, UNLABELLED_INDEX, np.int64)
        if inside.n_voxels:
            found = self.label_set.remap_to_indices(self.labels.read(inside.start, inside.stop)[0])
            classes[Region(subtract(inside.start, region.start), subtract(inside.stop, region.start)).slices] = found
        return classes

    def read(
        self,
        form: WindowForm,
        start: Zyx,
        target: np.ndarray,
        augment: Augmentation | None = None,
        rng: np.random.Generator | None = None,
    ) -> Window:
        """Read the image around the target that begins at ``start``; ``augment`` may change both."""
        if augment is None:
            region = Region(subtract(start, form.before), add(add(start, form.target), form.after))
            return Window(self.inputs.compute(self._grey(region)), form.pick(target))
        assert rng is not None, "augmentation needs a random generator"
        # An even patch reaches one voxel further down than up. With the wider margin on both sides a flipped image
        # still has its labels in the middle; it is cut to the form afterwards.
        margin = zyx(max(a, b) for a, b in zip(form.before, form.after, strict=True))
        region = Region(start, add(start, form.target)).grow(margin)
        image, labelled = self._augmented(region, margin, target, augment, rng)
        cut = Region(subtract(margin, form.before), add(add(margin, form.target), form.after))
        middle = Region(margin, add(margin, form.target))
        return Window(np.ascontiguousarray(image[(slice(None), *cut.slices)]), form.pick(labelled[middle.slices]))

    def _grey(self, region: Region) -> np.ndarray:
        return read_block(self.image, make_block(0, region, self.inputs.halo))[0]

    def _augmented(
        self, region: Region, margin: Zyx, target: np.ndarray, augment: Augmentation, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment grey values in units of their standard deviation, then make channels of them: features that are
        computed of a flipped image are right, flipped features need not be."""
        mean, std = np.float32(self.inputs.mean[0]), np.float32(self.inputs.std[0])
        grey = (self._grey(region).astype(np.float32) - mean) / std
        halo = self.inputs.halo
        labels = np.full(grey.shape, UNLABELLED_INDEX, target.dtype)
        around = add(margin, halo)
        labels[Region(around, add(around, target.shape)).slices] = target
        image, labels = augment(grey[None], labels, rng)
        inner = Region(halo, subtract(labels.shape, halo))
        return self.inputs.compute(np.asarray(image)[0] * std + mean), np.asarray(labels)[inner.slices]


@dataclass(frozen=True)
class BoxLabels:
    """The labelled voxels of one box of a survey, listed by class, and how they lie.

    Parameters
    ----------
    region : Region
    positions : ndarray of uint32
        Flat index in the box of its labelled voxels, classes ascending.
    first : ndarray of int, shape (K + 1,)
        Where each class begins in ``positions``.
    fill : three ndarrays of float, lengths z, y, x
        Labelled share of each plane across the axis.
    """

    region: Region
    positions: np.ndarray
    first: np.ndarray
    fill: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, region: Region, classes: np.ndarray, n_classes: int) -> BoxLabels:
        """List what ``classes`` (z, y, x) of a box hold."""
        labelled = classes >= 0
        flat = classes.ravel()
        # Stable sorts of 16-bit integers are radix sorts: 2 ns a voxel.
        order = np.argsort(flat.astype(np.int16), kind="stable")
        bounds = np.searchsorted(flat[order], np.arange(n_classes + 1))
        first = (bounds - bounds[0]).astype(np.int64)
        z, y, x = (labelled.mean(axis=tuple(b for b in range(3) if b != a)) for a in range(3))
        return cls(region, order[bounds[0] :].astype(np.uint32), first, (z, y, x))

    def voxel(self, k: int, number: int) -> Zyx:
        """Position in the volume of one labelled voxel of class ``k``."""
        flat = int(self.positions[self.first[k] + number])
        return add(self.region.start, unravel(flat, self.region.shape))

    def expected_labels(self, form: WindowForm) -> np.ndarray:
        """Labels to expect in a slab at each plane across its normal, if they are spread evenly over the plane."""
        assert form.normal is not None
        inside = [
            min(n, t) for a, (n, t) in enumerate(zip(self.region.shape, form.target, strict=True)) if a != form.normal
        ]
        return self.fill[form.normal] * math.prod(inside)

    def good_forms(self, voxel: Zyx, forms: Sequence[WindowForm]) -> list[int]:
        """Which forms suit a voxel: those whose window holds about the most labels."""
        if len(forms) == 1:
            return [0]
        local = subtract(voxel, self.region.start)
        expected = [self.expected_labels(form)[local[form.normal or 0]] for form in forms]
        return [i for i, count in enumerate(expected) if count >= GOOD_NORMAL * max(expected)]

    def best_form(self, forms: Sequence[WindowForm]) -> np.ndarray:
        """Number of the one form that each voxel of the box is scored with, (z, y, x)."""
        if len(forms) == 1:
            return np.zeros(self.region.shape, np.int64)
        expected = []
        for form in forms:
            shape = [1, 1, 1]
            shape[form.normal or 0] = -1
            expected.append(np.broadcast_to(self.expected_labels(form).reshape(shape), self.region.shape))
        return np.argmax(expected, axis=0)


class LabelIndex:
    """Where the labelled voxels of a survey are; boxes are read when needed, and the last ones kept.

    Safe for the threads that read ahead.
    """

    def __init__(self, reader: WindowReader, survey: LabelSurvey) -> None:
        self.reader = reader
        self.survey = survey
        self.counts = np.array(
            [[box.counts.get(i, 0) for i in reader.label_set.ids] for box in survey.boxes], np.int64
        ).reshape(-1, reader.label_set.n_classes)
        self._kept: OrderedDict[int, BoxLabels] = OrderedDict()
        self._kept_bytes = 0
        self._lock = Lock()

    @property
    def totals(self) -> np.ndarray:
        """Labelled voxels per class, (K,)."""
        return self.counts.sum(axis=0)

    def box(self, number: int) -> BoxLabels:
        """List the labels of one box."""
        with self._lock:
            found = self._kept.get(number)
        if found is None:
            region = self.survey.boxes[number].region
            found = BoxLabels.of(region, self.reader.read_classes(region), self.reader.label_set.n_classes)
            self._keep(number, found)
        return found

    def _keep(self, number: int, found: BoxLabels) -> None:
        with self._lock:
            if number in self._kept:  # another thread was faster
                return
            self._kept[number] = found
            self._kept_bytes += found.positions.nbytes
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].positions.nbytes


@dataclass(frozen=True)
class WindowSampler:
    """Draws training windows: a class by its share, a labelled voxel of it, a window that holds the voxel.

    Parameters
    ----------
    index : LabelIndex
        Of the labels that may be trained on.
    held_out : HeldOut
        What lies beside them in a window and may not.
    forms : sequence of WindowForm
        One per normal for slabs, or a single one. All windows of a step have one form.
    n_windows : int
        Windows per step.
    balance : "sqrt", "equal" or "labelled"
        Shares of the classes among the voxels drawn.
    seed : int
    augment : callable, optional
    """

    index: LabelIndex
    held_out: HeldOut
    forms: Sequence[WindowForm]
    n_windows: int
    balance: Balance
    seed: int
    augment: Augmentation | None = None
    _class_ends: np.ndarray = field(init=False, repr=False)
    _box_ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_class_ends", np.cumsum(target_shares(self.index.totals, self.balance)))
        object.__setattr__(self, "_box_ends", np.cumsum(self.index.counts, axis=0))

    def draw(self, step: int) -> WindowBatch:
        """Draw the windows of one step; the same for the same seed and step."""
        rng = np.random.default_rng([self.seed, step])
        form, starts = self._place(rng)
        windows = [
            self.index.reader.read(self.forms[form], start, self._target(form, start), self.augment, rng)
            for start in starts
        ]
        return WindowBatch.of(windows, form, starts)

    def count_labels(self, n_steps: int) -> Iterator[tuple[np.ndarray, int]]:
        """Labels of each class in each window of the first steps, (B, K), and voxels of image in the windows.

        Reads labels only.
        """
        for step in range(n_steps):
            form, starts = self._place(np.random.default_rng([self.seed, step]))
            counts = np.stack([self._count(form, start) for start in starts])
            yield counts, len(starts) * math.prod(self.forms[form].image_shape)

    def _count(self, form: int, start: Zyx) -> np.ndarray:
        target = self.forms[form].pick(self._target(form, start))
        return np.bincount(target[target >= 0], minlength=self.index.reader.label_set.n_classes)

    def _place(self, rng: np.random.Generator) -> tuple[int, list[Zyx]]:
        """Choose a form and where its windows start."""
        voxel, good = self._draw_voxel(rng)
        form = good[rng.integers(len(good))]
        voxels = [voxel]
        for _ in range(MAX_DRAWS * self.n_windows):
            if len(voxels) == self.n_windows:
                break
            voxel, good = self._draw_voxel(rng)
            if form in good:
                voxels.append(voxel)
        while len(voxels) < self.n_windows:
            voxels.append(self._draw_voxel(rng)[0])
        return form, [self._window_around(voxel, self.forms[form], rng) for voxel in voxels]

    def _draw_voxel(self, rng: np.random.Generator) -> tuple[Zyx, list[int]]:
        k = int(np.searchsorted(self._class_ends, rng.random() * self._class_ends[-1], side="right"))
        ends = self._box_ends[:, k]
        ticket = int(rng.integers(ends[-1]))
        number = int(np.searchsorted(ends, ticket, side="right"))
        box = self.index.box(number)
        voxel = box.voxel(k, ticket - int(ends[number] - self.index.counts[number, k]))
        return voxel, box.good_forms(voxel, self.forms)

    def _window_around(self, voxel: Zyx, form: WindowForm, rng: np.random.Generator) -> Zyx:
        """Start of a window in which the voxel counts, inside the volume where the volume is large enough."""
        start = []
        for v, t, s, n in zip(voxel, form.target, form.spacing, self.index.reader.labels.shape, strict=True):
            last = (t - 1) // s
            number = int(rng.integers(last + 1))  # which of those that count the voxel is to be
            least = min(last, max(0, -(-(v + t - n) // s)))  # with a smaller one the window ends beyond the volume
            start.append(v - s * max(least, min(number, v // s)))
        return zyx(start)

    def _target(self, form: int, start: Zyx) -> np.ndarray:
        region = Region(start, add(start, self.forms[form].target))
        classes = self.index.reader.read_classes(region)
        return np.where(self.held_out.may_train(region), classes, UNLABELLED_INDEX)


def effective_count(counts: np.ndarray) -> float:
    """How many labels, drawn one by one, would tell the classes' shares as surely as the labels of some windows.

    Labels of one window are alike: of classes in clumps that fill a window, all its labels tell no more than one. This
    is the number of labels, divided by the design effect of a sample in clusters (Kish 1965, Survey Sampling, section
    8.2).

    Parameters
    ----------
    counts : ndarray of int, shape (W, K)
        Labels of each class in each window.

    Returns
    -------
    float
        Mean over classes; at most the number of labels.
    """
    total = counts.sum()
    share = counts.sum(axis=0) / max(1, total)
    of_class, share = (a[..., (share > 0) & (share < 1)] for a in (counts, share))
    if share.size == 0:
        return float(total)
    scatter = np.square(of_class - counts.sum(axis=1, keepdims=True) * share).sum(axis=0)
    scatter_alone = share * (1 - share) * total  # of labels drawn one by one
    return float((total * scatter_alone / np.maximum(scatter, scatter_alone)).mean())


def loss_weights(totals: np.ndarray, balance: Balance, drawn: np.ndarray) -> np.ndarray:
    """Weight of each class in the loss, so that classes together weigh as ``balance`` says, however they were drawn.

    Parameters
    ----------
    totals : ndarray of int, shape (K,)
        Labelled voxels per class.
    balance : "sqrt", "equal" or "labelled"
    drawn : ndarray of int, shape (K,)
        Labelled voxels per class in a sample of training windows.

    Returns
    -------
    ndarray of float32, shape (K,)
        Mean 1 over the voxels drawn; 0 for classes without labels.
    """
    # A class so rare that the sample missed it counts as drawn once.
    drawn = np.maximum(drawn, totals > 0)
    weights = np.divide(target_shares(totals, balance), drawn, out=np.zeros(len(totals)), where=drawn > 0)
    return (weights * drawn.sum() / (weights * drawn).sum()).astype(np.float32)
