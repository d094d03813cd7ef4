"""A comparison as files: a page to read, a table for scripts, JSON with every number, and the two pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from voxclf.compare.comparison import Comparison
from voxclf.compare.figures import draw_pareto, draw_predictions
from voxclf.compare.scores import SCORES, Difference, Standing
from voxclf.compare.split import survey_within
from voxclf.config import CompareConfig
from voxclf.engine.executors import make_executor
from voxclf.figures import render_jpeg, render_svg
from voxclf.metrics.bootstrap import Interval
from voxclf.metrics.voxelwise import finite_or_none
from voxclf.pages import render_csv, render_json, render_template, write_texts
from voxclf.provenance import describe_input, software_versions, timestamp
from voxclf.report import ReportFigure
from voxclf.volume import open_labels, open_volume

PAGE, TABLE, NUMBERS, PARETO, PREDICTIONS = (
    "compare.html",
    "compare.csv",
    "compare.json",
    "score_and_time.svg",
    "predictions.jpg",
)
SCORE_TITLES = {
    "macro_f1": "macro F1",
    "mean_iou": "mean IoU",
    "macro_average_precision": "AP",
    "kappa": "kappa",
}
PICTURE_DPI = 120
"""Keeps a page of a dozen contestants within a few megabytes."""
JSON_FORMAT = 1


def write_comparison(comparison: Comparison, config: CompareConfig) -> Path:
    """Write page, table, JSON and pictures into the output folder; return the page's path."""
    folder = Path(config.output)
    volume = open_volume(config.volume, config.voxel_size)
    truth = open_labels(comparison.split.test, volume.shape)
    executor = make_executor(config.executor, config.workers)
    survey = survey_within(truth, config.unlabelled, comparison.split.region, executor)
    pareto = render_svg(draw_pareto(comparison.standings))
    predictions = render_jpeg(
        draw_predictions(comparison.standings, volume, truth, survey, comparison.split.region, comparison.label_set),
        PICTURE_DPI,
    )
    numbers = to_dict(comparison)
    numbers |= {
        "volume": describe_input(volume),
        "settings": config.model_dump(mode="json", exclude_none=True),
        "versions": software_versions(),
        "finished": timestamp(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARETO).write_bytes(pareto)
    (folder / PREDICTIONS).write_bytes(predictions)
    page = render_page(comparison, config, pareto, predictions)
    return write_texts(folder, {TABLE: render_table(comparison), NUMBERS: render_json(numbers), PAGE: page})[-1]


# --- numbers ---


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything that was found as values for JSON, None where a number is not known."""
    return {
        "format": JSON_FORMAT,
        "split": {
            "train": comparison.split.train,
            "held_out": comparison.split.test,
            "region": str(comparison.split.region),
            "note": comparison.split.note,
        },
        "classes": comparison.label_set.to_dict()["classes"],
        "contestants": [_standing_values(standing) for standing in comparison.standings],
        "against_best": [_difference_values(difference) for difference in comparison.differences],
        "stage_gains": [_difference_values(gain) for gain in comparison.gains],
        "failures": [{"name": f.name, "seed": f.seed, "message": f.message} for f in comparison.failures],
    }


def _standing_values(standing: Standing) -> dict[str, Any]:
    return {
        "name": standing.name,
        "model": standing.contestant.model,
        **{name: standing.intervals[name].to_dict() for name in SCORES},
        "class_f1": [finite_or_none(value) for value in standing.class_f1.tolist()],
        "cross_validated_macro_f1": standing.honest,
        "fit_s": standing.fit_s,
        "predict_s": standing.predict_s,
        "voxels_per_s": standing.voxels_per_s,
        "size": standing.size,
        "size_counts": _what_is_counted(standing),
        "peak_bytes": standing.peak.peak_bytes,
        "gpu_bytes": standing.peak.gpu_bytes,
        "notes": list(standing.notes),
        "seeds": [
            {
                "seed": run.seed,
                **{name: finite_or_none(getattr(scored.scores, name)) for name in SCORES},
                "macro_f1_spatial": scored.intervals["macro_f1"].to_dict(),
                "fit_s": run.fit.seconds,
                "predict_s": run.predict.seconds,
                "prediction": str(run.prediction),
            }
            for run, scored in zip(standing.runs, standing.scored, strict=True)
        ],
    }


def _what_is_counted(standing: Standing) -> str:
    if standing.contestant.is_network:
        return "parameters"
    return "numbers" if standing.contestant.model == "gaussian_mixture" else "nodes"


def _difference_values(difference: Difference) -> dict[str, Any]:
    gains = {name: gain.to_dict() for name, gain in difference.gains.items()}
    return {"name": difference.name, "against": difference.against, "verdict": difference.verdict, **gains}


def render_table(comparison: Comparison) -> str:
    """The table, one line per contestant, the best first."""
    ends = [f"{name}{end}" for name in SCORES for end in ("", "_low", "_high")]
    columns = ["cross_validated_macro_f1", "fit_s", "predict_s", "voxels_per_s", "size", "peak_bytes", "gpu_bytes"]
    rows = []
    for place, standing in enumerate(comparison.standings, 1):
        values = _standing_values(standing)
        scores = [standing.intervals[name] for name in SCORES]
        numbers = [f"{v:.6g}" for s in scores for v in (s.value, s.low, s.high)]
        row = ["" if values[name] is None else f"{values[name]:.6g}" for name in columns]
        rows.append([place, standing.name, len(standing.runs), *numbers, *row])
    return render_csv(["rank", "name", "seeds", *ends, *columns], rows)


# --- words ---


def describe_comparison(comparison: Comparison) -> list[str]:
    """The table and what follows from it, for the terminal."""
    width = max(len(standing.name) for standing in comparison.standings)
    lines = [f"split        {comparison.split.note}"]
    for standing in comparison.standings:
        f1 = _spell(standing.intervals["macro_f1"])
        others = "  ".join(f"{SCORE_TITLES[name]} {standing.intervals[name].value:.3f}" for name in SCORES[1:])
        lines.append(
            f"{standing.name:<{width}}  macro F1 {f1}  {others}  fit {spell_seconds(standing.fit_s)}  "
            f"predict {spell_seconds(standing.predict_s)}  {spell_count(standing.voxels_per_s)} voxels/s"
        )
    lines += [f"  {_spell_difference(difference)}" for difference in comparison.differences]
    lines += [f"  stage: {_spell_difference(gain)}" for gain in comparison.gains]
    lines += [f"note         {s.name}: {note}" for s in comparison.standings for note in s.notes]
    lines += [f"failed       {f.name}, seed {f.seed}: {f.message}" for f in comparison.failures]
    return lines


def _spell_difference(difference: Difference) -> str:
    gain = difference.gains["macro_f1"]
    return f"{difference.name} against {difference.against}: macro F1 {_spell(gain, '+.3f')}, {difference.verdict}"


def _spell(interval: Interval, form: str = ".3f") -> str:
    if interval.low != interval.low:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def spell_seconds(seconds: float) -> str:
    """Two or three digits, in the unit that suits."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def spell_count(count: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.3g}{suffix}"
    return f"{count:.3g}"


def summarise(comparison: Comparison) -> str:
    """Who is best, and of whom that is certain, in two sentences."""
    best = comparison.standings[0]
    text = f"{best.name} has the highest macro F1, {_spell(best.intervals['macro_f1'])}."
    by_verdict = {
        verdict: [d.name for d in comparison.differences if d.verdict == verdict]
        for verdict in ("worse", "not told apart")
    }
    if by_verdict["not told apart"]:
        text += f" These labels do not tell it apart from {_join(by_verdict['not told apart'])}."
    if by_verdict["worse"]:
        verb = "is" if len(by_verdict["worse"]) == 1 else "are"
        text += f" On these labels {_join(by_verdict['worse'])} {verb} worse by more than chance (95 %)."
    return text


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# --- page ---


def render_page(comparison: Comparison, config: CompareConfig, pareto: bytes, predictions: bytes) -> str:
    """The page; it refers to nothing outside itself."""
    values = {
        "comparison": comparison,
        "labels": comparison.label_set,
        "volume": Path(config.volume).name,
        "summary": summarise(comparison),
        "score_titles": SCORE_TITLES,
        "counted": {standing.name: _what_is_counted(standing) for standing in comparison.standings},
        "has_networks": any(standing.contestant.is_network for standing in comparison.standings),
        "seeds": config.seeds,
        "budget": config.time,
        "pareto": ReportFigure("Score and time", "", pareto).data_uri,
        "predictions": ReportFigure("Predictions", "", predictions, "jpeg").data_uri,
        "settings": config.model_dump(mode="json", exclude_none=True),
        "versions": software_versions(),
    }
    filters: dict[str, Callable[..., Any]] = {"seconds": spell_seconds, "count": spell_count, "interval": _spell}
    filters["gain"] = lambda interval: _spell(interval, "+.3f")
    return render_template("voxclf.compare", "compare.html.jinja", values, filters)
