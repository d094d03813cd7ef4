"""What a score per voxel hides: specks, holes, pieces, and classes that touch although they never should.

Two predictions with the same F1 can differ in what a biologist sees first. These counts need the region in memory,
because an object is only known once all of it has been seen: score a box, not a whole 10^12-voxel volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxclf.geometry import VoxelSize

SPECK_VOXELS = 27
"""A piece of less than 3 x 3 x 3 voxels is a speck unless told otherwise: less than the finest filter tells apart."""


@dataclass(frozen=True)
class StructureCounts:
    """The objects of each class in a region. Arrays have shape (K,), in the order of the class indices.

    Parameters
    ----------
    components : ndarray of int64
        Connected pieces; voxels that share a face, an edge or a corner belong together.
    specks : ndarray of int64
        Pieces smaller than the speck volume, those cut by the region's border not counted.
    holes : ndarray of int64
        Places inside a class, of whatever else, that reach the region's border nowhere: gaps in a mitochondrion,
        but also a vesicle inside cytoplasm. The hole's voxels are connected through their faces.
    contacts : ndarray of int64, shape (K, K)
        Voxel faces between two classes, see :func:`count_contacts`.
    """

    components: NDArray[np.int64]
    specks: NDArray[np.int64]
    holes: NDArray[np.int64]
    contacts: NDArray[np.int64]

    def __add__(self, other: StructureCounts) -> StructureCounts:
        """The counts of two regions; a piece that reaches into both counts twice."""
        return StructureCounts(
            self.components + other.components,
            self.specks + other.specks,
            self.holes + other.holes,
            self.contacts + other.contacts,
        )

    @property
    def holes_per_object(self) -> NDArray[np.float64]:
        """Holes over the pieces that are no specks, shape (K,); 0 where a class has no such piece."""
        return self.holes / np.maximum(self.components - self.specks, 1)

    def to_dict(self) -> dict[str, list[Any]]:
        """As plain values for JSON."""
        counts = {name: getattr(self, name).tolist() for name in ("components", "specks", "holes", "contacts")}
        return {**counts, "holes_per_object": self.holes_per_object.tolist()}

    def forbidden_contacts(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Voxel faces between pairs of class indices that must not touch; (a, b) is the same pair as (b, a)."""
        return sum(int(self.contacts[a, b]) for a, b in {(min(pair), max(pair)) for pair in pairs})


@dataclass(frozen=True)
class StructureChange:
    """Objects of two predictions of the same voxels.

    Parameters
    ----------
    place : str
        Where they were counted.
    speck_nm3 : float
    before, after : StructureCounts
    """

    place: str
    speck_nm3: float
    before: StructureCounts
    after: StructureCounts


def choose_speck_volume(voxel_size_nm: VoxelSize) -> float:
    """Cubic nanometres below which a piece is a speck: :data:`SPECK_VOXELS` voxels."""
    return SPECK_VOXELS * math.prod(voxel_size_nm)


def count_structures(
    classes: NDArray[np.integer], n_classes: int, voxel_size_nm: VoxelSize, speck_nm3: float
) -> StructureCounts:
    """Count pieces, specks, holes and contacts of every class.

    Parameters
    ----------
    classes : ndarray of int, shape (Z, Y, X)
        Class indices 0 .. K-1; negative where unlabelled, which counts as "something else".
    n_classes : int
        K.
    voxel_size_nm : (z, y, x)
        Nanometres.
    speck_nm3 : float
        Pieces of less volume, in cubic nanometres, are specks.

    Returns
    -------
    StructureCounts

    Raises
    ------
    ValueError
        If the array is not three-dimensional, an index is too large, or the speck volume is negative.

    Notes
    -----
    K + 1 labellings of the region; memory is about 20 bytes per voxel above the input.
    """
    _check(classes, n_classes)
    if not speck_nm3 >= 0:
        raise ValueError(f"speck_nm3 is {speck_nm3}; give a volume in cubic nanometres, 0 to count no specks")
    components, specks = _count_pieces(classes, n_classes, speck_nm3 / math.prod(voxel_size_nm))
    holes = np.array([_count_holes(classes == k) for k in range(n_classes)], np.int64)
    return StructureCounts(components, specks, holes, count_contacts(classes, n_classes))


def _check(classes: NDArray[np.integer], n_classes: int) -> None:
    if classes.ndim != 3 or not classes.size:
        raise ValueError(f"classes has shape {classes.shape}; it must be (Z, Y, X) with at least one voxel")
    if classes.dtype.kind not in "iu":
        raise ValueError(f"classes has dtype {classes.dtype}; give class indices, see LabelSet.remap_to_indices")
    if int(classes.max()) >= n_classes:
        raise ValueError(
            f"classes run up to {classes.max()}, allowed are negative (unlabelled) to {n_classes - 1}; map label ids "
            "with LabelSet.remap_to_indices"
        )


def _count_pieces(
    classes: NDArray[np.integer], n_classes: int, speck_voxels: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    import cc3d

    # One labelling for all classes: cc3d joins equal neighbours, and 0 is what it leaves out.
    shifted = (np.maximum(classes, -1) + 1).astype(np.uint16)
    pieces, n_pieces = cc3d.connected_components(shifted, connectivity=26, return_N=True)
    sizes = np.bincount(pieces.ravel(), minlength=n_pieces + 1)
    class_of = np.zeros(n_pieces + 1, np.int64)
    class_of[pieces.ravel()] = shifted.ravel()
    is_piece = np.arange(n_pieces + 1) > 0
    is_speck = is_piece & (sizes < speck_voxels)
    is_speck[_border_values(pieces)] = False
    return tuple(  # type: ignore[return-value]
        np.bincount(class_of[chosen], minlength=n_classes + 1)[1:].astype(np.int64) for chosen in (is_piece, is_speck)
    )


def _count_holes(mask: NDArray[np.bool_]) -> int:
    """Pieces of what is outside the mask that do not reach the border; faces connect, as corners connect the mask."""
    import cc3d

    outside, n_outside = cc3d.connected_components(~mask, connectivity=6, return_N=True)
    return int(n_outside - np.count_nonzero(_border_values(outside)))


def _border_values(pieces: NDArray[np.integer]) -> NDArray[np.integer]:
    """The different values on the six faces of an array."""
    faces = [pieces.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    return np.unique(np.concatenate(faces))


def count_contacts(classes: NDArray[np.integer], n_classes: int) -> NDArray[np.int64]:
    """Count the faces that voxels of two classes share; symmetric, faces within a class on the diagonal.

    Parameters
    ----------
    classes : ndarray of int, shape (Z, Y, X)
        Class indices 0 .. K-1; negative where unlabelled, which touches nothing.
    n_classes : int
        K.

    Returns
    -------
    ndarray of int64, shape (K, K)
        Adds up over regions that share no voxel, but for the faces between them.

    Examples
    --------
    >>> count_contacts(np.array([[[0, 0, 1]]]), 2)
    array([[1, 1],
           [1, 0]])
    """
    _check(classes, n_classes)
    table = np.zeros((n_classes + 1, n_classes + 1), np.int64)
    shifted = (np.maximum(classes, -1) + 1).astype(np.int64)
    for axis in range(3):
        along = np.moveaxis(shifted, axis, 0)
        codes = (along[:-1] * (n_classes + 1) + along[1:]).ravel()
        table += np.bincount(codes, minlength=table.size).reshape(table.shape)
    touching = table[1:, 1:]
    return touching + touching.T - np.diag(np.diag(touching))


def find_unseen_contacts(truth_contacts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs of classes that both occur in the truth and never touch there: what a prediction should not show.

    Parameters
    ----------
    truth_contacts : ndarray of int64, shape (K, K)
        From :func:`count_contacts` on dense labels.

    Returns
    -------
    list of (int, int)
        Class indices, a < b.
    """
    occurs = truth_contacts.sum(axis=1) > 0
    never = (truth_contacts == 0) & occurs[:, None] & occurs
    return [(int(a), int(b)) for a, b in np.argwhere(never) if a < b]
