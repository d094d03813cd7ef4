"""Labelled regions that models contradict: found plane by plane, measured, and freed of what is only a blurred border.

A plane is what a person drew. In each one:

1. the out-of-fold probabilities are smoothed and weighed with what the planes before and after say (`ContextFold`):
   a mitochondrion between two slices of cytoplasm is less likely than one between two slices of mitochondrion;
2. candidates are the connected pieces of every label as drawn, and within them the pieces where another class beats
   the given one clearly;
3. a candidate's evidence is its mean margin times the root of its depth-weighted size. A voxel weighs by its distance
   to the candidate's border, up to `FULL_DEPTH`, so a thin rim along a border, where nobody knows to the voxel which
   class it is, weighs little however long it is;
4. candidates that lie mostly in better ones are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxclf.geometry import Block, Region, Zyx, add, make_block
from voxclf.labels import LabelSet
from voxclf.probabilities import dequantise

Kind = Literal["object", "part", "leak"]

SMOOTHING = 5
"""Side of the square over which probabilities are averaged, voxels: single voxels of a forest are noisy."""
CONTEXT_WEIGHT = 0.25
"""How much the planes before and after count against the image. At 1, membranes that run at a slant, and so lie
elsewhere in every slice, filled the top of the list."""
LEAST_MARGIN = 0.3
"""By how much another class must be more probable than the given one for a part of a label to be a candidate."""
FULL_DEPTH = 5.0
"""Distance from its border, voxels, at which a voxel of a candidate counts in full."""
LARGEST_OVERLAP = 0.3
"""Share of a candidate that may lie in better ones."""
LEAST_CONTACT = 0.1
"""Share of a part's border that must touch the suggested class for it to be called a leak."""
OBJECT_WEIGHT = 1.5
"""A whole piece counts more than a part of one: its border was drawn by somebody who saw one there, while a part's is
a model's opinion."""
COMMON, RARE = 0.9, 1e-3
"""Shares between which the surprise of a contradiction is measured."""
PRIOR_COUNT = 20.0
FLOOR = 0.02
TILE = 2048


@dataclass(frozen=True)
class Contradiction:
    """A labelled region that models would label otherwise.

    Parameters
    ----------
    kind : str
        "object": all of a piece as drawn. "leak": a part that lies beyond an image edge, against the suggested class.
        "part": any other part of a piece.
    position : (z, y, x)
        The voxel deepest inside it.
    region : Region
        Its bounding box.
    axis : int
        The axis across its plane.
    given, suggested : int
        Class indices.
    n_voxels : int
    margin : float
        Mean probability of the suggested class minus that of the given one, 0 to 1.
    evidence : float
        What findings are ranked by.
    """

    kind: Kind
    position: Zyx
    region: Region
    axis: int
    given: int
    suggested: int
    n_voxels: int
    margin: float
    evidence: float


@dataclass(frozen=True)
class Contradictions:
    """The contradictions of some tiles; those of tiles add up.

    ``voxels`` counts, in all parts of labels that models contradict, voxels by given (row) and suggested class.
    """

    regions: tuple[Contradiction, ...]
    voxels: NDArray[np.int64]

    def __add__(self, other: Contradictions) -> Contradictions:
        return Contradictions(self.regions + other.regions, self.voxels + other.voxels)


def weigh_by_surprise(found: Contradictions, n_labelled: NDArray[np.int64]) -> list[Contradiction]:
    """Give contradictions that are common among the labels less evidence; ``n_labelled`` is per class, (K,)."""
    shares = found.voxels / np.maximum(n_labelled, 1)[:, None]
    surprise = -np.log(np.clip(shares, RARE, COMMON))
    return [
        replace(region, evidence=region.evidence * float(surprise[region.given, region.suggested]))
        for region in found.regions
    ]


def cut_plane_tiles(region: Region, axis: int, margin: int) -> list[Block]:
    """Cut one plane into tiles of at most 2048 x 2048 voxels that see ``margin`` planes on either side."""
    halo = [0, 0, 0]
    halo[axis] = margin
    starts = [range(a, b, TILE) for a, b in zip(region.start, region.stop, strict=True)]
    blocks: list[Block] = []
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                core = Region((z, y, x), add((z, y, x), (TILE, TILE, TILE))).intersect(region)
                blocks.append(make_block(len(blocks), core, (halo[0], halo[1], halo[2])))
    return blocks


def plane_stack(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Turn (C, Z, Y, X) into (C, planes, H, W), the planes across ``axis``."""
    return np.moveaxis(array, axis + 1, 1)


def neighbours_inside(block: Block, axis: int, size: int) -> tuple[bool, ...]:
    """Whether each plane of a tile's stack lies in the volume; others are mirrored and say nothing."""
    return tuple(0 <= position < size for position in range(block.read.start[axis], block.read.stop[axis]))


def _plane_classes(labels: NDArray[Any], block: Block, axis: int, size: int, label_set: LabelSet) -> NDArray[np.int16]:
    """Class indices of the plane before, the plane and the one after, (3, H, W); -1 where there is no label."""
    classes = label_set.remap_to_indices(plane_stack(labels, axis)[0])
    for plane, inside in zip(classes, neighbours_inside(block, axis, size), strict=True):
        if not inside:
            plane[:] = -1
    return classes


@dataclass(frozen=True)
class ContextFold:
    """Counts which class stands between which: ndarray of int64, shape (K + 1, K + 1, K).

    The first two indices are the classes before and after, K where there is no label.
    """

    label_set: LabelSet
    axis: int
    size: int

    def __call__(self, block: Block, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Count one tile."""
        K = self.label_set.n_classes
        before, here, after = _plane_classes(labels, block, self.axis, self.size, self.label_set) % (K + 1)
        codes = ((before.astype(np.int64) * (K + 1) + after) * (K + 1) + here).ravel()
        return np.bincount(codes, minlength=(K + 1) ** 3).reshape(K + 1, K + 1, K + 1)[:, :, :K].astype(np.int64)


def log_context(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """How much more often than usual a class stands between two others, as a log ratio, (K + 1, K + 1, K)."""
    totals = counts.sum(axis=(0, 1)).astype(np.float64)
    usual = np.maximum(totals, 1) / np.maximum(totals, 1).sum()
    seen = (counts + PRIOR_COUNT * usual) / (counts.sum(axis=2, keepdims=True) + PRIOR_COUNT)
    return np.log(seen / usual).astype(np.float32)


@dataclass(frozen=True)
class ContradictionFold:
    """Finds the contradictions of one tile of a plane, the strongest ``limit`` of them."""

    label_set: LabelSet
    axis: int
    size: int
    context: NDArray[np.float32]
    smallest: int
    limit: int

    def __call__(
        self, block: Block, labels: NDArray[Any], probabilities: NDArray[Any], image: NDArray[Any]
    ) -> Contradictions:
        """Arrays are (C, Z, Y, X), three planes thick."""
        before, given, after = _plane_classes(labels, block, self.axis, self.size, self.label_set)
        stored = plane_stack(probabilities, self.axis)[:, 1]
        voxels = np.zeros((self.label_set.n_classes, self.label_set.n_classes), np.int64)
        if not (given >= 0).any():
            return Contradictions((), voxels)
        posterior = self._weigh(stored, before, after)
        # A slab without a model left zeros: there is nothing to contradict with.
        given = np.where(stored.any(axis=0), given, np.int16(-1))
        candidates = [
            candidate
            for kind, pieces in self._draw_candidates(given, posterior)
            for candidate in _measure(kind, pieces, given, posterior, self.smallest)
        ]
        for candidate in candidates:
            if candidate.kind == "part":
                voxels[candidate.given, candidate.suggested] += candidate.n_voxels
        kept = _drop_overlapping(candidates, given.shape, self.limit)
        edges = _edge_strength(plane_stack(image, self.axis)[0, 1])
        return Contradictions(tuple(self._describe(candidate, given, edges, block) for candidate in kept), voxels)

    def _weigh(self, stored: NDArray[Any], before: NDArray[np.int16], after: NDArray[np.int16]) -> NDArray[np.float32]:
        from scipy import ndimage

        smooth = ndimage.uniform_filter(dequantise(stored), (0, SMOOTHING, SMOOTHING))
        # -1, no label, is the context's last entry.
        logits = np.log(smooth + FLOOR) + CONTEXT_WEIGHT * np.moveaxis(self.context[before, after], -1, 0)
        logits -= logits.max(axis=0)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=0)
        return logits

    def _draw_candidates(
        self, given: NDArray[np.int16], posterior: NDArray[np.float32]
    ) -> list[tuple[Kind, NDArray[np.unsignedinteger]]]:
        import cc3d

        of_given = np.take_along_axis(posterior, np.maximum(given, 0)[None], axis=0)[0]
        contradicted = (given >= 0) & (posterior.max(axis=0) - of_given > LEAST_MARGIN)
        drawn = (given + 1).astype(np.uint16)
        return [
            ("object", cc3d.connected_components(drawn, connectivity=4)),
            ("part", cc3d.connected_components(drawn * contradicted, connectivity=4)),
        ]

    def _describe(
        self, candidate: _Candidate, given: NDArray[np.int16], edges: NDArray[np.float32], block: Block
    ) -> Contradiction:
        kind = candidate.kind
        if kind == "part":
            kind = _tell_part(candidate, given, edges)
        rows, columns = candidate.box
        return Contradiction(
            kind,
            add(block.core.start, self._place(*candidate.deepest)),
            Region(
                add(block.core.start, self._place(rows.start, columns.start)),
                add(block.core.start, add(self._place(rows.stop, columns.stop), self._thickness)),
            ),
            self.axis,
            candidate.given,
            candidate.suggested,
            candidate.n_voxels,
            candidate.margin,
            candidate.evidence,
        )

    def _place(self, row: int, column: int) -> Zyx:
        place = [row, column]
        place.insert(self.axis, 0)
        return place[0], place[1], place[2]

    @property
    def _thickness(self) -> Zyx:
        thickness = [0, 0, 0]
        thickness[self.axis] = 1
        return thickness[0], thickness[1], thickness[2]


@dataclass(frozen=True)
class _Candidate:
    """A piece of a plane; ``mask`` is over its box."""

    kind: Kind
    box: tuple[slice, slice]
    mask: NDArray[np.bool_]
    deepest: tuple[int, int]
    given: int
    suggested: int
    n_voxels: int
    margin: float
    evidence: float


def _measure(
    kind: Kind,
    pieces: NDArray[np.unsignedinteger],
    given: NDArray[np.int16],
    posterior: NDArray[np.float32],
    smallest: int,
) -> list[_Candidate]:
    """Weigh every piece of at least ``smallest`` voxels that another class beats on average."""
    from scipy import ndimage

    flat = pieces.ravel()
    n = int(flat.max()) + 1
    sizes = np.bincount(flat, minlength=n)
    depth = np.minimum(ndimage.distance_transform_edt(~_borders(pieces)), FULL_DEPTH).astype(np.float32) / FULL_DEPTH
    weights = np.bincount(flat, weights=depth.ravel(), minlength=n)
    sums = [np.bincount(flat, weights=(depth * p).ravel(), minlength=n) for p in posterior]
    shares = np.stack(sums) / np.maximum(weights, 1e-6)
    class_of = np.zeros(n, np.int64)
    class_of[flat] = given.ravel()
    own = shares[class_of, np.arange(n)]
    suggested = shares.argmax(axis=0)
    margins = shares.max(axis=0) - own
    boxes = ndimage.find_objects(pieces.astype(np.int32))
    found = []
    for i in np.flatnonzero((sizes >= smallest) & (margins > 0) & (np.arange(n) > 0)).tolist():
        box = boxes[i - 1]
        mask = pieces[box] == i
        row, column = np.unravel_index(int((depth[box] * mask).argmax()), mask.shape)
        found.append(
            _Candidate(
                kind,
                box,
                mask,
                (int(row) + box[0].start, int(column) + box[1].start),
                int(class_of[i]),
                int(suggested[i]),
                int(sizes[i]),
                float(margins[i]),
                float(margins[i] * np.sqrt(weights[i])) * (OBJECT_WEIGHT if kind == "object" else 1.0),
            )
        )
    return found


def _borders(pieces: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Voxels with a neighbour, in the plane, of another piece."""
    border = np.zeros(pieces.shape, bool)
    for axis in range(2):
        along = np.moveaxis(pieces, axis, 0)
        differs = along[:-1] != along[1:]
        view = np.moveaxis(border, axis, 0)
        view[:-1] |= differs
        view[1:] |= differs
    return border


def _drop_overlapping(candidates: Sequence[_Candidate], shape: tuple[int, ...], limit: int) -> list[_Candidate]:
    covered = np.zeros(shape, bool)
    kept: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda c: -c.evidence):
        if len(kept) == limit:
            break
        there = covered[candidate.box]
        if there[candidate.mask].mean() <= LARGEST_OVERLAP:
            there |= candidate.mask
            kept.append(candidate)
    return kept


def _edge_strength(image: NDArray[Any]) -> NDArray[np.float32]:
    from scipy import ndimage

    return ndimage.gaussian_gradient_magnitude(image.astype(np.float32), 1.5)


def _tell_part(candidate: _Candidate, given: NDArray[np.int16], edges: NDArray[np.float32]) -> Kind:
    """A leak if the part lies against the suggested class, and the image has its edge where the label goes on."""
    from scipy import ndimage

    rows, columns = (slice(max(0, s.start - 1), s.stop + 1) for s in candidate.box)
    mask = np.zeros(given.shape, bool)[rows, columns]
    offset = (candidate.box[0].start - rows.start, candidate.box[1].start - columns.start)
    height, width = candidate.mask.shape
    mask[offset[0] : offset[0] + height, offset[1] : offset[1] + width] = candidate.mask
    around = ndimage.binary_dilation(mask) & ~mask
    nearby, strength = given[rows, columns], edges[rows, columns]
    to_own = around & (nearby == candidate.given)
    to_suggested = around & (nearby == candidate.suggested)
    if not to_own.any() or to_suggested.sum() < LEAST_CONTACT * around.sum():
        return "part"
    return "leak" if strength[to_own].mean() > strength[to_suggested].mean() else "part"
