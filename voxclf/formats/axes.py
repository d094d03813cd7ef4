"""Axis orders: where channel, z, y and x stand in a file, and how its arrays become (C, Z, Y, X)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from voxclf.errors import FormatError
from voxclf.geometry import Zyx

#: Used where a file does not name its axes: C order, slowest first.
DEFAULT_AXES = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}


@dataclass(frozen=True)
class AxisOrder:
    """The axes of one file: their names (c, z, y, x, others of length 1) and lengths, in the file's order."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The array's shape as (C, Z, Y, X); axes that the file lacks have length 1."""
        c, z, y, x = (self.lengths[self.names.index(a)] if a in self.names else 1 for a in "czyx")
        return c, z, y, x

    def index(self, start: Zyx, stop: Zyx) -> tuple[slice, ...]:
        """Index of a zyx box, all channels, into the file's own array."""
        ranges = {a: slice(b, e) for a, b, e in zip("zyx", start, stop, strict=True)}
        return tuple(ranges.get(name, slice(0, n)) for name, n in zip(self.names, self.lengths, strict=True))

    def to_czyx(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array in the file's axis order as (C, Z, Y, X)."""
        kept = [self.names.index(a) for a in "czyx" if a in self.names]
        dropped = [i for i in range(len(self.names)) if i not in kept]
        lengths = {a: array.shape[i] for i, a in enumerate(self.names)}
        return array.transpose(*dropped, *kept).reshape([lengths.get(a, 1) for a in "czyx"])

    def zyx(self, values: Sequence[Any], missing: Any) -> tuple[Any, Any, Any]:
        """Pick the z, y and x entries of a list that has one value per axis of the file."""
        z, y, x = (values[self.names.index(a)] if a in self.names else missing for a in "zyx")
        return z, y, x


def order_axes(names: Sequence[str] | None, lengths: Sequence[int], where: str) -> AxisOrder:
    """Check a file's axes and say where channel, z, y and x are.

    Parameters
    ----------
    names : sequence of str, optional
        One per axis, in the file's order; by default those of :data:`DEFAULT_AXES`.
    lengths : sequence of int
        Length of each axis.
    where : str
        The file, for messages.

    Raises
    ------
    FormatError
        If y or x is missing, an axis is empty, a name occurs twice, or an axis other than c, z, y, x is longer
        than 1.
    """
    lengths = tuple(int(n) for n in lengths)
    if names is None:
        if len(lengths) not in DEFAULT_AXES:
            raise FormatError(
                f"{where} is an array with {len(lengths)} axes {lengths} and does not name them; voxclf reads "
                "yx, zyx and czyx: save it as one of these"
            )
        names = DEFAULT_AXES[len(lengths)]
    names = tuple(str(name).lower() for name in names)
    shown = ", ".join(f"{a}={n}" for a, n in zip(names, lengths, strict=False))
    if len(names) != len(lengths) or len(set(names)) != len(names) or not {"y", "x"} <= set(names):
        raise FormatError(
            f"{where} has the axes ({shown}) for an array of shape {lengths}; y and x are needed and each may "
            "occur once: correct the axis names in the file"
        )
    if min(lengths) < 1:
        raise FormatError(f"{where} is empty: its axes are ({shown}); check how it was written")
    for name, length in zip(names, lengths, strict=True):
        if name not in "czyx" and length > 1:
            advice = (
                "save one time point, or, if slices were stored as time, swap frames and slices (Fiji: Image > "
                "Properties)"
                if name == "t"
                else "save it with z, y, x and at most a channel axis"
            )
            raise FormatError(f"{where} has the axes ({shown}), and {name!r} is longer than 1; {advice}")
    return AxisOrder(names, lengths)
