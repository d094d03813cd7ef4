"""Lengths as files state them, turned into nanometres."""

from __future__ import annotations

import math
from typing import Any

_NANOMETRES = {
    "pm": 1e-3,
    "å": 0.1,
    "nm": 1.0,
    "um": 1e3,
    "mm": 1e6,
    "cm": 1e7,
    "m": 1e9,
    "inch": 2.54e7,
}
_ALIASES = {
    "picometer": "pm",
    "angstrom": "å",
    "ångström": "å",
    "a": "å",
    "nanometer": "nm",
    "nanometre": "nm",
    "nanometers": "nm",
    "µm": "um",
    "μm": "um",
    "\\u00b5m": "um",
    "micron": "um",
    "microns": "um",
    "micrometer": "um",
    "micrometre": "um",
    "micrometers": "um",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
}


def to_nanometres(length: Any, unit: Any) -> float | None:
    """Return a length in nm, or None where length or unit is missing, not positive or not a length.

    "pixel" and other placeholders count as missing: what is not stated is asked for, never guessed.

    Examples
    --------
    >>> to_nanometres(0.05, "micron")
    50.0
    >>> to_nanometres(1, "pixel") is None
    True
    """
    name = str(unit).strip().lower()
    scale = _NANOMETRES.get(_ALIASES.get(name, name))
    try:
        value = float(length)
    except (TypeError, ValueError):
        return None
    if scale is None or not math.isfinite(value) or value <= 0:
        return None
    # Twelve digits: unit conversion must not turn 0.05 µm into 50.00000000000001 nm.
    return float(f"{value * scale:.12g}")
