import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import zarr

from voxclf.errors import FormatError, OutputExistsError
from voxclf.formats.zarr import open_zarr
from voxclf.volume import create_volume, open_level, open_volume

SHAPE, VOXEL_SIZE_NM = (23, 37, 41), (50.0, 4.6, 4.6)
CHUNK, SHARD = (8, 16, 16), (16, 32, 32)


def create(path, kind="image", n_channels=1, dtype="uint8", **options):
    return create_volume(path, SHAPE, n_channels, dtype, VOXEL_SIZE_NM, CHUNK, kind=kind, **options)


@pytest.mark.parametrize("shard", [None, SHARD])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint64", "float16", "float32"])
def test_zarr_python_reads_what_is_written(tmp_path, array, dtype, shard):
    volume = create(tmp_path / "v.zarr", "probabilities", 2, dtype, shard_shape=shard)
    values = np.stack([array, 255 - array]).astype(dtype)
    volume.write((0, 0, 0), values)
    stored = zarr.open_array(tmp_path / "v.zarr" / "0", mode="r")
    np.testing.assert_array_equal(stored[:], values)
    assert stored.shards == ((2, *SHARD) if shard else None)
    assert stored.chunks == (1, *CHUNK)
    np.testing.assert_array_equal(volume.read((3, 5, 7), (20, 36, 40)), values[:, 3:20, 5:36, 7:40])


def test_writing_block_by_block_gives_the_same_bytes_as_at_once(tmp_path, array):
    whole = create(tmp_path / "whole.zarr", shard_shape=SHARD)
    parts = create(tmp_path / "parts.zarr", shard_shape=SHARD)
    assert parts.write_shape == SHARD
    whole.write((0, 0, 0), array[None])
    for z in (16, 0):
        for y in (0, 32):
            for x in (32, 0):
                parts.write((z, y, x), array[None, z : z + 16, y : y + 32, x : x + 32])
    files = [p for p in (tmp_path / "whole.zarr" / "0").rglob("*") if p.is_file()]
    assert len(files) == 9
    for file in files:
        other = tmp_path / "parts.zarr" / file.relative_to(tmp_path / "whole.zarr")
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("kind", "n_channels", "axes"),
    [
        ("labels", 1, "zyx"),
        ("image", 1, "zyx"),
        ("image", 2, "czyx"),
        ("probabilities", 3, "czyx"),
        ("features", 1, "czyx"),
    ],
)
def test_metadata_are_ome_zarr_0_5(tmp_path, kind, n_channels, axes):
    """The rules of https://ngff.openmicroscopy.org/0.5/ for multiscales, label colours and channels."""
    classes = [{"id": 1, "name": "membrane", "colour": "#4477AA"}, {"id": 3, "name": "vesicle", "colour": "#EE6677"}]
    names = [f"class {i}" for i in range(n_channels)] if n_channels > 1 else None
    create(tmp_path / "v.zarr", kind, n_channels, channel_names=names, attributes={"classes": classes})
    group = zarr.open_group(tmp_path / "v.zarr", mode="r")
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    assert [a["name"] for a in multiscale["axes"]] == list(axes)
    assert {(a["type"], a.get("unit")) for a in multiscale["axes"][-3:]} == {("space", "nanometer")}
    assert all(a["type"] == "channel" for a in multiscale["axes"][:-3])
    assert len(multiscale["datasets"]) == 6
    for dataset in multiscale["datasets"]:
        stored = group[dataset["path"]]
        assert stored.metadata.dimension_names == tuple(axes)
        scale, *rest = dataset["coordinateTransformations"]
        assert (scale["type"], len(scale["scale"])) == ("scale", len(axes))
        assert [t["type"] for t in rest] == (["translation"] if dataset["path"] != "0" else [])
        if rest:
            # The first coarse voxel's centre is the middle of the fine voxels it stands for.
            middle = [(s - v) / 2 for s, v in zip(scale["scale"][-3:], VOXEL_SIZE_NM, strict=True)]
            assert rest[0]["translation"][-3:] == pytest.approx(middle)
    if kind == "labels":
        assert ome["image-label"]["colors"][1] == {"label-value": 3, "rgba": [0xEE, 0x66, 0x77, 255]}
        assert ome["image-label"]["properties"][0] == {"label-value": 1, "name": "membrane"}
    if "omero" in ome:
        assert len(ome["omero"]["channels"]) == n_channels
        for channel in ome["omero"]["channels"]:
            assert re.fullmatch("[0-9A-F]{6}", channel["color"])
            assert set(channel["window"]) == {"min", "max", "start", "end"}
    volume = open_volume(tmp_path / "v.zarr")
    assert (volume.shape, volume.n_channels, volume.voxel_size_nm) == (SHAPE, n_channels, VOXEL_SIZE_NM)
    assert volume.metadata["kind"] == kind
    assert volume.metadata["classes"] == classes
    assert volume.channel_names == tuple(names or ())


def write_zarr_2(path, array, attributes, chunks=(8, 16, 16)):
    group = zarr.open_group(path, mode="w", zarr_format=2, attributes=attributes)
    stored = group.create_array("0", shape=array.shape, chunks=chunks, dtype=array.dtype)
    stored[:] = array


def test_reads_ome_zarr_0_4_in_micrometres(tmp_path, array):
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    scale = [{"type": "scale", "scale": [1, 1, 0.05, 0.0046, 0.0046]}]
    multiscale = {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [1, 1, 1, 2, 2]}]
    attributes = {"multiscales": [multiscale], "omero": {"channels": [{"label": "SE"}, {"label": "BSE"}]}}
    two = np.stack([array, 255 - array])
    write_zarr_2(tmp_path / "v.zarr", two[None], attributes, (1, 1, 8, 16, 16))
    volume = open_volume(tmp_path / "v.zarr")
    assert volume.voxel_size_nm == pytest.approx((50, 9.2, 9.2))
    assert volume.channel_names == ("SE", "BSE")
    np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE), two)


def test_ome_zarr_without_units_has_no_voxel_size(tmp_path, array):
    axes = [{"name": a, "type": "space"} for a in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}]
    write_zarr_2(tmp_path / "v.zarr", array, {"multiscales": [{"axes": axes, "datasets": datasets}]})
    with pytest.raises(ValueError, match=r"states no voxel size; .* --voxel-size"):
        open_volume(tmp_path / "v.zarr")


def test_reads_ome_zarr_0_1_which_had_no_axes(tmp_path, array):
    attributes = {"multiscales": [{"version": "0.1", "datasets": [{"path": "0"}]}]}
    write_zarr_2(tmp_path / "v.zarr", array[None, None], attributes, (1, 1, 8, 16, 16))
    np.testing.assert_array_equal(open_zarr(str(tmp_path / "v.zarr")).read((0, 0, 0), SHAPE)[0], array)


@pytest.mark.parametrize("version", [2, 3])
def test_plain_array_with_resolution(tmp_path, array, version):
    attributes = {"resolution": [50, 4.6, 4.6]}
    stored = zarr.create_array(
        tmp_path / "v.zarr", data=array, chunks=(8, 16, 16), zarr_format=version, attributes=attributes
    )
    volume = open_volume(tmp_path / "v.zarr")
    assert volume.voxel_size_nm == VOXEL_SIZE_NM
    assert volume.chunk_shape == stored.chunks
    np.testing.assert_array_equal(volume.read((2, 3, 4), (21, 33, 40))[0], array[2:21, 3:33, 4:40])


def test_named_axes_of_a_plain_array_decide(tmp_path, array):
    zarr.create_array(tmp_path / "v.zarr", data=np.ascontiguousarray(array.T), dimension_names=["x", "y", "z"])
    np.testing.assert_array_equal(open_zarr(str(tmp_path / "v.zarr")).read((0, 0, 0), SHAPE)[0], array)


def test_group_without_image_lists_its_arrays(tmp_path, array):
    group = zarr.open_group(tmp_path / "v.zarr", mode="w")
    group.create_array("volumes/raw", data=array)
    with pytest.raises(FormatError, match=r"group without an image; it holds volumes/raw: give"):
        open_volume(tmp_path / "v.zarr")
    assert open_zarr(str(tmp_path / "v.zarr" / "volumes" / "raw")).info.shape == (1, *SHAPE)


def test_levels_open_by_path_with_their_own_voxel_size(tmp_path):
    create(tmp_path / "v.zarr")
    assert open_volume(tmp_path / "v.zarr" / "1").voxel_size_nm == (50.0, 9.2, 9.2)
    assert open_level(tmp_path / "v.zarr", 2).shape == (23, 10, 11)
    with pytest.raises(FileNotFoundError, match="no level 9"):
        open_level(tmp_path / "v.zarr", 9)


@pytest.mark.parametrize("damage", ["{", "[]", '{"node_type": "group"', '{"zarr_format": 3}'])
def test_damaged_metadata_say_so(tmp_path, damage):
    create(tmp_path / "v.zarr")
    (tmp_path / "v.zarr" / "zarr.json").write_text(damage)
    with pytest.raises(FormatError, match=r"v\.zarr"):
        open_volume(tmp_path / "v.zarr")


def test_damaged_chunk_says_so(tmp_path, array):
    create(tmp_path / "v.zarr").write((0, 0, 0), array[None])
    chunk = tmp_path / "v.zarr" / "0" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(FormatError, match=r"cannot read .*v\.zarr"):
        open_volume(tmp_path / "v.zarr").read((0, 0, 0), (8, 8, 8))


def test_existing_output_is_kept_unless_overwritten(tmp_path, array):
    create(tmp_path / "v.zarr").write((0, 0, 0), array[None])
    with pytest.raises(OutputExistsError, match="--overwrite"):
        create(tmp_path / "v.zarr")
    assert not create(tmp_path / "v.zarr", overwrite=True).read((0, 0, 0), SHAPE).any()
    assert [p.name for p in tmp_path.iterdir()] == ["v.zarr"]


def test_a_folder_that_is_no_zarr_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter_1.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not a Zarr folder"):
        create(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter_1.txt").exists()


def test_large_sparse_volume_costs_nothing_until_read(tmp_path):
    """10^12 voxels: created, written and read in one corner within some MB."""
    volume = create_volume(tmp_path / "v.zarr", (10_000, 10_000, 10_000), 1, "uint8", (8, 8, 8), kind="image")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    volume.write((9_984, 9_984, 9_984), np.full((1, 16, 16, 16), 7, np.uint8))
    corner = volume.read((9_980, 9_980, 9_980), (10_000, 10_000, 10_000))
    assert (int(corner.sum()), corner.shape) == (7 * 16**3, (1, 20, 20, 20))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kB
    n_bytes = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert n_bytes < 64 * 1024


_WRITE_FOREVER = """
import sys
import numpy as np
from voxclf.volume import open_level
volume = open_level(sys.argv[1], 0, writable=True)
array = np.random.default_rng(0).integers(0, 255, (1, *volume.shape), dtype=np.uint8)
print("started", flush=True)
while True:
    volume.write((0, 0, 0), array)
"""


def test_killed_writer_leaves_nothing_that_a_second_run_does_not_replace(tmp_path):
    path = tmp_path / "v.zarr"
    volume = create_volume(path, (64, 64, 64), 1, "uint8", (8, 8, 8), (16, 16, 16), kind="image")
    for delay in (0.0, 0.005, 0.02):
        writer = subprocess.Popen([sys.executable, "-c", _WRITE_FOREVER, str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(delay)
        writer.kill()
        writer.wait()
        writer.stdout.close()
    expected = np.random.default_rng(0).integers(0, 255, (1, *volume.shape), dtype=np.uint8)
    volume.write((0, 0, 0), expected)
    np.testing.assert_array_equal(open_volume(path).read((0, 0, 0), volume.shape), expected)
    assert not [p for p in path.rglob("*") if p.is_file() and not re.fullmatch(r"\d+|zarr\.json", p.name)]


def limited_file_size(code, tmp_path):
    """Run Python code under a file-size limit, which fails writes as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], preexec_fn=limit, capture_output=True, text=True, env=environment
    )


def test_failing_disk_is_told_in_words(tmp_path):
    code = """
import sys, numpy as np
from voxclf.volume import create_volume, export_tiff, open_volume
noise = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 64), dtype=np.uint8)
volume = create_volume(sys.argv[1] + "/v.zarr", (64, 64, 64), 1, "uint8", (8, 8, 8), kind="image")
for write in (lambda: volume.write((0, 0, 0), noise), lambda: export_tiff(volume, sys.argv[1] + "/v.tif")):
    try:
        write()
    except OSError as error:
        print(error)
"""
    done = limited_file_size(code, tmp_path)
    first, second = done.stdout.splitlines()
    assert re.search(r"cannot write .*v\.zarr/0: the file is larger than allowed", first)
    assert re.search(r"cannot write .*v\.tif: ", second)
    assert not list(tmp_path.glob("*.partial"))
    assert not list(Path(tmp_path).rglob("*__lock"))


def test_folder_without_permission(tmp_path, monkeypatch):
    # Refused by a stand-in, because the superuser may write anywhere.
    monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(PermissionError, match=r"cannot create .*v\.zarr: permission denied: choose a folder"):
        create(tmp_path / "v.zarr")


def test_attributes_are_stored_as_given(tmp_path):
    create(tmp_path / "v.zarr", attributes={"model": {"name": "random_forest", "seed": 3}})
    metadata = json.loads((tmp_path / "v.zarr" / "zarr.json").read_text())
    assert metadata["attributes"]["voxclf"] == {"kind": "image", "model": {"name": "random_forest", "seed": 3}}
