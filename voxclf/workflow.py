"""The main job in one call: check, fit, predict every voxel, score, report. ``voxclf run`` and ``voxclf demo``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxclf.before_after import BeforeAfter, change_tables, compare_with_parent, describe_change, draw_change
from voxclf.config import DemoConfig, EvaluateConfig, PredictConfig, PredictOptions, RunConfig, make_config, save_config
from voxclf.datasets import make_phantom, write_phantom
from voxclf.engine.executors import Executor, make_executor
from voxclf.evaluate import Evaluation, evaluate
from voxclf.figures import PlaneView, cut_planes
from voxclf.fit import FitResult, check_model_folder, fit_on_labels, load_if_fitted
from voxclf.geometry import Region, Zyx
from voxclf.jobs import choose_region
from voxclf.labels import LabelSet
from voxclf.models.devices import Inference, check_exactness, check_inference
from voxclf.models.model import Model
from voxclf.models.registry import check_model_name
from voxclf.predict import LABELS, Prediction, predict_volume
from voxclf.progress import Progress, silent
from voxclf.provenance import describe_input, software_versions
from voxclf.refine import Refinement, find_kept_parameters, refine_prediction
from voxclf.report import Report, standard_figures, write_report
from voxclf.summary import describe_cross_validation, describe_evaluation, format_certificate, score_evaluation
from voxclf.training_history import draw_history
from voxclf.volume import Volume, open_labels, open_volume

OVERLAY_SIDE = 320
"""Longest side of the overlays in the report, voxels; the volumes themselves are for viewers."""


@dataclass(frozen=True)
class RunResult:
    """What the whole job gave: the model, the prediction, the scores, and where the report is."""

    fit: FitResult
    prediction: Prediction
    held_out: Evaluation | None
    report: Path
    lines: list[str]
    values: dict[str, Any]


def run_all(config: RunConfig, progress: Progress = silent) -> RunResult:
    """Fit on the labels, predict every voxel, score and report, all into one folder.

    Interrupted, the same call goes on where it stopped: a finished model is not fitted again, finished blocks
    are not predicted again.

    Raises
    ------
    ValueError, VoxclfError
        As :func:`voxclf.fit.fit_model` and :func:`voxclf.predict.predict_volume`; inputs are checked first.
    """
    started = time.perf_counter()
    check_model_name(config.model)
    inference = Inference.from_options(config, config.memory, config.workers)
    check_inference(config.model, inference)
    check_exactness(config.model, inference)
    folder = Path(config.output)
    volume = open_volume(config.volume, config.voxel_size)
    labels = open_labels(config.labels, volume.shape)
    validation = open_labels(config.validation, volume.shape) if config.validation else None
    region = choose_region(config.region, volume)
    executor = make_executor(config.executor, config.workers)

    fit = _fit_or_load(volume, labels, config, folder / "model", executor, progress)
    save_config(config, folder / "config.toml")
    fitted = time.perf_counter()
    find_kept_parameters(config.crf, folder / "model", config.probabilities)  # what is wrong is told before the work
    prediction = predict_volume(_predict_config(config, folder), progress)
    predicted = time.perf_counter()
    refinement = refine_prediction(config, folder / "model", progress)
    refined = time.perf_counter()
    held_out, change = None, None
    if config.validation:
        scoring = _evaluate_config(config, refinement.folder if refinement else folder)
        held_out = evaluate(scoring, progress)
        change = compare_with_parent(scoring, held_out, score_evaluation(held_out), progress)
    seconds = {
        **(fit.seconds or {"fit (done earlier)": fitted - started}),
        "predict": predicted - fitted,
        **({"refine": refined - predicted} if refinement else {}),
        "score": time.perf_counter() - refined,
    }
    shown = [labels] if validation is None else [validation, labels]
    report = _write_report(config, volume, shown, region, fit, prediction, refinement, held_out, change, seconds)
    lines, values = describe_cross_validation(fit)
    if held_out is not None:
        more_lines, more_values = describe_evaluation(held_out)
        lines, values = [*lines, *more_lines], {**values, **more_values}
    if change is not None:
        more_lines, more_values = describe_change(change)
        lines, values = [*lines, *more_lines], {**values, "refined_from": more_values}
    lines += [f"warning      {warning}" for warning in prediction.warnings]
    lines += [format_certificate(prediction.certificate)] if prediction.certificate else []
    lines += [f"written to   {v.path}" for v in prediction.job.volumes]
    lines += [f"refined to   {refinement.folder}"] if refinement else []
    lines += [f"report       {report}"]
    values |= {"report": str(report), "seconds": seconds}
    return RunResult(fit, prediction, held_out, report, lines, values)


def run_demo(config: DemoConfig, progress: Progress = silent) -> RunResult:
    """Make the phantom, run the whole job on three labelled slices of it, and score the rest."""
    folder = Path(config.output)
    data = folder / "phantom"
    if not (data / "labels.toml").exists() or config.overwrite:
        write_phantom(data, make_phantom(config.size, seed=config.seed))
    values = {
        "volume": str(data / "volume.tif"),
        "labels": str(data / "labels.toml"),
        "validation": str(data / "unseen.tif"),
        "output": str(folder),
        "model": config.model,
        "seed": config.seed,
        **_execution(config),
    }
    return run_all(make_config(RunConfig, values), progress)


def _execution(config: RunConfig | DemoConfig) -> dict[str, Any]:
    """How blocks are run; the same for every stage."""
    return {
        "workers": config.workers,
        "executor": config.executor,
        "memory": config.memory,
        "overwrite": config.overwrite,
    }


def _fit_or_load(
    volume: Volume, labels: Volume, config: RunConfig, folder: Path, executor: Executor, progress: Progress
) -> FitResult:
    if not config.overwrite:
        earlier = load_if_fitted(folder, volume, labels, config)
        if earlier is not None:
            return earlier
    check_model_folder(folder, config.overwrite)
    return fit_on_labels(volume, labels, config, folder, executor, progress)


def _predict_config(config: RunConfig, folder: Path) -> PredictConfig:
    return make_config(
        PredictConfig,
        {
            "model": str(folder / "model"),
            "volume": config.volume,
            "voxel_size": config.voxel_size,
            "output": str(folder),
            **{name: getattr(config, name) for name in PredictOptions.model_fields},
            **_execution(config),
        },
    )


def _evaluate_config(config: RunConfig, folder: Path) -> EvaluateConfig:
    return make_config(
        EvaluateConfig,
        {
            "prediction": str(folder),
            "labels": config.validation,
            "unlabelled": config.unlabelled,
            "region": config.region,
            "workers": config.workers,
            "executor": config.executor,
        },
    )


def _write_report(
    config: RunConfig,
    volume: Volume,
    labels: list[Volume],
    region: Region,
    fit: FitResult,
    prediction: Prediction,
    refinement: Refinement | None,
    held_out: Evaluation | None,
    change: BeforeAfter | None,
    seconds: dict[str, float],
) -> Path:
    model = fit.model
    label_set = model.label_set
    counts = [fit.label_counts.get(i, 0) for i in label_set.ids]
    importances = (
        {}
        if model.feature_importances is None
        else dict(zip(model.feature_names, model.feature_importances.tolist(), strict=True))
    )
    scored = score_evaluation(held_out) if held_out else None
    before = open_volume(Path(config.output) / LABELS, kind="labels")
    shown = open_volume(refinement.folder / LABELS, kind="labels") if refinement else before

    def views(first: list[Volume], second: Volume) -> tuple[PlaneView, ...]:
        return _overlays(volume, first, second, model, region)

    honest = fit.cross_validation.honest
    report = Report(
        title=f"{Path(config.volume).name}: {model.name.replace('_', ' ')}",
        model_name=model.name,
        labels=label_set,
        held_out=scored,
        honest=honest,
        naive=fit.cross_validation.naive,
        label_counts=counts,
        importances=importances,
        times_s=seconds,
        inputs={"volume": describe_input(volume), "labels": config.labels, "validation": config.validation},
        configuration={
            **config.model_dump(mode="json", exclude_none=True),
            "features": list(model.feature_names),
            "hyperparameters": model.hyperparameters,
            **({"certificate": prediction.certificate} if prediction.certificate else {}),
        },
        versions=software_versions(),
        warnings=prediction.warnings,
        figures=(
            *standard_figures(label_set, scored or honest, counts, importances, views(labels, shown)),
            *([draw_change(views([before], shown), label_set)] if refinement else []),
            *draw_history(fit.folder),
        ),
        tables=change_tables(change) if change else (),
    )
    return write_report(report, Path(config.output))


@dataclass(frozen=True)
class _Window:
    """A part of a volume that is read when indexed, as the figures expect of an array; labels as class indices.

    Of several label volumes the first that labels a voxel is shown.
    """

    volumes: list[Volume]
    region: Region
    label_set: LabelSet | None = None

    @property
    def shape(self) -> Zyx:
        return self.region.shape

    def __getitem__(self, box: tuple[slice, slice, slice]) -> np.ndarray:
        start = tuple(r + s.start for r, s in zip(self.region.start, box, strict=True))
        stop = tuple(r + s.stop for r, s in zip(self.region.start, box, strict=True))
        arrays = [volume.read(start, stop)[0] for volume in self.volumes]
        if self.label_set is None:
            return arrays[0]
        indices = [self.label_set.remap_to_indices(array) for array in arrays]
        return np.select([found >= 0 for found in indices], indices, default=-1)


def _overlays(
    volume: Volume, labels: list[Volume], predicted: Volume, model: Model, region: Region
) -> tuple[PlaneView, ...]:
    """Three planes through the model's example voxel, near enough to see membranes."""
    label_set, example = model.label_set, model.training["example"]
    z, y, x = (min(max(c, a), b - 1) - a for c, a, b in zip(example, region.start, region.stop, strict=True))
    window_nm = OVERLAY_SIDE * min(volume.voxel_size_nm)
    return cut_planes(
        _Window([volume], region),
        _Window(labels, region, label_set),
        _Window([predicted], region, label_set),
        volume.voxel_size_nm,
        (z, y, x),
        window_nm,
    )
