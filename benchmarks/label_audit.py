"""Does ``voxclf audit`` find wrong labels? Plants 50 errors in the dense labels of a real volume and looks for them.

- one slice gets the labels of its neighbour: off by one;
- in the other slices, 49 small regions (200 to 3,000 voxels of one slice) get another class, drawn at random. Their
  true class is drawn evenly among the classes, so rare and hard ones count as much as cytoplasm. They are whole pieces
  as drawn (a mitochondrion, a strip of glia) or round spots cut out of a piece.

An error counts as found if a finding among the first 100 points at a voxel of it, or names the slice and its shift. A
finding elsewhere counts as none, although some are errors that were in the labels before.

Run: ``python benchmarks/label_audit.py --data DATA`` (about four minutes a seed on two cores); ``--seeds 3``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import tifffile
from record import BENCHMARKS, describe_run, markdown_table, publish
from scipy import ndimage

from voxclf.audit import Audit, audit_labels
from voxclf.config import AuditConfig, make_config

LIBRARIES = ("numpy", "scipy", "scikit-learn", "connected-components-3d")
TITLE = "Planted label errors found by the audit"
EXPLANATION = (
    "50 errors planted in the labels of vnc, slices 0 to 11: one slice off by one, 49 regions of 200 to 3,000 voxels "
    "with another class. Found: pointed at by one of the first findings of the list. Right class: of the regions found "
    "in the top 100, those whose suggested class is the true one. The list also holds what was wrong, or hard, before."
)
FOUND = ("found in top 50", "found in top 100", "of")
COLUMNS = ("seed", *FOUND, "spots", "whole pieces", "slice", "right class", "seconds")
VOXEL_SIZE_NM = (50.0, 4.6, 4.6)
N_ERRORS, TOP = 50, 100
LEAST, MOST = 200, 3_000
SPOT_RADII = (10, 25)
APART = 5


@dataclass(frozen=True)
class PlantedRegion:
    """A region whose class was changed; ``voxels`` is (N, 3), zyx."""

    kind: str
    voxels: np.ndarray
    true: int
    given: int


@dataclass(frozen=True)
class Planted:
    """Labels with errors, and what the errors are: the labels of ``slice_`` are those of ``slice_ + shift``."""

    labels: np.ndarray
    slice_: int
    shift: int
    regions: tuple[PlantedRegion, ...]


def plant_errors(labels: np.ndarray, n_errors: int, rng: np.random.Generator) -> Planted:
    """Change labels (Z, Y, X), 0 = unlabelled, in ``n_errors`` places."""
    changed = labels.copy()
    slices = np.flatnonzero(labels.any(axis=(1, 2)))
    moved, shift = int(rng.choice(slices[1:-1])), int(rng.choice([-1, 1]))
    changed[moved] = labels[moved + shift]
    taken = np.zeros(labels.shape, bool)
    taken[moved] = True
    classes = [int(c) for c in np.unique(labels) if c]
    regions: list[PlantedRegion] = []
    while len(regions) < n_errors - 1:
        z, true = int(rng.choice(slices)), int(rng.choice(classes))
        kind, mask = draw_region(labels[z] == true, rng)
        if not LEAST <= mask.sum() <= MOST or taken[z][ndimage.binary_dilation(mask, iterations=APART)].any():
            continue
        given = int(rng.choice([c for c in classes if c != true]))
        changed[z][mask] = given
        taken[z] |= mask
        inside = np.argwhere(mask)
        regions.append(PlantedRegion(kind, np.column_stack([np.full(len(inside), z), inside]), true, given))
    return Planted(changed, moved, shift, tuple(regions))


def draw_region(is_class: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A piece of one class around a random voxel of it: all of it, or a round spot."""
    candidates = np.argwhere(is_class)
    if not len(candidates):
        return "spot", np.zeros_like(is_class)
    y, x = candidates[rng.integers(len(candidates))]
    pieces = cc3d.connected_components(is_class, connectivity=4)
    piece = pieces == pieces[y, x]
    if rng.random() < 0.5 and piece.sum() <= MOST:
        return "piece", piece
    rows, columns = np.ogrid[: piece.shape[0], : piece.shape[1]]
    spot = piece & ((rows - y) ** 2 + (columns - x) ** 2 <= int(rng.integers(*SPOT_RADII)) ** 2)
    pieces = cc3d.connected_components(spot, connectivity=4)
    return "spot", pieces == pieces[y, x]


def score(audit: Audit, planted: Planted) -> dict[str, Any]:
    """Compare the list with what was planted."""
    number = np.full(planted.labels.shape, -1, np.int32)
    for i, region in enumerate(planted.regions):
        number[tuple(region.voxels.T)] = i
    shifts = [(s.axis, s.position, s.shift) for s in audit.shifts]
    slice_found = (0, planted.slice_, planted.shift) in shifts
    # Shifts head the list.
    hits = [-1] * len(shifts) + [int(number[found.position]) for found in audit.regions]
    first: dict[int, int] = {}
    for rank, hit in enumerate(hits[:TOP]):
        if hit >= 0:
            first.setdefault(hit, rank)
    ids = audit.label_set.ids
    right = sum(
        ids[audit.regions[rank - len(shifts)].suggested] == planted.regions[i].true for i, rank in first.items()
    )

    def share(kind: str) -> str:
        of_kind = [i for i, region in enumerate(planted.regions) if region.kind == kind]
        return f"{sum(i in first for i in of_kind)} of {len(of_kind)}"

    return {
        "found in top 50": sum(rank < 50 for rank in first.values()) + slice_found,
        "found in top 100": len(first) + slice_found,
        "of": len(planted.regions) + 1,
        "spots": share("spot"),
        "whole pieces": share("piece"),
        "slice": "found" if slice_found else f"missed ({len(shifts)} others named)",
        "right class": f"{right} of {len(first)}",
    }


def run_seed(data: Path, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Plant, audit and score once."""
    planted = plant_errors(tifffile.imread(data / "labels_train.tif"), N_ERRORS, np.random.default_rng(seed))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "labels.tif"
        tifffile.imwrite(path, planted.labels, compression="zlib")
        inputs = {"volume": str(data / "raw.tif"), "labels": str(path), "voxel_size": VOXEL_SIZE_NM}
        outputs = {"output": str(Path(scratch) / "audit"), "top": TOP, "seed": seed}
        started = time.perf_counter()
        audit = audit_labels(make_config(AuditConfig, {**inputs, **outputs, **options}))
        seconds = time.perf_counter() - started
        return {"seed": seed, **score(audit, planted), "seconds": round(seconds)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plant label errors in a real volume and see which the audit finds.")
    default = os.environ.get("VOXCLF_DATA", BENCHMARKS.parents[1] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default), help="folder that holds vnc/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    asked = parser.parse_args(arguments)
    facts = describe_run(LIBRARIES)
    rows = []
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        rows.append(run_seed(asked.data / "vnc", seed, {}))
        print(rows[-1], flush=True)
    if not asked.dry:
        publish("label_audit", TITLE, EXPLANATION, facts, rows, markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
