"""Where to label next, on probabilities made by hand whose best boxes are known."""

import csv
import json
from urllib.parse import unquote

import numpy as np
import pytest

from voxclf import cli
from voxclf.config import SuggestConfig, make_config
from voxclf.engine.executors import ProcessExecutor, SerialExecutor, ThreadExecutor
from voxclf.engine.run import reduce_blocks
from voxclf.errors import FormatError, OutputExistsError
from voxclf.geometry import Region, split_into_blocks
from voxclf.labels import LabelSet
from voxclf.neuroglancer_state import link_to_region
from voxclf.provenance import IntensityStatistics
from voxclf.suggest.box_scores import (
    ENTROPY_ONE,
    BoxTable,
    ScoreFold,
    choose_box_shape,
    choose_boxes,
    rarity_weights,
    sum_boxes,
)
from voxclf.suggest.suggestions import suggest_boxes
from voxclf.volume import create_volume, open_volume

SHAPE = (16, 64, 72)
BOX = (4, 8, 8)
SIZE = (20.0, 10.0, 10.0)
THREE = LabelSet.from_ids([1, 2, 5], names=["membrane", "inside", "blob"])
SURE = (0.02, 0.96, 0.02)


def even_field(shape=SHAPE):
    """Everything is surely "inside"."""
    return np.broadcast_to(np.array(SURE, np.float32)[:, None, None, None], (3, *shape)).copy()


def fill(probabilities, start, values, box=BOX):
    region = tuple(slice(a, a + n) for a, n in zip(start, box, strict=True))
    probabilities[(slice(None), *region)] = np.array(values, np.float32)[:, None, None, None]


@pytest.fixture
def save_prediction(tmp_path):
    """Write probabilities (K, Z, Y, X) as `voxclf predict` does; returns the folder."""

    def save(probabilities, label_set=THREE, dtype=np.uint8, name="OUT", region=None, with_probabilities=True):
        folder, shape = tmp_path / name, probabilities.shape[1:]
        region = region or Region((0, 0, 0), shape)
        attributes = {"provenance": {"region": str(region)}, **label_set.to_dict()}
        ids = label_set.remap_to_ids(probabilities.argmax(axis=0))
        ids[probabilities.sum(axis=0) == 0] = 0
        labels = create_volume(
            folder / "labels.zarr", shape, 1, np.uint8, SIZE, (8, 16, 16), kind="labels", attributes=attributes
        )
        labels.write((0, 0, 0), ids[None].astype(np.uint8))
        if with_probabilities:
            stored = np.rint(probabilities * 255) if dtype == np.uint8 else probabilities
            path = folder / "probabilities.zarr"
            volume = create_volume(path, shape, len(stored), dtype, SIZE, (8, 16, 16), kind="probabilities")
            volume.write((0, 0, 0), stored.astype(dtype))
        return folder

    return save


def suggest(folder, **options):
    values = {"prediction": str(folder), "output": str(folder / "next"), "box_size": BOX, "boxes": 3, **options}
    return suggest_boxes(make_config(SuggestConfig, {name: v for name, v in values.items() if v is not None}))


def starts(suggestions):
    return [box.region.start for box in suggestions.boxes]


def entropy(*p):
    p = np.array(p)
    return float(-(p * np.log(p)).sum() / np.log(len(p)))


# --- the right boxes ---


def test_the_uncertain_box_comes_first_with_its_entropy(save_prediction):
    probabilities = even_field()
    fill(probabilities, (8, 40, 16), (0.3, 0.4, 0.3))
    result = suggest(save_prediction(probabilities, dtype=np.float32))
    first = result.boxes[0]
    assert first.region == Region((8, 40, 16), (12, 48, 24))
    assert first.uncertainty == pytest.approx(entropy(0.3, 0.4, 0.3), abs=1e-4)
    assert first.centre_nm == (200.0, 440.0, 200.0)
    assert first.classes[0] == ("inside", pytest.approx(0.4, abs=1e-4))
    assert first.diversity == 1
    assert first.score == pytest.approx(first.uncertainty * first.rarity * first.diversity)
    assert result.boxes[1].uncertainty == pytest.approx(entropy(*SURE), abs=1e-4)
    assert result.n_open == 4 * 8 * 9


def test_a_rare_class_comes_before_a_common_one_that_is_as_uncertain(save_prediction):
    probabilities = even_field()
    fill(probabilities, (0, 0, 0), (0.3, 0.4, 0.3))  # inside
    fill(probabilities, (8, 40, 48), (0.3, 0.3, 0.4))  # blob, 256 voxels
    result = suggest(save_prediction(probabilities))
    assert starts(result)[:2] == [(8, 40, 48), (0, 0, 0)]
    n, total = 256, np.prod(SHAPE)
    assert result.boxes[0].rarity == 1
    assert result.boxes[1].rarity == pytest.approx(np.sqrt((n / total) / ((total - n) / total)))


def test_rarity_counts_the_labels_where_they_are_given(save_prediction, save_volume):
    probabilities = even_field()
    fill(probabilities, (0, 0, 0), (0.3, 0.4, 0.3))
    fill(probabilities, (8, 40, 48), (0.3, 0.3, 0.4))
    labels = np.zeros(SHAPE, np.uint8)
    labels[4, 8:24, 16:40], labels[4, 8, 16:19], labels[4, 8, 19:35] = 5, 2, 1  # of the blob there is plenty
    path = save_volume(labels, "labels.zarr", "labels").path
    result = suggest(save_prediction(probabilities), labels=path, boxes=200)
    assert starts(result)[0] == (0, 0, 0)
    assert result.boxes[0].rarity == 1
    (blob,) = (box for box in result.boxes if box.region.start == (8, 40, 48))
    assert blob.rarity == pytest.approx(np.sqrt(3 / (labels == 5).sum()))


def test_a_certain_rare_class_does_not_lift_an_uncertain_box_of_another(save_prediction):
    probabilities = even_field()
    fill(probabilities, (0, 0, 0), (0.3, 0.4, 0.3))
    fill(probabilities, (0, 0, 0), (0.0, 0.0, 1.0), (4, 8, 4))  # half of the box is a certain blob
    first = suggest(save_prediction(probabilities)).boxes[0]
    assert first.region.start == (0, 0, 0)
    share = 128 / np.prod(SHAPE)
    assert first.rarity == pytest.approx(np.sqrt(max(share, 1e-3) / (1 - share)))


def test_neighbours_and_look_alikes_wait(save_prediction):
    probabilities = even_field()
    for start in ((0, 0, 0), (0, 0, 8), (0, 8, 0), (4, 0, 0)):  # a clump of the most uncertain boxes
        fill(probabilities, start, (0.34, 0.35, 0.31))
    fill(probabilities, (8, 40, 48), (0.3, 0.4, 0.3))  # alike and far
    fill(probabilities, (8, 8, 56), (0.02, 0.5, 0.48))  # unlike and far
    result = suggest(save_prediction(probabilities), boxes=4)
    assert starts(result)[:3] == [(0, 0, 0), (8, 8, 56), (8, 40, 48)]
    assert starts(result)[3] in {(0, 0, 8), (0, 8, 0), (4, 0, 0)}
    scores = [box.score for box in result.boxes]
    assert scores == sorted(scores, reverse=True)


def test_diversity_by_hand():
    table = BoxTable(
        start=np.array([[0, 0, 0], [0, 0, 0], [0, 10, 100]]),
        stop=np.array([[1, 1, 1], [10, 10, 10], [10, 20, 110]]),
        entropy=np.full((2, 3), 20 * ENTROPY_ONE),
        probability=np.array([[0.5, 0.5, 0.375], [0.5, 0.5, 0.625]]),
        texture=np.zeros((2, 3)),
        score=np.array([1.0, 0.9, 0.8]),
        is_leader=np.ones(3, bool),
        limit=3,
        n_open=3,
        n_labelled=0,
    )
    (first, one), (second, far), (third, near) = choose_boxes(table, 3, (5, 1, 1), reach_nm=40)
    assert (first, second, third) == (0, 2, 1)
    assert one == 1
    assert far == pytest.approx(0.5 + 0.5 * 0.5)  # signatures 0.125 apart, half of what counts as unlike
    assert near == pytest.approx(10 / 40 * 0.5)  # the same signature, 10 nm from the first


def test_texture_tells_boxes_apart(save_prediction, save_volume):
    probabilities = np.full((3, *SHAPE), 1 / 3, np.float32)
    image = np.random.default_rng(0).integers(90, 110, SHAPE).astype(np.uint8)
    image[12:, 56:, 64:] = 200
    folder, volume = save_prediction(probabilities), save_volume(image)
    assert suggest(folder, volume=volume.path, boxes=2).boxes[1].region.start == (12, 56, 64)


def test_boxes_with_labels_are_left_out(save_prediction, save_volume):
    probabilities = even_field()
    fill(probabilities, (8, 40, 16), (0.3, 0.4, 0.3))
    fill(probabilities, (0, 0, 0), (0.2, 0.6, 0.2))
    labels = np.zeros(SHAPE, np.uint8)
    labels[9, 40:48, 16:24] = 2
    labels[0, 0, :4] = 1  # a stroke of four voxels leaves room for more
    path = save_volume(labels, "labels.zarr", "labels").path
    result = suggest(save_prediction(probabilities), labels=path)
    assert starts(result)[0] == (0, 0, 0)
    assert (8, 40, 16) not in starts(result)
    assert result.n_labelled == 1
    assert result.n_open == 4 * 8 * 9 - 1


def test_only_the_predicted_region_is_searched(save_prediction):
    probabilities = even_field()
    fill(probabilities, (8, 40, 16), (0.3, 0.4, 0.3))
    outside = np.ones(SHAPE, bool)
    outside[6:15, 20:60, 11:50] = False
    probabilities[:, outside] = 0
    region = Region((6, 20, 11), (15, 60, 50))
    folder = save_prediction(probabilities, region=region)
    result = suggest(folder)
    assert starts(result)[0] == (8, 40, 16)
    for box in result.boxes:
        assert box.region.intersect(region) == box.region
    with pytest.raises(ValueError, match=r"only 6:15,20:60,11:50 was predicted"):
        suggest(folder, region="0:4,:,:")


# --- blocks and executors ---


def noisy_prediction(shape=(23, 37, 41)):
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet((0.4, 1.0, 0.2), shape).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(probabilities, -1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_blocks_equal_whole_to_the_last_bit(save_prediction, save_volume, dtype):
    folder = save_prediction(noisy_prediction(), dtype=dtype)
    image = np.random.default_rng(1).normal(50, 9, (23, 37, 41)).astype(np.float32)
    volumes = [open_volume(folder / "probabilities.zarr"), open_volume(folder / "labels.zarr"), save_volume(image)]
    fold = ScoreFold((3, 5, 4), (6, 10, 8), THREE, (0.5, 0.25, 1.0), 40, None, IntensityStatistics(50, 9, 20, 80))
    tables = [
        reduce_blocks(fold, volumes, split_into_blocks((23, 37, 41), core, region=region), executor)
        for region in (Region((1, 2, 3), (23, 36, 41)),)
        for core, executor in [
            ((24, 40, 48), SerialExecutor()),
            ((6, 10, 8), SerialExecutor()),
            ((12, 20, 16), ThreadExecutor(2)),
            ((6, 40, 24), ProcessExecutor(2)),
        ]
    ]
    assert len(tables[0].score) == 40
    for table in tables[1:]:
        assert (table.n_open, table.n_labelled) == (tables[0].n_open, 0)
        for name in ("start", "stop", "entropy", "probability", "texture", "score", "is_leader"):
            np.testing.assert_array_equal(getattr(table, name), getattr(tables[0], name), err_msg=name)


def test_a_table_keeps_leaders_before_better_followers():
    probabilities = np.stack([np.full((1, 1, 8), 0.5), np.full((1, 1, 8), 0.5)]).astype(np.float32)
    probabilities[0, 0, 0] = (0.5, 0.49, 0.48, 0.4, 0.1, 0.2, 0.3, 0.25)
    probabilities[1] = 1 - probabilities[0]
    two = LabelSet.from_ids([1, 2])
    fold = ScoreFold((1, 1, 1), (1, 1, 4), two, (1.0, 1.0), 3)
    (block,) = split_into_blocks((1, 1, 8), (1, 1, 8))
    table = fold(block, probabilities, np.full((1, 1, 1, 8), 2, np.uint8))
    assert table.start[2].tolist() == [0, 6, 1]
    assert table.n_open == 8


def test_sums_of_boxes_against_a_loop():
    array = np.random.default_rng(0).integers(0, 1000, (5, 7, 9))
    cuts = [np.array([0, 2, 4]), np.array([10, 13]), np.array([3, 4, 8, 11])]
    expected = [
        array[z:zz, y:yy, x:xx].sum()
        for z, zz in ((0, 2), (2, 4), (4, 5))
        for y, yy in ((0, 3), (3, 7))
        for x, xx in ((0, 1), (1, 5), (5, 8), (8, 9))
    ]
    assert sum_boxes(array, cuts).tolist() == expected


def test_every_executor_and_worker_count_gives_the_same_suggestions(save_prediction):
    folder = save_prediction(noisy_prediction((24, 48, 48)))
    serial = suggest(folder, executor="serial", boxes=20)
    assert suggest(folder, executor="threads", workers=2, boxes=20) == serial
    assert suggest(folder, executor="processes", workers=2, boxes=20) == serial


# --- shapes and weights ---


@pytest.mark.parametrize(
    ("shape", "voxel_size", "expected"),
    [
        ((500, 2048, 2048), (50, 4.6, 4.6), (6, 64, 64)),  # thick slices: flat
        ((500, 2048, 2048), (8, 8, 8), (64, 64, 64)),
        ((128, 128, 128), (5, 5, 5), (16, 16, 16)),  # a small volume still has hundreds of boxes
        ((3, 512, 512), (8, 8, 8), (3, 64, 64)),
        ((20, 512, 512), (1000, 4, 4), (1, 64, 64)),
    ],
)
def test_default_boxes_are_as_long_in_nm_along_every_axis(shape, voxel_size, expected):
    assert choose_box_shape(shape, voxel_size) == expected


def test_box_sizes_in_nm_or_in_voxels():
    assert choose_box_shape((99, 99, 99), (50, 5, 5), box_size_nm=(50, 200, 100)) == (1, 40, 20)
    assert choose_box_shape((99, 99, 99), (50, 5, 5), box_size=(1, 30, 200)) == (1, 30, 99)
    with pytest.raises(ValueError, match="only one of them is allowed"):
        choose_box_shape((9, 9, 9), (1, 1, 1), (1, 2, 3), (1, 2, 3))


def test_weights_are_bounded_and_need_no_count_of_every_class():
    def weights(counts, is_predicted=(True, True, True)):
        return rarity_weights(np.array(counts), np.array(is_predicted))

    np.testing.assert_allclose(weights([640, 160, 10]), [0.125, 0.25, 1])
    np.testing.assert_allclose(weights([10**9, 1, 0]), [np.sqrt(1e-3), 1, 1])
    np.testing.assert_allclose(weights([640, 160, 0], (True, True, False)), [0.5, 1, 1])
    np.testing.assert_allclose(weights([0, 0, 0]), [1, 1, 1])


# --- what is refused ---


def test_a_prediction_without_probabilities_is_refused(save_prediction, tmp_path):
    folder = save_prediction(even_field(), with_probabilities=False)
    with pytest.raises(FileNotFoundError, match="predict again with --probabilities uint8"):
        suggest(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no labels\.zarr; give a folder that `voxclf predict` wrote"):
        suggest(tmp_path)


def test_one_class_is_refused(save_prediction):
    one = LabelSet.from_ids([1], names=["membrane"])
    with pytest.raises(ValueError, match=r"has one class, membrane; .*label and fit a second"):
        suggest(save_prediction(np.ones((1, *SHAPE), np.float32), one))


def test_more_boxes_than_exist_are_refused(save_prediction):
    with pytest.raises(ValueError, match=r"--boxes was 300, but region .* has only 288 boxes of \(4, 8, 8\) voxels"):
        suggest(save_prediction(even_field()), boxes=300)


def test_an_unfinished_prediction_is_refused(save_prediction):
    probabilities = even_field()
    probabilities[:, 3, 4, 5] = 0
    with pytest.raises(ValueError, match=r"1 voxels of .* have no class; .* run the same `voxclf predict` again"):
        suggest(save_prediction(probabilities))


def test_another_volume_is_refused(save_prediction, save_volume):
    volume = save_volume(np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="give the volume that was predicted"):
        suggest(save_prediction(even_field()), volume=volume.path)


def test_labels_and_probabilities_of_different_models_are_refused(save_prediction):
    folder = save_prediction(even_field())
    other = save_prediction(even_field()[:2], LabelSet.from_ids([1, 2]), name="other")
    (other / "probabilities.zarr").rename(other / "p.zarr")
    (folder / "probabilities.zarr").rename(other / "probabilities.zarr")
    with pytest.raises(FormatError, match="do not name the same classes"):
        suggest(other)


def test_a_budget_below_one_block_is_refused(save_prediction):
    config = make_config(SuggestConfig, {"prediction": str(save_prediction(even_field())), "output": "o"})
    with pytest.raises(ValueError, match=r"one block of .* needs .* GB; raise it or choose a smaller --box-size"):
        suggest_boxes(config.model_copy(update={"memory": 1000}))


# --- files ---


def test_the_command_writes_a_table_json_and_a_page(save_prediction, save_volume, capsys):
    probabilities = even_field()
    fill(probabilities, (8, 40, 16), (0.3, 0.4, 0.3))
    folder = save_prediction(probabilities)
    volume = save_volume(np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8))
    out = folder / "next"
    command = ["suggest", str(folder), volume.path, "-o", str(out), "--boxes", "12", "--box-size", "4,8,8"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "8:12,40:48,16:24" in printed
    assert "and 2 more" in printed
    rows = list(csv.DictReader((out / "suggestions.csv").read_text().splitlines()))
    values = json.loads((out / "suggestions.json").read_text())
    assert len(rows) == len(values["boxes"]) == 12
    assert [rows[0][name] for name in ("z0", "y0", "x0", "z1", "y1", "x1")] == ["8", "40", "16", "12", "48", "24"]
    assert rows[0]["region"] == values["boxes"][0]["region"] == "8:12,40:48,16:24"
    assert float(rows[0]["centre_y_nm"]) == 440
    assert "inside 40%" in rows[0]["classes"]
    page = (out / "suggestions.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert "http" not in page.replace("http-equiv", "")
    assert cli.main(command) == 3
    assert cli.main([*command, "--overwrite", "--json"]) == 0


def test_without_the_volume_there_is_no_page(save_prediction):
    folder = save_prediction(even_field())
    assert cli.main(["suggest", str(folder), "-o", str(folder / "next"), "--box-size-nm", "80,80,80"]) == 0
    assert (folder / "next" / "suggestions.csv").exists()
    assert not (folder / "next" / "suggestions.html").exists()
    with pytest.raises(OutputExistsError, match="use --overwrite"):
        suggest(folder)


def test_a_link_to_a_region_counts_voxels_from_the_corner_in_xyz():
    fragment = link_to_region(Region((10, 20, 30), (11, 24, 40)), (50, 4.6, 4.6))
    assert fragment.startswith("#!+")
    assert json.loads(unquote(fragment[3:])) == {
        "dimensions": {"x": [4.6e-9, "m"], "y": [4.6e-9, "m"], "z": [5e-8, "m"]},
        "position": [35.0, 22.0, 10.5],
    }
