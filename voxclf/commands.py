"""What each command does with its configuration, and what it says when done. The only file between CLI and library."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxclf import config as cfg
from voxclf.progress import Progress

if TYPE_CHECKING:
    from voxclf.metrics.structure import StructureChange


@dataclass(frozen=True)
class CommandResult:
    """What a command tells its user: lines to read, and the same as values for ``--json``."""

    lines: list[str]
    values: dict[str, Any]


def run_command(config: cfg.Config, progress: Progress) -> CommandResult:
    """Run the command that a configuration belongs to."""
    return _COMMANDS[type(config)](config, progress)


def _info(config: cfg.InfoConfig, progress: Progress) -> CommandResult:
    from voxclf.info import describe_volume

    values = describe_volume(config)
    width = max(map(len, values))
    return CommandResult([f"{name:<{width}}  {_spell(value)}" for name, value in values.items()], values)


def _models(config: cfg.ModelsConfig, progress: Progress) -> CommandResult:
    from voxclf.models.registry import NETWORKS, TREE_MODELS, ModelInfo, NetworkInfo

    models: list[ModelInfo | NetworkInfo] = [*TREE_MODELS.values(), *NETWORKS.values()]
    return CommandResult(
        [f"{info.name:<24}{info.description}" for info in models],
        {info.name: {"description": info.description, **info.defaults} for info in models},
    )


def _features(config: cfg.FeaturesConfig, progress: Progress) -> CommandResult:
    from voxclf.extract import write_features

    result = write_features(config, progress)
    names = list(result.volumes[0].channel_names)
    cfg.save_config(config, Path(config.output).with_suffix(".config.toml"))
    return CommandResult(
        [f"features     {len(names)}: {', '.join(names)}", f"written to   {config.output}"],
        {"output": config.output, "features": names},
    )


def _fit(config: cfg.FitConfig, progress: Progress) -> CommandResult:
    from voxclf.fit import fit_model
    from voxclf.summary import describe_cross_validation

    result = fit_model(config, progress)
    cfg.save_config(config, result.folder / "config.toml")
    lines, values = describe_cross_validation(result)
    return CommandResult(
        [*lines, f"model        {result.folder}"], {"model": str(result.folder), **values, "seconds": result.seconds}
    )


def _pretrain(config: cfg.PretrainConfig, progress: Progress) -> CommandResult:
    from voxclf.pretraining import pretrain_on_volume

    result = pretrain_on_volume(config, progress)
    cfg.save_config(config, Path(config.output) / "config.toml")
    losses = [entry["validation_loss"] for entry in result.history]
    return CommandResult(
        [
            f"loss         {losses[0]:.4f} > {min(losses):.4f}, {len(losses)} rounds, {result.n_patches_seen} patches",
            f"written to   {config.output}; use it with voxclf fit --model {config.model} --init {config.output}",
        ],
        {"output": config.output, "history": result.history, "seconds": result.seconds},
    )


def _export(config: cfg.ExportConfig, progress: Progress) -> CommandResult:
    from voxclf.export import export_model

    paths = [str(path) for path in export_model(config)]
    return CommandResult([f"written to   {path}" for path in paths], {"outputs": paths})


def _predict(config: cfg.PredictConfig, progress: Progress) -> CommandResult:
    from voxclf.predict import predict_volume
    from voxclf.refine import find_kept_parameters, refine_prediction
    from voxclf.summary import format_certificate

    started = time.perf_counter()
    find_kept_parameters(config.crf, Path(config.model), config.probabilities)  # what is wrong is told before the work
    result = predict_volume(config, progress)
    refined = refine_prediction(config, Path(config.model), progress)
    cfg.save_config(config, result.folder / "config.toml")
    paths = [volume.path for volume in result.job.volumes]
    device = [] if result.device == "cpu" else [f"device       {result.device}: one block at a time; --workers ignored"]
    certificate = [format_certificate(result.certificate)] if result.certificate else []
    resumed = f", {result.job.n_resumed} of them were there already" if result.job.n_resumed else ""
    return CommandResult(
        [
            *(f"warning      {warning}" for warning in result.warnings),
            *device,
            f"blocks       {result.job.n_blocks}{resumed}",
            *certificate,
            *(f"written to   {path}" for path in paths),
            *([f"refined to   {refined.folder}"] if refined else []),
        ],
        {
            "outputs": paths,
            "refined": str(refined.folder) if refined else None,
            "device": result.device,
            "certificate": result.certificate,
            "n_blocks": result.job.n_blocks,
            "n_resumed": result.job.n_resumed,
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def _evaluate(config: cfg.EvaluateConfig, progress: Progress) -> CommandResult:
    from voxclf.before_after import change_tables, compare_with_parent, describe_change
    from voxclf.evaluate import evaluate
    from voxclf.summary import describe_evaluation, report_evaluation, score_evaluation

    result = evaluate(config, progress)
    lines, values = describe_evaluation(result)
    change = compare_with_parent(config, result, score_evaluation(result), progress)
    if change is not None:
        more_lines, more_values = describe_change(change)
        lines, values = [*lines, *more_lines], {**values, "refined_from": more_values}
    if config.output:
        folder = Path(config.output)
        report_evaluation(result, config, folder, tables=change_tables(change) if change else ())
        cfg.save_config(config, folder / "config.toml")
        lines = [*lines, f"report       {folder / 'report.html'}"]
    return CommandResult(lines, values)


def _compare(config: cfg.CompareConfig, progress: Progress) -> CommandResult:
    from voxclf.compare import compare_models
    from voxclf.compare.page import describe_comparison, to_dict, write_comparison

    result = compare_models(config, progress)
    page = write_comparison(result, config)
    return CommandResult([*describe_comparison(result), f"report       {page}"], {"page": str(page), **to_dict(result)})


def _crf_tune(config: cfg.CrfTuneConfig, progress: Progress) -> CommandResult:
    from voxclf.refine import choose_output, tune_parameters
    from voxclf.summary import format_scores, score_values

    result = tune_parameters(config, progress)
    short = "; stopped by --time" if result.is_cut_short else ""
    contacts = [
        side.forbidden_contacts(result.unseen_pairs) for side in (result.structure.before, result.structure.after)
    ]
    lines = [
        format_scores("before", result.before),
        format_scores("after", result.after),
        result.reason,
        *_structure_lines(result.structure, result.parameters.classes),
        f"  faces between classes that never touch in the labels: {contacts[0]:,} > {contacts[1]:,}",
        f"tried        {result.n_evaluations} sets of parameters{short}",
        f"written to   {choose_output(config)}{'' if result.parameters.enabled else ' (enabled = false)'}",
    ]
    scores = {"before": score_values(result.before), "after": score_values(result.after)}
    values = {"output": str(choose_output(config)), "enabled": result.parameters.enabled, **result.to_dict(), **scores}
    return CommandResult(lines, values)


def _crf_refine(config: cfg.CrfRefineConfig, progress: Progress) -> CommandResult:
    from voxclf.refine import describe_halo, refine_volume

    result = refine_volume(config, progress)
    if result.job is None or result.structure is None:
        line = f"no CRF       {config.parameters} says that none helps; nothing was written, {config.prediction} stands"
        return CommandResult([line], {"enabled": False, "outputs": []})
    cfg.save_config(config, result.folder / "config.toml")
    paths = [volume.path for volume in result.job.volumes]
    resumed = f", {result.job.n_resumed} of them were there already" if result.job.n_resumed else ""
    lines = [
        f"blocks       {result.job.n_blocks}{resumed}; {describe_halo(result.halo, result.tolerance)}",
        *_structure_lines(result.structure, result.label_set.names),
        *(f"written to   {path}" for path in paths),
    ]
    values = {
        "enabled": True,
        "outputs": paths,
        "device": result.device,
        "halo": result.halo,
        "n_blocks": result.job.n_blocks,
        "n_resumed": result.job.n_resumed,
        "structure": _structure_values(result.structure),
    }
    return CommandResult(lines, values)


COUNTED = ("components", "specks", "holes")


def _structure_lines(change: StructureChange, names: tuple[str, ...]) -> list[str]:
    """Objects per class before and after."""
    width = max(map(len, names))
    lines = [f"objects      in {change.place}, before > after; specks are smaller than {change.speck_nm3:.3g} nm3"]
    for k, name in enumerate(names):
        counts = "  ".join(
            f"{kind} {getattr(change.before, kind)[k]} > {getattr(change.after, kind)[k]}" for kind in COUNTED
        )
        lines.append(f"  {name:<{width}}  {counts}")
    return lines


def _structure_values(change: StructureChange) -> dict[str, Any]:
    sides = {"before": change.before, "after": change.after}
    counts = {
        side: {kind: getattr(found, kind).tolist() for kind in (*COUNTED, "contacts")} for side, found in sides.items()
    }
    return {"place": change.place, "speck_nm3": change.speck_nm3, **counts}


def _suggest(config: cfg.SuggestConfig, progress: Progress) -> CommandResult:
    from voxclf.suggest import suggest_boxes
    from voxclf.suggest.files import describe_suggestions, write_suggestions

    result = suggest_boxes(config, progress)
    return _list_files(config, write_suggestions(result, config), *describe_suggestions(result))


def _explore(config: cfg.ExploreConfig, progress: Progress) -> CommandResult:
    from voxclf.explore import explore
    from voxclf.explore.page import describe_exploration, write_exploration

    found = explore(config, progress)
    page = write_exploration(found, config)
    cfg.save_config(config, Path(config.output) / "config.toml")
    lines, values = describe_exploration(found)
    return CommandResult([*lines, f"page         {page}"], {"page": str(page), **values})


def _audit(config: cfg.AuditConfig, progress: Progress) -> CommandResult:
    from voxclf.audit import audit_labels
    from voxclf.audit.page import describe_audit, write_audit

    result = audit_labels(config, progress)
    return _list_files(config, write_audit(result, config), *describe_audit(result))


def _diff(config: cfg.DiffConfig, progress: Progress) -> CommandResult:
    from voxclf.diff import compare_volumes
    from voxclf.diff.page import describe_diff, write_diff

    result = compare_volumes(config, progress)
    return _list_files(config, write_diff(result, config), *describe_diff(result))


def _list_files(
    config: cfg.SuggestConfig | cfg.AuditConfig | cfg.DiffConfig,
    paths: Sequence[Path],
    lines: Sequence[str],
    values: dict[str, Any],
) -> CommandResult:
    """Keep the settings beside what a command found, and say where it was written."""
    cfg.save_config(config, Path(config.output) / "config.toml")
    return CommandResult([*lines, *(f"written to   {path}" for path in paths)], values)


def _view(config: cfg.ViewConfig, progress: Progress) -> CommandResult:
    from voxclf.view import view

    lines, values = view(config)
    return CommandResult(lines, values)


def _run(config: cfg.RunConfig, progress: Progress) -> CommandResult:
    from voxclf.workflow import run_all

    result = run_all(config, progress)
    return CommandResult(result.lines, result.values)


def _convert(config: cfg.ConvertConfig, progress: Progress) -> CommandResult:
    from voxclf.convert import convert_volume

    convert_volume(config, progress)
    return CommandResult([f"written to   {config.output}"], {"output": config.output})


def _demo(config: cfg.DemoConfig, progress: Progress) -> CommandResult:
    from voxclf.workflow import run_demo

    result = run_demo(config, progress)
    return CommandResult(result.lines, result.values)


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_spell(item)}" for key, item in value.items())
    return str(value)


_COMMANDS: dict[type[cfg.Config], Callable[[Any, Progress], CommandResult]] = {
    cfg.InfoConfig: _info,
    cfg.ModelsConfig: _models,
    cfg.FeaturesConfig: _features,
    cfg.FitConfig: _fit,
    cfg.PretrainConfig: _pretrain,
    cfg.ExportConfig: _export,
    cfg.PredictConfig: _predict,
    cfg.EvaluateConfig: _evaluate,
    cfg.CompareConfig: _compare,
    cfg.CrfTuneConfig: _crf_tune,
    cfg.CrfRefineConfig: _crf_refine,
    cfg.SuggestConfig: _suggest,
    cfg.AuditConfig: _audit,
    cfg.DiffConfig: _diff,
    cfg.ViewConfig: _view,
    cfg.ExploreConfig: _explore,
    cfg.RunConfig: _run,
    cfg.ConvertConfig: _convert,
    cfg.DemoConfig: _demo,
}
