"""How often a 95 % interval holds the truth: the honest score's, and the naive split's beside it.

Each draw is another phantom. A model is fitted on labelled slices of it, as ``voxclf fit`` does, which gives the honest
score with its interval and the naive score. The truth is the score of the saved model over all voxels of the phantom,
labelled or not. An interval that keeps its promise holds the truth in 95 of 100 draws.

- cross: one slice each across z, y and x, through the middle.
- parallel: three slices across z.

The naive score's interval is the one a random split suggests: voxels are redrawn as if they were independent.

Models are small (10 trees, one scale, whose filters see 6 voxels) and so are phantoms. Voxels of 10 nm put as much
tissue into one as that allows: with a handful of synapses, macro F1 is a matter of luck that no interval can know.
Every draw is kept in a file as it is made, and a second call goes on where the first stopped.

Run: ``python benchmarks/interval_coverage.py`` (about half an hour on one core); ``--draws 5`` for a look.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from record import RESULTS, describe_run, markdown_table, publish

from voxclf.config import FitConfig, make_config
from voxclf.datasets import Phantom, make_phantom
from voxclf.fit import FitResult, fit_model
from voxclf.metrics.voxelwise import ScoreTables, score_batch, score_block, score_tables
from voxclf.models.trees import TreeModel
from voxclf.volume import create_volume

VOXEL_SIZE = (10.0, 10.0, 10.0)
SIZE = 128
LAYOUTS = ("cross", "parallel")
OPTIONS = {"sigmas": "10", "trees": 10, "samples": 15_000, "executor": "serial"}
SHOWN = {"macro_f1": "macro F1", "mean_iou": "mean IoU", "accuracy": "accuracy", "kappa": "kappa"}
SLAB = 32
N_REDRAWN = 500
LIBRARIES = ("numpy", "scipy", "scikit-learn", "numba")
TITLE = "How often 95 % intervals hold the truth"
EXPLANATION = (
    "Held: share of draws whose interval holds the score of the model over all voxels of the phantom; in brackets what "
    "that share itself could be (Wilson, 95 %). Off: mean of score minus truth. Width: mean width of the interval. "
    "Honest: `voxclf fit`'s cross-validation over slabs with its spatial bootstrap. Naive: one in five labelled voxels "
    "held out at random, voxels redrawn as if independent."
)
COLUMNS = (
    "labels",
    "score",
    "draws",
    "truth",
    "honest off",
    "honest held",
    "honest width",
    "naive off",
    "naive held",
    "naive width",
)

# --- one draw ---


def labelled_slices(phantom: Phantom, layout: str) -> np.ndarray:
    """Labels on some slices of a phantom, 0 elsewhere."""
    labels = np.zeros_like(phantom.labels)
    if layout == "cross":
        for axis, n in enumerate(labels.shape):
            place = [slice(None)] * 3
            place[axis] = slice(n // 2, n // 2 + 1)
            labels[tuple(place)] = phantom.labels[tuple(place)]
    else:
        places = [len(labels) * part // 6 for part in (1, 3, 5)]
        labels[places] = phantom.labels[places]
    return labels


def fit_on(phantom: Phantom, labels: np.ndarray, folder: Path, seed: int) -> FitResult:
    """Fit through files, as the command does."""
    for name, array, kind in (("volume", phantom.image, "image"), ("labels", labels, "labels")):
        volume = create_volume(folder / f"{name}.zarr", array.shape, 1, array.dtype, VOXEL_SIZE, kind=kind)
        volume.write((0, 0, 0), array[None])
    asked = {"volume": str(folder / "volume.zarr"), "labels": str(folder / "labels.zarr"), "output": str(folder / "m")}
    return fit_model(make_config(FitConfig, {**asked, **OPTIONS, "seed": seed}))


def score_everywhere(model: TreeModel, phantom: Phantom) -> ScoreTables:
    """The model's score over every voxel of the phantom, slab by slab."""
    step = model.step()
    padded = np.pad(phantom.image, [(h, h) for h in step.halo], mode="symmetric")
    tables = ScoreTables.zeros(model.label_set.n_classes)
    for z in range(0, len(phantom.image), SLAB):
        probabilities = step(padded[None, z : z + SLAB + 2 * step.halo[0]])
        truth = model.label_set.remap_to_indices(phantom.labels[z : z + SLAB])
        tables = tables + score_block(truth, probabilities, None, model.label_set.n_classes)
    return tables


def redraw_voxels(tables: ScoreTables, seed: int) -> dict[str, tuple[float, float]]:
    """Intervals as if voxels were independent: percentiles over confusion matrices drawn from the observed one."""
    n, shares = tables.n_voxels, tables.confusion.ravel() / tables.n_voxels
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=N_REDRAWN).reshape(-1, *tables.confusion.shape)
    no_levels = np.zeros((*drawn.shape[:-1], 2), np.int64)
    scores = score_batch(drawn, no_levels, no_levels, tables.support > 0)
    return {name: tuple(np.quantile(scores[name], [0.025, 0.975]).tolist()) for name in SHOWN}


def draw(layout: str, seed: int, size: int) -> dict[str, Any]:
    """Truth, and both scores with their intervals, on one phantom."""
    phantom = make_phantom(size, VOXEL_SIZE, seed)
    with tempfile.TemporaryDirectory() as scratch:
        result = fit_on(phantom, labelled_slices(phantom, layout), Path(scratch), seed)
    truth = score_tables(score_everywhere(result.model, phantom))
    honest, naive = result.cross_validation.honest, result.cross_validation.naive
    naive_intervals = redraw_voxels(naive.tables, seed)
    values: dict[str, Any] = {"layout": layout, "seed": seed, "size": size, "note": honest.note}
    for name in SHOWN:
        interval = honest.intervals[name]
        values[name] = {
            "truth": getattr(truth, name),
            "honest": interval.value,
            "honest_interval": [interval.low, interval.high],
            "naive": getattr(naive.scores, name),
            "naive_interval": list(naive_intervals[name]),
        }
    return values


# --- all draws ---


def draws_so_far(kept: Path, size: int) -> list[dict[str, Any]]:
    """Read the draws of an earlier call."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    return [found for found in map(json.loads, lines) if found["size"] == size]


def go_on(kept: Path, layouts: list[str], n_draws: int, size: int) -> list[dict[str, Any]]:
    """Make the draws that are missing, one layout after the other in turn, so that a stopped run is balanced."""
    found = draws_so_far(kept, size)
    done = {(one["layout"], one["seed"]) for one in found}
    for seed in range(n_draws):
        for layout in layouts:
            if (layout, seed) not in done:
                found.append(draw(layout, seed, size))
                with kept.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
                print(layout, seed, found[-1]["macro_f1"], flush=True)
    return [one for one in found if one["layout"] in layouts and one["seed"] < n_draws]


def wilson(n_held: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    middle = (n_held + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(n_held * (n - n_held) / n + z**2 / 4)
    return middle - half, middle + half


def summarise(found: list[dict[str, Any]], layouts: list[str]) -> Iterator[dict[str, Any]]:
    """A row per layout and score."""
    for layout in layouts:
        for name, title in SHOWN.items():
            parts = [one[name] for one in found if one["layout"] == layout]
            truth = np.array([part["truth"] for part in parts])
            row: dict[str, Any] = {
                "labels": layout,
                "score": title,
                "draws": len(parts),
                "truth": f"{truth.mean():.3f}",
            }
            for kind in ("honest", "naive"):
                low, high = np.array([part[f"{kind}_interval"] for part in parts]).T
                held = int(((low <= truth) & (truth <= high)).sum())
                least, most = wilson(held, len(parts))
                off = np.mean([part[kind] for part in parts] - truth)
                row |= {
                    f"{kind} off": f"{off:+.3f}",
                    f"{kind} held": f"{held / len(parts):.0%} ({least:.0%} to {most:.0%})",
                    f"{kind} width": f"{np.mean(high - low):.3f}",
                }
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=40, help="phantoms per layout")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--size", type=int, default=SIZE, help="edge of a phantom, voxels")
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "interval_coverage.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, phantom=f"{arguments.size}³ of {VOXEL_SIZE[0]:g} nm", **OPTIONS)
    layouts = arguments.layouts.split(",")
    found = go_on(arguments.kept, layouts, arguments.draws, arguments.size)
    rows = list(summarise(found, layouts))
    table = markdown_table(COLUMNS, rows)
    publish("interval_coverage", TITLE, EXPLANATION, facts, [*rows, *found], table, arguments.output)


if __name__ == "__main__":
    main()
