"""Windows that a network in training is scored on: they cover the labels held out, each labelled voxel once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from voxclf.geometry import Region, Zyx, add, subtract
from voxclf.labels import UNLABELLED_INDEX
from voxclf.training.windows import LabelIndex, Window, WindowBatch, WindowForm, unravel


class ScoredWindow(NamedTuple):
    """Where a window is to be scored: its form, its start, and the box and part whose labels it answers for."""

    form: int
    start: Zyx
    box: int
    part: Region
    n_labelled: int


def list_scored_windows(index: LabelIndex, forms: Sequence[WindowForm], limit: int, seed: int) -> list[ScoredWindow]:
    """List windows in which labelled voxels are scored, each voxel in at most one of them.

    Where there are more than ``limit`` labelled voxels, windows are drawn evenly from all of them; at least one is
    listed. Their order is random, so that any first part of the list samples the labels too.
    """
    rng = np.random.default_rng(seed)
    boxes = range(len(index.survey.boxes))
    if all(form.target == (1, 1, 1) for form in forms):
        share = min(1.0, limit / max(1, int(index.totals.sum())))
        windows = [window for number in boxes for window in _voxels_of(index, number, share, rng)]
    else:
        windows = [window for number in boxes for window in _parts_of(index, number, forms)]
    kept: list[ScoredWindow] = []
    n_labelled = 0
    for i in rng.permutation(len(windows)):
        if n_labelled >= limit:
            break
        kept.append(windows[i])
        n_labelled += windows[i].n_labelled
    return kept


def _voxels_of(index: LabelIndex, number: int, share: float, rng: np.random.Generator) -> Iterator[ScoredWindow]:
    """One window for each voxel drawn from a box."""
    box = index.box(number)
    n = len(box.positions)
    # A box too small for its share to be a voxel gives at least one; the limit is kept afterwards.
    for flat in rng.choice(box.positions, min(n, math.ceil(share * n)), replace=False):
        local = unravel(int(flat), box.region.shape)
        voxel = add(box.region.start, local)
        yield ScoredWindow(0, voxel, number, Region(voxel, add(voxel, (1, 1, 1))), 1)


def _parts_of(index: LabelIndex, number: int, forms: Sequence[WindowForm]) -> Iterator[ScoredWindow]:
    """Windows that cover a box, each voxel under the form that suits it best."""
    box = index.box(number)
    labelled = np.zeros(math.prod(box.region.shape), bool)
    labelled[box.positions] = True
    labelled = labelled.reshape(box.region.shape)
    best = box.best_form(forms)
    for i, form in enumerate(forms):
        mine = labelled & (best == i)
        for part in _tiles(box.region, form.target) if mine.any() else ():
            local = Region(subtract(part.start, box.region.start), subtract(part.stop, box.region.start))
            n = int(np.count_nonzero(mine[local.slices]))
            if n:
                yield ScoredWindow(i, part.start, number, part, n)


def _tiles(region: Region, shape: Zyx) -> Iterator[Region]:
    ranges = [range(a, b, n) for a, b, n in zip(region.start, region.stop, shape, strict=True)]
    for z in ranges[0]:
        for y in ranges[1]:
            for x in ranges[2]:
                yield Region((z, y, x), add((z, y, x), shape)).intersect(region)


def read_scored(index: LabelIndex, forms: Sequence[WindowForm], window: ScoredWindow) -> Window:
    """Read a window to be scored; labels that other windows answer for are -1."""
    form = forms[window.form]
    target = np.full(form.target, UNLABELLED_INDEX, np.int64)
    classes = index.reader.read_classes(window.part)
    if len(forms) > 1:
        box = index.box(window.box)
        local = Region(subtract(window.part.start, box.region.start), subtract(window.part.stop, box.region.start))
        classes = np.where(box.best_form(forms)[local.slices] == window.form, classes, UNLABELLED_INDEX)
    target[Region((0, 0, 0), window.part.shape).slices] = classes
    return index.reader.read(form, window.start, target)


def scored_batches(
    index: LabelIndex, forms: Sequence[WindowForm], windows: Sequence[ScoredWindow], n_windows: int
) -> Iterator[WindowBatch]:
    """Read windows in batches of one form; batches are in the order of their first windows."""
    batches = []
    for form in range(len(forms)):
        own = [number for number, window in enumerate(windows) if window.form == form]
        batches += [own[first : first + n_windows] for first in range(0, len(own), n_windows)]
    for numbers in sorted(batches):
        some = [windows[number] for number in numbers]
        read = [read_scored(index, forms, window) for window in some]
        yield WindowBatch.of(read, some[0].form, [window.start for window in some])
