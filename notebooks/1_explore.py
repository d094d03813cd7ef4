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
# # Look before you train
#
# **Question.** You have a volume of electron microscopy and labels on a few slices. Before any model is trained: what
# is labelled, and how evenly? Do grey values separate the classes? Is the volume sound? Will these few slices do?
#
# **Data.** By default the built-in phantom: a made-up piece of brain tissue of 96³ voxels of 5 nm, with labels on one
# slice across each axis. Set `DATA` to `"vnc"` (ssTEM of fly nerve cord, three labelled slices) or `"flyem"` (FIB-SEM
# of fly medulla, three crossing slices) to read real volumes from the folder `VOXCLF_DATA`.
#
# **Answer.** More than half of the labelled voxels belong to one class, and some classes have next to none. Nearly all
# statistical tests say that grey values differ between classes, as tests of this many voxels do. The effect sizes say
# which pairs really differ, and the best rule on grey values alone shows how far that carries: not far enough. Texture
# and surroundings have to do the rest ([notebook 2](2_features_and_trees.ipynb)). The learning curve at the end says
# what another labelled slice would bring.
#
# `voxclf explore VOLUME LABELS -o OUT` writes all of this as one page.

# %%
# %matplotlib inline
import os
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import Image, Markdown

from voxclf import figures
from voxclf.config import ExploreConfig
from voxclf.datasets import make_phantom, write_phantom
from voxclf.explore import explore
from voxclf.explore.data_warnings import find_warnings
from voxclf.explore.montage import cut_montage

# %% tags=["parameters"]
DATA = "phantom"  # or "vnc", "flyem"

# %%
if DATA == "phantom":
    folder = Path(tempfile.mkdtemp())
    write_phantom(folder, make_phantom(96))
    files = {"volume": folder / "volume.tif", "labels": folder / "labels.toml"}
    # A cube this small has no room for the wide gaps that the default filters ask for between training and testing.
    stated = {"sigmas": (4, 8)}
else:
    folder = Path(os.environ.get("VOXCLF_DATA", "../../shared/data")) / DATA
    files = {"volume": folder / "raw.tif", "labels": folder / "labels_sparse.tif"}
    stated = {
        "vnc": {"voxel_size": (50, 4.6, 4.6), "classes": "membrane,glia,mitochondrion,synapse,intracellular"},
        "flyem": {"voxel_size": (10, 10, 10), "classes": "interior,boundary"},
    }[DATA]
names = {name: str(path) for name, path in files.items()}
config = ExploreConfig(**names, **stated, output="unused", learning_curve=True, trees=20)
found = explore(config)
report, labels, profiles = found.intensities, found.labels.label_set, found.labels.profiles
Markdown(
    f"{' × '.join(map(str, found.shape))} voxels (z, y, x) of {' × '.join(f'{s:g}' for s in found.voxel_size_nm)} nm; "
    f"{profiles.n_labelled:,} of them labelled, {profiles.n_labelled / np.prod(found.shape):.1%}."
)

# %% [markdown]
# ## What is labelled?
#
# Some of the labelled slices, each with what was drawn on it. What is not coloured was left undecided.

# %%
Image(figures.render_jpeg(figures.draw_montage(cut_montage(found, config), labels), dpi=70))

# %% [markdown]
# Classes are far from even. A model that sees voxels as they come learns the common classes and forgets the rare
# ones, and accuracy would not even notice; hence macro F1 everywhere below, to which every class counts alike.

# %%
figures.draw_label_distribution(profiles.counts, labels)

# %% [markdown]
# Where the labels are, slice by slice along each axis. Three thin bars mean that whatever happens elsewhere in the
# volume has no part in training or in any score.

# %%
figures.draw_label_coverage(profiles.along, labels, found.shape)

# %% [markdown]
# ## Do grey values separate the classes?
#
# Every line has the same area, however rare its class. Where lines lie over each other, grey value alone cannot
# decide.

# %%
figures.draw_intensity_histograms(report.coarse.grey, report.coarse.counts, labels, report.coarse.overall)

# %% [markdown]
# Three classical tests: is each class normally distributed (D'Agostino and Pearson)? Do the means differ at all
# (one-way ANOVA)? Which pairs of means differ (Welch's t)?

# %%
rows = [
    f"| {name} | {m.n:,} | {m.mean:.1f} | {m.std:.1f} | {m.skewness:+.2f} | {m.kurtosis:+.2f} | {test.p:.2g} |"
    for name, m, test in zip(labels.names, report.classes, report.normality, strict=True)
]
head = "| class | voxels | mean | std | skewness | excess kurtosis | p (normal) |\n|---|--:|--:|--:|--:|--:|--:|\n"
anova = f"\n\nANOVA: F = {report.anova.f:,.0f}, p = {report.anova.p:.2g}, η² = {report.anova.eta_squared:.2f}"
Markdown(head + "\n".join(rows) + anova)

# %% [markdown]
# Nearly all p values are tiny, and that says little: with this many voxels the smallest difference is significant,
# and neighbouring voxels are no independent witnesses anyway. What to read is the size of the effect. η² is the share
# of the grey values' variance that lies between classes. Cohen's d is the distance of two means in standard
# deviations: 0.2 is small, 0.8 is large, and even at 2 one voxel in six lies nearer to the other class's mean than to
# its own.

# %%
figures.draw_pairs(report.effects(), labels, "Cohen's d", limit=2.0)

# %%
pairs = sorted(report.pairs.items(), key=lambda item: abs(item[1].effect))
rows = [
    f"| {labels.names[i]} – {labels.names[j]} | {pair.t:.1f} | {pair.p:.2g} | {pair.effect:+.2f} | {pair.overlap:.0%} |"
    for (i, j), pair in pairs[:6]
]
head = "The six pairs most alike:\n\n| pair | t | p | d | overlap of histograms |\n|---|--:|--:|--:|--:|\n"
Markdown(head + "\n".join(rows))

# %% [markdown]
# Pairs like these take up the same stain. In the study of CA1 that this exploration follows, one pair of six classes
# did not differ even by the t test (cell membrane and mitochondrion membrane, p = 0.175), and yet no reader of the
# images would take one for the other. What tells them apart is not in the grey value.

# %% [markdown]
# ## How far would grey value alone carry?
#
# The best rule there is (Bayes' rule on the histograms above, each voxel left out of the histogram that judges it) is
# an upper bound for every model that sees one voxel at a time:

# %%
apart = report.separability
Markdown(
    f"It names **{apart.accuracy:.1%}** of the labelled voxels rightly; always naming the most frequent class gets "
    f"{apart.chance:.1%}. With all classes equally frequent the best rule gets {apart.balanced_accuracy:.1%}, guessing "
    f"{1 / labels.n_classes:.1%}."
)

# %%
figures.draw_bars(labels.names, apart.recall, "share of the class that the best rule finds", labels.colours)

# %% [markdown]
# Classes without a bar are never named: another class is always more probable at their grey values.

# %% [markdown]
# ## Is the volume sound?
#
# How alike two voxels are, by their distance. In isotropic tissue the lines lie over each other if the voxel size is
# right. Where voxels are small, a drop at the first step is noise; a first step as long as a thick section is not.

# %%
sizes = found.voxel_size_nm
kept = [
    min(len(values), max(3, int(400 / size))) for values, size in zip(found.texture.autocorrelation, sizes, strict=True)
]
curves = [
    figures.Curve(axis, (np.arange(n) * size).tolist(), values[:n].tolist())
    for axis, values, size, n in zip("zyx", found.texture.autocorrelation, sizes, kept, strict=True)
]
figures.draw_curves(curves, "distance (nm)", "correlation")

# %% [markdown]
# Each slice against the next one and the one after. A sudden deep dip would be a damaged or missing slice; crossing
# lines, slices out of order. Some up and down is the tissue's own: what stands out of it is among the warnings below.

# %%
z = list(range(found.shape[0]))
slices = [
    figures.Curve("with the next", z, found.slices.next_one.tolist()),
    figures.Curve("with the one after", z, found.slices.next_but_one.tolist()),
]
figures.draw_slice_fit(slices, {defect.z: defect.text for defect in found.slices.defects}, "correlation")

# %%
warnings = "".join(f"\n- {warning}" for warning in find_warnings(found)) or " nothing."
Markdown(
    f"Noise: standard deviation {found.texture.noise:.1f} grey values, {found.texture.noise_share:.0%} of the image's "
    f"variance. What `voxclf explore` warns of:{warnings}"
)

# %% [markdown]
# ## Will these few slices do?
#
# Forests trained on growing parts of the labels, each scored on a slab that lies at least as far away as its features
# reach; what lies in that gap is lost for training, so the last point stands for fewer slices than there are. The
# band is what a power law through the points leaves open; right of the last point nothing was measured.

# %%
curve = found.curve
x = np.geomspace(0.8 * curve.n_slices.min(), 2 * curve.n_slices_now, 60)
low, high = np.nanquantile(curve.drawn_laws.at(x), [0.025, 0.975], axis=0)
measured = figures.Curve("measured", *(v.tolist() for v in (curve.n_slices, curve.scores, curve.low, curve.high)))
law = figures.Curve("power law, 95 %", x.tolist(), curve.law.at(x)[0].tolist(), low.tolist(), high.tolist())
figures.draw_learning_curve(measured, law, "labelled slices' worth", "macro F1 on held-out slabs")

# %%
one, twice = curve.expect_gain(1), curve.expect_gain(curve.n_slices_now)
Markdown(
    f"One more slice like these is expected to add **{one.value:+.3f}** macro F1 (95 %: {one.low:+.3f} to "
    f"{one.high:+.3f}), twice the labels {twice.value:+.3f} ({twice.low:+.3f} to {twice.high:+.3f}). Compare that with "
    "what better features bring for nothing in [notebook 2](2_features_and_trees.ipynb), and with an hour of labelling."
)
