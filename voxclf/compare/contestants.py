"""What takes part in a comparison: models with their own settings and the stages put on top of them.

A contestant is written ``NAME[:option=value …][+autocontext[=ROUNDS]][+crf]``, for example
``random_forest``, ``random_forest:bank=edges:trees=200`` or ``xgboost+autocontext+crf``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxclf.config import CompareConfig, FitConfig, PredictConfig, make_config
from voxclf.config.base import AnyConfig
from voxclf.fit import check_options
from voxclf.geometry import Region
from voxclf.models.devices import Inference, check_exactness, check_inference
from voxclf.models.registry import NETWORKS, check_model_name

AUTOCONTEXT, CRF = "autocontext", "crf"
ROUNDS = 2
SHARED = ("volume", "voxel_size", "unlabelled", "balance", "workers", "executor")
"""Settings of a comparison that every fit takes over as they are."""

FOR_TREES = ("bank", "sigmas", "dimensions", "samples", "folds")
FOR_NETWORKS = ("time", "device", "precision")
FOR_PREDICTION = ("tta", "output_stride", "real_context")
"""Options of a contestant that belong to ``voxclf predict``; all others are those of ``voxclf fit``."""


@dataclass(frozen=True)
class Contestant:
    """A model, its own settings, and the stages on top.

    Parameters
    ----------
    name : str
        As it was written; what tables and figures call it.
    model : str
        As ``voxclf models`` lists it.
    options : mapping of str to str
        Settings of ``voxclf fit`` and ``voxclf predict`` for this contestant only.
    rounds : int
        1, or the rounds of autocontext.
    with_crf : bool
        Whether a tuned dense CRF refines the prediction.
    """

    name: str
    model: str
    options: Mapping[str, str]
    rounds: int = 1
    with_crf: bool = False

    @property
    def is_network(self) -> bool:
        """Whether it trains until a time budget is spent; trees take what they take."""
        return self.model in NETWORKS

    @property
    def folder_name(self) -> str:
        """The name as a folder may be called on any system."""
        return re.sub(r"[^A-Za-z0-9.+=_-]", "_", self.name)

    @property
    def without_crf(self) -> Contestant:
        """The same model whose prediction the CRF refines."""
        return Contestant(self.name.removesuffix(f"+{CRF}"), self.model, self.options, self.rounds)

    @property
    def without_last_stage(self) -> Contestant | None:
        """What the last stage has to beat; None for a bare model."""
        if self.with_crf:
            return self.without_crf
        if self.rounds > 1:
            return Contestant(self.name.split("+")[0], self.model, self.options)
        return None

    def fit_config(self, config: CompareConfig, labels: str, classes: str | None, seed: int, output: Path) -> FitConfig:
        """What ``voxclf fit`` is asked for.

        Raises
        ------
        ValueError
            If an option is unknown or has a value that is not allowed.
        """
        shared = (*SHARED, *(FOR_NETWORKS if self.is_network else FOR_TREES))
        values: dict[str, Any] = {name: getattr(config, name) for name in shared}
        if self.rounds > 1:
            values["autocontext"] = self.rounds
        values |= {"labels": labels, "classes": classes, "seed": seed, "output": str(output), "model": self.model}
        own = {name: value for name, value in self.options.items() if name not in FOR_PREDICTION}
        return self._make(FitConfig, {**values, **own, "overwrite": True})

    def predict_config(self, config: CompareConfig, model: Path, region: Region, output: Path) -> PredictConfig:
        """What ``voxclf predict`` is asked for.

        Raises
        ------
        ValueError
            If an option has a value that is not allowed.
        """
        shared = ("volume", "voxel_size", "memory", "workers", "executor", "device")
        values: dict[str, Any] = {name: getattr(config, name) for name in shared}
        if self.is_network:
            values["precision"] = config.precision
        values |= {"model": str(model), "region": str(region), "output": str(output)}
        own = {name: value for name, value in self.options.items() if name in (*FOR_PREDICTION, "precision")}
        return self._make(PredictConfig, {**values, **own, "pyramid": False, "overwrite": True})

    def check(self, config: CompareConfig) -> None:
        """Refuse, before any work, what this model cannot be asked for.

        Raises
        ------
        ValueError
            Naming the contestant and the option.
        """
        folder = Path(config.output)
        fit = self.fit_config(config, config.labels, config.classes, config.seed, folder)
        predict = self.predict_config(config, folder, Region((0, 0, 0), (1, 1, 1)), folder)
        inference = Inference.from_options(predict, predict.memory, predict.workers)
        try:
            check_options(fit)
            check_inference(self.model, inference)
            check_exactness(self.model, inference)
        except ValueError as error:
            raise ValueError(f"--models {self.name}: {error}") from None

    def _make(self, kind: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
        try:
            return make_config(kind, values)
        except ValueError as error:
            raise ValueError(f"--models {self.name}: {error}") from None


def parse_contestants(text: str) -> tuple[Contestant, ...]:
    """Read what stands after ``--models``.

    Raises
    ------
    ValueError
        If a model or a stage is unknown, an option has no value, or a contestant is named twice.
    """
    contestants = tuple(_parse(part.strip()) for part in text.split(","))
    names = [contestant.name for contestant in contestants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--models names {', '.join(twice)} twice; name each once, or give one another :option=value")
    return contestants


def _parse(text: str) -> Contestant:
    head, *stages = text.split("+")
    model, *settings = head.split(":")
    check_model_name(model)
    options = dict(_parse_option(setting, text) for setting in settings)
    taken = set(options) & {*_SETTLED}
    if taken:
        raise ValueError(f"--models {text}: {', '.join(sorted(taken))} cannot differ between contestants; leave it out")
    rounds, with_crf = 1, False
    for stage in stages:
        name, _, number = stage.partition("=")
        if with_crf or (name == AUTOCONTEXT and rounds > 1) or name not in (AUTOCONTEXT, CRF):
            raise ValueError(
                f"--models {text}: stage +{stage} is not allowed here; after a model come, in this order and each "
                f"optional, +{AUTOCONTEXT}[=ROUNDS] and +{CRF}"
            )
        if name == CRF:
            with_crf = True
            continue
        rounds = int(number) if number.isdigit() else ROUNDS
        if not 2 <= rounds <= 4 or (number and not number.isdigit()):
            raise ValueError(f"--models {text}: +{AUTOCONTEXT}={number} is not allowed; give 2 to 4 rounds")
    return Contestant(text, model, options, rounds, with_crf)


# What the comparison itself decides, so that all contestants meet on the same ground.
_SETTLED = (
    *("volume", "labels", "voxel_size", "classes", "unlabelled"),
    *("output", "overwrite", "model", "autocontext", "seed", "time"),
)


def _parse_option(setting: str, text: str) -> tuple[str, str]:
    name, sign, value = setting.partition("=")
    if not (name and sign and value):
        raise ValueError(f"--models {text}: {setting!r} is not option=value; write for example random_forest:trees=200")
    return name.replace("-", "_"), value
