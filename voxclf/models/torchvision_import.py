"""Makes ``import torchvision`` work beside a torch without CUDA; called before whatever imports torchvision.

The wheels of torchvision on PyPI are linked against CUDA. Beside a CPU build of torch their library of operators
fails to load, silently, and the import then dies registering shapes for operators that do not exist ("operator
torchvision::nms does not exist"; pytorch/vision issue 9085). It takes lightning and torchmetrics down with it. What
is missing is two declarations, not code: encoders use no operator of torchvision. So where the import fails in
exactly this way, the two operators are declared and it is tried again. They stay unusable, as they were.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A library's declarations live as long as the object.
_declared: list[Any] = []


def prepare_torchvision() -> bool:
    """Import torchvision, declaring its operators first if it needs that; False where it is not installed."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_operators()
        importlib.import_module("torchvision")
    return True


def _declare_operators() -> None:
    import torch

    # What is left of the failed import must go, or importing again returns half a package.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
