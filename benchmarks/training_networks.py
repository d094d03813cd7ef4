"""Labelled voxels per second that networks are trained on: slabs of labelled slices against batches of patches.

Both give the gradient of the same loss; a slab computes what neighbouring patches have in common once. Every contestant
draws its own windows, runs forward and backward and takes a step of Adam, through the code that `voxclf fit` runs. They
take turns, repetition by repetition, in one process, so that a busy machine slows them all; reported are ratios of the
same repetition, in processor time on one thread.

- patches, plain: as published, float32, channels first.
- patches, tuned: channels last, which is the fairer opponent: both are laid out alike, so the ratio is the slab's own.
- patches, bf16: autocast, with gradients computed as `voxclf/training/cpu_bfloat16.py` says.
- slabs, every 4th: the default. Fewest voxels per second, and the best score for the time, since they are least alike.
- slabs, dense: every voxel of the window.

Run: ``python benchmarks/training_networks.py`` (about five minutes on one core); ``--quick`` for 4conv alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from record import describe_run, markdown_table, publish

from voxclf.config import FitConfig
from voxclf.datasets import make_phantom
from voxclf.freed_memory import keep_freed_memory
from voxclf.labels import LabelSet
from voxclf.models.memory_layout import use_channels_last
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.registry import NETWORKS, build
from voxclf.progress import last
from voxclf.sampling import survey_labels
from voxclf.training.augment import build_augmentation
from voxclf.training.fit_torch import Classification
from voxclf.training.held_out import HeldOut
from voxclf.training.step_batches import as_tensors
from voxclf.training.window_plan import plan_windows
from voxclf.training.windows import LabelIndex, WindowReader, WindowSampler
from voxclf.volume import create_volume, open_volume

VOXEL_SIZE = (5.0, 5.0, 5.0)
SIZE = 128
LIBRARIES = ("numpy", "torch", "lightning")
NOTHING_HELD_OUT = HeldOut(0, -9, -9, 0, 0, 0, 0, 0)
TITLE = "Training on slabs against training on patches"
EXPLANATION = (
    "Labelled voxels per second of processor time, one thread, and how many times that of plain and of tuned patches "
    "in the same repetition: median (lowest to highest)."
)
COLUMNS = ("network", "windows", "per step", "arithmetic", "labelled voxels/s", "vs plain patches", "vs tuned patches")


@dataclass(frozen=True)
class Contestant:
    """One way to train."""

    name: str
    sampling: str
    batch: int
    window: int | None = None
    spacing: int = 4
    precision: str = "32"
    is_tuned: bool = True


CONTESTANTS = (
    Contestant("patches, plain", "patches", 64, is_tuned=False),
    Contestant("patches, tuned", "patches", 64),
    Contestant("patches, bf16", "patches", 64, precision="bf16"),
    Contestant("slabs, every 4th", "slabs", 12, window=17),
    Contestant("slabs, every 4th, bf16", "slabs", 12, window=17, precision="bf16"),
    Contestant("slabs, dense 32²", "slabs", 8, window=32, spacing=1),
    Contestant("slabs, dense 32², bf16", "slabs", 8, window=32, spacing=1, precision="bf16"),
    Contestant("slabs, dense 64², bf16", "slabs", 2, window=64, spacing=1, precision="bf16"),
)


# --- the job ---


def save_phantom(folder):
    """A phantom with labels on three crossing slices, on disk, as a user would have it."""
    phantom = make_phantom(SIZE, VOXEL_SIZE, 0)
    middle = SIZE // 2
    sparse = np.zeros_like(phantom.labels)
    for index in ((middle,), (slice(None), middle), (slice(None), slice(None), middle)):
        sparse[index] = phantom.labels[index]
    opened = []
    for name, array, kind in (("volume.zarr", phantom.image, "image"), ("labels.zarr", sparse, "labels")):
        volume = create_volume(folder / name, array.shape, 1, array.dtype, VOXEL_SIZE, kind=kind)
        volume.write((0, 0, 0), array[None])
        opened.append(open_volume(folder / name, kind=kind))
    return opened


def make_task(network_name, contestant, volume, labels):
    """The task that `voxclf fit` would train."""
    survey = last(survey_labels(labels, 0)).total
    label_set = LabelSet.from_ids(survey.counts)
    options = FitConfig(
        volume="-",
        labels="-",
        output="-",
        model=network_name,
        sampling=contestant.sampling,
        window=contestant.window,
        spacing=contestant.spacing,
        batch=contestant.batch,
        precision=contestant.precision,
    )
    torch.manual_seed(0)
    network = build(network_name, label_set.n_classes)
    if contestant.is_tuned:
        use_channels_last(network)
    index = LabelIndex(WindowReader(volume, labels, NetworkInput.measure(volume), label_set), survey)
    (windows,) = plan_windows(network, NETWORKS[network_name], options, volume)
    augment = build_augmentation("patch", VOXEL_SIZE)
    sampler = WindowSampler(index, NOTHING_HELD_OUT, windows.drawn, contestant.batch, "sqrt", 0, augment)
    return Classification(network, options, windows, sampler, index)


def run_step(task, optimizer, number):
    """One step; labelled voxels per second of processor time."""
    began = time.process_time()
    batch = as_tensors(task.draw(number))
    is_bf16 = task.options.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16) if is_bf16 else contextlib.nullcontext():
        loss = task.loss_of(batch)
    optimizer.zero_grad()
    task.backward(loss)
    optimizer.step()
    return task.n_labelled(batch) / (time.process_time() - began)


# --- the race ---


def race(network_name, volume, labels, repetitions):
    """Rates of every contestant, in turn."""
    tasks = [make_task(network_name, contestant, volume, labels) for contestant in CONTESTANTS]
    optimizers = [task.configure_optimizers() for task in tasks]
    rates = [[] for _ in tasks]
    for repetition in range(repetitions + 1):
        for task, optimizer, measured in zip(tasks, optimizers, rates, strict=True):
            rate = run_step(task, optimizer, repetition)
            if repetition:  # the first allocates and compiles
                measured.append(rate)
    return [row_of(network_name, c, r, rates) for c, r in zip(CONTESTANTS, rates, strict=True)]


def row_of(network_name, contestant, measured, rates):
    """A line of the table."""
    row = {
        "network": network_name,
        "windows": contestant.name,
        "per_step": contestant.batch,
        "precision": contestant.precision,
        "voxels_per_s": round(median(measured), 1),
    }
    for name, opponent in (("vs_plain", rates[0]), ("vs_tuned", rates[1])):
        ratios = [a / b for a, b in zip(measured, opponent, strict=True)]
        row[name] = [round(f(ratios), 2) for f in (median, min, max)]
    return row


def shown(row):
    """A line of the page."""
    rate = row["voxels_per_s"]
    cells = [f"{middle:.3g} ({low:.3g} to {high:.3g})" for middle, low, high in (row["vs_plain"], row["vs_tuned"])]
    values = (row["network"], row["windows"], row["per_step"], row["precision"], f"{rate:,.0f}", *cells)
    return dict(zip(COLUMNS, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4conv alone")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    facts = describe_run(LIBRARIES, threads=1)
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        volume, labels = save_phantom(Path(folder))
        rows = []
        for name in ("4conv",) if arguments.quick else ("3layer", "4conv", "dil"):
            rows += race(name, volume, labels, arguments.repetitions)
    publish("training_networks", TITLE, EXPLANATION, facts, rows, markdown_table(COLUMNS, map(shown, rows)))


if __name__ == "__main__":
    main()
