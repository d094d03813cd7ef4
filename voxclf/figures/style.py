"""How every picture of voxclf looks, and how it becomes bytes: one style, no pyplot, no global state."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from voxclf.labels import LabelSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK, QUIET, GRID = "#222222", "#6B6B6B", "#E3E3E3"

#: Lines that are no class (axes, slices) keep away from the classes' colours.
LINE_COLOURS = (INK, "#8A8A8A", "#C2C2C2")
ALARM = "#BB3311"

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # The same numbers give the same bytes, so a report can be compared and cached.
    "svg.hashsalt": "voxclf",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under `STYLE`, leaving the caller's matplotlib settings alone."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches."""
    from matplotlib.figure import Figure as NewFigure

    return NewFigure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, **options: Any) -> bytes:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, bbox_inches="tight", pad_inches=0.06, **options)
        return buffer.getvalue()


def render_svg(figure: Figure) -> bytes:
    """Return the figure as SVG, sharp at any size; for line drawings. Equal figures give equal bytes."""
    return _save(figure, format="svg", metadata={"Date": None, "Creator": "voxclf"})


def render_png(figure: Figure, dpi: int = 150) -> bytes:
    """Return the figure as PNG with `dpi` dots per inch."""
    return _save(figure, format="png", dpi=dpi, metadata={"Software": "voxclf"})


def render_jpeg(figure: Figure, dpi: int = 180) -> bytes:
    """Return the figure as JPEG; for pictures of EM, whose noise makes a PNG five times as large."""
    # Without chroma subsampling, class borders stay sharp.
    return _save(figure, format="jpeg", dpi=dpi, pil_kwargs={"quality": 88, "subsampling": 0})


def add_class_legend(figure: Figure, labels: LabelSet) -> None:
    """Name the class colours below the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(labels.names, labels.colours, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
