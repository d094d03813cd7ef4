import numpy as np
import pytest

from voxclf.errors import FormatError
from voxclf.formats.axes import order_axes
from voxclf.formats.units import to_nanometres


@pytest.mark.parametrize(
    ("length", "unit", "nanometres"),
    [
        (4.6, "nm", 4.6),
        (0.05, "micron", 50),
        (0.05, "µm", 50),
        (0.05, "\\u00B5m", 50),
        (0.05, "micrometer", 50),
        (46, "Angstrom", 4.6),
        (1e-6, "cm", 10),
        (8, "pixel", None),
        (8, None, None),
        (None, "nm", None),
        (0, "nm", None),
        (-1, "nm", None),
        (float("nan"), "nm", None),
        ("eight", "nm", None),
    ],
)
def test_lengths(length, unit, nanometres):
    assert to_nanometres(length, unit) == (nanometres if nanometres is None else pytest.approx(nanometres, rel=1e-12))


@pytest.mark.parametrize(
    ("names", "shape", "czyx"),
    [
        ("xyz", (41, 37, 23), (1, 23, 37, 41)),
        ("tzcyx", (1, 23, 2, 37, 41), (2, 23, 37, 41)),
        ("yx", (37, 41), (1, 1, 37, 41)),
        ("zyxc", (23, 37, 41, 3), (3, 23, 37, 41)),
    ],
)
def test_any_order_becomes_czyx(names, shape, czyx):
    values = np.arange(np.prod(shape)).reshape(shape)
    order = order_axes(names, shape, "file")
    assert order.shape == czyx
    # einsum is the independent reading of the axis letters.
    letters = names.replace("t", "")
    expected = np.einsum(
        f"{letters}->{''.join(a for a in 'czyx' if a in letters)}", values.squeeze(0) if "t" in names else values
    )
    np.testing.assert_array_equal(order.to_czyx(values), expected.reshape(czyx))
    start, stop = (0, 3, 5), (1, 9, 40)
    box = order.to_czyx(values[order.index(start, stop)])
    np.testing.assert_array_equal(box, expected.reshape(czyx)[:, 0:1, 3:9, 5:40])


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        ("tzyx", (5, 3, 4, 5), "'t' is longer than 1; save one time point"),
        ("wzyx", (5, 3, 4, 5), "'w' is longer than 1; save it with z, y, x"),
        ("zzyx", (5, 3, 4, 5), "may occur once"),
        ("zy", (3, 4), "y and x are needed"),
        ("zyx", (0, 4, 5), "is empty"),
        (None, (3,), "array with 1 axes"),
    ],
)
def test_axes_that_are_refused(names, shape, message):
    with pytest.raises(FormatError, match=message):
        order_axes(names, shape, "file")
