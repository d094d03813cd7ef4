"""Which filters at which scales: the bank a model is trained with and carries along.

A :class:`FilterBank` is a frozen value.  It says how many features there are and what they are called, how
much halo they need on voxels of a given size, and turns a block of grey values into features: block (Z, Y, X)
with its halo in, features (F, Z, Y, X) without it out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from features import edge_kernels, filters, simd
from features.multiscale import compute_multiscale, flat, scratch_bytes

Kind = Literal["intensity", "edges", "multiscale"]
Dimensions = Literal[2, 3]
Zyx = tuple[int, int, int]
VoxelSize = Sequence[float]

ALL: tuple[str, ...] = ()
DTYPES = (np.uint8, np.uint16, np.int16, np.float32)

# Converted without loss that could matter (float64 to float32) before the kernels see them.
CONVERTED_DTYPES = {np.dtype(np.int8): np.int16, np.dtype(np.float16): np.float32, np.dtype(np.float64): np.float32}

# In voxels of the finest in-plane axis: from the width of a membrane to that of a mitochondrion. In 3D the largest
# scale decides the halo, which a block pays for three times over.
DEFAULT_SIGMAS: dict[int, tuple[float, ...]] = {2: (1.0, 2.0, 4.0, 8.0, 16.0), 3: (0.7, 1.0, 1.6, 3.5, 5.0)}
# From this z step on (in units of the in-plane voxel) neighbouring slices share too little for 3D filters:
# ssTEM (10) and coarse block-face stacks (6) go per slice, FIB-SEM (1) and 20 x 10 x 10 nm in 3D.
PER_SLICE_FROM = 3.0
# Below a third of a voxel a Gaussian is the identity and a scale in nm has lost its meaning.
SMALLEST_SIGMA_VOXELS = 0.3
# Slices filtered at a time when neighbours are looked at: their features stay in cache until they are compared.
NEIGHBOUR_SLAB = 8

_EDGES: dict[Dimensions, tuple[str, ...]] = {
    2: (
        "intensity",
        "sobel_x",
        "sobel_y",
        "sobel_magnitude",
        "laplace",
        "prewitt_x",
        "prewitt_y",
        "prewitt_magnitude",
    ),
    3: (
        "intensity",
        "sobel_x",
        "sobel_y",
        "sobel_z",
        "sobel_magnitude",
        "laplace",
        "prewitt_x",
        "prewitt_y",
        "prewitt_z",
        "prewitt_magnitude",
    ),
}
_RADIUS: dict[str, Callable[[Sequence[float]], tuple[int, ...]]] = {
    "gaussian": filters.smoothing_radius,
    "laplacian_of_gaussian": filters.smoothing_radius,
    "gaussian_gradient_magnitude": filters.smoothing_radius,
    "difference_of_gaussians": filters.smoothing_radius,
    "structure_tensor_eigenvalues": filters.structure_tensor_radius,
    "hessian_eigenvalues": filters.smoothing_radius,
}


def available_filters(kind: Kind, dimensions: Dimensions) -> tuple[str, ...]:
    """Names that ``FilterBank.filters`` accepts, in the order in which their features come."""
    if kind == "intensity":
        return ("intensity",)
    return _EDGES[dimensions] if kind == "edges" else tuple(_RADIUS)


@dataclass(frozen=True)
class FilterBank:
    """A set of filters, their scales in nanometres, and the features they make.

    Parameters
    ----------
    kind : "intensity", "edges" or "multiscale"
        The grey value alone; 3 x 3 (x 3) neighbourhoods; Gaussian filters at several scales.
    dimensions : 2 or 3
        2 filters every slice on its own, 3 the volume.
    sigmas_nm : tuple of float
        Scales of a multiscale bank in nanometres, increasing; empty for the other kinds.
    filters : tuple of str
        Which filters of the kind to compute, see :func:`available_filters`; empty means all of them.
    neighbours : bool
        For a bank in 2 dimensions: give every feature two more, its smaller and its larger value in the slice
        before and the slice after. Structures go on from slice to slice even where slices are too far apart for
        filters in 3D, and the order of the two slices must not matter.

    Raises
    ------
    ValueError
        If a field has a value outside these.

    Examples
    --------
    >>> bank = FilterBank("multiscale", 2, sigmas_nm=(8.0,), filters=("gaussian", "hessian_eigenvalues"))
    >>> bank.names((50, 4, 4))
    ('gaussian(sigma=8nm)', 'hessian_eigenvalue_1(sigma=8nm)', 'hessian_eigenvalue_2(sigma=8nm)')
    >>> bank.halo((50, 4, 4))
    (0, 7, 7)
    """

    kind: Kind
    dimensions: Dimensions
    sigmas_nm: tuple[float, ...] = ()
    filters: tuple[str, ...] = ALL
    neighbours: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind is {self.kind!r}; a filter bank is one of {', '.join(get_args(Kind))}: choose one of these"
            )
        if self.dimensions not in get_args(Dimensions):
            raise ValueError(
                f"dimensions is {self.dimensions!r}; filters run in 2 dimensions (each slice) or in 3 "
                "(the volume): give 2 or 3"
            )
        object.__setattr__(self, "sigmas_nm", _checked_sigmas(self.kind, self.sigmas_nm))
        known = available_filters(self.kind, self.dimensions)
        unknown = [name for name in self.filters if name not in known]
        if unknown or len(set(self.filters)) != len(self.filters):
            raise ValueError(
                f"filters is {tuple(self.filters)}; a {self.kind} bank in {self.dimensions}D has "
                f"{', '.join(known)}: name each at most once, or none for all of them"
            )
        chosen = tuple(name for name in known if name in self.filters) if self.filters else known
        object.__setattr__(self, "filters", chosen)
        if self.neighbours and self.dimensions == 3:
            raise ValueError(
                "neighbours is True in 3 dimensions; it compares slices filtered in 2 dimensions: leave it out, since "
                "3D filters see the neighbours themselves"
            )

    @classmethod
    def default(cls, kind: Kind, voxel_size_nm: VoxelSize) -> Self:
        """Build the bank that suits a volume: all filters, in 3D unless its slices are far apart.

        Parameters
        ----------
        kind : "intensity", "edges" or "multiscale"
            What the features are made of.
        voxel_size_nm : (z, y, x)
            A z step of three in-plane voxels or more gives filters per slice, compared with the neighbouring slices
            where the bank is multiscale; scales are 0.7 to 5 (3D) or 1 to 16 (2D) times the in-plane voxel, rounded
            to three digits.
        """
        z, y, x = _checked_voxel_size(voxel_size_nm)
        dimensions: Dimensions = 2 if z >= PER_SLICE_FROM * min(y, x) else 3
        return cls.with_defaults(kind, dimensions, voxel_size_nm)

    @classmethod
    def with_defaults(cls, kind: Kind, dimensions: Dimensions, voxel_size_nm: VoxelSize) -> Self:
        """Build the default bank of a kind in the given dimensions; see :meth:`default`."""
        if kind != "multiscale":
            return cls(kind, dimensions)
        in_plane = min(_checked_voxel_size(voxel_size_nm)[1:])
        sigmas = tuple(float(f"{s * in_plane:.3g}") for s in DEFAULT_SIGMAS[dimensions])
        return cls(kind, dimensions, sigmas, neighbours=dimensions == 2)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return {
            "kind": self.kind,
            "dimensions": self.dimensions,
            "sigmas_nm": list(self.sigmas_nm),
            "filters": list(self.filters),
            "neighbours": self.neighbours,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild a bank from :meth:`to_dict`.

        Raises
        ------
        ValueError
            If a field is missing, unknown, or has a value no bank can have.
        """
        expected = {"kind", "dimensions", "sigmas_nm", "filters", "neighbours"}
        if set(fields) != expected:
            raise ValueError(
                f"fields of the filter bank are {sorted(fields)}; expected exactly {sorted(expected)}: "
                "write them with FilterBank.to_dict"
            )
        sigmas, chosen = tuple(fields["sigmas_nm"]), tuple(fields["filters"])
        return cls(fields["kind"], fields["dimensions"], sigmas, chosen, bool(fields["neighbours"]))

    @property
    def n_features(self) -> int:
        """How many features every voxel gets (F)."""
        return self.n_own_features * (3 if self.neighbours else 1)

    @property
    def n_own_features(self) -> int:
        """How many of the features come from the voxel's own slice; the others repeat them for its neighbours."""
        per_scale = sum(self._n_outputs(name) for name in self.filters)
        return per_scale * (len(self.sigmas_nm) if self.kind == "multiscale" else 1)

    def names(self, voxel_size_nm: VoxelSize) -> tuple[str, ...]:
        """Name every feature, in the order of the features axis: scale by scale, filter by filter.

        Parameters
        ----------
        voxel_size_nm : (z, y, x)
            Checked as in :meth:`compute`, so that no list is made for a volume the bank cannot filter.

        Returns
        -------
        tuple of str, length F
            Eigenvalues are numbered from the largest.
        """
        self.sigmas_in_voxels(voxel_size_nm)
        own = self.filters
        if self.kind == "multiscale":
            own = tuple(
                f"{name}(sigma={sigma:g}nm)"
                for sigma in self.sigmas_nm
                for filter_name in self.filters
                for name in self._output_names(filter_name)
            )
        if not self.neighbours:
            return own
        return (*own, *(f"{name} min z±1" for name in own), *(f"{name} max z±1" for name in own))

    def halo(self, voxel_size_nm: VoxelSize) -> Zyx:
        """Voxels (z, y, x) that the filters need on each side of a block: the largest of their radii."""
        z, y, x = self._own_halo(voxel_size_nm)
        return (z + 1, y, x) if self.neighbours else (z, y, x)

    def _own_halo(self, voxel_size_nm: VoxelSize) -> Zyx:
        if self.kind == "intensity":
            return (0, 0, 0)
        if self.kind == "edges":
            return self._zyx((filters.edge_radius(),) * self.dimensions)
        radii = [_RADIUS[name](sigma) for sigma in self.sigmas_in_voxels(voxel_size_nm) for name in self.filters]
        return self._zyx(tuple(max(r) for r in zip(*radii, strict=True)))

    def compute(
        self, block: NDArray, voxel_size_nm: VoxelSize, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Turn a block of grey values into features for every voxel inside its halo.

        Parameters
        ----------
        block : ndarray of 8- or 16-bit integers or floats, shape (Z + 2 hz, Y + 2 hy, X + 2 hx)
            Grey values with a margin of :meth:`halo` on every side, padded by the caller at the edge.
        voxel_size_nm : (z, y, x)
            Size of a voxel in nanometres.
        out : ndarray of float32, shape (F, Z, Y, X), optional
            Memory to write to, every channel C-contiguous, so that a loop over blocks allocates once.

        Returns
        -------
        ndarray of float32, shape (F, Z, Y, X)
            ``out`` if given.  Cutting a volume in other blocks changes no bit of it.

        Raises
        ------
        TypeError
            If the block or ``out`` has another dtype.
        ValueError
            If the block has no voxel inside its halo, or ``out`` does not fit.

        Notes
        -----
        Runs on one thread and without the GIL: call it from several threads to use several cores.  A multiscale
        bank needs a float32 copy of the block and up to about 150 MB of scratch at the default sigmas, however
        large the block; every calling thread keeps that memory for its next block.
        """
        block = block.astype(CONVERTED_DTYPES.get(block.dtype, block.dtype), copy=False)
        core = _checked_core_shape(block, self.halo(voxel_size_nm))
        out = _checked_out(out, (self.n_features, *core))
        if self.neighbours:
            self._compute_with_neighbours(block, voxel_size_nm, out)
        else:
            self._compute_own(block, voxel_size_nm, out)
        return out

    def working_bytes(self, core: Zyx, voxel_size_nm: VoxelSize) -> int:
        """Memory that :meth:`compute` holds beside ``out`` for a core of this shape, in the thread that calls it."""
        z, y, x = core
        n_slab = 0
        if self.neighbours:
            z = min(NEIGHBOUR_SLAB, z) + 2
            n_slab = self.n_own_features * z * y * x
        halo = self._own_halo(voxel_size_nm)
        block = tuple(n + 2 * h for n, h in zip((z, y, x), halo, strict=True))
        if self.kind != "multiscale":
            return 4 * (n_slab + math.prod(block))
        wants_tensor = "structure_tensor_eigenvalues" in self.filters
        scratch = scratch_bytes(block, self.sigmas_in_voxels(voxel_size_nm), (z, y, x), wants_tensor)
        return 4 * n_slab + scratch

    def _compute_with_neighbours(self, block: NDArray, voxel_size_nm: VoxelSize, out: NDArray[np.float32]) -> None:
        n = self.n_own_features
        n_slices, height, width = out.shape[1:]
        slab = np.empty((n, min(NEIGHBOUR_SLAB, n_slices) + 2, height, width), np.float32)
        for first in range(0, n_slices, NEIGHBOUR_SLAB):
            last = min(first + NEIGHBOUR_SLAB, n_slices)
            own = slab[:, : last - first + 2]
            self._compute_own(block[first : last + 2], voxel_size_nm, own)
            out[:n, first:last] = own[:, 1:-1]
            np.minimum(own[:, :-2], own[:, 2:], out=out[n : 2 * n, first:last])
            np.maximum(own[:, :-2], own[:, 2:], out=out[2 * n :, first:last])

    def _compute_own(self, block: NDArray, voxel_size_nm: VoxelSize, out: NDArray[np.float32]) -> None:
        if self.kind == "intensity":
            out[0] = block
        elif self.kind == "edges":
            self._compute_edges(block, out)
        else:
            scales = self.sigmas_in_voxels(voxel_size_nm)
            compute_multiscale(block, scales, self._own_halo(voxel_size_nm), self._first_channels(), out)

    def _compute_edges(self, block: NDArray, out: NDArray[np.float32]) -> None:
        source = np.ascontiguousarray(block).reshape(-1)
        if out.shape[-1] < simd.WIDE:
            source = np.concatenate([source, np.zeros(simd.WIDE, source.dtype)])
        everything = _EDGES[3]  # edge_kernels numbers the channels in this order
        channels = tuple(self.filters.index(name) if name in self.filters else -1 for name in everything)
        compute = edge_kernels.edges_2d if self.dimensions == 2 else edge_kernels.edges_3d
        compute(source, out.shape[1:], out.strides[0] // out.itemsize, flat(out), channels)

    def _first_channels(self) -> tuple[int, ...]:
        """First channel within one scale of every multiscale filter, -1 for those left out."""
        first, channel = dict.fromkeys(_RADIUS, -1), 0
        for name in self.filters:
            first[name] = channel
            channel += self._n_outputs(name)
        return tuple(first.values())

    def sigmas_in_voxels(self, voxel_size_nm: VoxelSize) -> list[tuple[float, ...]]:
        """Convert every sigma to voxels, per filtered axis: the only place where nm become voxels."""
        size = _checked_voxel_size(voxel_size_nm)[3 - self.dimensions :]
        smallest = SMALLEST_SIGMA_VOXELS * min(size)
        for sigma in self.sigmas_nm:
            if sigma < smallest:
                raise ValueError(
                    f"sigmas_nm has {sigma:g}, which is under {SMALLEST_SIGMA_VOXELS} voxels of {size} nm; "
                    f"allowed is {smallest:g} nm and more: leave this scale out or check the voxel size"
                )
        return [tuple(sigma / s for s in size) for sigma in self.sigmas_nm]

    def _zyx(self, radius: tuple[int, ...]) -> Zyx:
        z, y, x = (0,) * (3 - self.dimensions) + radius
        return (z, y, x)

    def _n_outputs(self, name: str) -> int:
        return self.dimensions if name.endswith("eigenvalues") else 1

    def _output_names(self, name: str) -> list[str]:
        if not name.endswith("eigenvalues"):
            return [name]
        return [f"{name.removesuffix('s')}_{i + 1}" for i in range(self.dimensions)]


def _checked_sigmas(kind: Kind, sigmas_nm: Sequence[float]) -> tuple[float, ...]:
    sigmas = tuple(float(s) for s in sigmas_nm)
    if kind != "multiscale" and sigmas:
        raise ValueError(
            f"sigmas_nm is {sigmas}, but an {kind} bank has no scale; allowed is (): leave it out, "
            "or choose kind 'multiscale'"
        )
    if kind == "multiscale" and not sigmas:
        raise ValueError(
            "sigmas_nm is empty; a multiscale bank needs at least one scale in nanometres: give some, "
            "or use FilterBank.default, which takes them from the voxel size"
        )
    increasing = all(a < b for a, b in itertools.pairwise(sigmas))
    if not increasing or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise ValueError(
            f"sigmas_nm is {sigmas}; allowed are positive numbers of nanometres in increasing order: "
            "sort them and remove repetitions"
        )
    return sigmas


def _checked_voxel_size(voxel_size_nm: VoxelSize) -> tuple[float, ...]:
    size = tuple(float(s) for s in voxel_size_nm)
    if len(size) != 3 or not all(math.isfinite(s) and s > 0 for s in size):
        raise ValueError(
            f"voxel_size_nm is {size}; allowed are three positive numbers (z, y, x) in nanometres: "
            "give the size of one voxel along each axis"
        )
    return size


def _checked_core_shape(block: NDArray, halo: Zyx) -> Zyx:
    if block.dtype not in DTYPES:
        raise TypeError(
            f"block has dtype {block.dtype}; allowed are {', '.join(np.dtype(d).name for d in DTYPES)}: "
            "convert it, e.g. block.astype(numpy.float32)"
        )
    core = tuple(n - 2 * h for n, h in zip(block.shape, halo, strict=False))
    if block.ndim != 3 or min(core) < 1:
        least = tuple(2 * h + 1 for h in halo)
        raise ValueError(
            f"block has shape {block.shape}; with a halo of {halo} on each side it must have three axes "
            f"(z, y, x) of at least {least} voxels: read a larger block or use smaller sigmas"
        )
    return core[0], core[1], core[2]


def _checked_out(out: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if out.dtype != np.float32:
        raise TypeError(f"out has dtype {out.dtype}; features are float32: allocate it with dtype numpy.float32")
    if out.shape != shape or not out[0].flags.c_contiguous:
        raise ValueError(
            f"out has shape {out.shape} and strides {out.strides}; this block and its halo give {shape}, every "
            "channel C-contiguous: check the halo the block was read with, or leave out away"
        )
    return out
