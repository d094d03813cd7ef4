"""Values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json_values(value: Any) -> Any:
    """Turn arrays and tuples into lists, NumPy numbers into Python's, nan and infinity into None, all else to text."""
    if isinstance(value, Mapping):
        return {str(name): to_json_values(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_json_values(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json_values(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
