"""Augmentation: a window and its labels, changed together in ways that leave the labels true.

A recipe is a list of transforms, each with the probability that it acts. Labels stay whole numbers: they are moved
by nearest neighbour, and what comes in from outside the window is unlabelled (-1). Anisotropy is respected: quarter
turns, rotations and deformations stay in planes of equal voxel size, where they are the same shape in nanometres.

Recipes (all but the first three import MONAI, which takes seconds, when they are first used):

========  =========================================================================================================
none      nothing
flips     flips of every axis
patch     flips, quarter turns, brightness and contrast: for patch networks, nearly free
B         eleven of the MitoEM winner (arXiv:2104.07961): flips, quarter turns, rotation and rescaling, elastic
          deformation, greyscale, missing section, misalignment, motion blur, missing parts, cut-out
C         flips, quarter turns, rotation, brightness, contrast and gamma, coarse dropout
D         random crop, flips, centre crop, both resized to the window, brightness and contrast
========  =========================================================================================================

Images are normalised (mean 0, standard deviation 1 over the volume); strengths below are in that unit, and 0 is what
a voxel that is lost becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from voxclf.geometry import VoxelSize
from voxclf.training.losses import UNLABELLED

RECIPES = ("none", "flips", "patch", "B", "C", "D")
Pair = tuple[np.ndarray, np.ndarray]
Plane = tuple[int, int]


class Transform(Protocol):
    """One change of a window: image (C, Z, Y, X) and target (Z, Y, X), neither of which it may write into."""

    @property
    def probability(self) -> float: ...  # noqa: D102

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """Return both, changed, in the same shapes."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """A recipe: transforms in the order in which they act."""

    name: str
    transforms: tuple[Transform, ...] = ()

    def __call__(self, image: Any, target: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """Change a window at random.

        Parameters
        ----------
        image : ndarray or Tensor of float32, shape (C, Z, Y, X)
            Normalised.
        target : ndarray or Tensor of integers, shape (Z, Y, X)
            Class indices, -1 where unlabelled.
        rng : numpy.random.Generator
            Everything random is drawn from it: the same state gives the same result.

        Returns
        -------
        (image, target)
            Same shapes, dtypes and kind of array; the ones given are never written into.
        """
        changed, labels = np.asarray(image), np.asarray(target)
        for transform in self.transforms:
            if rng.random() < transform.probability:
                changed, labels = transform.apply(changed, labels, rng)
        # A true copy: along an axis of one voxel `ascontiguousarray` keeps the negative stride of a flip, which torch
        # refuses.
        changed, labels = changed.astype(np.float32, order="C"), labels.copy()
        if isinstance(image, np.ndarray):
            return changed, labels
        # Tensors share their memory with the arrays, which a recipe that did nothing has handed through.
        return image.new_tensor(changed), target.new_tensor(labels)


def build_augmentation(recipe: str, voxel_size_nm: VoxelSize) -> Augmentation:
    """Build the recipe of this name for volumes of this voxel size.

    Raises
    ------
    ValueError
        If the recipe is unknown.
    """
    if recipe not in RECIPES:
        raise ValueError(f"augment {recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    planes = find_isotropic_planes(voxel_size_nm)
    # Sections are what was cut: the coarsest axis, or z where all are equal.
    section_axis = int(np.argmax(voxel_size_nm))
    build: dict[str, Callable[[], tuple[Transform, ...]]] = {
        "none": lambda: (),
        "flips": lambda: (Flip(),),
        "patch": lambda: (Flip(), QuarterTurn(planes), Greyscale(0.5)),
        "B": lambda: _recipe_b(planes, section_axis),
        "C": lambda: _recipe_c(planes),
        "D": _recipe_d,
    }
    return Augmentation(recipe, build[recipe]())


def _recipe_b(planes: Sequence[Plane], section_axis: int) -> tuple[Transform, ...]:
    return (
        Flip(),
        QuarterTurn(planes),
        InPlane("rotation and rescaling", planes, 0.3, _build_affine, {"rotate": np.pi, "scale": 0.2}),
        InPlane("elastic", planes, 0.3, _build_elastic, {}),
        Greyscale(0.75, gamma=0.4),
        MissingSection(section_axis, 0.2),
        Misalignment(section_axis, 0.2),
        MotionBlur(section_axis, 0.2),
        CoarseDropout(0.2),
        CutOut(0.2),
    )


def _recipe_c(planes: Sequence[Plane]) -> tuple[Transform, ...]:
    return (
        Flip(),
        QuarterTurn(planes),
        InPlane("rotation", planes, 0.5, _build_affine, {"rotate": np.pi, "scale": 0.0}),
        Greyscale(0.5, gamma=0.3),
        CoarseDropout(0.3),
    )


def _recipe_d() -> tuple[Transform, ...]:
    return (
        CropAndResize(0.5, is_centred=False),
        Flip(),
        CropAndResize(0.3, is_centred=True),
        Greyscale(0.5),
    )


def find_isotropic_planes(voxel_size_nm: VoxelSize) -> tuple[Plane, ...]:
    """Pairs of axes whose voxels are equally long, to 1 %: (1, 2) alone for thick sections, all three for FIB-SEM."""
    return tuple(
        (a, b)
        for a, b in ((0, 1), (0, 2), (1, 2))
        if abs(voxel_size_nm[a] - voxel_size_nm[b]) <= 0.01 * voxel_size_nm[b]
    )


@dataclass(frozen=True)
class Flip:
    """Mirror each axis, with probability one half."""

    probability: float = 1.0

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        step_z, step_y, step_x = (slice(None, None, -1 if flipped else 1) for flipped in rng.random(3) < 0.5)
        return image[:, step_z, step_y, step_x], target[step_z, step_y, step_x]


@dataclass(frozen=True)
class QuarterTurn:
    """Turn by a multiple of 90 degrees in a plane of equal voxel size; by 180 where the window is not square."""

    planes: Sequence[Plane]
    probability: float = 1.0

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        for a, b in self.planes:
            turns = int(rng.integers(4))
            if target.shape[a] != target.shape[b]:
                turns -= turns % 2
            image, target = np.rot90(image, turns, (a + 1, b + 1)), np.rot90(target, turns, (a, b))
        return image, target


@dataclass(frozen=True)
class Greyscale:
    """Contrast, brightness and, if asked, gamma: ``x·c + b``, then the window's range bent by an exponent."""

    probability: float
    contrast: float = 0.2
    brightness: float = 0.2
    gamma: float = 0.0

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        c, b, g = rng.uniform(-1, 1, 3) * (self.contrast, self.brightness, self.gamma)
        image = image * np.float32(1 + c) + np.float32(b)
        if self.gamma:
            low, high = image.min(), image.max()
            if high > low:
                span = high - low
                image = ((image - low) / span) ** np.float32(np.exp(g)) * span + low
        return image, target


@dataclass(frozen=True)
class MissingSection:
    """Lose one section: its image becomes 0 everywhere, and its labels must be found from its neighbours."""

    axis: int
    probability: float

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`; a window of fewer than 3 sections has no neighbours to find them from."""
        n = target.shape[self.axis]
        if n >= 3:
            image = image.copy()
            np.moveaxis(image, self.axis + 1, 0)[rng.integers(1, n - 1)] = 0
        return image, target


@dataclass(frozen=True)
class Misalignment:
    """Shift all sections from a random one on (or that one alone, half of the time) by up to ``reach`` voxels."""

    axis: int
    probability: float
    reach: int = 10

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        n = target.shape[self.axis]
        if n < 2:
            return image, target
        first = int(rng.integers(1, n))
        sections = slice(first, first + 1 if rng.random() < 0.5 else n)
        image, target = image.copy(), target.copy()
        moved_image = np.moveaxis(image, self.axis + 1, 1)[:, sections]
        moved_target = np.moveaxis(target, self.axis, 0)[sections]
        shift = [int(rng.integers(-r, r + 1)) for r in (min(self.reach, m // 4) for m in moved_target.shape[1:])]
        moved_image[...] = _shift(moved_image, shift, mode="symmetric")
        moved_target[...] = _shift(moved_target, shift, mode="constant", constant_values=UNLABELLED)
        return image, target


def _shift(array: np.ndarray, shift: Sequence[int], **padding: Any) -> np.ndarray:
    """Move an array along its last axes and fill what comes in."""
    still = [(0, 0)] * (array.ndim - len(shift))
    padded = np.pad(array, still + [(max(s, 0), max(-s, 0)) for s in shift], **padding)
    inside = [slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(shift, array.shape[-len(shift) :], strict=True)]
    index: tuple[Any, ...] = (..., *inside)
    return padded[index]


@dataclass(frozen=True)
class MotionBlur:
    """Blur a few sections along a random direction, as the beam or stage does when it moves."""

    axis: int
    probability: float
    length: int = 7
    n_sections: int = 3

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        from scipy import ndimage

        kernel = _draw_line(self.length, rng.uniform(0, np.pi))
        image = image.copy()
        n = target.shape[self.axis]
        for section in rng.choice(n, min(self.n_sections, n), replace=False):
            for channel in np.moveaxis(image, self.axis + 1, 1):
                channel[section] = ndimage.convolve(channel[section], kernel, mode="reflect")
        return image, target


def _draw_line(length: int, angle: float) -> np.ndarray:
    """A line through the middle of a square of ``length`` pixels, summing to 1."""
    steps = np.linspace(-1, 1, 2 * length) * (length // 2)
    kernel = np.zeros((length, length), dtype=np.float32)
    rows, columns = (np.rint(length // 2 + steps * f(angle)).astype(int) for f in (np.sin, np.cos))
    kernel[rows, columns] = 1
    return kernel / kernel.sum()


@dataclass(frozen=True)
class CutOut:
    """Lose a random box of up to half the window along each axis; its labels must be found from around it."""

    probability: float

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        shape = [int(rng.integers(1, max(2, n // 2 + 1))) for n in target.shape]
        starts = [int(rng.integers(0, n - m + 1)) for n, m in zip(target.shape, shape, strict=True)]
        image = image.copy()
        image[(slice(None), *(slice(s, s + m) for s, m in zip(starts, shape, strict=True)))] = 0
        return image, target


@dataclass(frozen=True)
class CoarseDropout:
    """Lose up to ``n_holes`` small boxes of an eighth of the window (MONAI's RandCoarseDropout)."""

    probability: float
    n_holes: int = 8

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        from monai.transforms import RandCoarseDropout

        size = tuple(max(1, n // 8) for n in target.shape)
        drop = RandCoarseDropout(1, size, fill_value=0.0, max_holes=self.n_holes, prob=1.0)
        drop.set_random_state(seed=_draw_seed(rng))
        return _to_numpy(drop(image.copy())), target


@dataclass(frozen=True)
class CropAndResize:
    """Cut out a box of 60 to 100 % along every axis, at random or in the middle, and enlarge it to the window."""

    probability: float
    is_centred: bool
    least: float = 0.6

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`."""
        from monai.transforms import Resize

        scale = rng.uniform(self.least, 1)
        shape = [max(1, round(scale * n)) for n in target.shape]
        spare = [n - m for n, m in zip(target.shape, shape, strict=True)]
        starts = [s // 2 if self.is_centred else int(rng.integers(0, s + 1)) for s in spare]
        box = tuple(slice(s, s + m) for s, m in zip(starts, shape, strict=True))
        enlarged = Resize(target.shape, mode="trilinear")(image[:, *box].copy())
        labels = Resize(target.shape, mode="nearest")(target[box][None].astype(np.float32, order="C"))
        return _to_numpy(enlarged), _to_labels(_to_numpy(labels)[0], target.dtype)


@dataclass(frozen=True)
class InPlane:
    """A 2D transform of MONAI in a plane of equal voxel size, the same for all sections along the third axis.

    A labelled section stays a section, and the cost is that of one 2D grid: the third axis rides as channels.
    """

    name: str
    planes: Sequence[Plane]
    probability: float
    build: Callable[..., Any]
    options: dict[str, float] = field(default_factory=dict)

    @cached_property
    def _transform(self) -> Any:
        return self.build(**self.options)

    def apply(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """See :class:`Transform`; nothing happens where no two axes have voxels of the same size."""
        if not self.planes:
            return image, target
        a, b = self.planes[int(rng.integers(len(self.planes)))]
        order = (3 - a - b, a, b)
        flat_image = np.moveaxis(image, [d + 1 for d in order], [1, 2, 3])
        flat_target = np.moveaxis(target, order, [0, 1, 2])
        transform = self._transform
        transform.set_random_state(seed=_draw_seed(rng))
        found = transform(
            {
                "image": flat_image.copy().reshape(-1, *flat_image.shape[2:]),
                # What comes in from outside is 0: labels move up by one, and unlabelled is that 0.
                "target": (flat_target - UNLABELLED).astype(np.float32, order="C"),
            }
        )
        changed = _to_numpy(found["image"]).reshape(flat_image.shape)
        labels = _to_labels(_to_numpy(found["target"]) + UNLABELLED, target.dtype)
        return np.moveaxis(changed, [1, 2, 3], [d + 1 for d in order]), np.moveaxis(labels, [0, 1, 2], order)


def _build_affine(rotate: float, scale: float) -> Any:
    from monai.transforms import RandAffined

    return RandAffined(
        ("image", "target"),
        prob=1.0,
        rotate_range=rotate,
        scale_range=scale,
        mode=("bilinear", "nearest"),
        padding_mode=("reflection", "zeros"),
    )


def _build_elastic(spacing: int = 24, magnitude: float = 3.0) -> Any:
    """Control points every ``spacing`` voxels, each moved by up to ``magnitude`` voxels along both axes."""
    from monai.transforms import Rand2DElasticd

    return Rand2DElasticd(
        ("image", "target"),
        spacing=(spacing, spacing),
        magnitude_range=(1.0, magnitude),
        prob=1.0,
        mode=("bilinear", "nearest"),
        padding_mode=("reflection", "zeros"),
    )


def _draw_seed(rng: np.random.Generator) -> int:
    """MONAI seeds its own generators; this ties them to ours."""
    return int(rng.integers(2**31))


def _to_numpy(found: Any) -> np.ndarray:
    return found if isinstance(found, np.ndarray) else found.as_tensor().numpy()


def _to_labels(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.rint(values).astype(dtype)
