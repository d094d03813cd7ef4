"""Every number of a comparison equals a brute-force count over arrays in memory."""

import csv
import json
from collections import Counter

import cc3d
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voxclf import cli
from voxclf.config import DiffConfig, make_config
from voxclf.diff import volume_diff
from voxclf.diff.page import count_fates, list_classes, spell_value
from voxclf.diff.volume_diff import compare_volumes
from voxclf.errors import OutputExistsError
from voxclf.labels import LabelSet
from voxclf.volume import open_volume

SIZE = (20.0, 10.0, 10.0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(volume_diff, "CORE", (3, 4, 5))


@pytest.fixture
def save(tmp_path):
    def save(array, name):
        path = tmp_path / f"{name}.npy"
        np.save(path, array)
        return str(path)

    return save


def compare(save, before, after, **options):
    values = {"before": save(before, "a"), "after": save(after, "b"), "output": "unused", "voxel_size": SIZE}
    return compare_volumes(make_config(DiffConfig, {**values, "executor": "serial", "top": 10_000, **options}))


def brute_objects(a, b, share, instances=False):
    """Fates per class, counted pair by pair."""
    pieces = [v if instances else cc3d.connected_components(v.astype(np.uint32), connectivity=26) for v in (a, b)]
    sizes = [Counter(p[p > 0].tolist()) for p in pieces]
    both = (pieces[0] > 0) & (pieces[1] > 0) & (np.ones_like(a, bool) if instances else a == b)
    shared = Counter(zip(pieces[0][both].tolist(), pieces[1][both].tolist(), strict=True))
    related = [(i, j) for (i, j), n in shared.items() if n >= share * min(sizes[0][i], sizes[1][j])]
    relatives = [Counter(pair[side] for pair in related) for side in range(2)]

    def value(side, i):
        return 0 if instances else int((a, b)[side][pieces[side] == i][0])

    fates = Counter()
    for side, (none, many) in enumerate((("lost", "split"), ("born", "merged"))):
        for i in sizes[side]:
            fates[value(side, i), ("before", "after")[side]] += 1
            if relatives[side][i] == 0:
                fates[value(side, i), none] += 1
            if relatives[side][i] > 1:
                fates[value(side, i), many] += 1
    return fates


def brute_regions(a, b, changed):
    """Connected changed regions of one pair of values: sorted (before, after, size)."""
    codes = np.where(changed, a.astype(np.int64) * 1000 + b + 1, 0).astype(np.uint32)
    pieces = cc3d.connected_components(codes, connectivity=26)
    found = []
    for i in range(1, int(pieces.max()) + 1):
        inside = pieces == i
        found.append((int(a[inside][0]), int(b[inside][0]), int(inside.sum())))
    return sorted(found)


def draw(shape, seed, n_values, density):
    rng = np.random.default_rng(seed)
    a = (rng.integers(1, n_values + 1, shape) * (rng.random(shape) < density)).astype(np.uint8)
    b = np.where(rng.random(shape) < 0.3, rng.permutation(a.ravel()).reshape(shape), a)
    a.flat[:n_values] = np.arange(1, n_values + 1)[: a.size]
    return a, b


SHAPES = st.tuples(st.integers(1, 8), st.integers(2, 9), st.integers(2, 9))
ANY = {"max_examples": 30, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(**ANY)
@given(
    shape=SHAPES, seed=st.integers(0, 10**6), density=st.sampled_from([0.2, 0.5, 1.0]), share=st.sampled_from([0, 0.5])
)
def test_labels_equal_brute_force(save, small_blocks, shape, seed, density, share):
    a, b = draw(shape, seed, 3, density)
    found = compare(save, a, b, least_overlap=share)
    assert found.label_set.ids == tuple(sorted({*np.unique(a).tolist(), *np.unique(b).tolist()} - {0}))
    ids = [0, *found.label_set.ids]
    expected = [[int(((a == i) & (b == j)).sum()) for j in ids] for i in ids]
    assert found.confusion.tolist() == expected
    assert (found.n_voxels, found.n_changed) == (a.size, int((a != b).sum()))
    fates, counted = brute_objects(a, b, share), count_fates(found)
    for i, name in zip(found.label_set.ids, found.label_set.names, strict=True):
        for kind in ("before", "after", "born", "lost", "split", "merged"):
            assert counted[name][kind] == fates[i, kind], (name, kind)
    regions = sorted((d.before, d.after, d.n_voxels) for d in found.differences)
    assert regions == brute_regions(a, b, a != b)
    for d in found.differences:
        assert (a[d.position], b[d.position]) == (d.before, d.after)


@settings(**ANY)
@given(shape=SHAPES, seed=st.integers(0, 10**6), share=st.sampled_from([0, 0.2]))
def test_instances_equal_brute_force(save, small_blocks, shape, seed, share):
    a, b = draw(shape, seed, 5, 0.8)
    b = np.where(b > 0, (b.astype(np.uint16) * 7) % 11 + 100, 0).astype(np.uint16)  # other numbers
    found = compare(save, a, b, least_overlap=share, instances=True)
    fates = brute_objects(a, b, share, instances=True)
    assert count_fates(found)["objects"] == {
        kind: fates[0, kind] for kind in ("before", "after", "lost", "split", "born", "merged")
    }
    pairs = Counter(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    # Ties between partners are settled by the lower id, as in the code's own order.
    best = [
        {i: max((p for p in pairs if p[s] == i), key=lambda p: (pairs[p], -p[1 - s])) for i in {p[s] for p in pairs}}
        for s in range(2)
    ]
    same = {p for p in pairs if p == (0, 0) or (0 not in p and best[0][p[0]] == p == best[1][p[1]])}
    changed = np.array([p not in same for p in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)]).reshape(shape)
    assert found.n_changed == int(changed.sum())
    assert sorted((d.before, d.after, d.n_voxels) for d in found.differences) == brute_regions(a, b, changed)


def test_fates_by_hand(save):
    a, b = np.zeros((1, 3, 12), np.uint8), np.zeros((1, 3, 12), np.uint8)
    a[0, 0, :5] = 1
    b[0, 0, :2] = b[0, 0, 3:5] = 1  # one became two
    a[0, 2, 0] = a[0, 2, 2] = b[0, 2, 0] = b[0, 2, 1] = b[0, 2, 2] = 2  # two became one
    a[0, 0, 8:10] = 2  # lost
    b[0, 2, 8:11] = 2  # born
    found = compare(save, a, b)
    assert count_fates(found) == {
        "class 1": {"before": 1, "after": 2, "born": 0, "lost": 0, "split": 1, "merged": 0},
        "class 2": {"before": 3, "after": 2, "born": 1, "lost": 1, "split": 0, "merged": 1},
    }
    largest = found.differences[0]
    assert (largest.before, largest.after, largest.n_voxels) == (0, 2, 3)
    assert largest.position == (0, 2, 8)
    assert str(largest.region) == "0:1,2:3,8:11"
    volumes = {row["class"]: row for row in list_classes(found)}
    assert volumes["class 2"]["volume_after_nm3"] == 6 * 2000
    assert volumes["class 1"]["iou"] == pytest.approx(4 / 5)


def test_a_region_is_compared_as_if_it_were_all(save, small_blocks):
    a, b = draw((6, 9, 9), 3, 3, 0.5)
    part = (slice(2, 6), slice(1, 8), slice(4, 9))
    inside = compare(save, a, b, region="2:6,1:8,4:9", classes="x,y,z")
    alone = compare(save, a[part], b[part], classes="x,y,z")
    assert count_fates(inside) == count_fates(alone)
    assert inside.confusion.tolist() == alone.confusion.tolist()
    assert [d.n_voxels for d in inside.differences] == [d.n_voxels for d in alone.differences]


def test_classes_come_with_the_volume(save_volume):
    label_set = LabelSet.from_ids([1, 4], ["inside", "membrane"])
    a = np.ones((4, 5, 6), np.uint8)
    b = a.copy()
    b[1, 1, 1] = 4
    paths = [
        save_volume(array, f"{name}.zarr", "labels", attributes=label_set.to_dict()).path
        for name, array in (("a_labels", a), ("b_labels", b))
    ]
    found = compare_volumes(make_config(DiffConfig, {"before": paths[0], "after": paths[1], "output": "unused"}))
    assert found.label_set == label_set
    assert spell_value(found, found.differences[0].after) == "membrane"


@pytest.mark.parametrize(
    "change, match",
    [
        ({"after": "short.npy"}, r"has \(3, 4, 4\).*give two segmentations of one volume"),
        ({"voxel_size": None}, "--voxel-size is missing"),
        ({"volume": "short.npy"}, "give the image behind them"),
        ({"before": "many.npy", "after": "many.npy"}, "use --instances"),
        ({"before": "empty.npy", "after": "empty.npy"}, "nothing but 0"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, change, match):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.ones((4, 4, 4), np.uint8))
    np.save("short.npy", np.ones((3, 4, 4), np.uint8))
    np.save("many.npy", np.arange(512, dtype=np.uint16).reshape(8, 8, 8))
    np.save("empty.npy", np.zeros((4, 4, 4), np.uint8))
    values = {"before": "a.npy", "after": "a.npy", "output": "out", "voxel_size": SIZE, **change}
    with pytest.raises(ValueError, match=match):
        compare_volumes(make_config(DiffConfig, {k: v for k, v in values.items() if v is not None}))


def test_the_command_writes_page_tables_and_json(tmp_path, monkeypatch, capsys, cells):
    monkeypatch.chdir(tmp_path)
    image, labels = cells
    changed = labels.copy()
    changed[5:15, 5:20, 5:20] = 3
    for name, array in (("image", image), ("a", labels), ("b", changed)):
        np.save(f"{name}.npy", array)
    arguments = [
        "diff",
        "a.npy",
        "b.npy",
        "-o",
        "out",
        "--volume",
        "image.npy",
        "--voxel-size",
        "20,10,10",
        "--top",
        "3",
    ]
    assert cli.main(arguments) == 0
    assert f"changed      {int((labels != changed).sum()):,} of" in capsys.readouterr().out
    values = json.loads((tmp_path / "out/diff.json").read_text())
    assert values["n_changed"] == int((labels != changed).sum())
    rows = list(csv.DictReader((tmp_path / "out/diff.csv").open()))
    assert [int(r["n_voxels"]) for r in rows] == [d["n_voxels"] for d in values["differences"]]
    born = sum(r["fate"] == "born" for r in csv.DictReader((tmp_path / "out/objects.csv").open()))
    assert born == sum(counts["born"] for counts in values["objects"].values())
    page = (tmp_path / "out/diff.html").read_text()
    assert page.count("data:image/jpeg") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert cli.main(arguments) == 3
    assert open_volume("a.npy", SIZE).shape == labels.shape
    with pytest.raises(OutputExistsError, match="--overwrite"):
        compare_volumes(make_config(DiffConfig, {"before": "a.npy", "after": "b.npy", "output": "out"}))
