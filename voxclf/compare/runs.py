"""One contestant with one seed: fit, predict, score, each through the same functions as the commands of these names.

What a stage found is kept beside its output as JSON, so that a comparison that is run again repeats no finished stage.
Stages start from nothing rather than from an interrupted half, because their time is part of the result.

::

    OUT/runs/random_forest/seed_0/       model, prediction/, fit.json, predict.json, scores.npz
    OUT/runs/random_forest+crf/seed_0/   tuning/ (model, prediction), crf.toml, refined/, tune.json, refine.json, …
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from voxclf.compare.contestants import Contestant
from voxclf.compare.cost import Cost, CostMeter
from voxclf.compare.split import HeldOut
from voxclf.config import CompareConfig, CrfRefineConfig, CrfTuneConfig, EvaluateConfig, make_config
from voxclf.engine.ledger import write_atomically
from voxclf.evaluate import evaluate
from voxclf.fit import FitResult, fit_model
from voxclf.metrics.cells import CellTables
from voxclf.metrics.voxelwise import ScoreTables
from voxclf.models.packed_forest import PackedForest
from voxclf.models.trees import TreeModel
from voxclf.predict import predict_volume
from voxclf.progress import Progress
from voxclf.refine import refine_volume, tune_parameters
from voxclf.summary import describe_cross_validation

if TYPE_CHECKING:
    from voxclf.models.network_model import NetworkModel

RUNS = "runs"


@dataclass(frozen=True)
class Ground:
    """What all contestants share.

    Parameters
    ----------
    config : CompareConfig
        What was asked for.
    split : HeldOut
        Labels to train and to score on.
    tuning : HeldOut or None
        The training labels split once more, to train on and to tune a CRF on; needed by contestants with a CRF.
    """

    config: CompareConfig
    split: HeldOut
    tuning: HeldOut | None = None


@dataclass(frozen=True)
class Run:
    """What one contestant reached with one seed, and what it cost.

    Parameters
    ----------
    contestant : Contestant
    seed : int
    fit, predict : Cost
        Fitting (without a cross-validation that only scores) and prediction of the region. With a CRF, fitting
        includes its tuning, and prediction its refinement.
    size : int
        Trained numbers: parameters of a network, nodes of trees.
    honest : float or None
        Macro F1 of the fit's own cross-validation within the training labels.
    tables : CellTables
        Score tables per cell of the held-out labels.
    prediction : Path
        Folder of the labels and probabilities that were scored.
    notes : tuple of str
        What a reader should know about this run.
    """

    contestant: Contestant
    seed: int
    fit: Cost
    predict: Cost
    size: int
    honest: float | None
    tables: CellTables
    prediction: Path
    notes: tuple[str, ...] = ()


def run_contestant(ground: Ground, contestant: Contestant, seed: int, progress: Progress) -> Run:
    """Fit, predict and score, or read what was found earlier.

    Raises
    ------
    ValueError, VoxclfError
        As :func:`voxclf.fit.fit_model`, :func:`voxclf.predict.predict_volume`, :func:`voxclf.refine.tune_parameters`
        and :func:`voxclf.evaluate.evaluate`.
    """
    if contestant.with_crf:
        return _run_with_crf(ground, contestant, seed, progress)
    folder = run_folder(ground.config, contestant, seed)
    fitted = _once(folder / "fit.json", lambda: _fit(ground, contestant, ground.split, seed, folder, progress))
    predicted = _once(folder / "predict.json", lambda: _predict(ground, contestant, ground.split, folder, progress))
    return Run(
        contestant,
        seed,
        _fit_cost(fitted),
        _cost(predicted),
        fitted["size"],
        fitted["honest"],
        _score(ground, folder / "prediction", folder / "scores.npz", progress),
        folder / "prediction",
        tuple(predicted["warnings"]),
    )


def run_folder(config: CompareConfig, contestant: Contestant, seed: int) -> Path:
    """Where the files of one contestant and seed lie."""
    return Path(config.output) / RUNS / contestant.folder_name / f"seed_{seed}"


def _run_with_crf(ground: Ground, contestant: Contestant, seed: int, progress: Progress) -> Run:
    """Tune on a slab of the training labels that a second model has not seen, then refine the full model's prediction.

    Tuned where the model was trained, the CRF would meet probabilities far too sure of themselves.
    """
    assert ground.tuning is not None, "contestants with a CRF need labels to tune it on"
    tuning = ground.tuning
    bare = run_contestant(ground, contestant.without_crf, seed, progress)
    folder = run_folder(ground.config, contestant, seed)
    trial = folder / "tuning"
    fitted = _once(trial / "fit.json", lambda: _fit(ground, contestant.without_crf, tuning, seed, trial, progress))
    predicted = _once(trial / "predict.json", lambda: _predict(ground, contestant, tuning, trial, progress))
    tuned = _once(folder / "tune.json", lambda: _tune(ground, tuning, seed, folder, progress))
    fit = bare.fit + _fit_cost(fitted) + _cost(predicted) + _cost(tuned)
    if not tuned["enabled"]:
        note = f"CRF switched off, the prediction is that of {bare.contestant.name}: {tuned['reason']}"
        return Run(
            contestant, seed, fit, bare.predict, bare.size, None, bare.tables, bare.prediction, (*bare.notes, note)
        )
    refined = _once(folder / "refine.json", lambda: _refine(ground, bare.prediction, folder, progress))
    tables = _score(ground, folder / "refined", folder / "scores.npz", progress)
    predict = bare.predict + _cost(refined)
    return Run(contestant, seed, fit, predict, bare.size, None, tables, folder / "refined", bare.notes)


def _once(record: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a stage found: read if it was done earlier, else computed, measured and written."""
    if record.exists():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    with CostMeter() as meter:
        found = compute()
    cost = {field.name: getattr(meter.cost, field.name) for field in fields(Cost)}
    write_atomically(record, json.dumps({**found, "cost": cost}, indent=1) + "\n")
    return {**found, "cost": cost}


def _cost(found: Mapping[str, Any]) -> Cost:
    return Cost(**found["cost"])


def _fit_cost(found: Mapping[str, Any]) -> Cost:
    """What fitting took, without a cross-validation that serves the score alone."""
    cost = _cost(found)
    return Cost(cost.seconds - found["only_scoring_s"], cost.peak_bytes, cost.gpu_bytes)


def _fit(
    ground: Ground, contestant: Contestant, split: HeldOut, seed: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    config = contestant.fit_config(ground.config, split.train, split.classes, seed, folder / "model")
    result = fit_model(config, progress)
    _, values = describe_cross_validation(result)
    # Later rounds of autocontext learn from the models of the cross-validation, so it is then part of the fit.
    only_scoring_s = result.seconds.get("cross-validation", 0.0) if contestant.rounds == 1 else 0.0
    return {"size": count_parameters(result), "honest": values["honest"]["macro_f1"], "only_scoring_s": only_scoring_s}


def count_parameters(result: FitResult) -> int:
    """Numbers that were learned: nodes of all trees, components and weights of a mixture, parameters of a network."""
    model = result.model
    if not isinstance(model, TreeModel):
        return sum(parameter.numel() for parameter in cast("NetworkModel", model).network.parameters())
    return sum(
        classifier.n_nodes
        if isinstance(classifier, PackedForest)
        else sum(array.size for array in classifier.to_arrays().values())
        for classifier in model.classifiers
    )


def _predict(
    ground: Ground, contestant: Contestant, split: HeldOut, folder: Path, progress: Progress
) -> dict[str, Any]:
    config = contestant.predict_config(ground.config, folder / "model", split.region, folder / "prediction")
    result = predict_volume(config, progress)
    return {"device": result.device, "warnings": list(result.warnings)}


def _tune(ground: Ground, tuning: HeldOut, seed: int, folder: Path, progress: Progress) -> dict[str, Any]:
    config = ground.config
    values = {
        "prediction": str(folder / "tuning" / "prediction"),
        "volume": config.volume,
        "voxel_size": config.voxel_size,
        "labels": tuning.test,
        "output": str(folder / "crf.toml"),
        "unlabelled": config.unlabelled,
        "time": config.time,
        "workers": config.workers,
        "seed": seed,
        "overwrite": True,
    }
    result = tune_parameters(make_config(CrfTuneConfig, values), progress)
    return {"enabled": result.parameters.enabled, "reason": result.reason}


def _refine(ground: Ground, prediction: Path, folder: Path, progress: Progress) -> dict[str, Any]:
    config = ground.config
    values = {
        "prediction": str(prediction),
        "volume": config.volume,
        "voxel_size": config.voxel_size,
        "output": str(folder / "refined"),
        "parameters": str(folder / "crf.toml"),
        "pyramid": False,
        "device": "cpu" if config.device == "mps" else config.device,
        "overwrite": True,
        **_blockwise(config),
    }
    # The CRF's own budget is larger than that of other steps, because its halo is wide.
    if "memory" not in config.model_fields_set:
        del values["memory"]
    result = refine_volume(make_config(CrfRefineConfig, values), progress)
    return {"device": result.device}


def _blockwise(config: CompareConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("memory", "workers", "executor")}


def _score(ground: Ground, prediction: Path, record: Path, progress: Progress) -> CellTables:
    if record.exists():
        return load_tables(record)
    config = ground.config
    values = {
        "prediction": str(prediction),
        "labels": ground.split.test,
        "unlabelled": config.unlabelled,
        "region": str(ground.split.region),
        "workers": config.workers,
        "executor": config.executor,
    }
    tables = evaluate(make_config(EvaluateConfig, values), progress).tables
    save_tables(tables, record)
    return tables


def save_tables(tables: CellTables, path: Path) -> None:
    """Write score tables by cell as arrays; :func:`load_tables` reads them back."""
    stacked: dict[str, Any] = {
        field.name: np.stack([getattr(part, field.name) for part in tables.cells]) for field in fields(ScoreTables)
    }
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    stacked["cells"] = np.array(sorted(tables.by_cell))
    np.savez_compressed(partial, **stacked)
    partial.replace(path)


def load_tables(path: Path) -> CellTables:
    """Read what :func:`save_tables` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        columns = {field.name: arrays[field.name] for field in fields(ScoreTables)}
        return CellTables(
            {
                int(cell): ScoreTables(**{name: column[row] for name, column in columns.items()})
                for row, cell in enumerate(arrays["cells"])
            }
        )
