import json

import numpy as np
import pytest
import tensorstore as ts

from voxclf.errors import FormatError
from voxclf.volume import open_volume

BOX = (slice(3, 20), slice(5, 30), slice(7, 40))
START, STOP = (3, 5, 7), (20, 30, 40)


def write_n5(path, array, **metadata):
    spec = {
        "driver": "n5",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "dimensions": array.shape[::-1],
            "blockSize": (16, 16, 8, 1)[: array.ndim],
            "dataType": "uint8",
            "compression": {"type": "gzip"},
            **metadata,
        },
    }
    ts.open(spec, create=True).result()[...] = array.T


#: What programs that write N5 say about voxel size, all of it x, y, z except the named axes of the last.
VOXEL_SIZES = {
    "resolution": {"resolution": [4.6, 4.6, 50], "units": ["nm", "nm", "nm"]},
    "pixelResolution": {"pixelResolution": {"dimensions": [0.0046, 0.0046, 0.05], "unit": "um"}},
    "transform": {
        "transform": {"axes": ["z", "y", "x"], "scale": [50, 4.6, 4.6], "units": ["nm"] * 3, "translate": [0] * 3}
    },
}


@pytest.mark.parametrize("custom", VOXEL_SIZES)
def test_n5_is_transposed_and_its_voxel_size_read(tmp_path, array, custom):
    write_n5(tmp_path / "v.n5" / "em", array)
    file = tmp_path / "v.n5" / "em" / "attributes.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **VOXEL_SIZES[custom]}))
    volume = open_volume(tmp_path / "v.n5" / "em")
    assert (volume.shape, volume.chunk_shape, volume.voxel_size_nm) == ((23, 37, 41), (8, 16, 16), (50, 4.6, 4.6))
    np.testing.assert_array_equal(volume.read(START, STOP)[0], array[BOX])


def test_n5_multiscale_group_opens_its_finest_level(tmp_path, array):
    write_n5(tmp_path / "v.n5" / "em" / "s0", array)
    write_n5(tmp_path / "v.n5" / "em" / "s1", array[::2, ::2, ::2])
    (tmp_path / "v.n5" / "em" / "attributes.json").write_text(json.dumps(VOXEL_SIZES["pixelResolution"]))
    for path in ("em", "em/s0"):
        volume = open_volume(tmp_path / "v.n5" / path)
        assert (volume.shape, volume.voxel_size_nm) == ((23, 37, 41), (50, 4.6, 4.6))


def test_n5_group_lists_its_datasets(tmp_path, array):
    write_n5(tmp_path / "v.n5" / "volumes" / "raw", array)
    (tmp_path / "v.n5" / "attributes.json").write_text('{"n5": "2.0.0"}')
    for path in ("v.n5", "v.n5/volumes"):
        with pytest.raises(FormatError, match=r"choose a dataset inside it, as in .*/raw\. It holds"):
            open_volume(tmp_path / path)


def test_n5_channels_are_last_in_the_file_and_first_here(tmp_path, array):
    two = np.stack([array, 255 - array])
    write_n5(tmp_path / "v.n5", two)
    np.testing.assert_array_equal(open_volume(tmp_path / "v.n5", (8, 8, 8)).read(START, STOP), two[(slice(None), *BOX)])


@pytest.mark.parametrize("sharded", [False, True])
def test_precomputed_is_transposed_and_begins_at_0(tmp_path, array, sharded):
    scale = {"size": (41, 37, 23), "encoding": "raw", "chunk_size": (16, 16, 8), "resolution": (4.6, 4.6, 50)}
    if sharded:
        scale["sharding"] = {
            "@type": "neuroglancer_uint64_sharded_v1",
            "preshift_bits": 1,
            "minishard_bits": 1,
            "shard_bits": 1,
            "hash": "identity",
        }
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/v/"},
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 2},
        "scale_metadata": {**scale, "voxel_offset": (100, 200, 300)},
    }
    two = np.stack([array, 255 - array])
    ts.open(spec, create=True).result()[...] = two.T
    volume = open_volume(tmp_path / "v")
    assert (volume.shape, volume.chunk_shape, volume.voxel_size_nm) == ((23, 37, 41), (8, 16, 16), (50, 4.6, 4.6))
    np.testing.assert_array_equal(volume.read(START, STOP), two[(slice(None), *BOX)])


@pytest.mark.parametrize("text", ["", "{}", '{"scales": [{}]}', '{"@type": "neuroglancer_legacy_mesh"}'])
def test_info_of_something_else(tmp_path, text):
    (tmp_path / "info").write_text(text)
    with pytest.raises(FormatError, match="does not describe a precomputed volume"):
        open_volume(tmp_path)
