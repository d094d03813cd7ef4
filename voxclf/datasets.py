"""The built-in phantom: an EM-like volume of neuropil whose every voxel's class is known.

It stands at the head of the corridor: the demo, the tests and the benchmarks need a volume that looks and
behaves like FIB-SEM, costs seconds, and comes with a dense truth. ``make_phantom`` holds it in memory,
``sparse_labels`` labels three orthogonal slices of it as an annotator would, ``write_phantom`` puts both on
disk, and ``EndlessPhantom`` gives regions of a volume of any size. How the tissue is drawn: ``phantom.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import tifffile
import tomli_w
from numpy.typing import NDArray
from scipy import ndimage

from voxclf import phantom as tissue
from voxclf.phantom import Float32, SmoothField, UInt8, Zyx, ZyxNm

LABEL_NAMES: Mapping[int, str] = {
    tissue.CYTOPLASM: "cytoplasm",
    tissue.CELL_MEMBRANE: "cell membrane",
    tissue.MITOCHONDRION: "mitochondrion",
    tissue.MITO_MEMBRANE: "mitochondrion membrane",
    tissue.SYNAPSE: "synapse",
    tissue.VESICLE: "vesicle",
}
LABEL_COLOURS: Mapping[int, str] = {
    tissue.CYTOPLASM: "#f2e6c9",
    tissue.CELL_MEMBRANE: "#3b6ea5",
    tissue.MITOCHONDRION: "#e07b39",
    tissue.MITO_MEMBRANE: "#8c2d04",
    tissue.SYNAPSE: "#c51b7d",
    tissue.VESICLE: "#1b9e77",
}
PLANES = ("xy", "xz", "yz")  # a plane's index is the axis it is perpendicular to
LARGEST_SIDE = 1024  # voxels; beyond it a dense phantom outgrows memory and EndlessPhantom is the right source
LARGEST_UM3 = 150  # of tissue: 1024³ voxels of 5 nm; process ids are 16 bits and organelle sites are searched in turn
MIRRORED_TILE = 160  # voxels per side of the piece that EndlessPhantom repeats
ENOUGH_SHARE = 0.015  # of a plane: a class this frequent no longer attracts a labelled slice


@dataclass(frozen=True)
class Phantom:
    """A synthetic EM volume together with the true class of every voxel.

    Attributes
    ----------
    image : ndarray of uint8, shape (Z, Y, X)
        Grey values, dark = stained.
    labels : ndarray of uint8, shape (Z, Y, X)
        True class of each voxel, ids 1..6 of ``label_names``; no voxel is unlabelled.
    voxel_size_nm : tuple of float
        Voxel size (z, y, x) in nanometres.
    label_names : mapping of int to str
        Class id to name.
    """

    image: UInt8
    labels: UInt8
    voxel_size_nm: ZyxNm
    label_names: Mapping[int, str] = field(default_factory=lambda: dict(LABEL_NAMES))


@dataclass(frozen=True)
class LabelSlice:
    """One annotated plane of a volume; 0 = unlabelled.

    Attributes
    ----------
    plane : str
        "xy", "xz" or "yz".
    origin : tuple of int
        The plane's first voxel (z, y, x) in the volume.
    labels : ndarray of uint8, 2D
        Axes in volume order: (Y, X) for "xy", (Z, X) for "xz", (Z, Y) for "yz".
    """

    plane: str
    origin: Zyx
    labels: UInt8


def make_phantom(size: int | Zyx = 128, voxel_size_nm: ZyxNm = (5.0, 5.0, 5.0), seed: int = 0) -> Phantom:
    """Generate an EM-like volume of neuropil and its dense truth.

    Parameters
    ----------
    size : int or tuple of int
        Side of a cube, or shape (Z, Y, X), in voxels; each 16..1024. From 64 voxels of 5 nm upwards all six
        classes occur; from 128 in realistic proportions.
    voxel_size_nm : tuple of float
        Voxel size (z, y, x) in nanometres. The tissue is drawn for about 5 nm; above 10 nm its membranes,
        12 nm thick, fall between the voxels.
    seed : int
        0..2**63 - 1. Same seed, size and voxel size: same phantom, bit for bit.

    Returns
    -------
    Phantom
        Image and truth, both uint8 of shape (Z, Y, X).

    Raises
    ------
    ValueError
        If a side, a voxel size, their product or the seed is out of range.

    Notes
    -----
    Time and memory grow with the number of voxels: about 1 µs and 16 bytes each (128³ in 2 s, 320³ in
    30 s on one core); the very first call compiles the kernel for some seconds.
    """
    shape = _checked_shape(size)
    voxel_size = _checked_voxel_size(voxel_size_nm)
    _check_seed(seed)
    volume_um3 = math.prod(shape) * math.prod(voxel_size) * 1e-9
    if volume_um3 > LARGEST_UM3:
        raise ValueError(
            f"size {shape} at voxel_size_nm {voxel_size} spans {volume_um3:.0f} µm³ of tissue; allowed is up to "
            f"{LARGEST_UM3}; take fewer or smaller voxels"
        )
    canvas, labels = tissue.draw_tissue(shape, voxel_size, seed)
    return Phantom(tissue.expose(canvas, voxel_size, seed), labels, voxel_size)


def _checked_shape(size: int | Zyx) -> Zyx:
    sides = (int(size),) * 3 if isinstance(size, int | np.integer) else tuple(int(side) for side in size)
    if len(sides) != 3 or any(not 16 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError(
            f"size is {size}; allowed is one side or three (z, y, x), each 16..{LARGEST_SIDE} voxels; "
            "for a larger volume read regions of EndlessPhantom"
        )
    return sides[0], sides[1], sides[2]


def _checked_voxel_size(voxel_size_nm: ZyxNm) -> ZyxNm:
    sizes = tuple(float(size) for size in voxel_size_nm)
    if len(sizes) != 3 or not all(0 < size < np.inf for size in sizes):
        raise ValueError(
            f"voxel_size_nm is {voxel_size_nm}; it must be three positive lengths (z, y, x) in nm; try (5, 5, 5)"
        )
    return sizes[0], sizes[1], sizes[2]


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; allowed is 0..2**63 - 1; take any smaller number, such as 0")


def label_slices(phantom: Phantom, undefined_share: float = 0.18) -> tuple[LabelSlice, LabelSlice, LabelSlice]:
    """Annotate one xy, one xz and one yz slice, leaving doubtful edges out, as a person would.

    Each slice is the one nearest the middle of its axis on which every class is frequent enough (1.5 % of the
    slice, or as much as the rarest class ever reaches). Edges between classes stay unlabelled in patches: an
    annotator's doubt covers a stretch of membrane, not single voxels.

    Parameters
    ----------
    phantom : Phantom
        The volume to annotate.
    undefined_share : float
        Share of each slice left 0 = unlabelled, 0..0.4. Never more than 60 % of the voxels on edges.

    Returns
    -------
    tuple of LabelSlice
        In the order "xy", "xz", "yz". The same phantom gives the same slices.

    Raises
    ------
    ValueError
        If ``undefined_share`` is out of range.
    """
    if not 0 <= undefined_share <= 0.4:
        raise ValueError(
            f"undefined_share is {undefined_share}; allowed is 0..0.4 of a slice, "
            "because its edges hold no more; try 0.18"
        )
    slices = []
    for axis, plane in enumerate(PLANES):
        position = _best_plane(phantom.labels, axis)
        truth = np.take(phantom.labels, position, axis=axis)
        origin = tuple(position if a == axis else 0 for a in range(3))
        doubt = _doubtful_edges(truth, undefined_share, axis)
        slices.append(LabelSlice(plane, (origin[0], origin[1], origin[2]), np.where(doubt, 0, truth).astype(np.uint8)))
    return slices[0], slices[1], slices[2]


def sparse_labels(phantom: Phantom, undefined_share: float = 0.18) -> UInt8:
    """The slices of ``label_slices`` in a label volume of the phantom's shape, 0 everywhere else.

    Where two slices cross, a voxel is labelled if either of them labels it.
    """
    volume = np.zeros_like(phantom.labels)
    for piece in label_slices(phantom, undefined_share):
        axis = PLANES.index(piece.plane)
        target = np.moveaxis(volume, axis, 0)[piece.origin[axis]]
        np.maximum(target, piece.labels, out=target)
    return volume


def _best_plane(labels: UInt8, axis: int) -> int:
    """Where along ``axis`` the rarest class is frequent enough or most frequent; of these nearest the middle."""
    planes = np.moveaxis(labels, axis, 0)
    n_classes = len(LABEL_NAMES) + 1
    counts = np.stack([np.bincount(plane.ravel(), minlength=n_classes) for plane in planes])[:, 1:]
    rarest = np.minimum(counts.min(axis=1) / planes[0].size, ENOUGH_SHARE)
    from_middle = np.abs(np.arange(len(planes)) - len(planes) // 2)
    return int(np.lexsort((from_middle, -rarest))[0])


def _doubtful_edges(truth: UInt8, share: float, axis: int) -> NDArray[np.bool_]:
    """Edge voxels of a slice where a smooth random doubt is highest, ``share`` of the slice in all."""
    edges = ndimage.maximum_filter(truth, 3) != ndimage.minimum_filter(truth, 3)
    if share == 0 or not edges.any():
        return np.zeros(truth.shape, bool)
    # Spacing in voxels: an annotator's eye follows the picture on the screen, not nanometres.
    doubt = SmoothField(tissue.generator(axis, 20), (1, *truth.shape), (1.0, 1.0, 1.0), 6.0)
    values = doubt.read((0, 0, 0), (1, *truth.shape))[0]
    of_edges = min(share * truth.size / np.count_nonzero(edges), 0.6)
    return edges & (values > np.quantile(values[edges], 1 - of_edges))


def write_phantom(folder: str | Path, phantom: Phantom) -> None:
    """Write a phantom as a user would bring data: a TIFF volume, three label slices and their listing.

    Parameters
    ----------
    folder : path
        Created where missing; files of the same names are replaced. It receives ``volume.tif`` (image),
        ``labels_xy.tif``, ``labels_xz.tif``, ``labels_yz.tif`` (2D, 0 = unlabelled), ``labels.toml`` (plane
        and origin of each slice, names and colours of the classes), ``truth.tif`` (class of every voxel) and
        ``unseen.tif`` (the same without the three slices: what a model fitted on them may be scored on).
    phantom : Phantom
        What to write. The voxel size in nm goes into the TIFF volumes in ImageJ's form, which Fiji reads.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_volume(folder / "volume.tif", phantom.image, phantom.voxel_size_nm)
    _write_volume(folder / "truth.tif", phantom.labels, phantom.voxel_size_nm)
    listing, unseen = [], phantom.labels.copy()
    for piece in label_slices(phantom):
        axis = PLANES.index(piece.plane)
        np.moveaxis(unseen, axis, 0)[piece.origin[axis]] = 0
        name = f"labels_{piece.plane}.tif"
        tifffile.imwrite(folder / name, piece.labels, compression="zlib")
        listing.append({"file": name, "plane": piece.plane, "origin": list(piece.origin)})
    _write_volume(folder / "unseen.tif", unseen, phantom.voxel_size_nm)
    document = {
        "slice": listing,
        "classes": [
            {"id": label, "name": name, "colour": LABEL_COLOURS[label]} for label, name in phantom.label_names.items()
        ],
    }
    (folder / "labels.toml").write_text(tomli_w.dumps(document), encoding="utf-8")


def _write_volume(path: Path, volume: UInt8, voxel_size_nm: ZyxNm) -> None:
    z, y, x = voxel_size_nm
    metadata = {"axes": "ZYX", "spacing": z, "unit": "nm"}
    tifffile.imwrite(path, volume, imagej=True, resolution=(1 / x, 1 / y), resolutionunit="NONE", metadata=metadata)


class EndlessPhantom:
    """An EM-like volume of any size that is never stored: regions are computed when they are read.

    One phantom of 160 voxels per side is repeated with every second copy mirrored, so tissue runs on across
    the seams (from afar it looks like a kaleidoscope). A slow drift of brightness, and noise that depends on the
    voxel's position alone, lie on top: no two copies have equal grey values, and every voxel has one value,
    whatever region it is read in.

    Parameters
    ----------
    shape : tuple of int
        Shape (Z, Y, X) in voxels, as large as wanted.
    voxel_size_nm : tuple of float
        Voxel size (z, y, x) in nanometres.
    seed : int
        0..2**63 - 1. Same seed, same volume.

    Raises
    ------
    ValueError
        If the shape, the voxel size or the seed is out of range.

    Notes
    -----
    Holds 20 MB for the repeated piece, computed at the first read (a few seconds); a read costs about
    5 ns per voxel and memory for its result. Meant for measuring scale: scores on it flatter, for tissue
    repeats.
    """

    dtype = np.dtype(np.uint8)
    ndim = 3

    def __init__(self, shape: Zyx, voxel_size_nm: ZyxNm = (5.0, 5.0, 5.0), seed: int = 0) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"shape is {shape}; it must be three sides (z, y, x) of at least 1; try (1024, 2048, 2048)"
            )
        _check_seed(seed)
        self.shape: Zyx = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.voxel_size_nm = _checked_voxel_size(voxel_size_nm)
        self.seed = seed

    @cached_property
    def _tile(self) -> tuple[Float32, UInt8]:
        return tissue.draw_tissue((MIRRORED_TILE,) * 3, self.voxel_size_nm, self.seed)

    def read(self, start: Zyx, stop: Zyx) -> UInt8:
        """Grey values of the region from ``start`` up to and without ``stop``, uint8 (Z, Y, X)."""
        z, y, x = self._mirrored(start, stop)
        drift = SmoothField(tissue.generator(self.seed, 30), (self.shape[0], 1, 1), self.voxel_size_nm, 400.0)
        light = 1 + 0.05 * drift.read((start[0], 0, 0), (stop[0], 1, 1))[:, 0, 0]
        out = np.empty((len(z), len(y), len(x)), np.uint8)
        tissue.expose_region(self._tile[0], z, y, x, np.array(start, np.int64), light, np.uint64(self.seed), out)
        return out

    def read_labels(self, start: Zyx, stop: Zyx) -> UInt8:
        """True classes of the region from ``start`` up to and without ``stop``, uint8 (Z, Y, X), ids 1..6."""
        return self._tile[1][np.ix_(*self._mirrored(start, stop))]

    def _mirrored(self, start: Zyx, stop: Zyx) -> tuple[NDArray[np.intp], ...]:
        if len(start) != 3 or len(stop) != 3:
            raise ValueError(f"start {start} and stop {stop} must be three positions (z, y, x) each")
        if any(not 0 <= a < b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise ValueError(
                f"the region from start {start} to stop {stop} must hold a voxel and lie within "
                f"the volume's shape {self.shape}; clip it first"
            )
        position = (np.arange(a, b) % (2 * MIRRORED_TILE) for a, b in zip(start, stop, strict=True))
        return tuple(np.minimum(p, 2 * MIRRORED_TILE - 1 - p) for p in position)
