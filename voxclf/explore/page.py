"""An exploration as one HTML page, as JSON, and in a few lines. Nothing is computed here beyond what is shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxclf import figures
from voxclf.config import ExploreConfig
from voxclf.explore.data_warnings import find_warnings
from voxclf.explore.exploration import Exploration, LabelSummary
from voxclf.explore.learning_curve import LearningCurve
from voxclf.explore.montage import cut_montage
from voxclf.json_values import to_json_values
from voxclf.labelled_slices import spell_runs
from voxclf.pages import render_json, render_template, write_texts
from voxclf.report import ReportFigure, ReportTable

#: Raised when a field of explore.json changes its meaning.
JSON_FORMAT = 1
MONTAGE_DPI = 120
LEAST_P = 1e-300


@dataclass(frozen=True)
class Section:
    """A part of the page: what it shows, in which pictures and tables, and how to read them."""

    title: str
    texts: Sequence[str] = ()
    figures: Sequence[ReportFigure] = ()
    tables: Sequence[ReportTable] = ()


def write_exploration(found: Exploration, config: ExploreConfig) -> Path:
    """Write ``explore.html`` and ``explore.json`` and return the page's path."""
    values = {"format": JSON_FORMAT, **found.to_dict(), "warnings": find_warnings(found)}
    texts = {"explore.json": render_json(values), "explore.html": render_page(found, config)}
    return write_texts(Path(config.output), texts)[-1]


def describe_exploration(found: Exploration) -> tuple[list[str], dict[str, Any]]:
    """The essentials as lines for the terminal, and everything as values for ``--json``."""
    lines = []
    if found.labels:
        profiles, total = found.labels.profiles, math.prod(found.shape)
        share = profiles.n_labelled / total
        lines.append(f"labelled     {profiles.n_labelled:,} of {total:,} voxels ({_percent(share, 2)})")
        width = max(map(len, found.names))
        lines += [
            f"  {name:<{width}}  {count:>12,}  {count / max(profiles.n_labelled, 1):6.1%}"
            for name, count in zip(found.names, profiles.counts.tolist(), strict=True)
        ]
        apart = found.intensities.separability
        lines.append(
            f"grey value   alone names {_percent(apart.accuracy)} of the labelled voxels rightly; always naming the "
            f"most frequent class {_percent(apart.chance)}"
        )
    if found.curve:
        lines.append(f"next slice   {_describe_gain(found.curve)}")
    warnings = find_warnings(found)
    lines += [f"warning      {warning}" for warning in warnings]
    values = to_json_values({**found.to_dict(), "warnings": warnings})
    return lines, values


def render_page(found: Exploration, config: ExploreConfig) -> str:
    """The page; it refers to nothing outside itself."""
    sections = [
        *(_label_sections(found, found.labels, config) if found.labels else [_montage_section(found, config)]),
        _intensity_section(found),
        *([_difference_section(found)] if found.labels else []),
        _texture_section(found),
        _slice_section(found),
        *([_curve_section(found.curve)] if found.curve else []),
    ]
    values = {
        "title": Path(found.path).name,
        "facts": _facts(found),
        "warnings": find_warnings(found),
        "tiles": list(_tiles(found)),
        "sections": sections,
    }
    tests = {"number": lambda value: isinstance(value, Number)}
    return render_template("voxclf.explore", "explore.html.jinja", values, tests=tests)


class Number(str):
    """A number as it is written; aligned to the right in tables."""

    __slots__ = ()


def _write(value: float, digits: int = 3) -> Number:
    """Significant digits, without exponents for everyday sizes; a dash for nan."""
    if not math.isfinite(value):
        return Number("–")
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return Number(f"{value:.{digits - 1}e}".replace("-", "−", value < 0))
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return Number(f"{value:,.{min(decimals, 4)}f}".replace("-", "−"))


def _percent(share: float, decimals: int = 1) -> Number:
    return Number("–" if math.isnan(share) else f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%")


def _write_p(p: float) -> Number:
    return Number("–") if math.isnan(p) else Number("< 1e-300") if p < LEAST_P else _write(p, 2)


def _count(value: int) -> Number:
    return Number(f"{int(value):,}")


def _facts(found: Exploration) -> list[str]:
    shape, size = found.shape, found.voxel_size_nm
    extent = " × ".join(f"{n * s / 1000:.3g}" for n, s in zip(shape, size, strict=True))
    facts = [
        f"{' × '.join(f'{n:,}' for n in shape)} voxels (z, y, x) of {' × '.join(f'{s:g}' for s in size)} nm, "
        f"{extent} µm, {found.dtype}.",
        f"Grey values were counted in {found.sampled['intensities'].describe()}.",
    ]
    if found.labels:
        facts.append(f"Labels: {Path(found.labels.path).name}.")
    return facts


def _tiles(found: Exploration) -> Iterator[tuple[str, str, str]]:
    """Name, value and a few words for each of the figures on top."""
    if found.labels:
        share = found.labels.profiles.n_labelled / math.prod(found.shape)
        apart = found.intensities.separability
        yield (
            "Labelled",
            _percent(share, 2 if share < 0.1 else 1),
            f"of all voxels, {len(found.names)} classes",
        )
        chance = _percent(apart.chance)
        yield "From grey value alone", _percent(apart.accuracy), f"right at best; {chance} by naming one class"
    texture = found.texture
    if math.isfinite(texture.noise):
        yield "Noise", _write(texture.noise), f"grey values, {_percent(texture.noise_share)} of the variance"
    usual = np.nanmedian(found.slices.next_one) if np.isfinite(found.slices.next_one).any() else math.nan
    if math.isfinite(usual):
        yield "Next slice", f"{usual:.2f}", "correlation of neighbours along z"


# --- labels ---


def _label_sections(found: Exploration, labels: LabelSummary, config: ExploreConfig) -> list[Section]:
    profiles, label_set = labels.profiles, labels.label_set
    n_total = math.prod(found.shape)
    distribution = ReportFigure(
        "Label distribution",
        "Share of the labelled voxels that each class has. A model learns frequent classes better.",
        figures.render_svg(figures.draw_label_distribution(profiles.counts, label_set)),
    )
    coverage = ReportFigure(
        "Where the labels are",
        "Share of each slice that is labelled, by class, across the three axes. Where few slices hold labels, ticks on "
        "top mark them. What is learned in one place need not hold elsewhere: spread slices over the volume.",
        figures.render_svg(figures.draw_label_coverage(profiles.along, label_set, found.shape)),
    )
    rows = [
        [
            f"{letter} ({plane} slices)",
            _count(len(profiles.slices_with_labels(axis))),
            _count(found.shape[axis]),
            _count(len(profiles.labelled_slices(axis))),
            spell_runs(profiles.labelled_slices(axis)),
        ]
        for axis, (letter, plane) in enumerate(zip("zyx", ("xy", "xz", "yz"), strict=True))
    ]
    table = ReportTable(
        "Slices with labels",
        "A slice counts as labelled as such if it holds at least a quarter of what the fullest slice holds; the others "
        "are only crossed by labels.",
        ["axis", "slices with labels", "of", "labelled as such", "at"],
        rows,
    )
    text = (
        f"{profiles.n_labelled:,} of {n_total:,} voxels are labelled ({_percent(profiles.n_labelled / n_total, 2)}); "
        f"{_percent(1 - profiles.n_labelled / n_total, 2)} are unlabelled and never count, neither for training nor "
        "for scores."
    )
    return [Section("Labels", [text], [distribution, coverage], [table]), _montage_section(found, config)]


def _montage_section(found: Exploration, config: ExploreConfig) -> Section:
    label_set = found.labels.label_set if found.labels else None
    views = cut_montage(found, config)
    caption = (
        "Some of the labelled slices, each with what was drawn on it. Look for labels that are shifted against the "
        "image, swapped, or painted over an edge."
        if label_set
        else "Slices from the middle of the volume."
    )
    picture = figures.render_jpeg(figures.draw_montage(views, label_set), MONTAGE_DPI)
    return Section("Slices", figures=[ReportFigure("Slices", caption, picture, "jpeg")])


# --- grey values ---


def _intensity_section(found: Exploration) -> Section:
    report = found.intensities
    label_set = found.labels.label_set if found.labels else None
    histogram = ReportFigure(
        "Grey values" if label_set is None else "Grey values, over all voxels and by class",
        "Every histogram has the same area, so rare classes are as visible as common ones. Where lines lie over each "
        "other, grey value alone cannot tell the classes apart; a model then needs texture and shape.",
        figures.render_svg(
            figures.draw_intensity_histograms(
                report.coarse.grey, report.coarse.counts, label_set, report.coarse.overall
            )
        ),
    )
    overall = report.overall
    text = (
        f"All voxels: mean {_write(overall.mean, 4)}, standard deviation {_write(overall.std, 4)}, from "
        f"{report.overall_range[0]:g} to {report.overall_range[1]:g}; 1 % lie at or below {report.percentiles['1']:g}, "
        f"99 % at or below {report.percentiles['99']:g}."
    )
    if not report.is_exact:
        text += " Floats were counted in 65,536 bins; figures below are exact to that."
    return Section("Grey values", [text], [histogram], [_class_table(found)] if label_set else [])


def _class_table(found: Exploration) -> ReportTable:
    report = found.intensities
    rows = [
        [
            name,
            _count(moments.n),
            _write(moments.mean, 4),
            _write(moments.std),
            _write(moments.skewness),
            _write(moments.kurtosis),
            _write(normality.statistic),
            _write_p(normality.p),
        ]
        for name, moments, normality in zip(found.names, report.classes, report.normality, strict=True)
    ]
    return ReportTable(
        "Class by class",
        "Skewness and excess kurtosis are 0 for a normal distribution; K² (D'Agostino and Pearson) tests both at once. "
        "With this many voxels the test rejects any deviation, however small: read skewness and kurtosis, not p.",
        ["class", "voxels", "mean", "std", "skewness", "kurtosis", "K²", "p"],
        rows,
    )


def _difference_section(found: Exploration) -> Section:
    report = found.intensities
    assert found.labels is not None
    anova, apart = report.anova, report.separability
    texts = [
        f"One-way ANOVA: F = {_write(anova.f)}, p {_equals(anova.p)}. The classes' means explain "
        f"{_percent(anova.eta_squared)} of the variance of the labelled voxels' grey values (η²).",
        f"The best rule on grey value alone names {_percent(apart.accuracy)} of the labelled voxels rightly; always "
        f"naming the most frequent class gets {_percent(apart.chance)}. With all classes equally frequent the best "
        f"rule gets {_percent(apart.balanced_accuracy)}, guessing {_percent(1 / max(len(report.classes), 1))}.",
        "About p values: a million voxels make any difference significant, and neighbouring voxels are no independent "
        "witnesses, so p is 0 nearly everywhere and says nothing. Cohen's d, the difference of the means in units of "
        "the standard deviation, says how large a difference is: 0.2 is small, 0.5 medium, 0.8 large.",
    ]
    if not report.pairs:
        return Section("Do grey values separate the classes?", texts)
    picture = ReportFigure(
        "Effect sizes",
        "Cohen's d of every pair of class means. Pale pairs have the same grey value on average.",
        figures.render_svg(figures.draw_pairs(report.effects(), found.labels.label_set, "Cohen's d", 2.0)),
    )
    rows = [
        [
            f"{found.names[i]} – {found.names[j]}",
            _write(report.classes[i].mean - report.classes[j].mean),
            _write(pair.t),
            _write(pair.degrees_of_freedom),
            _write_p(pair.p),
            _write(pair.effect),
            _percent(pair.overlap),
        ]
        for (i, j), pair in sorted(report.pairs.items(), key=lambda item: _order(item[1].effect))
    ]
    table = ReportTable(
        "Pairs of classes",
        "Welch's t test, most alike first. Overlap is the share of the two histograms that coincides.",
        ["pair", "difference", "t", "df", "p", "d", "overlap"],
        rows,
    )
    recalls = ReportTable(
        "What grey value alone finds",
        "Share of each class that the best rule names rightly, with classes as frequent as labelled.",
        ["class", "found"],
        [[name, _percent(recall)] for name, recall in zip(found.names, apart.recall.tolist(), strict=True)],
    )
    return Section("Do grey values separate the classes?", texts, [picture], [table, recalls])


def _order(effect: float) -> float:
    return math.inf if math.isnan(effect) else abs(effect)


def _equals(p: float) -> str:
    return "is unknown" if math.isnan(p) else "< 1e-300" if p < LEAST_P else f"= {_write(p, 2)}"


# --- texture and slices ---


def _texture_section(found: Exploration) -> Section:
    texture = found.texture
    curves = [
        figures.Curve(letter, (np.arange(len(values)) * size).tolist(), values.tolist(), colour=colour)
        for letter, values, size, colour in zip(
            "zyx", texture.autocorrelation, found.voxel_size_nm, figures.LINE_COLOURS, strict=True
        )
        if len(values) > 1
    ]
    # Beyond a few correlation lengths nothing is left to see; a thick axis would squeeze the others.
    reach = 6 * max([length for length in texture.length_nm if math.isfinite(length)], default=math.inf)
    shown = [_shorten(curve, reach) for curve in curves]
    picture = ReportFigure(
        "Autocorrelation",
        "How alike two voxels are by their distance. In isotropic tissue the lines lie over each other if the voxel "
        "size is right; the drop from 1 at the first step is noise.",
        figures.render_svg(figures.draw_curves(shown, "distance (nm)", "correlation")),
    )
    rows = [
        [
            letter,
            _write(size, 4),
            _write(length),
            _write(float(values[1]) if len(values) > 1 else math.nan),
            _write(implied),
        ]
        for letter, size, length, values, implied in zip(
            "zyx",
            found.voxel_size_nm,
            texture.length_nm,
            texture.autocorrelation,
            texture.implied_size_nm,
            strict=True,
        )
    ]
    table = ReportTable(
        "Isotropy",
        "Correlation length: where the correlation of the structure, without noise, has fallen to one half. Implied "
        "voxel size: the one at which the picture changes as fast per nm along this axis as along the other in-plane "
        "axis (for z: as in the plane). Tissue is seldom quite isotropic; worry above a factor of 2.5.",
        ["axis", "voxel size (nm)", "correlation length (nm)", "correlation of neighbours", "implied voxel size (nm)"],
        rows,
    )
    text = (
        f"Noise that changes from voxel to voxel has a standard deviation of {_write(texture.noise)} grey values, "
        f"{_percent(texture.noise_share)} of the image's variance. Measured in "
        f"{found.sampled['texture'].describe()}. "
        "Noise shared by neighbours, as after denoising or lossy compression, goes unseen."
        if math.isfinite(texture.noise)
        else "The slices are too small to measure noise."
    )
    return Section("Texture and noise", [text], [picture] if shown else [], [table])


def _shorten(curve: figures.Curve, reach: float) -> figures.Curve:
    kept = max(3, sum(x <= reach for x in curve.x))
    return figures.Curve(curve.name, curve.x[:kept], curve.y[:kept], colour=curve.colour)


def _slice_section(found: Exploration) -> Section:
    slices = found.slices
    z = list(range(len(slices.next_one)))
    curves = [
        figures.Curve("with the next", z, slices.next_one.tolist()),
        figures.Curve("with the one after", z, slices.next_but_one.tolist()),
    ]
    flagged = {defect.z: defect.text for defect in slices.defects}
    picture = ReportFigure(
        "Neighbouring slices",
        "Correlation of each slice with the next one and the one after that. A dip is a jump: slices missing, shifted "
        "or damaged; where the lower line rises above the upper, slices are out of order.",
        figures.render_svg(figures.draw_slice_fit(curves, flagged, "correlation")),
    )
    read = f"Measured in {found.sampled['slices'].describe()}."
    tables = []
    if slices.defects:
        rows = [[_count(d.z), _count(d.last), d.kind, d.text] for d in slices.defects]
        tables = [ReportTable("Conspicuous slices", "In the order of z.", ["from z", "to", "kind", "what"], rows)]
    return Section("Do slices follow each other?", [read], [picture], tables)


# --- learning curve ---


def _describe_gain(curve: LearningCurve) -> str:
    one, twice = curve.expect_gain(1), curve.expect_gain(curve.n_slices_now)
    return (
        f"one more labelled slice: macro F1 {one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f}); twice the labels: "
        f"{twice.value:+.3f} ({twice.low:+.3f} to {twice.high:+.3f})"
    )


def _curve_section(curve: LearningCurve) -> Section:
    least, most = float(curve.n_slices.min()), 2 * curve.n_slices_now
    x = np.geomspace(0.8 * least, most, 60)
    low, high = np.nanquantile(curve.drawn_laws.at(x), [0.025, 0.975], axis=0)
    measured = figures.Curve(
        "measured", curve.n_slices.tolist(), curve.scores.tolist(), curve.low.tolist(), curve.high.tolist()
    )
    law = figures.Curve("power law, 95 %", x.tolist(), curve.law.at(x)[0].tolist(), low.tolist(), high.tolist())
    picture = ReportFigure(
        "Learning curve",
        "Macro F1 on held-out slabs by the amount of labels trained on. Right of the dotted line nothing was measured: "
        "the line is carried on, and the band says how far it could be off if the power law holds.",
        figures.render_svg(figures.draw_learning_curve(measured, law, "labelled slices' worth", "macro F1")),
    )
    now = curve.expect(curve.n_slices_now)
    texts = [
        f"Expected from {_describe_gain(curve)}. With all the labels there are "
        f"({curve.n_slices_now:.3g} slices' worth, {curve.voxels_per_slice:,.0f} voxels each) the curve says "
        f"{now.value:.3f} ({now.low:.3f} to {now.high:.3f}).",
        f"Measured with {curve.note}. A slice that shows something new, such as more of a rare class, brings more than "
        "a slice like those there are.",
    ]
    return Section("What would another labelled slice bring?", texts, [picture])
