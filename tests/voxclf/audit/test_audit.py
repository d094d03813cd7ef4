"""The audit finds what was planted, and measures what can be worked out by hand."""

import csv
import json
import re

import numpy as np
import pytest

from tests.conftest import draw_cells
from voxclf import cli
from voxclf.audit import label_audit
from voxclf.audit.label_audit import audit_labels, choose_planes, choose_slabs
from voxclf.audit.page import list_findings
from voxclf.audit.regions import (
    ContextFold,
    ContradictionFold,
    Contradictions,
    cut_plane_tiles,
    log_context,
    weigh_by_surprise,
)
from voxclf.audit.slices import LEAST_CELLS, REACH, SliceFit, find_shifts
from voxclf.config import AuditConfig, make_config
from voxclf.engine.run import reduce_blocks
from voxclf.geometry import ORIGIN, Region
from voxclf.labelled_slices import ProfileFold
from voxclf.labels import LabelSet
from voxclf.sampling import SurveyFold

SIZE = (20.0, 10.0, 10.0)
TWO = LabelSet.from_ids([1, 2])


# --- regions, on probabilities made by hand ---


@pytest.fixture
def find(save_volume):
    """Find the contradictions of plane 1 of labels (3, Y, X), given the probability of class 2, (Y, X)."""

    def run(labels, second, image=None, smallest=1):
        shape = labels.shape
        second = np.broadcast_to(second, shape)
        stored = np.rint(255 * np.stack([1 - second, second])).astype(np.uint8)
        image = np.zeros(shape, np.uint8) if image is None else np.broadcast_to(image, shape)
        volumes = [
            save_volume(labels.astype(np.uint8), "labels.zarr", "labels"),
            save_volume(stored, "p.zarr", "probabilities"),
            save_volume(image.astype(np.uint8), "image.zarr"),
        ]
        tiles = cut_plane_tiles(Region((1, 0, 0), (2, *shape[1:])), 0, 1)
        no_context = np.zeros((3, 3, 2), np.float32)
        return reduce_blocks(ContradictionFold(TWO, 0, shape[0], no_context, smallest, 50), volumes, tiles)

    return run


def test_a_piece_of_the_wrong_class_is_found_with_its_place(find):
    labels = np.ones((3, 40, 40), int)
    labels[1, 10:20, 12:24] = 2
    found = find(labels, np.zeros((40, 40)), smallest=20)
    first = max(found.regions, key=lambda region: region.evidence)
    assert (first.kind, first.given, first.suggested, first.n_voxels) == ("object", 1, 0, 120)
    assert first.region == Region((1, 10, 12), (2, 20, 24))
    assert first.position[0] == 1
    assert 13 <= first.position[1] <= 16
    assert first.margin == pytest.approx((1 - 0.02 / 1.04) - 0.02 / 1.04, abs=0.02)
    assert found.voxels[1, 0] == 120
    assert found.voxels[0, 1] == 0


def test_a_thin_rim_weighs_little_however_long(find):
    labels = np.ones((3, 60, 60), int)
    labels[1, 10:12] = 2  # two voxels wide: all border
    labels[1, 20:23] = 2  # three wide, 180 voxels
    labels[1, 40:48, 5:13] = 2  # a block, 64 voxels
    found = {region.n_voxels: region.evidence for region in find(labels, np.zeros((60, 60))).regions}
    assert sorted(found) == [64, 180]
    # Depth-weighted sizes: 60 / 5, and (20 * 1 + 12 * 2 + 4 * 3) / 5.
    assert found[64] / found[180] == pytest.approx(np.sqrt(11.2 / 12.0), rel=0.01)


@pytest.mark.parametrize("edge, kind", [(20, "leak"), (30, "part")])
def test_a_leak_has_the_image_edge_inside_the_label(find, edge, kind):
    labels = np.ones((3, 40, 60), int)
    labels[:, :, 30:] = 2  # drawn border at 30, the models' at 20
    second = np.zeros((40, 60))
    second[:, 20:] = 1
    image = np.zeros((40, 60))
    image[:, edge:] = 200
    (found,) = (region for region in find(labels, second, image, smallest=50).regions if region.suggested == 1)
    assert (found.kind, found.given) == (kind, 0)
    assert 19 <= found.region.start[2] <= 22
    assert found.region.stop[2] == 30


def test_nothing_is_contradicted_where_nothing_was_predicted(find, save_volume):
    labels = np.ones((3, 20, 20), np.uint8)
    volumes = [
        save_volume(labels, "labels.zarr", "labels"),
        save_volume(np.zeros((2, 3, 20, 20), np.uint8), "p.zarr", "probabilities"),
        save_volume(labels, "image.zarr"),
    ]
    tiles = cut_plane_tiles(Region((1, 0, 0), (2, 20, 20)), 0, 1)
    fold = ContradictionFold(TWO, 0, 3, np.zeros((3, 3, 2), np.float32), 1, 50)
    assert reduce_blocks(fold, volumes, tiles).regions == ()


def test_common_contradictions_count_less(find):
    labels = np.ones((3, 40, 40), int)
    labels[1, 10:20, 12:24] = 2
    found = find(labels, np.zeros((40, 40)), smallest=20)
    rare = weigh_by_surprise(found, np.array([10_000, 100_000]))
    common = weigh_by_surprise(found, np.array([10_000, 240]))
    assert rare[0].evidence / found.regions[0].evidence == pytest.approx(-np.log(120 / 100_000))
    assert common[0].evidence / found.regions[0].evidence == pytest.approx(-np.log(0.5))
    assert isinstance(found + found, Contradictions)


def test_the_context_counts_what_stands_between_what(save_volume):
    labels = np.zeros((3, 1, 4), np.uint8)
    labels[:, 0] = [[1, 1, 2, 0], [1, 2, 2, 1], [1, 1, 2, 0]]
    volume = save_volume(labels, "labels.zarr", "labels")
    tiles = [tile for z in range(3) for tile in cut_plane_tiles(Region((z, 0, 0), (z + 1, 1, 4)), 0, 1)]
    counts = reduce_blocks(ContextFold(TWO, 0, 3), [volume], tiles)
    assert counts.sum() == 10
    assert counts[0, 0].tolist() == [1, 1]
    assert counts[2, 2].tolist() == [1, 0]  # unlabelled before and after
    assert counts[2, 0].tolist() == [1, 0]  # before the first slice there is nothing
    context = log_context(counts * 1000)
    assert context[0, 0, 0] == pytest.approx(np.log(0.5 / (6 / 10)), abs=0.05)
    assert context[1, 1, 0] < -2


# --- slice positions ---


def fit(shift_gain, position, n=20, noise=0.01, seed=0):
    """A slice whose labels gain `shift_gain` one slice further on, and lose 0.5 elsewhere."""
    gains = np.full(2 * REACH + 1, -0.5)
    gains[REACH], gains[REACH + 1] = 0, shift_gain
    rng = np.random.default_rng(seed + position)
    return SliceFit(0, position, n * 100, gains[:, None] + rng.normal(0, noise, (2 * REACH + 1, n)))


def test_the_slice_that_fits_elsewhere_is_named():
    shifts = find_shifts([fit(-0.5, 3), fit(0.4, 4), fit(-0.5, 5)])
    assert [(s.position, s.shift) for s in shifts] == [(4, 1)]
    assert shifts[0].gain == pytest.approx(0.4, abs=0.02)


def test_small_uncertain_or_scanty_gains_are_no_shift():
    others = [fit(-0.5, i) for i in range(5)]
    assert find_shifts([*others, fit(0.05, 8)]) == []
    assert find_shifts([*others, fit(0.4, 8, noise=2.0)]) == []
    assert find_shifts([*others, fit(0.4, 8, n=LEAST_CELLS - 1)]) == []


# --- which planes and slabs ---


def profile(labels):
    whole = Region(ORIGIN, labels.shape)
    (block,) = cut_plane_tiles(whole, 0, 0)
    (box,) = SurveyFold(0)(block, labels[None]).boxes
    assert box.n_labelled
    return ProfileFold(TWO, labels.shape)(block, labels[None])


def test_planes_are_what_somebody_drew():
    dense, sparse, crossing = (np.zeros((9, 20, 20), np.uint8) for _ in range(3))
    dense[2:6] = sparse[[1, 5, 7]] = 1
    crossing[4] = crossing[:, 8] = crossing[:, :, 9] = 1
    assert choose_planes(profile(dense)) == ([2, 3, 4, 5], [], [])
    assert choose_planes(profile(sparse)) == ([1, 5, 7], [], [])
    assert choose_planes(profile(crossing)) == ([4], [8], [9])


def test_slabs_are_runs_of_slices():
    labels = np.zeros((30, 20, 20), np.uint8)
    labels[[2, 10, 11, 25]] = 1
    split = choose_slabs(profile(labels), np.zeros((1, 3), int), (1, 9, 9))
    assert (split.axis, split.gap, split.edges.tolist()) == (0, 0, [2, 10, 11, 25, 26])


# --- the whole ---


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder with an image and labels on 8 slices, in one of which the blobs are called membrane."""
    folder = tmp_path_factory.mktemp("audit")
    image, dense = draw_cells((40, 90, 100), seed=3)
    labels = np.zeros_like(dense)
    labels[16:24] = dense[16:24]
    z = 17 + int((dense[17:23] == 3).sum(axis=(1, 2)).argmax())
    planted = np.zeros(dense.shape, bool)
    planted[z] = dense[z] == 3
    labels[planted] = 2
    np.save(folder / "image.npy", image)
    np.save(folder / "labels.npy", labels)
    return folder, planted


OPTIONS = ["--voxel-size", "20,10,10", "--trees", "15", "--samples", "8000", "--bank", "edges", "--top", "12"]


def test_the_command_finds_a_planted_region(wrong, monkeypatch, capsys):
    folder, planted = wrong
    monkeypatch.chdir(folder)
    arguments = ["audit", "image.npy", "labels.npy", "-o", "AUDIT", "--classes", "inside,membrane,blob", *OPTIONS]
    assert cli.main(arguments) == 0
    assert "looked at" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "AUDIT/audit.csv").open()))
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    first = rows[0]
    assert planted[int(first["z"]), int(first["y"]), int(first["x"])]
    assert (first["given"], first["suggested"]) == ("membrane", "blob")
    assert float(first["z_nm"]) == pytest.approx(20 * (int(first["z"]) + 0.5))
    values = json.loads((folder / "AUDIT/audit.json").read_text())
    assert len(values["findings"]) == len(rows)
    assert values["planes"] == {"z": 8, "y": 0, "x": 0}
    page = (folder / "AUDIT/audit.html").read_text()
    assert page.count("data:image/jpeg") == len(rows)
    assert not re.search(r'(src|href)="http', page)
    assert cli.main(arguments) == 3
    assert "--overwrite" in capsys.readouterr().err


def test_shifts_head_the_list_and_their_slices_are_left_out(wrong, tmp_path, monkeypatch):
    folder, _ = wrong
    monkeypatch.setattr(label_audit, "find_shifts", lambda fits: [shift_of(f) for f in fits if f.position == 20])
    values = {"volume": folder / "image.npy", "labels": folder / "labels.npy", "output": tmp_path / "out"}
    config = {name: str(path) for name, path in values.items()}
    options = {"voxel_size": SIZE, "trees": 4, "samples": 2000, "bank": "edges", "executor": "serial"}
    result = audit_labels(make_config(AuditConfig, {**config, **options}))
    findings = list_findings(result)
    assert (findings[0]["kind"], findings[0]["given"], findings[0]["suggested"]) == ("slice", "z = 20", "z = 22")
    assert all(finding["z"] != 20 for finding in findings[1:])


def shift_of(fit):
    from voxclf.audit.slices import SliceShift

    return SliceShift(fit.axis, fit.position, 2, 0.5, 9.0, fit.n_voxels)


@pytest.mark.parametrize("change, match", [({0: 1}, "only one class"), ({}, r"have shape \(40, 90, 99\)")])
def test_bad_labels_are_refused(wrong, tmp_path, change, match):
    folder, _ = wrong
    labels = np.load(folder / "labels.npy")
    labels = np.where(labels > 0, 1, 0).astype(np.uint8) if change else labels[:, :, 1:]
    np.save(tmp_path / "labels.npy", labels)
    values = {"volume": str(folder / "image.npy"), "labels": str(tmp_path / "labels.npy"), "output": str(tmp_path)}
    with pytest.raises(ValueError, match=match):
        audit_labels(make_config(AuditConfig, {**values, "voxel_size": SIZE}))
