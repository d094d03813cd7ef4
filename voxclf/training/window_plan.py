"""Which windows a network is trained and scored on: patches, crops, or slabs of the size that suits the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from voxclf.config import FitOptions
from voxclf.geometry import VoxelSize, Zyx, round_up
from voxclf.models.dense import inspect_geometry
from voxclf.models.registry import NetworkInfo
from voxclf.models.segmenter import ISOTROPIC_WITHIN
from voxclf.progress import Progress, silent
from voxclf.training.windows import (
    WindowForm,
    WindowSampler,
    crop_form,
    effective_count,
    patch_form,
    slab_forms,
    window_side,
)
from voxclf.volume import Volume

CROP_SIDE, SECTION_SIDE, FLAT_CROP_SIDE = 64, 128, 256
"""Side of a segmenter's training crop: where voxels are cubes, within thick sections, and of a single section."""
MANY_SLABS, FEW_SLABS = (12, 17), (4, 33)
"""Training slabs in a step, and their side, voxels. A label of a larger one is cheaper, but where classes lie in clumps
it says little that its neighbours do not: there a step learns more from a dozen places. Where the labels of large ones
are worth more, they scored higher (flyem, isbi2012), else no higher or lower (vnc, cdeep3m_mito)."""
COMPARED_WINDOWS = 2400
"""Windows drawn to tell what their labels are worth: to about 3 %."""
SCORED_SIDE = 64
"""Side of a slab that is only scored."""
PATCHES, CROPS = 64, 2
"""Patches or crops in a step."""
CROP_MARGIN = 8
"""A scored crop of a segmenter gives its labels up to an eighth of its length from its faces: context lacks there."""


@dataclass(frozen=True)
class WindowPlan:
    """Which windows a network is trained and scored on.

    Parameters
    ----------
    kind, scored_kind : "slabs", "patches" or "crops"
    drawn, scored : tuple of WindowForm
    sight : (z, y, x)
        How far the network sees, from end to end.
    batch : int
        Windows in a step.
    final : tuple of WindowForm
        What is drawn in the last third of the training, where that is something else.
    """

    kind: str
    drawn: tuple[WindowForm, ...]
    scored_kind: str
    scored: tuple[WindowForm, ...]
    sight: Zyx
    batch: int
    final: tuple[WindowForm, ...] = ()


def plan_windows(network: nn.Module, info: NetworkInfo, options: FitOptions, volume: Volume) -> tuple[WindowPlan, ...]:
    """The windows that suit a network: one plan, or for slabs those of many small and few large ones to choose from."""
    if info.kind == "segmenter":
        shape = options.patch or crop_shape(network, options.window, volume.voxel_size_nm)
        return (_plan_crops(shape, options.batch or CROPS, options.final_patch),)
    patch: Zyx = tuple(network.patch)
    if not info.is_exact:
        form = (patch_form(patch),)
        return (WindowPlan("patches", form, "patches", form, patch, options.batch or PATCHES),)
    geometry = inspect_geometry(network, patch)
    sight = geometry.receptive_field
    scored = slab_forms(patch, sight, window_side(SCORED_SIDE, volume.voxel_size_nm))
    if options.sampling == "patches":
        return (WindowPlan("patches", (patch_form(patch),), "slabs", scored, sight, options.batch or PATCHES),)
    z, y, x = (math.gcd(stride, options.spacing) for stride in geometry.strides)
    choices = (MANY_SLABS, FEW_SLABS) if options.window is None else ((MANY_SLABS[0], options.window),)
    plans = []
    for batch, side in choices:
        drawn = slab_forms(patch, sight, window_side(side, volume.voxel_size_nm), (z, y, x))
        plans.append(WindowPlan("slabs", drawn, "slabs", scored, sight, options.batch or batch))
    return tuple(plans)


def choose_windows(
    plans: Sequence[WindowPlan], samplers: Sequence[WindowSampler], progress: Progress = silent
) -> tuple[WindowPlan, WindowSampler]:
    """The plan whose labels are worth most for what they cost, and its sampler. Reads labels only, for a second."""
    if len(plans) == 1:
        return plans[0], samplers[0]
    worth = [_labels_worth(sampler, progress) for sampler in samplers]
    best = worth.index(max(worth))
    return plans[best], samplers[best]


def _labels_worth(sampler: WindowSampler, progress: Progress) -> float:
    """How many labels, drawn one by one, those of windows are worth per voxel of the windows' image."""
    n_steps = -(-COMPARED_WINDOWS // sampler.n_windows)
    counted = progress("choose windows", sampler.count_labels(n_steps), n_steps, "step")
    counts, n_image = zip(*counted, strict=True)
    return effective_count(np.concatenate(counts)) / sum(n_image)


def crop_shape(network: Any, side: int | None, voxel_size_nm: VoxelSize) -> Zyx:
    """Shape of a segmenter's training crops, a multiple of its divisor.

    Parameters
    ----------
    network : Segmenter
        A network of sections has ``section_axes``; if it cuts along one axis only, its crops are single sections.
    side : int, optional
        Along the finest axis, voxels; the same length in nm along the others. By default one that trains on two cores,
        twice as wide as thick where sections are thick.
    voxel_size_nm : (z, y, x)
    """
    sections = getattr(network, "section_axes", (0, 1, 2))
    is_flat = len(sections) == 1
    thick = [size >= ISOTROPIC_WITHIN * min(voxel_size_nm) for size in voxel_size_nm]
    widest = FLAT_CROP_SIDE if is_flat else SECTION_SIDE if any(thick) else CROP_SIDE
    across, within = window_side(side or CROP_SIDE, voxel_size_nm), window_side(side or widest, voxel_size_nm)
    shape = []
    for axis, divisor in enumerate(network.divisor):
        if is_flat and axis in sections:
            shape.append(1)
        elif thick[axis]:
            shape.append(round_up(across[axis], divisor))
        else:  # two or more at the coarsest level: batch norm needs several voxels there
            shape.append(max(round_up(within[axis], divisor), 2 * divisor))
    z, y, x = shape
    return z, y, x


def _plan_crops(shape: Zyx, batch: int, final: Zyx | None) -> WindowPlan:
    z, y, x = (n // CROP_MARGIN for n in shape)
    # How far a segmenter sees in effect is less than its crop; half of it parts what was held out well enough.
    sight_z, sight_y, sight_x = (-(-n // 2) for n in shape)
    scored = (crop_form(shape, (z, y, x)),)
    later = () if final is None else (crop_form(final),)
    return WindowPlan("crops", (crop_form(shape),), "crops", scored, (sight_z, sight_y, sight_x), batch, later)
