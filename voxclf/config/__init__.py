"""One frozen, validated configuration per command; the CLI, the TOML file and the provenance are read off it.

A field's ``description`` is its ``--help`` text, its constraint is checked before any work starts, and what
ran is saved beside the output as ``config.toml``, which ``--config`` reads back.
"""

from __future__ import annotations

from voxclf.config.audit_commands import AuditConfig, DiffConfig, ViewConfig
from voxclf.config.base import (
    Config,
    load_config_file,
    make_config,
    parse_duration,
    parse_memory,
    positional_names,
    save_config,
)
from voxclf.config.compare_commands import CompareConfig
from voxclf.config.crf_commands import CrfInput, CrfRefineConfig, CrfTuneConfig
from voxclf.config.data_commands import ConvertConfig, InfoConfig, SuggestConfig
from voxclf.config.explore_commands import ExploreConfig
from voxclf.config.model_commands import (
    DemoConfig,
    EvaluateConfig,
    FeaturesConfig,
    FitConfig,
    ModelsConfig,
    PredictConfig,
    RunConfig,
)
from voxclf.config.network_commands import ExportConfig, PretrainConfig
from voxclf.config.options import Balance, BankOptions, FitOptions, NetworkFitOptions, PredictOptions

COMMANDS: tuple[type[Config], ...] = (
    RunConfig,
    FitConfig,
    PretrainConfig,
    PredictConfig,
    EvaluateConfig,
    CompareConfig,
    CrfTuneConfig,
    CrfRefineConfig,
    SuggestConfig,
    AuditConfig,
    DiffConfig,
    ViewConfig,
    ExploreConfig,
    FeaturesConfig,
    InfoConfig,
    ConvertConfig,
    ModelsConfig,
    ExportConfig,
    DemoConfig,
)

__all__ = [
    "COMMANDS",
    "AuditConfig",
    "Balance",
    "BankOptions",
    "CompareConfig",
    "Config",
    "ConvertConfig",
    "CrfInput",
    "CrfRefineConfig",
    "CrfTuneConfig",
    "DemoConfig",
    "DiffConfig",
    "EvaluateConfig",
    "ExploreConfig",
    "ExportConfig",
    "FeaturesConfig",
    "FitConfig",
    "FitOptions",
    "InfoConfig",
    "ModelsConfig",
    "NetworkFitOptions",
    "PredictConfig",
    "PredictOptions",
    "PretrainConfig",
    "RunConfig",
    "SuggestConfig",
    "ViewConfig",
    "load_config_file",
    "make_config",
    "parse_duration",
    "parse_memory",
    "positional_names",
    "save_config",
]
