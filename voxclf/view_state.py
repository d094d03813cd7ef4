"""What neuroglancer shows, as its state: layers, colours, position. Plain values, no viewer needed.

Neuroglancer lists axes as x, y, z and lengths in metres; a position counts voxels from the volume's corner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from voxclf.geometry import VoxelSize, Zyx
from voxclf.labels import LabelSet

MOST_CHANNELS = 16
"""Classes that the shader of a probability layer mixes; a graphics card refuses very long ones."""

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


def probability_layer(
    name: str, source: str, label_set: LabelSet, dtype: np.dtype, voxel_size_nm: VoxelSize
) -> dict[str, Any]:
    """Probabilities of all classes in one layer: every class shines in its colour as far as it is probable."""
    axes = dimensions(voxel_size_nm)
    # A channel dimension, marked by ^, is one that a shader reads instead of one that a slider walks along.
    output = {"c^": [1, ""], **{axis: axes[axis] for axis in "zyx"}}
    return {
        "type": "image",
        "name": name,
        "source": {"url": source, "transform": {"outputDimensions": output}},
        "channelDimensions": {"c^": [1, ""]},
        "shader": mix_shader(label_set, dtype),
        "opacity": 0.7,
        "visible": False,
    }


def mix_shader(label_set: LabelSet, dtype: np.dtype) -> str:
    """Add up the class colours, each weighed with its probability; a checkbox per class switches it off."""
    value = "getDataValue({k})" if dtype.kind == "f" else "toNormalized(getDataValue({k}))"
    lines, terms = [], []
    for k in range(min(label_set.n_classes, MOST_CHANNELS)):
        red, green, blue = (f"{v / 255:.4f}" for v in label_set.rgb[k])
        lines.append(f"#uicontrol bool {_identifier(label_set.names[k], k)} checkbox(default=true)")
        colour = f"vec3({red}, {green}, {blue})"
        terms.append(f"  if ({_identifier(label_set.names[k], k)}) colour += {value.format(k=k)} * {colour};")
    return "\n".join([*lines, "void main() {", "  vec3 colour = vec3(0.0);", *terms, "  emitRGB(colour);", "}"]) + "\n"


def _identifier(name: str, k: int) -> str:
    """A class's name as a shader allows it: letters and digits, made unlike all others by its number."""
    kept = "".join(character if character.isascii() and character.isalnum() else "_" for character in name)
    return f"show_{k}_{kept}".rstrip("_").replace("__", "_")


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


PANEL_PIXELS = 400


def to_fragment(state: Mapping[str, Any]) -> str:
    """The end of a neuroglancer address that holds a state."""
    return "#!" + quote(json.dumps(state, separators=(",", ":")), safe="")
