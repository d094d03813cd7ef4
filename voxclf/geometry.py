"""Blocks of a volume as plain integers: where each one is computed, what it must read, what it writes.

This is the first stop of the corridor and knows no arrays and no files. Everything is (z, y, x), half-open,
in voxels::

    read_start   computed_start                    computed_stop   read_stop
        |<-- halo -->|<----------- computed ------------->|<-- halo -->|
                     |   core_start ... core_stop   |  a  |
                                                    edge of the volume or region

*core* is what the block writes; cores of all blocks partition the region. *computed* is the core rounded
outwards to the step's alignment (``a`` above: only at ragged edges, cropped before writing). *read* adds the
halo on each side and may lie outside the volume; ``engine.transfer.read_block`` mirrors the volume there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsInt, overload

Zyx = tuple[int, int, int]
VoxelSize = tuple[float, float, float]

ORIGIN: Zyx = (0, 0, 0)
UNIT: Zyx = (1, 1, 1)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def round_down(value: int, multiple: int) -> int:
    """Return the largest multiple of ``multiple`` that is not above ``value``."""
    return value // multiple * multiple


def zyx(values: Iterable[SupportsInt]) -> Zyx:
    """Make a triple of three whole numbers."""
    z, y, x = values
    return int(z), int(y), int(x)


def add(a: Zyx, b: Zyx) -> Zyx:
    """Add two triples, axis by axis."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def subtract(a: Zyx, b: Zyx) -> Zyx:
    """Subtract two triples, axis by axis."""
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


@dataclass(frozen=True)
class Region:
    """A box of voxels, half-open: ``start`` belongs to it, ``stop`` does not."""

    start: Zyx
    stop: Zyx

    @property
    def shape(self) -> Zyx:
        """Extent along z, y, x."""
        return subtract(self.stop, self.start)

    @property
    def n_voxels(self) -> int:
        """Number of voxels inside; 0 where the box is empty."""
        return math.prod(max(0, n) for n in self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index into a (Z, Y, X) array."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def intersect(self, other: Region) -> Region:
        """The voxels common to both boxes; empty (``n_voxels`` 0) where they do not meet."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Region(start, stop)  # type: ignore[arg-type]

    def grow(self, margin: Zyx) -> Region:
        """The box with ``margin`` more voxels on each side."""
        return Region(subtract(self.start, margin), add(self.stop, margin))

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


def parse_region(text: str, shape: Zyx) -> Region:
    """Read ``z0:z1,y0:y1,x0:x1``; an end left out means the volume's own (``100:,:,:512``).

    Raises
    ------
    ValueError
        If the text is not of that form, or the box is empty or sticks out of the volume.
    """
    parts = text.split(",")
    advice = f"give z0:z1,y0:y1,x0:x1 inside the volume's shape {shape}, for example 0:{shape[0]},0:100,0:100"
    if len(parts) != 3 or any(part.count(":") != 1 for part in parts):
        raise ValueError(f"region {text!r} is not three ranges; {advice}")
    starts, stops = [], []
    for part, size in zip(parts, shape, strict=True):
        first, last = part.split(":")
        try:
            starts.append(int(first) if first.strip() else 0)
            stops.append(int(last) if last.strip() else size)
        except ValueError:
            raise ValueError(
                f"region {text!r} holds {part!r}, which is not a range of whole numbers; {advice}"
            ) from None
        if not 0 <= starts[-1] < stops[-1] <= size:
            raise ValueError(f"region {text!r} has the range {part!r}, which is empty or outside 0:{size}; {advice}")
    return Region((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))


@dataclass(frozen=True)
class Block:
    """One unit of work: the core it writes and the halo it only reads (drawn in the module's docstring)."""

    index: int
    core: Region
    computed: Region
    halo: Zyx

    @property
    def read(self) -> Region:
        """What the step must see: the computed box and the halo around it. May stick out of the volume."""
        return self.computed.grow(self.halo)

    def outside(self, shape: Zyx) -> tuple[Zyx, Zyx]:
        """How far :attr:`read` sticks out of a volume of this shape, before its start and after its stop."""
        before = tuple(max(0, -a) for a in self.read.start)
        after = tuple(max(0, b - n) for b, n in zip(self.read.stop, shape, strict=True))
        return before, after  # type: ignore[return-value]

    @property
    def core_in_computed(self) -> Region:
        """Where the core lies within the array that the step returns."""
        return Region(subtract(self.core.start, self.computed.start), subtract(self.core.stop, self.computed.start))


def make_block(index: int, core: Region, halo: Zyx = ORIGIN, alignment: Zyx = UNIT) -> Block:
    """Build the block that writes ``core``, for a step with this halo and alignment."""
    start = tuple(round_down(s, a) for s, a in zip(core.start, alignment, strict=True))
    stop = tuple(round_up(s, a) for s, a in zip(core.stop, alignment, strict=True))
    aligned_halo = tuple(round_up(h, a) for h, a in zip(halo, alignment, strict=True))
    return Block(index, core, Region(start, stop), aligned_halo)  # type: ignore[arg-type]


@dataclass(frozen=True)
class BlockGrid(Sequence[Block]):
    """All blocks of a region, computed from their index, so a grid of a million blocks takes no memory.

    Core corners lie on multiples of ``core_shape`` counted from the *volume's* origin, not the region's:
    two runs over different regions of one volume write the same chunks from the same blocks.
    """

    region: Region
    core_shape: Zyx
    halo: Zyx = ORIGIN
    alignment: Zyx = UNIT

    @property
    def first(self) -> Zyx:
        """Grid position of the block that holds the region's first voxel."""
        z, y, x = (s // c for s, c in zip(self.region.start, self.core_shape, strict=True))
        return z, y, x

    @property
    def counts(self) -> Zyx:
        """Number of blocks along z, y, x."""
        z, y, x = (
            -(-stop // c) - first for stop, c, first in zip(self.region.stop, self.core_shape, self.first, strict=True)
        )
        return z, y, x

    def __len__(self) -> int:
        return math.prod(self.counts)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of a grid of {len(self)}")
        index %= len(self)
        _, n_y, n_x = self.counts
        position = (index // (n_y * n_x), index // n_x % n_y, index % n_x)
        start = tuple((f + p) * c for f, p, c in zip(self.first, position, self.core_shape, strict=True))
        whole = Region(start, add(start, self.core_shape))  # type: ignore[arg-type]
        return make_block(index, whole.intersect(self.region), self.halo, self.alignment)

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class SelectedBlocks(Sequence[Block]):
    """Some blocks of a grid, with their indices in it."""

    grid: BlockGrid
    indices: tuple[int, ...]

    @property
    def core_shape(self) -> Zyx:
        """Of the grid's blocks."""
        return self.grid.core_shape

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            return [self.grid[i] for i in self.indices[index]]
        return self.grid[self.indices[index]]


def select_blocks(grid: BlockGrid, boxes: Sequence[Region]) -> SelectedBlocks:
    """Select the blocks whose core meets any of the boxes; costs as many steps as blocks are found."""
    found: set[int] = set()
    _, n_y, n_x = grid.counts
    for box in boxes:
        inside = box.intersect(grid.region)
        if not inside.n_voxels:
            continue
        z, y, x = (
            range(a // c - f, -(-b // c) - f)
            for a, b, c, f in zip(inside.start, inside.stop, grid.core_shape, grid.first, strict=True)
        )
        found.update((i * n_y + j) * n_x + k for i in z for j in y for k in x)
    return SelectedBlocks(grid, tuple(sorted(found)))


def split_into_blocks(
    shape: Zyx,
    core_shape: Zyx,
    halo: Zyx = ORIGIN,
    alignment: Zyx = UNIT,
    region: Region | None = None,
) -> BlockGrid:
    """Cut a volume (or a region of it) into blocks whose cores touch but never overlap.

    Parameters
    ----------
    shape : (Z, Y, X)
        Shape of the volume, voxels.
    core_shape : (z, y, x)
        Wanted core, voxels; rounded up to ``alignment``.
    halo : (z, y, x)
        Voxels that the step reads beyond its core on *each* side; rounded up to ``alignment``.
    alignment : (z, y, x)
        What block starts must be multiples of: (1, 1, 1), or the product of a network's strides.
    region : Region, optional
        Compute only this box; the whole volume by default.

    Raises
    ------
    ValueError
        If an extent is not positive or the region sticks out of the volume.
    """
    for name, triple, least in (
        ("shape", shape, 1),
        ("core_shape", core_shape, 1),
        ("halo", halo, 0),
        ("alignment", alignment, 1),
    ):
        if len(triple) != 3 or min(triple) < least:
            raise ValueError(f"{name} was {triple}; it needs three whole numbers of at least {least} (z, y, x)")
    whole = Region(ORIGIN, shape)
    region = region or whole
    if region.n_voxels == 0 or region.intersect(whole) != region:
        raise ValueError(f"region {region} is empty or sticks out of the volume's shape {shape}; choose one inside")
    z, y, x = (round_up(c, a) for c, a in zip(core_shape, alignment, strict=True))
    return BlockGrid(region, (z, y, x), halo, alignment)
