"""The pictures of voxclf in one style: what reports, notebooks and papers show.

Every ``draw_*`` function takes numbers and a `LabelSet` and returns a matplotlib ``Figure`` (no pyplot, no
global state); `render_svg`, `render_png` and `render_jpeg` turn it into bytes. A class has its `LabelSet`
colour in all of them. Nothing is computed here beyond what drawing needs.
"""

from voxclf.figures.charts import (
    Curve,
    draw_bars,
    draw_curves,
    draw_importances,
    draw_intensity_histograms,
    draw_intervals,
    draw_label_coverage,
    draw_label_distribution,
    draw_learning_curve,
    draw_slice_fit,
)
from voxclf.figures.planes import (
    PlaneView,
    cut_planes,
    draw_montage,
    draw_overlays,
    draw_probabilities,
    scale_bar_length_nm,
)
from voxclf.figures.scores import draw_confusion, draw_pairs, draw_precision_recall, draw_reliability
from voxclf.figures.style import INK, LINE_COLOURS, QUIET, STYLE, render_jpeg, render_png, render_svg

__all__ = [
    "INK",
    "LINE_COLOURS",
    "QUIET",
    "STYLE",
    "Curve",
    "PlaneView",
    "cut_planes",
    "draw_bars",
    "draw_confusion",
    "draw_curves",
    "draw_importances",
    "draw_intensity_histograms",
    "draw_intervals",
    "draw_label_coverage",
    "draw_label_distribution",
    "draw_learning_curve",
    "draw_montage",
    "draw_overlays",
    "draw_pairs",
    "draw_precision_recall",
    "draw_probabilities",
    "draw_reliability",
    "draw_slice_fit",
    "render_jpeg",
    "render_png",
    "render_svg",
    "scale_bar_length_nm",
]
