"""A volume, its labels and its probabilities in a viewer, from local files. ``voxclf view``.

Neuroglancer's Python package brings the viewer, which runs in the browser; it reads the volumes from a server on this
machine (`server.py`). Nothing leaves it, and it works without internet. napari shows the same layers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from voxclf.config import ViewConfig
from voxclf.formats.ome_metadata import Kind
from voxclf.geometry import VoxelSize, Zyx
from voxclf.labels import LabelSet
from voxclf.neuroglancer_state import image_layer, label_layer, make_state, probability_layers, to_fragment
from voxclf.predict import LABELS, PROBABILITIES
from voxclf.provenance import IntensityStatistics
from voxclf.view.server import HOST, FolderSource, Source, ViewServer, VolumeSource
from voxclf.volume import Volume, open_volume

DEFAULT_PORT = 9280
"""Named in printed addresses where no port was asked for."""
PUBLIC_VIEWER = "https://neuroglancer-demo.appspot.com"
"""Named in printed addresses where no other viewer was allowed to read."""


@dataclass(frozen=True)
class Shown:
    """One layer: a volume and what it means."""

    name: Literal["image", "labels", "probabilities"]
    volume: Volume

    @property
    def label_set(self) -> LabelSet | None:
        """The classes it carries."""
        return LabelSet.from_metadata(self.volume.metadata)


@dataclass(frozen=True)
class Scene:
    """What a viewer shows: layers of one shape, and where it looks first."""

    layers: tuple[Shown, ...]
    voxel_size_nm: VoxelSize
    position: Zyx

    @property
    def shape(self) -> Zyx:
        """Of all layers."""
        return self.layers[0].volume.shape

    @property
    def label_set(self) -> LabelSet | None:
        """The classes, from the first layer that knows them."""
        return next((layer.label_set for layer in self.layers if layer.label_set), None)


def open_scene(config: ViewConfig) -> Scene:
    """Open what there is to see.

    Raises
    ------
    FileNotFoundError
        If the prediction or the volume does not exist.
    ValueError
        If shapes differ, the voxel size is not known, or ``at`` lies outside.
    """
    folder = Path(config.prediction)
    layers = []
    if (folder / LABELS).exists():
        size = open_volume(folder / LABELS, kind="labels").voxel_size_nm
        layers.append(Shown("labels", open_volume(folder / LABELS, kind="labels")))
        if (folder / PROBABILITIES).exists():
            layers.append(Shown("probabilities", open_volume(folder / PROBABILITIES)))
    else:
        labels = open_volume(config.prediction, config.voxel_size, require_voxel_size=False, kind="labels")
        size = labels.voxel_size_nm
        layers.append(Shown("labels", labels))
    if config.volume:
        known = None if np.isnan(size).any() else size
        image = open_volume(config.volume, config.voxel_size or known)
        size = image.voxel_size_nm
        layers.insert(0, Shown("image", image))
    if np.isnan(size).any():
        raise ValueError(f"{config.prediction} states no voxel size; give --voxel-size z,y,x in nm")
    shapes = {layer.volume.path: layer.volume.shape for layer in layers}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes} (z, y, x); give the volume that was predicted")
    shape = layers[0].volume.shape
    return Scene(tuple(layers), size, _parse_position(config.at, shape))


def _parse_position(text: str | None, shape: Zyx) -> Zyx:
    if text is None:
        return shape[0] // 2, shape[1] // 2, shape[2] // 2
    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdecimal() for part in parts):
        z, y, x = (int(part) for part in parts)
        if z < shape[0] and y < shape[1] and x < shape[2]:
            return z, y, x
    raise ValueError(f"--at was {text!r}; give a voxel z,y,x inside the volume's shape {shape}, for example 0,0,0")


def make_sources(scene: Scene) -> dict[str, Source]:
    """How each layer is served, by the name it has in the address."""
    sources: dict[str, Source] = {}
    for layer in scene.layers:
        path = Path(layer.volume.path)
        is_zarr = path.is_dir() and ((path / "zarr.json").exists() or (path / ".zattrs").exists())
        if is_zarr and layer.volume.metadata.get("kind"):
            sources[layer.name] = FolderSource(path)
        else:
            # Zarr of other programs may have a time axis or no unit; read by voxclf, it has neither.
            kind: Kind = "labels" if layer.name == "labels" else "image"
            sources[layer.name] = VolumeSource(_with_voxel_size(layer.volume, scene.voxel_size_nm), kind)
    return sources


def _with_voxel_size(volume: Volume, voxel_size_nm: VoxelSize) -> Volume:
    return volume if volume.has_voxel_size else Volume(volume.path, volume.info, voxel_size_nm, volume.opener)


def scene_state(scene: Scene, address: str) -> dict[str, Any]:
    """The state of neuroglancer that shows a scene served at an address."""
    layers = []
    for layer in scene.layers:
        source = f"zarr://{address}/data/{layer.name}/"
        if layer.name == "image":
            seen = IntensityStatistics.measure(layer.volume)
            layers.append(image_layer(layer.name, source, (seen.percentile_1, seen.percentile_99)))
        elif layer.name == "labels":
            layers.append(label_layer(layer.name, source, layer.label_set))
        elif scene.label_set is not None:
            layers += probability_layers(source, scene.label_set, layer.volume.dtype)
    return make_state(layers, scene.voxel_size_nm, scene.position, scene.shape)


class NeuroglancerView:
    """A scene served and shown: neuroglancer's own server for the viewer, ours for the data.

    Parameters
    ----------
    scene : Scene
    port : int
        Of the data; 0 takes any that is free.
    allow_origin : str, optional
        Another web address whose pages may read the data.

    Raises
    ------
    ModuleNotFoundError
        If neuroglancer is not installed.
    """

    def __init__(self, scene: Scene, port: int = 0, allow_origin: str | None = None) -> None:
        if importlib.util.find_spec("neuroglancer") is None:
            raise ModuleNotFoundError(
                "neuroglancer is not installed; install it with: pip install 'voxclf[neuroglancer]', or use --napari"
            )
        import neuroglancer

        neuroglancer.set_server_bind_address(HOST)
        self._viewer = neuroglancer.Viewer()
        self.url = str(self._viewer.get_viewer_url())
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(self.url))
        self.server = ViewServer(port, make_sources(scene), {origin, *([allow_origin] if allow_origin else [])})
        self.state = scene_state(scene, self.server.address)
        self._viewer.set_state(self.state)

    def __enter__(self) -> NeuroglancerView:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def view(config: ViewConfig) -> tuple[list[str], dict[str, Any]]:
    """Show a scene until interrupted, or print its address; returns lines and values to print."""
    scene = open_scene(config)
    if config.napari:
        return _view_in_napari(config, scene)
    viewer = config.allow_origin or PUBLIC_VIEWER
    if config.print:
        state = scene_state(scene, f"http://{HOST}:{config.port or DEFAULT_PORT}")
        url = f"{viewer}/{to_fragment(state)}"
        command = f"voxclf view {config.prediction} ... --port {config.port or DEFAULT_PORT} --allow-origin {viewer}"
        return [f"address      {url}", f"works while  {command}"], {"url": url, "state": state}
    with NeuroglancerView(scene, config.port, config.allow_origin) as shown:
        # Printed here and not when done: a viewer is done only when it is stopped.
        print(f"address      {shown.url}\nas state     {viewer}/{to_fragment(shown.state)}\nCtrl-C ends it", flush=True)
        if config.browser:
            webbrowser.open(shown.url)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return [], {"url": shown.url, "state": shown.state}


# --- napari ---


class LazyArray:
    """A volume as napari wants it: an array that reads what is indexed. Channels come first where there are several."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.dtype = volume.dtype
        self.shape: tuple[int, ...] = volume.shape if volume.n_channels == 1 else (volume.n_channels, *volume.shape)
        self.ndim = len(self.shape)

    def __getitem__(self, key: Any) -> np.ndarray:
        keys = key if isinstance(key, tuple) else (key,)
        given = [k for k in keys if k is not Ellipsis]
        rest = (slice(None),) * (self.ndim - len(given))
        at = keys.index(Ellipsis) if Ellipsis in keys else len(given)
        keys = (*given[:at], *rest, *given[at:])
        space = keys[-3:]
        ranges = [
            range(n)[k if isinstance(k, slice) else slice(int(k) % n, int(k) % n + 1)]
            for k, n in zip(space, self._volume.shape, strict=True)
        ]
        if any(len(r) == 0 for r in ranges):
            return np.zeros([len(r) for r in ranges], self.dtype)
        start, stop = [min(r) for r in ranges], [max(r) + 1 for r in ranges]
        box = self._volume.read((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        within = tuple(slice(None, None, k.step) if isinstance(k, slice) else 0 for k in space)
        return box[(keys[0] if self.ndim == 4 else 0, *within)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * self.ndim], dtype)


def _view_in_napari(config: ViewConfig, scene: Scene) -> tuple[list[str], dict[str, Any]]:
    if importlib.util.find_spec("napari") is None:
        arguments = [config.prediction, *([config.volume] if config.volume else [])]
        command = f"pip install 'voxclf[napari]' && voxclf view {shlex.join(arguments)} --napari"
        return [f"napari is not installed here; with it: {command}"], {"command": command}
    import napari

    add_to_napari(napari.Viewer(), scene)
    napari.run()
    return [], {}


def add_to_napari(viewer: Any, scene: Scene) -> None:
    """Add the layers of a scene to a napari viewer, at their true size and in the colours of their classes."""
    scale = scene.voxel_size_nm
    label_set = scene.label_set
    for layer in scene.layers:
        array = LazyArray(layer.volume)
        if layer.name == "image":
            seen = IntensityStatistics.measure(layer.volume)
            limits = (seen.percentile_1, max(seen.percentile_99, seen.percentile_1 + 1e-6))
            viewer.add_image(array, name="image", scale=scale, contrast_limits=limits, multiscale=False)
        elif layer.name == "labels":
            labels = viewer.add_labels(array, name="labels", scale=scale, opacity=0.4, multiscale=False)
            if label_set:
                from napari.utils.colormaps import DirectLabelColormap

                colours: dict[int | None, str] = {None: "transparent", 0: "transparent"}
                colours.update(zip(label_set.ids, label_set.colours, strict=True))
                labels.colormap = DirectLabelColormap(color_dict=colours)
        elif label_set:
            top = 255 if layer.volume.dtype == np.uint8 else 1
            viewer.add_image(
                array,
                channel_axis=0,
                name=[f"p({name})" for name in label_set.names],
                scale=scale,
                contrast_limits=[(0, top)] * label_set.n_classes,
                colormap=[_ramp(colour) for colour in label_set.colours],
                visible=False,
            )
    viewer.dims.set_point(range(3), [p * s for p, s in zip(scene.position, scale, strict=True)])


def _ramp(colour: str) -> Any:
    """From black to a class's colour."""
    from napari.utils import Colormap

    return Colormap(["#000000", colour], name=colour)
