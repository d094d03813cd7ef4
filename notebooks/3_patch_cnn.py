# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A small network at every voxel
#
# **Question.** A patch network looks at a small cube and names the class of the voxel in its middle. Sliding it over a
# volume, patch after patch, is what made such networks slow. Can it be evaluated at every voxel exactly and fast? And
# does it beat the forest of [notebook 2](2_features_and_trees.ipynb) on this volume?
#
# **Data.** By default the built-in phantom, 96³ voxels of 5 nm with labels on one slice across each axis; models are
# scored on the rest, whose truth is known. `DATA = "vnc"` or `"flyem"` reads real volumes from `VOXCLF_DATA` and
# scores on their validation slices.
#
# **Answer.** Exactly, yes: probabilities agree to rounding with those of the patches, and come up to hundreds of times
# as fast. Whether it beats the forest is a matter of training time and of the network. After half a minute on the
# phantom the forest is ahead, though not everywhere: a few voxels away from any border both networks are wrong less
# often than it is. They lose on the borders themselves, and the network with pools, `4conv`, loses most. `dilres`,
# which has none, draws thin membranes nearly as sharply as the forest. On `vnc`, with membranes many voxels wide,
# `4conv` is the better of the two, and the forest ahead again. Before you judge on a volume of your own, give them ten
# minutes (`SECONDS`).

# %%
# %matplotlib inline
import csv
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image, Markdown
from scipy import ndimage

from voxclf import figures
from voxclf.config import EvaluateConfig, FitConfig, PredictConfig
from voxclf.datasets import make_phantom, write_phantom
from voxclf.engine.transfer import read_block
from voxclf.evaluate import evaluate
from voxclf.fit import fit_model
from voxclf.geometry import Region, make_block, parse_region
from voxclf.models.dense import densify, inspect_geometry, tune_for_inference
from voxclf.models.registry import build, default_patch
from voxclf.predict import predict_volume
from voxclf.summary import format_certificate, score_evaluation
from voxclf.volume import open_labels, open_volume

# %% tags=["parameters"]
DATA = "phantom"  # or "vnc", "flyem"
SECONDS = 25  # training time of each network; real volumes want 600
WIDTH = 0.5  # factor on the numbers of channels: half of the published ones, a quarter of the work

# %%
output = Path(tempfile.mkdtemp())
if DATA == "phantom":
    write_phantom(output, make_phantom(96))
    volume, labels, validation = (output / name for name in ("volume.tif", "labels.toml", "unseen.tif"))
    # Narrow filters leave room in so small a cube for the gap that the forest's honest score needs.
    stated, named, forest = {}, {}, {"sigmas": (4, 8)}
    region, thin, shown = ":,:,:", "cell membrane", 30
    patch = (16, 16, 16)  # half the published side: more steps in little time
else:
    folder = Path(os.environ.get("VOXCLF_DATA", "../../shared/data")) / DATA
    volume, labels, validation = (folder / name for name in ("raw.tif", "labels_sparse.tif", "labels_val.tif"))
    voxel_size, classes, region, thin, shown = {
        "vnc": (
            (50, 4.6, 4.6),
            "membrane,glia,mitochondrion,synapse,intracellular",
            "12:16,256:768,256:768",
            "membrane",
            14,
        ),
        "flyem": ((10, 10, 10), "interior,boundary", "130:160,:,:", "boundary", 145),
    }[DATA]
    stated, named, forest = {"voxel_size": voxel_size}, {"classes": classes}, {}
    patch = default_patch("4conv", voxel_size)
em = open_volume(volume, stated.get("voxel_size"))
truth = open_labels(validation, em.shape)
box = parse_region(region, em.shape)
inputs = {"volume": str(volume), **stated}

# %% [markdown]
# ## What the network looks at
#
# `4conv` has four convolutions and three pools. Reading down the table, the patch shrinks until one voxel is left, the
# answer for the centre; kernels are 1 where fewer than 3 voxels are left. "Sees" is the receptive field: how many
# voxels of the volume have a part in one number there.
#
# The last two columns are the point. Patch by patch, every number in the patch is computed for one answer. But the
# next patch lies one voxel further and has nearly all of these numbers as well. Computed once for all patches, each
# layer has one number per voxel and channel, whatever the extent.

# %%
rows, totals = [], {}
for name in ("4conv", "dilres"):
    dense = densify(build(name, 6, patch, width=WIDTH), patch)
    n_channels, totals[name] = 1, np.zeros(2)
    for operation, reach in zip(dense.operations, dense.reaches[1:], strict=True):
        if operation.kind not in ("convolution", "max_pool", "average_pool"):
            continue
        work = np.zeros(2)
        if operation.kind == "convolution":
            n_channels = operation.target.weight.shape[0]
            work = operation.target.weight.numel() * np.array([np.prod(reach.extent), 1])
        totals[name] += work
        kernel, extent, sees = (
            "×".join(map(str, n)) for n in (operation.window.kernel, reach.extent, [n + 1 for n in reach.lost])
        )
        dilation = max(operation.window.dilation)
        layer = f"{operation.kind.replace('_', ' ')} {kernel}" + (f", dilation {dilation}" if dilation > 1 else "")
        rows.append(
            f"| {name} | {layer} | {n_channels} | {extent} | {sees} | "
            + (" | ".join(f"{n:,.0f}" for n in work) if work.any() else "| ")
            + " |"
        )
head = (
    "| network | layer | channels | left of the patch | sees | multiplications per voxel, patch by patch | dense |\n"
    "|---|---|--:|--:|--:|--:|--:|\n"
)
sums = ", ".join(f"{by_patch / dense:.0f} times less for `{name}`" for name, (by_patch, dense) in totals.items())
Markdown(head + "\n".join(rows) + f"\n\nDense is {sums}.")

# %% [markdown]
# `dilres` has no pools: its kernels spread out instead (dilation), and each pair of convolutions adds to what it was
# given, so that the centre voxel itself is carried through to the end.
#
# Pools are no obstacle to the dense form. A patch that starts one voxel further has its pooled voxels between those of
# its neighbour, and all of them are computed side by side. Padding is one: within a patch it puts zeros where a volume
# has voxels, so overlapping patches share no numbers. Such networks are refused by name:

# %%
problems = inspect_geometry(build("4res", 6, 32), 32).problems
Markdown(f"> `4res` is not exact: {problems[0]} (and {len(problems) - 1} layers more).")

# %% [markdown]
# ## Train on three slices
#
# The forest on the filter bank, and both networks for the same few seconds. All of them learn from the same slices.

# %%
training = {
    "time": SECONDS,
    "width": WIDTH,
    "patch": patch,
    # Small steps from many places, and a step size that rises and falls, make the most of little time.
    "batch": 4,
    "schedule": "one_cycle",
    "learning_rate": 0.003,
    "class_weights": "sqrt",
    "patience": 1000,
}
fitted = {
    name: fit_model(FitConfig(**inputs, labels=str(labels), output=str(output / name), model=name, **named, **options))
    for name, options in {
        "random_forest": {**forest, "samples": 30_000, "folds": 2},
        "4conv": training,
        "dilres": training,
    }.items()
}

# %% [markdown]
# After every round the network is scored on a slab of the labels that it does not learn from, and the best round is
# kept. The forest's line is its own honest score, from other slabs of the same labels: a mark to aim at, no comparison.
# That follows below, on one set of voxels for all.

# %%
curves = []
for name in ("4conv", "dilres"):
    with (fitted[name].folder / "history.csv").open() as file:
        rounds = list(csv.DictReader(file))
    columns = [[float(entry[column]) for entry in rounds] for column in ("seconds", "validation_macro_f1")]
    curves.append(figures.Curve(name, *columns))
honest = fitted["random_forest"].cross_validation.honest.scores.macro_f1
curves.append(figures.Curve("random_forest", [0, max(curves[0].x + curves[1].x)], [honest] * 2))
figures.draw_curves(curves, "seconds of training", "macro F1 on held-out labels")

# %% [markdown]
# ## The same answers, patch by patch and at once
#
# The trained `4conv` on a tile of 12³ voxels of the volume, in three ways: the plain network on 1,728 patches, every
# number once, and that again tuned for prediction (batch norm merged into convolutions, the faster of two memory
# layouts), which is what `predict` runs. Each is run twice and the second time counts.

# %%
model = fitted["4conv"].model
side = tuple(min(12, n) for n in em.shape)
start = tuple(n // 2 - s // 2 for n, s in zip(em.shape, side, strict=True))
tile = Region(start, tuple(a + s for a, s in zip(start, side, strict=True)))
around = read_block(em, make_block(0, tile, model.patches.halo))[0]
# Where a patch's length is even, the last voxel's patch ends one voxel before the halo does.
around = around[tuple(slice(0, n + p - 1) for n, p in zip(side, patch, strict=True))]
channels = torch.from_numpy(model.inputs.compute(around))[None]
tuned = tune_for_inference(model.network, patch, tile=side)
needed = channels[(..., *(slice(0, n) for n in tuned.input_shape(side)))]
patches = channels[0, 0].unfold(0, patch[0], 1).unfold(1, patch[1], 1).unfold(2, patch[2], 1)
patches = patches.reshape(-1, 1, *patch)
ways = {
    "patch by patch": lambda: torch.cat([model.network(part).softmax(1) for part in patches.split(16)]),
    "dense": lambda: densify(model.network, patch)(needed).softmax(1)[0].flatten(1).T,
    "dense, tuned": lambda: tuned(needed).softmax(1)[0].flatten(1).T,
}
answers, seconds = {}, {}
with torch.inference_mode():
    for name, classify in ways.items():
        for _ in range(2):
            started = time.perf_counter()
            answers[name] = classify()
            seconds[name] = time.perf_counter() - started
rows = [
    f"| {name} | {s:.3f} | {len(patches) / s:,.0f} | {(answers[name] - answers['patch by patch']).abs().max():.1g} |"
    for name, s in seconds.items()
]
Markdown("| | seconds | voxels/s | largest difference of a probability |\n|---|--:|--:|--:|\n" + "\n".join(rows))

# %% [markdown]
# The difference is rounding of float32. And this is a small tile: most of what was computed is the border around it,
# as wide as the patch. On larger tiles the border weighs less:

# %%
rows = []
for n in (16, 32, 64):
    block = torch.zeros(1, 1, *tuned.input_shape((n, n, n)))
    with torch.inference_mode():
        tuned(block)
        started = time.perf_counter()
        n_voxels = tuned(block)[0, 0].numel()
        rate = n_voxels / (time.perf_counter() - started)
    rows.append(f"| {n} | {n_voxels / block.numel():.0%} | {rate:,.0f} |")
Markdown("| side of the tile | share of it in the input | voxels/s |\n|--:|--:|--:|\n" + "\n".join(rows))

# %% [markdown]
# ## Every voxel, with a certificate
#
# `predict` reads the volume in blocks. Every block's prediction is compared with the definition: up to 16 of its
# voxels, half of them where blocks meet, are classified again by the plain network on the patch around that voxel
# alone. Were a halo one voxel short, a seam would show here, and the run would stop.

# %%
predicted, rates = {}, {}
for name in fitted:
    started = time.perf_counter()
    predicted[name] = predict_volume(
        PredictConfig(
            **inputs, model=str(output / name), output=str(output / f"{name} predicted"), region=region, pyramid=False
        )
    )
    rates[name] = box.n_voxels / (time.perf_counter() - started)
certificates = [f"{name:<8}{format_certificate(predicted[name].certificate)}" for name in ("4conv", "dilres")]
Markdown("```\n" + "\n".join(certificates) + "\n```")

# %% [markdown]
# ## Does it beat the forest?
#
# On voxels that none of them has seen. Brackets: 95 % interval, from redrawing pieces of the volume.

# %%
label_set = predicted["4conv"].label_set
scored = {
    name: score_evaluation(evaluate(EvaluateConfig(prediction=str(one.folder), labels=str(validation))))
    for name, one in predicted.items()
}
rows = []
for name, one in scored.items():
    spread, scores = one.intervals["macro_f1"], one.scores
    rows.append(
        f"| {name} | **{scores.macro_f1:.3f}** ({spread.low:.3f} to {spread.high:.3f}) | {scores.mean_iou:.3f} | "
        f"{scores.macro_average_precision:.3f} | {sum(fitted[name].seconds.values()):.0f} | {rates[name]:,.0f} |"
    )
head = "| | macro F1 | mean IoU | average precision | fit, s | voxels/s |\n|---|---|--:|--:|--:|--:|\n"
Markdown(head + "\n".join(rows))

# %%
rows = [
    f"| {name} | " + " | ".join(f"{scored[model].scores.f1[k]:.3f}" for model in scored) + " |"
    for k, name in enumerate(label_set.names)
]
Markdown(f"| F1 of | {' | '.join(scored)} |\n|---|{'--:|' * len(scored)}\n" + "\n".join(rows))

# %% [markdown]
# One plane. Under "differences", only voxels predicted wrongly are coloured, by the class they were given.

# %%
start = (shown, *box.start[1:])
stop = (shown + 1, *(min(b, a + 192) for a, b in zip(box.start[1:], box.stop[1:], strict=True)))
image, true = em.read(start, stop)[0, 0], label_set.remap_to_indices(truth.read(start, stop)[0, 0])
views = [
    figures.PlaneView(
        f"{name}\n" if name == "random_forest" else name,
        image,
        true,
        label_set.remap_to_indices(open_volume(one.folder / "labels.zarr", kind="labels").read(start, stop)[0, 0]),
        em.voxel_size_nm[1:],
    )
    for name, one in predicted.items()
]
Image(figures.render_jpeg(figures.draw_overlays(views, label_set), dpi=80))

# %% [markdown]
# ## What pools do to thin boundaries
#
# A pool keeps the strongest of eight voxels and forgets which one it was. Where a boundary is two voxels thick, that is
# what had to be known. How probable each model finds the thin class in this plane, white being sure:

# %%
k = label_set.names.index(thin)
panels = [figures.PlaneView("image", image, None, None, em.voxel_size_nm[1:])]
for name, one in predicted.items():
    probability = open_volume(one.folder / "probabilities.zarr").read(start, stop)[k, 0]
    panels.append(figures.PlaneView(f"{name}: {thin}", probability, None, None, em.voxel_size_nm[1:]))
Image(figures.render_jpeg(figures.draw_montage(panels, None), dpi=80))

# %% [markdown]
# And how wrong they are, by the distance from the nearest border between two classes:

# %%
there = truth.read(box.start, box.stop)[0]
# Borders within planes of fine voxels only: from one thick slice to the next, hardly any voxel keeps its class.
around = [3 if size == min(em.voxel_size_nm) else 1 for size in em.voxel_size_nm]
lowest = ndimage.minimum_filter(np.where(there > 0, there, 255), around)
is_border = (there > 0) & (ndimage.maximum_filter(there, around) != lowest)
distance = ndimage.distance_transform_edt(~is_border, sampling=em.voxel_size_nm) / min(em.voxel_size_nm)
bins = np.arange(8)
curves = []
for name, one in predicted.items():
    labels_there = open_volume(one.folder / "labels.zarr", kind="labels").read(box.start, box.stop)[0]
    is_wrong = [(labels_there != there)[(there > 0) & (distance >= n) & (distance < n + 1)].mean() for n in bins]
    curves.append(figures.Curve(name, bins.tolist(), is_wrong))
figures.draw_curves(curves, "voxels from the nearest border", "share of wrong voxels")

# %% [markdown]
# The thin class in numbers: how pure it is, how complete, and how much of it there is.

# %%
rows = []
for name, one in scored.items():
    s = one.scores
    found = one.tables.confusion[:, k].sum() / one.tables.confusion[k].sum()
    rows.append(f"| {name} | {s.precision[k]:.3f} | {s.recall[k]:.3f} | {s.f1[k]:.3f} | {found:.2f} |")
head = f"| {thin} | precision | recall | F1 | volume against the true one |\n|---|--:|--:|--:|--:|\n"
Markdown(head + "\n".join(rows))
