"""Refining a whole prediction: the laws of blocks, resuming, what is stored, and every kind of bad input."""

import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from crf import DenseCRF
from tests.conftest import VOXEL_SIZE_NM, read, snapshot
from tests.voxclf.noisy import THREE, draw_prediction
from voxclf import cli
from voxclf.config import CrfRefineConfig, make_config
from voxclf.crf_inputs import select_channels
from voxclf.engine.executors import SerialExecutor
from voxclf.engine.run import Output, map_blocks
from voxclf.geometry import Region, make_block, split_into_blocks
from voxclf.models.crf_parameters import CrfParameters
from voxclf.models.crf_refiner import CrfRefiner, measure_intensity_windows
from voxclf.models.devices import has_nvidia_device
from voxclf.refine import check_memory, choose_crf_device, choose_parameters, refine_volume
from voxclf.volume import create_volume, open_volume

BY_HAND = {
    "bilateral_sigma_nm": "30", "intensity_sigma": "0.1", "spatial_sigma_nm": "10",
    "bilateral_weight": "2", "spatial_weight": "1", "n_iterations": "4",
}  # fmt: skip
OPTIONS = [part for name, value in BY_HAND.items() for part in (f"--{name.replace('_', '-')}", value)]
SHAPE = (8, 40, 140)  # three blocks of at most 64 voxels along x


def make_refiner(tolerance=1e-4, n_classes=3, **options):
    crf = DenseCRF(30.0, 0.1, 10.0, 2.0, 1.0, n_iterations=4)
    return CrfRefiner(crf, n_classes, VOXEL_SIZE_NM, tolerance, **options)


@pytest.fixture
def save_prediction(tmp_path, save_volume):
    """Write image.zarr and a prediction folder as `voxclf predict` does; returns the folder of both."""

    def save(image, stored, region=None, label_set=THREE, **options):
        save_volume(image, "image.zarr", chunk_shape=(64, 64, 64), **options)
        region = region or Region((0, 0, 0), image.shape)
        attributes = {"provenance": {"region": str(region)}, **label_set.to_dict()}
        (tmp_path / "OUT").mkdir()
        labels = label_set.remap_to_ids(stored.argmax(axis=0))[None]
        save_volume(labels, "OUT/labels.zarr", "labels", attributes=attributes)
        save_volume(stored, "OUT/probabilities.zarr", "probabilities", attributes=attributes)
        return tmp_path

    return save


def refine(folder, output="REF", **options):
    values = {"prediction": str(folder / "OUT"), "volume": str(folder / "image.zarr"), "output": str(folder / output)}
    return refine_volume(make_config(CrfRefineConfig, {**values, **BY_HAND, **options}))


def whole(refiner, image, stored):
    """The volume in one piece, with nothing around it; (K, Z, Y, X)."""
    probabilities = stored / np.float32(255)
    probabilities /= probabilities.sum(axis=0)
    return refiner.crf.refine(image, probabilities, VOXEL_SIZE_NM, n_threads=refiner.n_threads)


def in_blocks(refiner, image, stored, core_shape, tmp_path):
    output = create_volume(
        tmp_path / "out.zarr", image.shape, 3, np.float32, VOXEL_SIZE_NM, core_shape, kind="image", overwrite=True
    )
    volumes = []
    for name, array in (("i.zarr", image[None]), ("p.zarr", stored)):
        made = create_volume(
            tmp_path / name, array.shape[1:], len(array), array.dtype, VOXEL_SIZE_NM, kind="image", overwrite=True
        )
        made.write((0, 0, 0), array)
        volumes.append(open_volume(tmp_path / name))
    blocks = split_into_blocks(image.shape, core_shape, refiner.halo)
    list(map_blocks(refiner, volumes, [Output(output, np.asarray)], blocks, SerialExecutor()))
    return open_volume(tmp_path / "out.zarr").read((0, 0, 0), image.shape)


# --- the laws ---


@pytest.mark.parametrize("core_shape", [(23, 64, 72), (8, 32, 24)])
def test_blocks_equal_whole_within_the_tolerance(tmp_path, core_shape):
    image, _, stored = draw_prediction((23, 64, 72), noise=2.0)
    refiner = make_refiner(1e-4)
    expected = whole(refiner, image, stored)
    found = in_blocks(refiner, image, stored, core_shape, tmp_path)
    assert found.shape == (3, *image.shape)
    assert np.mean(found.argmax(axis=0) != expected.argmax(axis=0)) <= 1e-4
    assert np.mean(stored.argmax(axis=0) != expected.argmax(axis=0)) > 0.1  # something was refined
    if core_shape == image.shape:
        # The edge of the volume is the edge of the arrays: the step is the bare CRF to the last bit.
        np.testing.assert_array_equal(found, expected)


def test_a_halo_too_small_fails_the_law(tmp_path):
    image, _, stored = draw_prediction((23, 64, 72), noise=2.0)
    expected = whole(make_refiner(1e-4), image, stored)
    small = make_refiner(0.5)
    assert all(a < b for a, b in zip(small.halo, make_refiner(1e-4).halo, strict=True))
    found = in_blocks(small, image, stored, (8, 32, 24), tmp_path)
    assert np.mean(found.argmax(axis=0) != expected.argmax(axis=0)) > 1e-4


def test_smoothing_the_image_is_the_same_in_blocks(tmp_path):
    image, _, stored = draw_prediction((23, 64, 72), noise=2.0)
    refiner = replace(make_refiner(1e-4), image_sigma_nm=15.0)
    smooth = ndimage.gaussian_filter(image, (0.75, 1.5, 1.5), output=np.float32, radius=(3, 5, 5))
    expected = whole(refiner, np.rint(smooth).astype(np.uint8), stored)
    found = in_blocks(refiner, image, stored, (8, 32, 24), tmp_path)
    assert np.mean(found.argmax(axis=0) != expected.argmax(axis=0)) <= 1e-4
    assert np.abs(expected - whole(refiner, image, stored)).max() > 0.1
    np.testing.assert_array_equal(in_blocks(refiner, image, stored, image.shape, tmp_path), expected)


def test_kernels_wider_than_the_volume_see_all_of_it_and_take_no_more_memory():
    image, _, stored = draw_prediction((7, 24, 20), noise=2.0)
    refiner = CrfRefiner(DenseCRF(900.0, 0.1, 10.0, 2.0, 1.0), 3, VOXEL_SIZE_NM, volume_shape=image.shape)
    block = make_block(0, Region((0, 0, 0), image.shape), refiner.halo)
    edge = refiner.at_edge(block.outside(image.shape))
    np.testing.assert_array_equal(edge(image[None], stored), whole(refiner, image, stored))
    assert refiner.working_bytes((8, 8, 8)) == refiner.working_bytes((64, 64, 64)) < 20e6


def test_a_halo_that_does_not_fit_is_told_with_numbers():
    refiner = CrfRefiner(DenseCRF(300.0, 0.1, 10.0, 2.0, 1.0), 3, VOXEL_SIZE_NM, volume_shape=(999, 999, 999))
    message = (
        r"--memory was 0.4 GB, but kernels of \(300.0, .* see \(90, 180, 180\) voxels .* needs 5.6 GB; raise "
        r"--memory to 5.7GB or more, lower --workers, allow --tolerance 0.001 \(a halo of \(60, 120, 120\)\), use"
    )
    with pytest.raises(ValueError, match=message):
        check_memory(refiner, 400_000_000, 2)
    check_memory(refiner, 10_000_000_000, 2)


def test_threads_of_a_block_do_not_change_it():
    image, _, stored = draw_prediction((11, 30, 34))
    np.testing.assert_array_equal(
        whole(make_refiner(n_threads=1), image, stored), whole(make_refiner(n_threads=2), image, stored)
    )


def test_every_executor_writes_the_same_bytes(save_prediction):
    image, _, stored = draw_prediction(SHAPE)
    folder = save_prediction(image, stored)
    jobs = {"serial": 1, "threads": 2, "processes": 2}
    for name, workers in jobs.items():
        assert refine(folder, name, executor=name, workers=workers).job.n_blocks == 3
    expected = snapshot(folder / "serial")
    assert expected
    assert snapshot(folder / "threads") == expected
    assert snapshot(folder / "processes") == expected


def test_a_killed_run_resumes_to_the_same_bytes(save_prediction, monkeypatch):
    image, _, stored = draw_prediction(SHAPE)
    folder = save_prediction(image, stored)
    refine(folder, "uninterrupted")
    compute, n_calls = CrfRefiner.__call__, []

    def interrupted(self, *arrays):
        n_calls.append(1)
        if len(n_calls) == 2:
            raise KeyboardInterrupt
        return compute(self, *arrays)

    monkeypatch.setattr(CrfRefiner, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refine(folder)
    result = refine(folder)
    assert result.job.n_resumed == 1
    assert len(n_calls) == 2 + 2
    assert snapshot(folder / "REF") == snapshot(folder / "uninterrupted")


def test_memory_stays_below_what_is_announced():
    image, _, stored = draw_prediction((20, 48, 48))
    refiner = make_refiner()
    margin = [(0, 0), *((h, h) for h in refiner.halo)]
    arrays = np.pad(image[None], margin, mode="symmetric"), np.pad(stored, margin, mode="symmetric")
    refiner(*arrays)
    tracemalloc.start()
    try:
        refiner(*arrays)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    needed = peak + sum(array.nbytes for array in arrays)
    assert 0.4 * refiner.working_bytes(image.shape) < needed < refiner.working_bytes(image.shape)


# --- several channels ---


def test_a_guide_adds_channels(save_prediction, save_volume):
    image, _, stored = draw_prediction((8, 40, 60))
    guide = np.stack([image.astype(np.float32) / 3, image[::-1] * 100.0, np.zeros(image.shape)]).astype(np.float32)
    folder = save_prediction(image, stored)
    save_volume(guide, "guide.zarr", "features", channel_names=("same", "flipped", "nothing"))
    refine(folder, guide=str(folder / "guide.zarr"), guide_channels="flipped")
    ((low, high),) = measure_intensity_windows([select_channels(open_volume(folder / "guide.zarr"), ["1"])])
    two = np.stack([image / 255, np.clip((guide[1] - low) / (high - low), 0, 1)]).astype(np.float32)
    expected = whole(make_refiner(), two, stored).argmax(axis=0) + 1
    labels = read(folder / "REF" / "labels.zarr")[0]
    assert np.mean(labels != expected) < 1e-3
    refine(folder, "alone")
    assert np.mean(labels != read(folder / "alone" / "labels.zarr")[0]) > 0.003
    provenance = open_volume(folder / "REF" / "labels.zarr", kind="labels").metadata["provenance"]
    assert provenance["guide"]["channels"] == 1
    assert len(provenance["parameters"]["intensity_windows"]) == 2


# --- what is stored ---


def test_output_is_a_prediction_that_says_how_it_was_made(save_prediction, capsys):
    image, truth, stored = draw_prediction(SHAPE)
    folder = save_prediction(image, stored)
    code = cli.main(["crf-refine", str(folder / "OUT"), str(folder / "image.zarr"), "-o", str(folder / "R"), *OPTIONS])
    assert code == 0
    printed = capsys.readouterr().out
    labels, probabilities = read(folder / "R" / "labels.zarr"), read(folder / "R" / "probabilities.zarr")
    expected = whole(make_refiner(), image, stored)
    np.testing.assert_array_equal(labels[0], expected.argmax(axis=0) + 1)
    assert np.abs(probabilities / 255 - expected).max() <= 0.5 / 255 + 1e-3
    assert np.mean(labels[0] == truth) > np.mean(stored.argmax(axis=0) + 1 == truth) + 0.1
    metadata = open_volume(folder / "R" / "probabilities.zarr").metadata
    provenance = metadata["provenance"]
    assert provenance["parameters"]["bilateral_sigma_nm"] == [30]
    assert provenance["halo"] == [9, 18, 18]
    assert provenance["tolerance"] == 1e-4
    assert "0.0100% of labels" in provenance["blocks"]
    assert [c["name"] for c in metadata["classes"]] == ["inside", "membrane", "blob"]
    assert re.search(r"inside +components \d+ > \d+  specks \d+ > \d+  holes \d+ > \d+", printed)
    assert open_volume(folder / "R" / "labels.zarr", kind="labels").voxel_size_nm == VOXEL_SIZE_NM


def test_only_the_predicted_region_is_refined_and_the_zeros_around_it_say_nothing(save_prediction):
    image, _, stored = draw_prediction((8, 40, 60))
    region = Region((0, 5, 10), (8, 35, 50))
    outside = np.ones(image.shape, bool)
    outside[region.slices] = False
    stored[:, outside] = 0
    folder = save_prediction(image, stored, region)
    result = refine(folder)
    assert result.region == region
    labels = read(folder / "REF" / "labels.zarr")[0]
    assert not labels[outside].any()
    assert labels[region.slices].all()
    with pytest.raises(ValueError, match="only 0:8,5:35,10:50 was predicted"):
        refine(folder, "other", region="0:8,0:35,10:50")


def test_float_images_and_float_probabilities(save_prediction):
    image, _, stored = draw_prediction((8, 40, 60))
    as_float = (image.astype(np.float32) - 100) * 3  # neither 0..1 nor 8 bits
    windows = ((-300.0, 465.0),)  # what 0 and 255 became
    folder = save_prediction(as_float, stored.astype(np.float32) / stored.sum(axis=0))
    parameters = CrfParameters((30.0,), 0.1, (10.0,), 2.0, 1.0, 4, intensity_windows=windows)
    parameters.save(folder / "crf.toml")
    given = dict.fromkeys(BY_HAND)
    refine(folder, parameters=str(folder / "crf.toml"), **given)
    expected = whole(make_refiner(), image, stored).argmax(axis=0) + 1
    assert np.mean(read(folder / "REF" / "labels.zarr")[0] != expected) < 1e-3
    ((low, high),) = measure_intensity_windows([open_volume(folder / "image.zarr")])
    assert (low, high) == pytest.approx(np.percentile(as_float, [1, 99]), rel=0.1)


def test_the_voxel_size_may_come_from_the_prediction(save_prediction, tmp_path):
    image, _, stored = draw_prediction((6, 20, 20))
    folder = save_prediction(image, stored)
    np.save(tmp_path / "image.npy", image)
    refine(folder, volume=str(tmp_path / "image.npy"), probabilities="none", pyramid=False)
    assert read(folder / "REF" / "labels.zarr").all()
    assert not (folder / "REF" / "probabilities.zarr").exists()


def test_a_gpu_is_used_where_there_is_one_and_the_job_is_large(monkeypatch):
    monkeypatch.setattr("voxclf.refine.has_nvidia_device", lambda: True)
    monkeypatch.setattr("voxclf.refine.sees", lambda device: True)
    assert choose_crf_device("auto", 10**9) == "cuda"
    assert choose_crf_device("auto", 10**6) == "cpu"
    assert choose_crf_device("cpu", 10**9) == "cpu"
    monkeypatch.setattr("voxclf.refine.sees", lambda device: False)
    assert choose_crf_device("auto", 10**9) == "cpu"
    with pytest.raises(ValueError, match="--device was cuda, but torch finds no such GPU"):
        choose_crf_device("cuda", 10)


@pytest.mark.skipif(not has_nvidia_device(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_same_labels():
    image, _, stored = draw_prediction((11, 30, 34))
    everything = (slice(None),) * 3
    on_gpu = make_refiner(device="cuda").refine([image[None], stored], everything)
    np.testing.assert_allclose(on_gpu, whole(make_refiner(), image, stored), atol=1e-3)


# --- parameters ---


def test_parameter_files_keep_every_value(tmp_path):
    matrix = ((0.0, 1.5, 2.0), (1.5, 0.0, 1e-5), (2.0, 1e-5, 0.0))
    windows, names = ((3.5, 900.0),), ("a", 'b"', "c")
    parameters = CrfParameters((50.0, 20.0, 20.0), 0.07, (10.0,), matrix, 2.5, 7, 6.5, windows, names, False)
    parameters.save(tmp_path / "crf.toml", {"reason": "ä", "before": {"f1": [np.nan, "absent"]}})
    assert CrfParameters.load(tmp_path / "crf.toml") == parameters
    assert "    [0.0, 1.5, 2.0],\n" in (tmp_path / "crf.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bilateral_sigma_nm = [-3.0]", "bilateral_sigma_nm is .*-3.0.* must be positive"),
        ("spatial_weight = [[0, 1], [1]]", r"a matrix of 2 rows has rows of \[2, 1\] numbers"),
        ("n_iterations = 2.5", "n_iterations is 2.5, it must be a whole number"),
        ('classes = "membrane"', "classes is 'membrane', it must be a list of names"),
        ('enabled = "no"', "enabled is 'no', it must be true or false"),
        (
            "intensity_windows = [[9, 1]]",
            r"intensity_windows has \[9.0, 1.0\], whose first number must be the lower one",
        ),
        ("image_sigma_nm = -1.0", "image_sigma_nm is -1.0; it must be 0, for no smoothing, or a width in nanometres"),
    ],
)
def test_a_wrong_value_in_a_parameter_file_is_named(tmp_path, line, message):
    path, name = tmp_path / "crf.toml", line.split(" = ")[0]
    CrfParameters((30.0,), 0.1, (10.0,), 2.0, 1.0).save(path)
    kept = [row for row in path.read_text().splitlines() if not row.startswith(name)]
    path.write_text("\n".join([line, *kept]))
    with pytest.raises(ValueError, match=f"parameter file .*crf.toml cannot be used: .*{message}"):
        CrfParameters.load(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.toml", "matrix = [[0, 1], [2, 0]]"),
        ("w.json", "[[0, 1], [2, 0]]"),
        ("w.json", '{"matrix": [[0, 1], [2, 0]]}'),
    ],
)
def test_weights_come_from_a_number_or_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    values = {"prediction": "p", "volume": "v", "output": "o", **BY_HAND, "bilateral_weight": str(tmp_path / name)}
    parameters = choose_parameters(make_config(CrfRefineConfig, values))
    assert parameters.bilateral_weight == ((0, 1), (2, 0))
    assert parameters.spatial_weight == 1


def test_no_crf_writes_nothing_and_says_so(save_prediction, capsys):
    image, _, stored = draw_prediction((6, 20, 20))
    folder = save_prediction(image, stored)
    CrfParameters((30.0,), 0.1, (10.0,), 2.0, 1.0, enabled=False).save(folder / "crf.toml")
    code = cli.main(
        ["crf-refine", str(folder / "OUT"), str(folder / "image.zarr"), "-o", str(folder / "R"),
         "--parameters", str(folder / "crf.toml")]
    )  # fmt: skip
    assert code == 0
    assert "no CRF" in capsys.readouterr().out
    assert not (folder / "R").exists()


# --- bad input ---


def matrix_of_two(folder):
    (folder / "two.json").write_text("[[0, 1], [1, 0]]")
    return {"bilateral_weight": str(folder / "two.json")}


def other_classes(folder):
    CrfParameters((30.0,), 0.1, (10.0,), 2.0, 1.0, classes=("x", "y")).save(folder / "crf.toml")
    return {**dict.fromkeys(BY_HAND), "parameters": str(folder / "crf.toml")}


def two_channels(folder):
    return {"guide": str(folder / "image.zarr"), "intensity_sigma": "0.1,0.2,0.3"}


def guide_of_four(folder):
    volume = create_volume(folder / "guide.zarr", (6, 20, 20), 4, np.uint8, VOXEL_SIZE_NM, kind="features")
    volume.write((0, 0, 0), np.zeros((4, 6, 20, 20), np.uint8))
    return {"guide": str(folder / "guide.zarr")}


def no_probabilities(folder):
    (folder / "OUT" / "probabilities.zarr").rename(folder / "gone")
    return {}


def other_shape(folder):
    np.save(folder / "small.npy", np.zeros((6, 20, 19), np.uint8))
    return {"volume": str(folder / "small.npy")}


def not_summing_to_one(folder):
    volume = create_volume(folder / "p.zarr", (6, 20, 20), 3, np.uint8, VOXEL_SIZE_NM, kind="probabilities")
    volume.write((0, 0, 0), np.full((3, 6, 20, 20), 60, np.uint8))
    return {"prediction": str(folder / "p.zarr")}


def with_nan(folder):
    volume = create_volume(folder / "p.zarr", (6, 20, 20), 3, np.float32, VOXEL_SIZE_NM, kind="probabilities")
    values = np.full((3, 6, 20, 20), 1 / 3, np.float32)
    values[1, 2, 3, 4] = np.nan
    volume.write((0, 0, 0), values)
    return {"prediction": str(folder / "p.zarr")}


def never_predicted(folder):
    create_volume(folder / "p.zarr", (6, 20, 20), 3, np.uint8, VOXEL_SIZE_NM, kind="probabilities")
    return {"prediction": str(folder / "p.zarr")}


def torn_file(folder):
    (folder / "crf.toml").write_text("enabled = tr")
    return {**dict.fromkeys(BY_HAND), "parameters": str(folder / "crf.toml")}


def half_a_file(folder):
    (folder / "crf.toml").write_text("intensity_sigma = 0.1\nsigma = 3")
    return {**dict.fromkeys(BY_HAND), "parameters": str(folder / "crf.toml")}


BAD = [
    ({"volume": "missing.tif"}, 2, "missing.tif"),
    ({"prediction": "missing"}, 2, "missing"),
    (no_probabilities, 2, "holds labels but no probabilities.*predict again with --probabilities uint8"),
    (lambda folder: {"prediction": str(folder / "OUT" / "labels.zarr")}, 2, "labels or an image.*channel per class"),
    (other_shape, 2, r"small.npy has shape \(6, 20, 19\) but .* \(6, 20, 20\)"),
    ({"voxel_size": "20,10,11"}, 2, r"voxel size \(20.0, 10.0, 11.0\) nm but .*\(20.0, 10.0, 10.0\) nm"),
    ({"bilateral_sigma_nm": "-3"}, 2, r"--bilateral-sigma-nm was -3.0: input should be greater than 0"),
    ({"spatial_sigma_nm": "1,2"}, 2, "spatial_sigma_nm has 2 values"),
    ({"intensity_sigma": "0"}, 2, "--intensity-sigma was 0.0: input should be greater than 0"),
    ({"intensity_sigma": None}, 2, "--intensity-sigma not given; the CRF needs --parameters FILE"),
    (matrix_of_two, 2, r"bilateral_weight is a matrix of shape \(2, 2\) but the prediction has 3 classes"),
    ({"spatial_weight": "strong"}, 2, "--spatial-weight was 'strong', which is neither a number nor a file"),
    ({"parameters": "crf.toml"}, 2, "--parameters crf.toml was given together with --bilateral-sigma-nm"),
    (other_classes, 2, r"tuned for the classes \['x', 'y'\] but the prediction has \['inside', 'membrane', 'blob'\]"),
    (torn_file, 2, "parameter file .*crf.toml cannot be used"),
    (half_a_file, 2, r"parameter file .*fields are \['intensity_sigma', 'sigma'\]; needed are"),
    ({"tolerance": "1"}, 2, "--tolerance was '1': input should be less than 1"),
    (two_channels, 2, "intensity_sigma has 3 entries but the image .* has 2 channels"),
    ({"guide": "image.zarr", "guide_channels": "5"}, 2, "has no channel '5'; it has 0 to 0: choose some of these"),
    ({"guide_channels": "0"}, 2, "--guide-channels was 0, but there is no --guide to choose them from"),
    (guide_of_four, 2, "have 5 channels; the CRF follows the edges of at most 3, .* choose channels with --guide-chan"),
    ({"guide": "image.zarr", "intensity_sigma": "0.02"}, 2, "needs .* products of intensity bumps"),
    ({"image_sigma_nm": "-1"}, 2, "--image-sigma-nm was '-1': input should be greater than or equal to 0"),
    (lambda folder: {"output": str(folder / "OUT")}, 2, "holds the prediction itself; give another folder"),
    (not_summing_to_one, 5, "sum to a value 0.294 away from 1"),
    (with_nan, 5, r"NaN or infinity at voxel \(2, 3, 4\)"),
    (never_predicted, 5, "0 for every class at 2,400 voxels; these were never predicted"),
]


@pytest.mark.parametrize(("change", "code", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_has_its_own_message(save_prediction, capsys, change, code, message):
    image, _, stored = draw_prediction((6, 20, 20))
    folder = save_prediction(image, stored)
    values = {"prediction": str(folder / "OUT"), "volume": str(folder / "image.zarr"), "output": str(folder / "REF")}
    values |= {**BY_HAND, **(change(folder) if callable(change) else change)}
    values |= {"guide": str(folder / values["guide"])} if "guide" in values else {}
    positional = [values.pop("prediction"), values.pop("volume")]
    options = [part for name, v in values.items() if v is not None for part in (f"--{name.replace('_', '-')}", v)]
    assert (
        cli.main(["crf-refine", *positional, *(f"{a}={b}" for a, b in zip(options[::2], options[1::2], strict=True))])
        == code
    )
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_another_job_in_the_output_is_not_touched(save_prediction, capsys):
    image, _, stored = draw_prediction((6, 20, 20))
    folder = save_prediction(image, stored)
    command = ["crf-refine", str(folder / "OUT"), str(folder / "image.zarr"), "-o", str(folder / "R"), *OPTIONS]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_blocks"] == 1
    assert cli.main(command) == 0  # the same job again: nothing left to do
    assert "1 of them were there already" in capsys.readouterr().out
    assert cli.main([*command, "--tolerance", "0.01"]) == 3
    assert "halo was" in capsys.readouterr().err
    assert cli.main([*command, "--tolerance", "0.01", "--overwrite"]) == 0
