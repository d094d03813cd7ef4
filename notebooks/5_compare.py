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
# # Which model, and is each stage worth its time?
#
# **Question.** Features matter more than the kind of tree ([notebook 2](2_features_and_trees.ipynb)). What do a
# better tree model, a second round that reads the first one's probabilities, and a dense CRF add, and at what price?
#
# **Data.** By default the built-in phantom, 96³ voxels of 5 nm with labels on one slice across each axis; every model
# is scored on a block of the rest whose truth is known. `DATA = "vnc"` or `"flyem"` reads real volumes from
# `VOXCLF_DATA` and scores on a part of their validation slices.
#
# **Answer.** `voxclf compare` trains all of them on the same labels and scores them on the same held-out ones. The
# table says which differences are real: their intervals know both where the labels happen to lie and how much a score
# changes from seed to seed. On the phantom, with few labels and two seeds, no stage is told apart from the plain
# forest: differences of a few hundredths need more of both. Networks take part in the same way
# ([notebook 3](3_patch_cnn.ipynb)) and want more time: add `4conv` or `dilres` to `MODELS` and set `SECONDS` to 600.

# %%
# %matplotlib inline
import io
import os
import tempfile
from pathlib import Path

import PIL.Image
from IPython.display import Image, Markdown

from voxclf.compare import compare_models
from voxclf.compare.figures import draw_pareto
from voxclf.compare.page import PREDICTIONS, describe_comparison, summarise, write_comparison
from voxclf.compare.scores import SCORES
from voxclf.config import CompareConfig
from voxclf.datasets import make_phantom, write_phantom

# %% tags=["parameters"]
DATA = "phantom"  # or "vnc", "flyem"
SECONDS = 3  # training time of each network, and of tuning each CRF
MODELS = "random_forest,xgboost,random_forest+autocontext,random_forest+crf"

# %%
output = Path(tempfile.mkdtemp())
if DATA == "phantom":
    write_phantom(output, make_phantom(96))
    volume, labels, validation = (output / name for name in ("volume.tif", "labels.toml", "unseen.tif"))
    # Narrow filters leave room in so small a cube for the gap between the labels that tune a CRF and the others.
    stated = {"region": "8:56,:,:", "sigmas": (4, 8)}
else:
    folder = Path(os.environ.get("VOXCLF_DATA", "../../shared/data")) / DATA
    volume, labels, validation = (folder / name for name in ("raw.tif", "labels_sparse.tif", "labels_val.tif"))
    stated = {
        "vnc": {
            "voxel_size": (50, 4.6, 4.6),
            "classes": "membrane,glia,mitochondrion,synapse,intracellular",
            "region": "12:16,256:768,256:768",
        },
        "flyem": {"voxel_size": (10, 10, 10), "classes": "interior,boundary", "region": "130:160,:,:"},
    }[DATA]
config = CompareConfig(
    volume=str(volume),
    labels=str(labels),
    validation=str(validation),
    output=str(output / "compared"),
    models=MODELS,
    time=SECONDS,
    seeds=2,
    samples=10_000,
    folds=2,
    slabs=4,
    **stated,
)
compared = compare_models(config)
Markdown(f"**{summarise(compared)}**")

# %% [markdown]
# ## Scores and costs
#
# On the held-out labels, means over seeds with 95 % intervals. With two seeds the spread between them is known badly,
# and intervals are wide where they differ.

# %%
rows = [
    f"| {s.name} | "
    + " | ".join(f"{i.value:.3f} ({i.low:.3f} to {i.high:.3f})" for i in (s.intervals[name] for name in SCORES))
    + f" | {s.fit_s:.1f} | {s.predict_s:.1f} | {s.voxels_per_s / 1000:,.0f} k | {s.size:,} |"
    for s in compared.standings
]
head = "| model | macro F1 | mean IoU | AP | kappa | fit, s | predict, s | voxels/s | nodes or parameters |\n"
Markdown(head + "|---|--:|--:|--:|--:|--:|--:|--:|--:|\n" + "\n".join(rows))

# %%
draw_pareto(compared.standings)

# %% [markdown]
# ## What each stage adds
#
# The same model with and without the stage, on the same pieces of the labels and the same seeds. Only an interval
# that lies above zero as a whole says that the stage earned its place.

# %%
rows = [
    f"| {g.name} | {g.against} | {g.gains['macro_f1'].value:+.3f} ({g.gains['macro_f1'].low:+.3f} to "
    f"{g.gains['macro_f1'].high:+.3f}) | {g.verdict} |"
    for g in (*compared.gains, *compared.differences)
]
Markdown("| model | against | macro F1 | verdict |\n|---|---|--:|---|\n" + "\n".join(rows))

# %% [markdown]
# The first lines compare with the model without its last stage, the others with the best. A CRF that does not help on
# labels it was not tuned on switches itself off for that seed, which then counts as +0.000. Where it is on for one seed
# and off for the other, the interval is wide.

# %% [markdown]
# ## What it looks like
#
# One plane of the held-out region. Under "differences", only voxels predicted wrongly are coloured, by the class they
# were given.

# %%
write_comparison(compared, config)
picture, small = PIL.Image.open(output / "compared" / PREDICTIONS), io.BytesIO()
picture.thumbnail((800, 800))
picture.save(small, "jpeg", quality=85)
Image(small.getvalue())

# %% [markdown]
# All of this is one command, whose page and files are those of `write_comparison`. What it prints:

# %%
Markdown("```\n" + "\n".join(describe_comparison(compared)) + "\n```")
