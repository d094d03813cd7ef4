"""Slices worth a look: those that were labelled, cut to where the labels are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from voxclf.config import ExploreConfig
from voxclf.explore.exploration import Exploration
from voxclf.figures import PlaneView
from voxclf.geometry import Zyx
from voxclf.labelled_slices import LabelProfiles
from voxclf.volume import Volume, open_labels, open_volume

N_SLICES = 6
LARGEST_SIDE = 512
"""Longest side shown, voxels: more would be drawn smaller than they are."""
LARGEST_PLANE = 64_000_000
"""Label slices up to this many voxels are read whole to find where on them the labels are."""


def cut_montage(found: Exploration, config: ExploreConfig) -> list[PlaneView]:
    """Cut up to six slices, evenly spread over the labelled ones, or over the volume without labels."""
    volume = open_volume(config.volume, config.voxel_size)
    labels = open_labels(config.labels, volume.shape) if config.labels else None
    chosen = choose_slices(found.labels.profiles) if found.labels else _choose_anywhere(found.shape)
    views = []
    for axis, position in chosen:
        start, stop = _choose_window(found, labels, axis, position)
        image = np.take(volume.read(start, stop)[0], 0, axis=axis)
        truth = None
        if labels is not None and found.labels is not None:
            truth = np.take(found.labels.label_set.remap_to_indices(labels.read(start, stop)[0]), 0, axis=axis)
        rows, columns = (a for a in range(3) if a != axis)
        title = f"{('xy', 'xz', 'yz')[axis]}, {'zyx'[axis]} = {position}"
        sizes = found.voxel_size_nm[rows], found.voxel_size_nm[columns]
        views.append(PlaneView(title, image, truth, None, sizes))
    return views


def choose_slices(profiles: LabelProfiles) -> list[tuple[int, int]]:
    """Up to six labelled slices as (axis, position), shared among the axes across which slices were labelled."""
    labelled = {axis: profiles.labelled_slices(axis) for axis in range(3)}
    axes = [axis for axis, slices in labelled.items() if len(slices)]
    per_axis = N_SLICES // max(len(axes), 1)
    return [(axis, int(position)) for axis in axes for position in _spread(labelled[axis], per_axis)]


def _spread(values: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """At most n of the values, from the middles of equal stretches of them."""
    if len(values) <= n:
        return values
    return values[((np.arange(n) + 0.5) * len(values) / n).astype(int)]


def _choose_anywhere(shape: Zyx) -> list[tuple[int, int]]:
    flat = [(0, int(z)) for z in _spread(np.arange(shape[0]), 4)]
    return [*flat, *((axis, shape[axis] // 2) for axis in (1, 2) if shape[0] > 1)]


def _choose_window(found: Exploration, labels: Volume | None, axis: int, position: int) -> tuple[Zyx, Zyx]:
    """The part of a slice to show: around its labels, at most 512 voxels along a side."""
    start, stop = [0, 0, 0], list(found.shape)
    start[axis], stop[axis] = position, position + 1
    used = [(0, n) for n in found.shape]
    if found.labels is not None:
        slices = [found.labels.profiles.slices_with_labels(a) for a in range(3)]
        used = [(int(s[0]), int(s[-1]) + 1) if len(s) else (0, n) for s, n in zip(slices, found.shape, strict=True)]
        if labels is not None and math.prod(found.shape) // found.shape[axis] <= LARGEST_PLANE:
            plane = labels.read((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))[0]
            hits = np.nonzero(plane != found.labels.label_set.unlabelled)
            used = [(int(h.min()), int(h.max()) + 1) if len(h) else u for h, u in zip(hits, used, strict=True)]
    for a in range(3):
        if a != axis:
            side = min(LARGEST_SIDE, found.shape[a])
            middle = (used[a][0] + used[a][1]) // 2
            start[a] = min(max(middle - side // 2, 0), found.shape[a] - side)
            stop[a] = start[a] + side
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])
