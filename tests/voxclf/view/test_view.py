"""What the viewer is told and served, and that a real browser draws it."""

import importlib.util
import io
import json
import threading
import urllib.error
import urllib.request
from urllib.parse import unquote

import numpy as np
import pytest
import tensorstore as ts

from tests.voxclf.browser import Browser, find_chromium
from voxclf import cli
from voxclf.config import ViewConfig, make_config
from voxclf.labels import LabelSet
from voxclf.neuroglancer_state import probability_layers, to_fragment
from voxclf.view.scene import LazyArray, NeuroglancerView, make_sources, open_scene, scene_state
from voxclf.view.server import FolderSource, ViewServer, VolumeSource
from voxclf.volume import create_volume, open_volume

SIZE = (20.0, 10.0, 10.0)
CLASSES = LabelSet.from_ids([1, 2, 3], ["inside", "cell membrane", "blob"])


@pytest.fixture
def project(tmp_path, cells, monkeypatch):
    """A folder as `voxclf predict` leaves it, and the image as .npy: one volume served as files, one cut on demand."""
    monkeypatch.chdir(tmp_path)
    image, labels = cells
    np.save("image.npy", image)
    options = {"attributes": CLASSES.to_dict()}
    stored = create_volume("OUT/labels.zarr", labels.shape, 1, np.uint8, SIZE, (8, 16, 16), kind="labels", **options)
    stored.write((0, 0, 0), labels[None])
    probabilities = np.stack([255 * (labels == i) for i in CLASSES.ids]).astype(np.uint8)
    stored = create_volume(
        "OUT/probabilities.zarr", labels.shape, 3, np.uint8, SIZE, (8, 16, 16), kind="probabilities", **options
    )
    stored.write((0, 0, 0), probabilities)
    return tmp_path


def scene(**options):
    return open_scene(make_config(ViewConfig, {"prediction": "OUT", "volume": "image.npy", **options}))


@pytest.fixture
def serve():
    """Serve sources in the background; gives a function that fetches a path as (status, headers, bytes)."""
    servers = []

    def start(sources, allowed=()):
        server = ViewServer(0, sources, allowed)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def fetch(path, **headers):
            try:
                with urllib.request.urlopen(urllib.request.Request(server.address + path, headers=headers)) as answer:
                    return answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.headers, b""

        fetch.address = server.address
        return fetch

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def read_served(address, name, level):
    spec = {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": f"{address}/data/{name}/{level}/"}}
    return np.asarray(ts.open(spec).result().read().result())


# --- what is served ---


def test_any_format_is_served_as_the_same_voxels(project, serve, cells):
    address = serve(make_sources(scene())).address
    np.testing.assert_array_equal(read_served(address, "image", 0), cells[0])
    np.testing.assert_array_equal(read_served(address, "labels", 0), cells[1])
    assert read_served(address, "probabilities", 0).shape == (3, *cells[0].shape)


@pytest.mark.parametrize("dtype", [np.uint16, np.float64, np.uint32])
def test_types_and_coarser_levels(tmp_path, serve, dtype):
    array = np.random.default_rng(0).integers(0, 60_000, (70, 150, 131)).astype(dtype)
    np.save(tmp_path / "v.npy", array)
    kind = "labels" if dtype == np.uint32 else "image"
    fetch = serve({"v": VolumeSource(open_volume(tmp_path / "v.npy", (10, 10, 10), kind=kind), kind)})
    levels = json.loads(fetch("/data/v/zarr.json")[2])["attributes"]["ome"]["multiscales"][0]["datasets"]
    assert len(levels) == 3
    np.testing.assert_array_equal(read_served(fetch.address, "v", 0), array)
    np.testing.assert_array_equal(read_served(fetch.address, "v", 2), array[::4, ::4, ::4])
    assert fetch("/data/v/0/c/9/0/0")[0] == 404
    assert fetch("/data/v/7/c/0/0/0")[0] == 404


def test_parts_of_files_are_served_as_shards_need_them(tmp_path, serve):
    (tmp_path / "shard").write_bytes(bytes(range(100)))
    fetch = serve({"v": FolderSource(tmp_path)})
    status, headers, content = fetch("/data/v/shard", Range="bytes=10-19")
    assert (status, headers["Content-Range"], content) == (206, "bytes 10-19/100", bytes(range(10, 20)))
    status, headers, content = fetch("/data/v/shard", Range="bytes=-4")
    assert (status, headers["Content-Range"], content) == (206, "bytes 96-99/100", bytes(range(96, 100)))
    assert fetch("/data/v/shard")[0::2] == (200, bytes(range(100)))


def test_nothing_outside_the_volumes_is_served(tmp_path, serve):
    (tmp_path / "v").mkdir()
    (tmp_path / "secret").write_text("secret")
    fetch = serve({"v": FolderSource(tmp_path / "v")})
    above = ("/data/v/../secret", "/data/v/%2e%2e/secret", f"/data/v/{tmp_path}/secret")
    for path in (*above, "/data/w/x", "/secret", "/"):
        assert fetch(path)[0] == 404, path


def test_only_allowed_pages_may_read(tmp_path, serve):
    (tmp_path / "a").write_text("a")
    viewer = "http://127.0.0.1:1234"
    fetch = serve({"v": FolderSource(tmp_path)}, {viewer})
    assert fetch("/data/v/a", Origin=viewer)[1]["Access-Control-Allow-Origin"] == viewer
    assert "Access-Control-Allow-Origin" not in fetch("/data/v/a", Origin="https://elsewhere.example")[1]


def test_a_port_that_is_taken_is_named(serve):
    taken = int(serve({}).address.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"port {taken} cannot be used: .*--port"):
        ViewServer(taken, {})


# --- what the viewer is told ---


def test_the_state_names_sources_colours_and_place(project):
    state = scene_state(scene(at="3,4,5"), "http://127.0.0.1:1")
    assert state["dimensions"] == {"x": [1e-8, "m"], "y": [1e-8, "m"], "z": [2e-8, "m"]}
    assert state["position"] == [5.5, 4.5, 3.5]
    image, labels, *probabilities = state["layers"]
    assert image["source"] == "zarr://http://127.0.0.1:1/data/image/"
    assert labels["segmentColors"] == {str(i): c.lower() for i, c in zip(CLASSES.ids, CLASSES.colours, strict=True)}
    assert labels["segments"] == ["1", "2", "3"]
    assert [(p["name"], p["localPosition"]) for p in probabilities][1] == ("p(cell membrane)", [1])
    assert json.loads(unquote(to_fragment(state).removeprefix("#!"))) == state


def test_a_probability_is_its_class_colour_made_opaque():
    of_bytes = probability_layers("zarr://here", CLASSES, np.dtype(np.uint8))[2]["shader"]
    assert f'default="{CLASSES.colours[2].lower()}"' in of_bytes
    assert "toNormalized(getDataValue())" in of_bytes
    assert "toNormalized" not in probability_layers("zarr://here", CLASSES, np.dtype(np.float32))[0]["shader"]


def test_labels_alone_in_any_format(project, cells):
    np.save("labels.npy", cells[1])
    shown = scene(prediction="labels.npy", volume=None, voxel_size=SIZE)
    assert [layer.name for layer in shown.layers] == ["labels"]
    assert shown.position == (11, 18, 20)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"at": "1,2"}, "--at was '1,2'"),
        ({"at": "99,0,0"}, "inside the volume's shape"),
        ({"volume": "short.npy"}, "shapes differ.*give the volume that was predicted"),
        ({"prediction": "short.npy", "volume": None}, "states no voxel size"),
    ],
)
def test_bad_input_is_refused(project, options, match):
    np.save("short.npy", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=match):
        scene(**options)


def test_print_gives_the_address_and_how_to_serve_it(project, capsys):
    arguments = ["view", "OUT", "image.npy", "--print", "--port", "9281"]
    assert cli.main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["url"].startswith("https://neuroglancer-demo.appspot.com/#!")
    assert values["state"]["layers"][0]["source"] == "zarr://http://127.0.0.1:9281/data/image/"
    assert cli.main(arguments) == 0
    assert "--port 9281 --allow-origin https://neuroglancer-demo.appspot.com" in capsys.readouterr().out


def test_napari_prints_the_command_where_it_is_absent(project, capsys):
    if importlib.util.find_spec("napari"):
        pytest.skip("napari is installed here")
    assert cli.main(["view", "OUT", "image.npy", "--napari"]) == 0
    assert "voxclf view OUT image.npy --napari" in capsys.readouterr().out


def test_lazy_arrays_read_as_arrays(project, cells):
    image = LazyArray(open_volume("image.npy", SIZE))
    for key in (3, (slice(None), 4), (2, slice(1, 9, 3)), (..., 7), (slice(1, 3), 2, slice(None))):
        np.testing.assert_array_equal(image[key], cells[0][key], err_msg=str(key))
    np.testing.assert_array_equal(np.asarray(image), cells[0])
    probabilities = LazyArray(open_volume("OUT/probabilities.zarr"))
    assert probabilities.shape == (3, *cells[0].shape)
    np.testing.assert_array_equal(probabilities[1, 5], 255 * (cells[1][5] == 2))


# --- a real browser ---


def test_a_browser_draws_image_and_labels(project, tmp_path):
    if find_chromium() is None:
        pytest.skip("no chromium: the picture of neuroglancer is not taken")
    if importlib.util.find_spec("neuroglancer") is None:
        pytest.skip("the package neuroglancer is not installed")
    from PIL import Image

    def share_of(picture, colour):
        """Share of the upper left panel whose hue is that of a class over grey."""
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)[50:340, 5:490]
        strongest, weakest = np.argmax(colour), np.argmin(colour)
        return float((pixels[..., strongest] - pixels[..., weakest] > 25).mean())

    def is_drawn(picture):
        return all(share_of(picture, colour) > 0.02 for colour in CLASSES.rgb)

    with NeuroglancerView(scene()) as shown, Browser(tmp_path / "profile") as browser:
        picture = browser.photograph(shown.url, is_drawn)
    (tmp_path / "neuroglancer.png").write_bytes(picture)
    assert is_drawn(picture), f"see {tmp_path / 'neuroglancer.png'}"
