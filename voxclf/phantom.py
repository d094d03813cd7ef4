"""How the phantom's tissue is drawn and imaged: geometry to grey values, nothing of files or slices.

All geometry is in nanometres, so any voxel size samples the same kind of tissue. The passes:

1. grow processes: bent tubes of varying calibre on a jittered grid;
2. tessellate: each voxel belongs to the nearest tube in a smoothly warped space, so tubes fill the volume;
   the distance to the border with the second-nearest tube places the cell membrane;
3. place organelles where there is room: mitochondria in wide processes, synapses on contacts, vesicles on the
   presynaptic side; paint each into the canvas (grey value) and the labels, in its own bounding box;
4. form the image: blur by the microscope's point spread, contrast differences, drift along z, curtains of the
   ion beam, shot and detector noise.

Membranes, mitochondrial membranes, cristae, synapses and vesicle rims share one range of grey values on
purpose: only shape and surroundings tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Zyx = tuple[int, int, int]
ZyxNm = tuple[float, float, float]
Box = tuple[slice, slice, slice]
Points = NDArray[np.float64]
Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Ids = NDArray[np.uint16]
Indices = NDArray[np.int64]

CYTOPLASM, CELL_MEMBRANE, MITOCHONDRION, MITO_MEMBRANE, SYNAPSE, VESICLE = range(1, 7)

EXACT_DEPTH_NM = 35.0  # distances to a border are exact up to here; deeper in, they may come out too large
SLAB = 4  # planes drawn at a time; also the side of the tessellation's blocks
COARSE_BLOCK = 32  # voxels in y and x; its few tubes are searched for those of each small block

PROCESS_SPACING_NM = 178.0
MEMBRANE_HALF_NM = 6.5  # both membranes and the cleft of a contact together: 13 nm
MITO_SHELL_NM = 10.0
VESICLE_RIM_NM = 8.0
BLUR_NM = 3.6
NOISE_PER_GREY, NOISE_FLOOR = 0.45, 9.0  # variance of shot noise per grey value; of the detector

# Grey values before blur and noise, on the 0..255 scale of the image.
MEMBRANE_GREY, MITO_MEMBRANE_GREY, SYNAPSE_GREY, VESICLE_RIM_GREY = 60.0, 58.0, 64.0, 66.0
MITO_MATRIX_GREY, CRISTA_GREY, LUMEN_GREY = 114.0, 80.0, 158.0


def generator(seed: int, *stream: int) -> np.random.Generator:
    """One independent random stream per purpose, so that no pass shifts the numbers of the next."""
    return np.random.default_rng([seed, *stream])


class SmoothField:
    """Random smooth texture of unit variance: a cubic B-spline through white noise on a coarse lattice.

    Any region is read alone and equals that region of the whole. Sums run over four neighbours per axis,
    element by element: no BLAS, whose summation order differs between machines.
    """

    def __init__(self, rng: np.random.Generator, shape: Zyx, voxel_size_nm: ZyxNm, spacing_nm: float | ZyxNm) -> None:
        spacing = (spacing_nm,) * 3 if isinstance(spacing_nm, float | int) else spacing_nm
        self._step = tuple(v / s for v, s in zip(voxel_size_nm, spacing, strict=True))
        lattice = tuple(int(n * step) + 5 for n, step in zip(shape, self._step, strict=True))
        # A cubic B-spline keeps 151/315 of white noise's variance per axis.
        self._lattice = rng.standard_normal(lattice, dtype=np.float32) * np.float32((315 / 151) ** 1.5)

    def read(self, start: Zyx, stop: Zyx) -> Float32:
        """The texture in voxels ``start`` up to and without ``stop``."""
        values = self._lattice
        for axis in range(3):
            values = self._interpolate(values, axis, start[axis], stop[axis])
        return values

    def _interpolate(self, values: Float32, axis: int, start: int, stop: int) -> Float32:
        position = np.arange(start, stop) * self._step[axis]
        base = position.astype(np.intp)
        u = position - base
        weights = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
        along = tuple(-1 if a == axis else 1 for a in range(3))
        total: Float32 = np.float32(0)  # type: ignore[assignment]
        for tap, weight in enumerate(weights):
            share = (weight / 6).astype(np.float32).reshape(along)
            total = total + np.take(values, base + tap, axis=axis) * share
        return total


@dataclass(frozen=True)
class _Neuropil:
    """Which process each voxel belongs to, which one it borders on, and how far that border is."""

    owner: Ids
    neighbour: Ids
    depth_nm: Float32
    direction: Points  # (processes, 3): main axis of each process
    voxel_size_nm: ZyxNm

    def box_around(self, points_nm: Points, reach_nm: float) -> Box:
        voxel = np.array(self.voxel_size_nm)
        low = np.maximum(np.floor((points_nm.min(0) - reach_nm) / voxel), 0).astype(int)
        high = np.minimum(np.ceil((points_nm.max(0) + reach_nm) / voxel) + 1, self.owner.shape).astype(int)
        return tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]

    def positions_nm(self, box: Box) -> tuple[Float32, Float32, Float32]:
        """Open grid of the box's voxel positions in nm, one array per axis."""
        axes = (np.arange(s.start, s.stop) * v for s, v in zip(box, self.voxel_size_nm, strict=True))
        z, y, x = np.ix_(*axes)
        return z.astype(np.float32), y.astype(np.float32), x.astype(np.float32)

    def voxel_at(self, points_nm: Points) -> tuple[NDArray[np.intp], ...]:
        index = np.rint(points_nm / np.array(self.voxel_size_nm)).astype(np.intp)
        return tuple(np.clip(index[:, a], 0, self.owner.shape[a] - 1) for a in range(3))


def draw_tissue(shape: Zyx, voxel_size_nm: ZyxNm, seed: int) -> tuple[Float32, UInt8]:
    """Steps 1 to 3 and the blur: the stained tissue before the detector's noise, and its labels."""
    neuropil = _tessellate(shape, voxel_size_nm, seed)
    canvas, labels = _paint_cells(neuropil, seed)
    brush = _Brush(neuropil, canvas, labels, seed)
    brush.paint_mitochondria()
    brush.paint_synapses()
    sigma = [BLUR_NM / v for v in voxel_size_nm]
    ndimage.gaussian_filter(canvas, sigma, output=canvas, mode="nearest", truncate=3.0)
    return canvas, labels


def _grow_processes(rng: np.random.Generator, extent_nm: Points) -> tuple[Float32, Ids, Points]:
    """Bent tubes through the volume and its surroundings: segments (S, 8), their process, main axes (P, 3).

    A segment's row is its start (3), its vector (3), its first radius and the radius' change along it.
    """
    ends = extent_nm + 2 * PROCESS_SPACING_NM
    counts = np.ceil(ends / PROCESS_SPACING_NM).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), -1).reshape(-1, 3)
    centre = (grid + rng.uniform(0.1, 0.9, grid.shape)) * PROCESS_SPACING_NM - PROCESS_SPACING_NM
    n = len(centre)
    axis = _normalised(rng.standard_normal((n, 3)))
    bends = _normalised(axis[:, None] + 0.4 * rng.standard_normal((n, 3, 3)))
    steps = bends * rng.uniform(70, 150, (n, 3, 1))
    nodes = np.concatenate([np.zeros((n, 1, 3)), np.cumsum(steps, axis=1)], axis=1)
    nodes += centre[:, None] - nodes.mean(axis=1, keepdims=True)
    calibre = np.minimum(np.exp(rng.normal(np.log(56.0), 0.45, (n, 1))), 150) * rng.uniform(0.8, 1.25, (n, 4))
    rows = np.concatenate([nodes[:, :-1], steps, calibre[:, :-1, None], np.diff(calibre)[..., None]], axis=-1)
    process = np.repeat(np.arange(n), 3).astype(np.uint16)
    return rows.reshape(-1, 8).astype(np.float32), process, axis


def _normalised(vectors: Points) -> Points:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _tessellate(shape: Zyx, voxel_size_nm: ZyxNm, seed: int) -> _Neuropil:
    """Step 2, in slabs of a few planes so that the warped coordinates never exist as a whole."""
    extent = np.array(shape) * np.array(voxel_size_nm)
    segments, process, axis = _grow_processes(generator(seed, 1), extent)
    coarse = [SmoothField(generator(seed, 2, a), shape, voxel_size_nm, 150.0) for a in range(3)]
    fine = [SmoothField(generator(seed, 3, a), shape, voxel_size_nm, 48.0) for a in range(3)]
    owner, neighbour = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    depth = np.empty(shape, np.float32)
    for z in range(0, shape[0], SLAB):
        start, stop = (z, 0, 0), (min(z + SLAB, shape[0]), shape[1], shape[2])
        warped = np.stack(
            [34 * c.read(start, stop) + 6.5 * f.read(start, stop) for c, f in zip(coarse, fine, strict=True)]
        )
        for a in range(3):
            along = tuple(-1 if b == a else 1 for b in range(3))
            warped[a] += (np.arange(start[a], stop[a]) * voxel_size_nm[a]).astype(np.float32).reshape(along)
        planes = slice(start[0], stop[0])
        _tessellate_slab(warped, segments, process, owner[planes], neighbour[planes], depth[planes])
    return _Neuropil(owner, neighbour, depth, axis, voxel_size_nm)


@numba.njit(cache=True)
def _tube_distance(tube: Float32, z: float, y: float, x: float) -> tuple[float, float, float, float]:
    """Signed distance to a tube's surface (negative inside) and its gradient, in nm."""
    dz, dy, dx = z - tube[0], y - tube[1], x - tube[2]
    along = dz * tube[3] + dy * tube[4] + dx * tube[5]
    t = along / (tube[3] * tube[3] + tube[4] * tube[4] + tube[5] * tube[5])
    t = min(max(t, 0.0), 1.0)
    dz, dy, dx = dz - t * tube[3], dy - t * tube[4], dx - t * tube[5]
    r = np.sqrt(dz * dz + dy * dy + dx * dx) + 1e-6
    return r - (tube[6] + t * tube[7]), dz / r, dy / r, dx / r


@numba.njit(cache=True)
def _near_tubes(warped: Float32, segments: Float32, process: Ids, among: Indices) -> Indices:
    """Those tubes of ``among`` that may matter anywhere in a block of positions.

    A distance changes by at most the way walked, so only tubes within twice the block's radius of the best at
    its centre matter, plus what ``_border`` asks for: a dozen or two out of thousands.
    """
    Z, Y, X = warped.shape[1:]
    cz, cy, cx = warped[:, Z // 2, Y // 2, X // 2]
    reach = 0.0
    for z in range(Z):
        for y in range(Y):
            for x in range(X):
                pz, py, px = warped[:, z, y, x]
                reach = max(reach, (pz - cz) ** 2 + (py - cy) ** 2 + (px - cx) ** 2)
    at_centre = np.empty(len(among), np.float32)
    first, second, nearest = np.inf, np.inf, -1
    for i in range(len(among)):
        f, p = _tube_distance(segments[among[i]], cz, cy, cx)[0], process[among[i]]
        at_centre[i] = f
        if p == nearest:
            first = min(first, f)
        elif f < first:
            first, second, nearest = f, first, p
        elif f < second:
            second = f
    # 2.8, not 2: a radius that changes by at most 67 nm in 70 makes the distance up to 1.39 times steeper.
    limit = max(second, first + 2 * EXACT_DEPTH_NM) + 2.8 * np.sqrt(reach)
    return among[at_centre <= limit]


@numba.njit(cache=True)
def _border(
    segments: Float32, process: Ids, near: Indices, scratch: Float32, pz: float, py: float, px: float
) -> tuple[int, int, float]:
    """Nearest process of a point, the process across its nearest border, and the distance to that border.

    Two tubes' distances f meet on a surface (f2 - f1) / |gradient of it| away. The minimum over all rivals, not
    the rival with the smallest f alone, keeps the distance continuous where one rival takes over from another.
    """
    first = 0
    for i in range(len(near)):
        scratch[i] = _tube_distance(segments[near[i]], pz, py, px)
        if scratch[i, 0] < scratch[first, 0]:
            first = i
    owner = process[near[first]]
    neighbour, depth = owner, np.inf
    f1, z1, y1, x1 = scratch[first]
    for i in range(len(near)):
        # No slope exceeds 2, so a rival this far away cannot be nearer than the best so far.
        if process[near[i]] == owner or scratch[i, 0] - f1 >= 2 * depth:
            continue
        slope = np.sqrt((scratch[i, 1] - z1) ** 2 + (scratch[i, 2] - y1) ** 2 + (scratch[i, 3] - x1) ** 2)
        # Beside two parallel tubes the slope vanishes; the floor keeps the distance finite there.
        distance = (scratch[i, 0] - f1) / max(slope, 0.25)
        if distance < depth:
            neighbour, depth = process[near[i]], distance
    return owner, neighbour, depth


@numba.njit(cache=True)
def _tessellate_block(
    warped: Float32, segments: Float32, process: Ids, near: Indices, owner: Ids, neighbour: Ids, depth: Float32
) -> None:
    scratch = np.empty((len(near), 4), np.float32)
    Z, Y, X = owner.shape
    for z in range(Z):
        for y in range(Y):
            for x in range(X):
                pz, py, px = warped[:, z, y, x]
                p1, p2, distance = _border(segments, process, near, scratch, pz, py, px)
                owner[z, y, x], neighbour[z, y, x], depth[z, y, x] = p1, p2, distance


@numba.njit(cache=True)
def _tessellate_slab(
    warped: Float32, segments: Float32, process: Ids, owner: Ids, neighbour: Ids, depth: Float32
) -> None:
    everywhere = np.arange(len(segments))
    _, Y, X = owner.shape
    for y0 in range(0, Y, COARSE_BLOCK):
        for x0 in range(0, X, COARSE_BLOCK):
            y1, x1 = min(y0 + COARSE_BLOCK, Y), min(x0 + COARSE_BLOCK, X)
            coarse = _near_tubes(warped[:, :, y0:y1, x0:x1], segments, process, everywhere)
            for y in range(y0, y1, SLAB):
                for x in range(x0, x1, SLAB):
                    ys, xs = slice(y, min(y + SLAB, y1)), slice(x, min(x + SLAB, x1))
                    block = warped[:, :, ys, xs]
                    near = _near_tubes(block, segments, process, coarse)
                    _tessellate_block(
                        block, segments, process, near, owner[:, ys, xs], neighbour[:, ys, xs], depth[:, ys, xs]
                    )


def _paint_cells(neuropil: _Neuropil, seed: int) -> tuple[Float32, UInt8]:
    """Cytoplasm of each process in its own grey with a soft texture and cisternae, and the cell membranes."""
    shape, voxel = neuropil.owner.shape, neuropil.voxel_size_nm
    grey = generator(seed, 4).normal(152.0, 15.0, len(neuropil.direction)).astype(np.float32)
    spacings = {"cloud": 110.0, "grain": 13.0, "sheet": 60.0, "patch": 130.0}
    fields = {
        name: SmoothField(generator(seed, 5, i), shape, voxel, nm) for i, (name, nm) in enumerate(spacings.items())
    }
    canvas, labels = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    for z in range(0, shape[0], SLAB):
        planes = slice(z, min(z + SLAB, shape[0]))
        texture = {name: f.read((z, 0, 0), (planes.stop, *shape[1:])) for name, f in fields.items()}
        depth = neuropil.depth_nm[planes]
        tissue = grey[neuropil.owner[planes]] + 6 * texture["cloud"] + 8 * texture["grain"]
        # Endoplasmic reticulum: where "patch" is high, the zero surface of "sheet" is faintly stained.
        cisterna = np.exp(-((texture["sheet"] / 0.16) ** 2)) * (texture["patch"] > 0.9)
        tissue -= 45 * cisterna
        membrane = MEMBRANE_GREY + 9 * texture["patch"]
        canvas[planes] = _blend(tissue, membrane, _coverage(MEMBRANE_HALF_NM - depth, voxel))
        labels[planes] = np.where(depth < MEMBRANE_HALF_NM, CELL_MEMBRANE, CYTOPLASM)
    return canvas, labels


def _coverage(inside_nm: Float32, voxel_size_nm: ZyxNm) -> Float32:
    """Share of a voxel inside a surface, from the signed distance of its centre: anti-aliased edges."""
    return np.clip(inside_nm / np.float32(min(voxel_size_nm)) + np.float32(0.5), 0, 1)


def _blend(below: Float32, above: Float32 | float, share: Float32) -> Float32:
    return below + (above - below) * share


class _Brush:
    """Step 3: finds sites for organelles and paints them into the canvas and the labels."""

    def __init__(self, neuropil: _Neuropil, canvas: Float32, labels: UInt8, seed: int) -> None:
        self._neuropil, self._canvas, self._labels = neuropil, canvas, labels
        self._rng = generator(seed, 6)
        shape, voxel = neuropil.owner.shape, neuropil.voxel_size_nm
        self._voxel = voxel
        self._volume_um3 = float(np.prod(shape) * np.prod(voxel)) * 1e-9
        self._wobble = SmoothField(generator(seed, 7), shape, voxel, 60.0)
        self._ripple = SmoothField(generator(seed, 8), shape, voxel, 35.0)

    def _sample_voxels(self, n_per_um3: float) -> NDArray[np.intp]:
        n = max(4000, int(n_per_um3 * self._volume_um3))
        return np.stack([self._rng.integers(0, side, n) for side in self._labels.shape], -1)

    def paint_mitochondria(self) -> None:
        """Bent rods along the widest processes, off the cell membrane, with shell, matrix and cristae."""
        wanted = max(1, round(self._volume_um3 / 0.014))
        voxels = self._sample_voxels(40_000)
        room = self._neuropil.depth_nm[tuple(voxels.T)]
        order = np.argsort(-room * self._rng.uniform(0.6, 1.0, len(room)), kind="stable")
        placed = np.empty((0, 3))
        hosts = np.empty(0, int)
        for i in order:
            if len(placed) == wanted:
                return
            centre = voxels[i] * np.array(self._voxel)
            process = int(self._neuropil.owner[tuple(voxels[i])])
            # Rods of two processes cannot meet; two of one process need the length of a rod between them.
            if _is_apart(centre, placed, 170) and _is_apart(centre, placed[hosts == process], 340):
                placed, hosts = np.vstack([placed, centre]), np.append(hosts, process)
                self._paint_mitochondrion(centre, process, float(room[i]))

    def _paint_mitochondrion(self, centre: Points, process: int, room_nm: float) -> None:
        radius = min(max(room_nm, 45.0), self._rng.uniform(65, 100))
        axis = self._neuropil.direction[process]
        half = self._rng.uniform(70, 170) * _normalised(axis + 0.25 * self._rng.standard_normal((2, 3)))
        nodes = np.stack([centre - half[0], centre, centre + half[1]])
        box = self._neuropil.box_around(nodes, 1.4 * radius)
        start, stop = _corners(box)
        z, y, x = self._neuropil.positions_nm(box)
        wobble, ripple = self._wobble.read(start, stop), self._ripple.read(start, stop)
        distance = np.minimum(
            _distance_to_rod(nodes[0], nodes[1], z, y, x), _distance_to_rod(nodes[1], nodes[2], z, y, x)
        )
        inside = np.float32(radius) * (1 + 0.1 * wobble) - distance
        # A rim of cytoplasm always parts it from the cell membrane.
        inside = np.minimum(inside, self._neuropil.depth_nm[box] - np.float32(MEMBRANE_HALF_NM + 7))
        inside[self._neuropil.owner[box] != process] = -1e3
        self._paint_mito_layers(box, inside, axis, wobble, ripple)

    def _paint_mito_layers(self, box: Box, inside: Float32, axis: Points, wobble: Float32, ripple: Float32) -> None:
        z, y, x = self._neuropil.positions_nm(box)
        along = (axis[0] * z + axis[1] * y + axis[2] * x).astype(np.float32)
        lamella = np.sin(2 * np.pi * along / np.float32(36) + 1.5 * ripple + 1.5 * wobble)
        crista = np.clip((lamella - 0.35) * 3, 0, 1) * np.clip(0.9 + 0.9 * ripple, 0, 1)
        matrix = _blend(MITO_MATRIX_GREY + 6 * wobble, CRISTA_GREY, crista)
        body = _blend(
            np.full_like(matrix, MITO_MEMBRANE_GREY) + 5 * ripple,
            matrix,
            _coverage(inside - MITO_SHELL_NM, self._voxel),
        )
        self._canvas[box] = _blend(self._canvas[box], body, _coverage(inside, self._voxel))
        self._labels[box][inside > 0] = MITO_MEMBRANE
        self._labels[box][inside > MITO_SHELL_NM] = MITOCHONDRION

    def paint_synapses(self) -> None:
        """Dense patches on contacts of two processes, each with a cloud of vesicles on one side."""
        wanted = max(2, round(self._volume_um3 / 0.016))
        voxels = self._sample_voxels(120_000)
        voxels = voxels[self._neuropil.depth_nm[tuple(voxels.T)] < 3.0]
        sites = np.empty((0, 3))
        for enough in (12, 3):  # the second round takes poorer sites, which small volumes need
            for voxel in voxels:
                if len(sites) == wanted:
                    return
                site = voxel * np.array(self._voxel)
                if _is_apart(site, sites, 140) and self._try_synapse(voxel, site, enough):
                    sites = np.vstack([sites, site])

    def _try_synapse(self, voxel: NDArray[np.intp], site: Points, enough: int) -> bool:
        sides = int(self._neuropil.owner[tuple(voxel)]), int(self._neuropil.neighbour[tuple(voxel)])
        radius = self._rng.uniform(75, 115)
        clouds = [self._vesicle_cloud(site, process) for process in sides]
        fuller = int(len(clouds[1]) > len(clouds[0]))
        if len(clouds[fuller]) < enough:
            return False
        self._paint_density(site, radius, pre=sides[fuller], post=sides[1 - fuller])
        for centre in clouds[fuller]:
            self._paint_vesicle(centre, self._rng.uniform(18, 22))
        return True

    def _vesicle_cloud(self, site: Points, process: int) -> Points:
        """Centres at least a vesicle apart, in cytoplasm of ``process``, denser towards the site."""
        distance = 25 + 160 * self._rng.uniform(0, 1, 900) ** 0.7
        points = site + _normalised(self._rng.standard_normal((900, 3))) * distance[:, None]
        upper = (np.array(self._labels.shape) - 1) * np.array(self._voxel)
        points = points[((points >= 0) & (points <= upper)).all(axis=1)]
        at = self._neuropil.voxel_at(points)
        free = (
            (self._neuropil.owner[at] == process) & (self._neuropil.depth_nm[at] > 28) & (self._labels[at] == CYTOPLASM)
        )
        centres = np.empty((0, 3))
        for point in points[free]:
            if len(centres) < 80 and _is_apart(point, centres, 41):
                centres = np.vstack([centres, point])
        return centres

    def _paint_density(self, site: Points, radius: float, *, pre: int, post: int) -> None:
        box = self._neuropil.box_around(site[None], 1.3 * radius)
        z, y, x = self._neuropil.positions_nm(box)
        owner, neighbour = self._neuropil.owner[box], self._neuropil.neighbour[box]
        wobble = self._wobble.read(*_corners(box))
        ripple = self._ripple.read(*_corners(box))
        away = np.sqrt((z - site[0]) ** 2 + (y - site[1]) ** 2 + (x - site[2]) ** 2).astype(np.float32)
        taper = np.sqrt(np.clip(1 - (away / (radius * (1 + 0.12 * wobble))) ** 4, 0, 1))
        thick = np.where((owner == post) & (neighbour == pre), np.float32(31), np.float32(0))
        thick[(owner == pre) & (neighbour == post)] = 13
        inside = thick * taper * (1 + 0.12 * ripple) - self._neuropil.depth_nm[box]
        labels = self._labels[box]
        inside[(taper == 0) | ((labels != CYTOPLASM) & (labels != CELL_MEMBRANE))] = -1e3
        self._canvas[box] = _blend(self._canvas[box], SYNAPSE_GREY + 9 * ripple, _coverage(inside - 1, self._voxel))
        labels[inside > 0] = SYNAPSE

    def _paint_vesicle(self, centre: Points, radius: float) -> None:
        box = self._neuropil.box_around(centre[None], radius + 5)
        z, y, x = self._neuropil.positions_nm(box)
        inside = (radius - np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)).astype(
            np.float32
        )
        labels = self._labels[box]
        inside[(labels != CYTOPLASM) & (labels != VESICLE)] = -1e3
        content = _blend(
            np.full_like(inside, VESICLE_RIM_GREY),
            LUMEN_GREY,
            _coverage(inside - VESICLE_RIM_NM, self._voxel),
        )
        self._canvas[box] = _blend(self._canvas[box], content, _coverage(inside, self._voxel))
        labels[inside > 0] = VESICLE


def _is_apart(point: Points, others: Points, distance_nm: float) -> bool:
    return bool((((others - point) ** 2).sum(axis=1) > distance_nm**2).all())


def _corners(box: Box) -> tuple[Zyx, Zyx]:
    z, y, x = box
    return (z.start, y.start, x.start), (z.stop, y.stop, x.stop)


def _distance_to_rod(first: Points, last: Points, z: Float32, y: Float32, x: Float32) -> Float32:
    """Distance in nm of every grid position to the straight line between two points."""
    vector = last - first
    dz, dy, dx = (axis - np.float32(start) for axis, start in zip((z, y, x), first, strict=True))
    vz, vy, vx = (np.float32(component) for component in vector)
    t = np.clip((dz * vz + dy * vy + dx * vx) / np.float32(vector @ vector), 0, 1)
    return np.sqrt((dz - t * vz) ** 2 + (dy - t * vy) ** 2 + (dx - t * vx) ** 2)


def expose(canvas: Float32, voxel_size_nm: ZyxNm, seed: int) -> UInt8:
    """Step 4: the microscope's picture of the tissue, plane by plane as a FIB-SEM takes it."""
    shape = (canvas.shape[0], canvas.shape[1], canvas.shape[2])
    contrast = SmoothField(generator(seed, 9), shape, voxel_size_nm, 420.0)
    drift = SmoothField(generator(seed, 10), (shape[0], 1, 1), voxel_size_nm, 260.0)
    # Curtains run along y, the milling direction, and last for a few planes.
    curtain = SmoothField(generator(seed, 11), shape, voxel_size_nm, (25.0, 900.0, 11.0))
    image = np.empty(shape, np.uint8)
    for z in range(shape[0]):
        start, stop = (z, 0, 0), (z + 1, shape[1], shape[2])
        stain = 1 + 0.10 * contrast.read(start, stop)[0]
        light = 1 + 0.035 * drift.read((z, 0, 0), (z + 1, 1, 1))[0] + 0.016 * curtain.read(start, stop)[0]
        grey = (130 + (canvas[z] - 130) * stain) * light
        noise = generator(seed, 12, z).standard_normal(grey.shape, dtype=np.float32)
        image[z] = np.clip(np.rint(grey + noise_sigma(grey) * noise), 0, 255)
    return image


def noise_sigma(grey: Float32) -> Float32:
    """Standard deviation of shot noise, which grows with the signal, plus the detector's constant part."""
    return np.sqrt(np.float32(NOISE_PER_GREY) * np.maximum(grey, 0) + np.float32(NOISE_FLOOR))


@numba.njit(cache=True)
def expose_region(
    canvas: Float32,
    zs: NDArray[np.intp],
    ys: NDArray[np.intp],
    xs: NDArray[np.intp],
    start: NDArray[np.int64],
    light: Float32,
    seed: np.uint64,
    out: UInt8,
) -> None:
    """Light the tissue gathered at ``zs, ys, xs`` and add noise that depends on seed and position alone.

    The noise is SplitMix64's finaliser (Steele, Lea and Flood 2014) of the position in the whole volume,
    ``start`` being the region's first voxel; ``light`` holds one factor per plane.
    """
    for i in range(len(zs)):
        for j in range(len(ys)):
            # Odd 64-bit multipliers: positions of any storable volume do not collide in practice.
            row = seed * np.uint64(0xD6E8FEB86659FD93)
            row += np.uint64(start[0] + i) * np.uint64(0x9E3779B97F4A7C15)
            row += np.uint64(start[1] + j) * np.uint64(0xC2B2AE3D27D4EB4F)
            for k in range(len(xs)):
                h = row + np.uint64(start[2] + k) * np.uint64(0x165667B19E3779F9)
                h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                h = h ^ (h >> np.uint64(31))
                # Four 16-bit parts add up to a bell curve: mean 2 * 65535, standard deviation 37837.
                total = (h & np.uint64(0xFFFF)) + ((h >> np.uint64(16)) & np.uint64(0xFFFF))
                total += ((h >> np.uint64(32)) & np.uint64(0xFFFF)) + (h >> np.uint64(48))
                bell = (np.float64(total) - 131070.0) / 37837.0
                grey = canvas[zs[i], ys[j], xs[k]] * light[i]
                value = grey + np.sqrt(NOISE_PER_GREY * max(grey, 0.0) + NOISE_FLOOR) * bell
                out[i, j, k] = np.uint8(min(max(value + 0.5, 0.0), 255.0))
