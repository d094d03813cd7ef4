"""Pretraining on a volume without labels: build, train on a pretext, save the backbone for ``fit --init``."""

from __future__ import annotations

import shutil
from pathlib import Path

from voxclf.config import BankOptions, NetworkFitOptions, PretrainConfig
from voxclf.engine.executors import available_cores, make_executor
from voxclf.engine.ledger import fingerprint
from voxclf.errors import OutputExistsError
from voxclf.fit_job import training_folder
from voxclf.fit_networks import (
    HISTORY,
    build_seeded,
    choose_architecture,
    format_history,
    make_inputs,
    open_training_folder,
)
from voxclf.jobs import check_finite
from voxclf.models.registry import NETWORKS
from voxclf.progress import Progress, silent
from voxclf.provenance import describe_input, software_versions, timestamp
from voxclf.training.pretrain import FACTS_FILE, Pretext, PretrainedNetwork, pretrain_network, save_pretrained
from voxclf.volume import open_volume

LABEL_OPTIONS = ("init", "loss", "gamma", "class_weights", "sampling", "window", "spacing", "final_patch")
"""Options of `fit` that have no meaning without labels."""
N_CLASSES = 2
"""Any number will do: the head for classes plays no part and is not saved."""


def pretrain_on_volume(config: PretrainConfig, progress: Progress = silent) -> PretrainedNetwork:
    """Train the backbone of a patch network on a volume without labels and save it.

    Interrupted at any moment, the same call goes on where it stopped.

    Raises
    ------
    ValueError
        If the model is not a patch network, or an option has no meaning without labels.
    OutputExistsError
        If the output exists and ``overwrite`` is not set, or is no folder of an earlier pretraining.
    """
    _check_options(config)
    folder = Path(config.output)
    if folder.exists() and not (config.overwrite and (folder / FACTS_FILE).exists()):
        raise OutputExistsError(
            f"{folder} exists already; give another output, or --overwrite where it holds an earlier pretraining"
        )
    volume = open_volume(config.volume, config.voxel_size)
    check_finite(volume, make_executor(config.executor, config.workers), progress)
    inputs = make_inputs(volume, config.input_bank, BankOptions())
    architecture = choose_architecture(config.model, config, volume.voxel_size_nm, inputs.n_channels, N_CLASSES)
    pretext = Pretext(config.task, config.padding, config.mask_center)
    facts = {
        "model": config.model,
        "architecture": architecture,
        "inputs": inputs.to_dict(),
        "task": {"kind": pretext.kind, "padding": pretext.padding, "mask_center": pretext.mask_center},
        "volume": describe_input(volume),
        "options": config.model_dump(mode="json", include={*NetworkFitOptions.model_fields, "seed"}),
    }
    scratch = open_training_folder(training_folder(folder), fingerprint(facts))
    pretrained = pretrain_network(
        build_seeded(config.model, architecture, config.seed),
        pretext,
        inputs,
        volume,
        config,
        config.seed,
        scratch,
        config.workers or available_cores(),
        progress,
    )
    shutil.rmtree(folder, ignore_errors=True)
    save_pretrained(folder, pretrained, {**facts, "versions": software_versions(), "finished": timestamp()})
    (folder / HISTORY).write_bytes(format_history(pretrained.history))
    shutil.rmtree(scratch, ignore_errors=True)
    return pretrained


def _check_options(config: PretrainConfig) -> None:
    if config.model not in NETWORKS or NETWORKS[config.model].kind != "patch":
        names = ", ".join(name for name, info in NETWORKS.items() if info.kind == "patch")
        raise ValueError(f"--model was {config.model}; pretraining is for patch networks: {names}")
    for name in LABEL_OPTIONS:
        value = getattr(config, name)
        if value != PretrainConfig.model_fields[name].default:
            raise ValueError(
                f"--{name.replace('_', '-')} was {value}, which has no meaning without labels; leave it out here and "
                "give it to `voxclf fit --init`"
            )
