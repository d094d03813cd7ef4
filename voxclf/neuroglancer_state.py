"""What neuroglancer shows, as its state: layers, colours, position. Plain values, no viewer needed.

Neuroglancer lists axes as x, y, z and lengths in metres; a position counts voxels from the volume's corner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from voxclf.geometry import Region, VoxelSize, Zyx
from voxclf.labels import LabelSet

PANEL_PIXELS = 400
IMAGE_SHADER = "#uicontrol invlerp normalized\nvoid main() { emitGrayscale(normalized()); }\n"


def dimensions(voxel_size_nm: VoxelSize) -> dict[str, Any]:
    """The axes and what a voxel measures along them."""
    # Through text, so that 4.6 nm is 4.6e-9 m and not 4.6000000000000005e-9.
    return {axis: [float(f"{size:.9g}e-9"), "m"] for axis, size in zip("xyz", voxel_size_nm[::-1], strict=True)}


def image_layer(name: str, source: str, window: tuple[float, float]) -> dict[str, Any]:
    """A grey image with its contrast: ``window`` is what becomes black and white."""
    controls = {"normalized": {"range": list(window)}}
    return {"type": "image", "name": name, "source": source, "shader": IMAGE_SHADER, "shaderControls": controls}


def label_layer(name: str, source: str, label_set: LabelSet | None) -> dict[str, Any]:
    """Labels in the colours of their classes, half transparent; without classes, colours are neuroglancer's own."""
    layer: dict[str, Any] = {"type": "segmentation", "name": name, "source": source, "selectedAlpha": 0.35}
    if label_set is not None:
        layer["segments"] = [str(i) for i in label_set.ids]
        layer["segmentColors"] = {
            str(i): colour.lower() for i, colour in zip(label_set.ids, label_set.colours, strict=True)
        }
    return layer


def probability_layers(source: str, label_set: LabelSet, dtype: np.dtype) -> list[dict[str, Any]]:
    """Probabilities as a layer per class, off at first: its colour, opaque where it is certain."""
    value = "getDataValue()" if dtype.kind == "f" else "toNormalized(getDataValue())"
    return [
        {
            "type": "image",
            "name": f"p({name})",
            "source": source,
            # What neuroglancer calls the channel axis of OME-Zarr; every layer stands at its own class on it.
            "localDimensions": {"c'": [1, ""]},
            "localPosition": [k],
            "shader": f'#uicontrol vec3 colour color(default="{colour.lower()}")\n'
            f"void main() {{ emitRGBA(vec4(colour, {value})); }}\n",
            "opacity": 1,
            "visible": False,
        }
        for k, (name, colour) in enumerate(zip(label_set.names, label_set.colours, strict=True))
    ]


def make_state(
    layers: Sequence[Mapping[str, Any]], voxel_size_nm: VoxelSize, position: Zyx, shape: Zyx
) -> dict[str, Any]:
    """Everything that neuroglancer shows, so that the whole height or width of the volume is seen at first."""
    in_plane = min(voxel_size_nm[1:])
    extent = max(shape[1] * voxel_size_nm[1], shape[2] * voxel_size_nm[2]) / in_plane
    return {
        "dimensions": dimensions(voxel_size_nm),
        "position": [p + 0.5 for p in position[::-1]],
        "crossSectionScale": max(extent / PANEL_PIXELS, 0.05),
        "projectionScale": max(n * size / in_plane for n, size in zip(shape, voxel_size_nm, strict=True)) * 1.3,
        "layers": [dict(layer) for layer in layers],
        "layout": "4panel",
        "showSlices": True,
    }


def to_fragment(state: Mapping[str, Any]) -> str:
    """The end of a neuroglancer address that holds a state."""
    return "#!" + _spell(state)


def link_to_region(region: Region, voxel_size_nm: VoxelSize) -> str:
    """The end of a neuroglancer address, ``#!+{state}``, that moves to the centre of a box.

    The ``+`` keeps the layers that neuroglancer shows, so it can be put behind the address of any session.
    """
    centre = [(a + b) / 2 for a, b in zip(region.start, region.stop, strict=True)]
    return "#!+" + _spell({"dimensions": dimensions(voxel_size_nm), "position": centre[::-1]})


def _spell(state: Mapping[str, Any]) -> str:
    return quote(json.dumps(state, separators=(",", ":")), safe="")
