"""Tuning the CRF: it must help where it can, and say "no CRF" where nothing is to be gained."""

import re
import time
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import VOXEL_SIZE_NM, draw_cells
from tests.voxclf.noisy import THREE, noisy_probabilities
from voxclf import cli
from voxclf.config import CrfTuneConfig, make_config
from voxclf.geometry import Region
from voxclf.models.crf_parameters import CrfParameters
from voxclf.refine import tune_parameters
from voxclf.training import crf_search, tune_crf
from voxclf.training.crf_search import HAND_PICKED, _simplex
from voxclf.training.crf_space import SearchSpace, contact_penalties
from voxclf.training.crf_tiles import Tile, TuningInputs, draw_tiles, find_tiles, load_tile, split_cells
from voxclf.volume import create_volume, open_volume

SHAPE = (24, 48, 52)


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few trials on a few tiles: enough to see which way it goes."""
    for name, value in {"N_START_POINTS": 8, "N_SIMPLEX": 8, "N_FACTORS": 3}.items():
        monkeypatch.setattr(crf_search, name, value)
    for name, value in {"MOST_TUNING_TILES": 4, "MOST_JUDGING_TILES": 8}.items():
        monkeypatch.setattr(tune_crf, name, value)


def write(path, array, kind, **options):
    array = array if array.ndim == 4 else array[None]
    volume = create_volume(path, array.shape[1:], len(array), array.dtype, VOXEL_SIZE_NM, kind=kind, **options)
    volume.write((0, 0, 0), array)
    return path


@pytest.fixture
def save_case(tmp_path):
    """Write image, probabilities as predict does, and labels; returns a function that tunes on them."""

    def save(image, probabilities, labels, region=None):
        region = region or Region((0, 0, 0), image.shape)
        attributes = {"provenance": {"region": str(region)}, **THREE.to_dict()}
        stored = np.rint(probabilities * 255).astype(np.uint8)
        write(tmp_path / "image.zarr", image, "image")
        write(tmp_path / "probabilities.zarr", stored, "probabilities", attributes=attributes)
        write(tmp_path / "labels.zarr", labels, "labels")

        def tune(output="crf.toml", **options):
            values = {
                "prediction": str(tmp_path / "probabilities.zarr"),
                "volume": str(tmp_path / "image.zarr"),
                "labels": str(tmp_path / "labels.zarr"),
                "output": str(tmp_path / output),
                "n_iterations": 4,
                **options,
            }
            return tune_parameters(make_config(CrfTuneConfig, values))

        return tune

    return save


@pytest.fixture
def cells_case():
    return draw_cells(SHAPE, seed=5)


@pytest.fixture
def open_inputs(save_case, cells_case, tmp_path):
    """Write the case and open it as tiles are read from it."""
    image, truth = cells_case
    save_case(image, noisy_probabilities(truth), truth)

    def open_all():
        labels = open_volume(tmp_path / "labels.zarr", kind="labels")
        images = (open_volume(tmp_path / "image.zarr"),)
        return TuningInputs(images, open_volume(tmp_path / "probabilities.zarr"), THREE, labels)

    return open_all


def test_a_crf_that_must_help_is_found_and_kept(save_case, cells_case, tmp_path):
    image, truth = cells_case
    result = save_case(image, noisy_probabilities(truth), truth)()
    assert result.parameters.enabled
    assert result.gain["mean_iou"].low > 0.05
    assert result.after.scores.macro_f1 > result.before.scores.macro_f1 + 0.05
    assert result.tuned_mean_iou[1] > result.tuned_mean_iou[0]
    assert CrfParameters.load(tmp_path / "crf.toml") == result.parameters
    values = tomllib.loads((tmp_path / "crf.toml").read_text(encoding="utf-8"))
    assert values["enabled"] is True
    assert values["classes"] == ["inside", "membrane", "blob"]
    assert values["tuning"]["macro_f1_gain"]["low"] == result.gain["macro_f1"].low
    assert values["tuning"]["labels"]["shape"] == list(SHAPE)
    assert len(values["tuning"]["before"]["iou"]) == 3
    # Specks vanish, and classes no longer touch where the labels never show it.
    before, after = values["tuning"]["before"], values["tuning"]["after"]
    assert sum(after["specks"]) < 0.7 * sum(before["specks"])
    assert result.structure.before.specks.tolist() == before["specks"]


def test_labels_on_slices_are_enough(save_case, cells_case, tmp_path):
    image, truth = cells_case
    sparse = np.zeros_like(truth)
    sparse[12], sparse[:, 20], sparse[:, :, 25] = truth[12], truth[:, 20], truth[:, :, 25]
    tune = save_case(image, noisy_probabilities(truth), sparse)
    np.save(tmp_path / "labels.npy", sparse)  # states no voxel size
    assert tune(labels=str(tmp_path / "labels.npy")).parameters.enabled
    assert CrfParameters.load(tmp_path / "crf.toml").enabled


def test_perfect_probabilities_need_no_crf(save_case, cells_case, tmp_path):
    image, truth = cells_case
    result = save_case(image, noisy_probabilities(truth, noise=0.0), truth)()
    assert not result.parameters.enabled
    assert "no CRF" in result.reason
    assert result.n_evaluations == 0
    assert tomllib.loads((tmp_path / "crf.toml").read_text(encoding="utf-8"))["enabled"] is False


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_labels_give_no_crf(save_case, cells_case, seed):
    image, truth = cells_case
    random = np.random.default_rng(seed).integers(1, 4, SHAPE).astype(np.uint8)
    result = save_case(image, noisy_probabilities(truth), random)(seed=seed)
    assert not result.parameters.enabled
    assert "no CRF: the gain is not significant" in result.reason


def test_the_same_seed_gives_the_same_parameters(save_case, cells_case, tmp_path):
    image, truth = cells_case
    tune = save_case(image, noisy_probabilities(truth, noise=2.0), truth)
    tune("a.toml", workers=1)
    tune("b.toml", workers=2)
    one, two = ((tmp_path / name).read_text(encoding="utf-8").splitlines()[1:] for name in ("a.toml", "b.toml"))
    assert one == two


def test_time_ends_the_search(save_case, cells_case, monkeypatch):
    image, truth = cells_case
    tune = save_case(image, noisy_probabilities(truth, noise=2.0), truth)
    monkeypatch.setattr(crf_search, "N_SIMPLEX", 10_000)
    started = time.monotonic()
    result = tune(time="1s")
    assert result.is_cut_short
    assert result.n_evaluations >= 1
    assert time.monotonic() - started < 20


def test_only_what_was_predicted_is_tuned_on(save_case, cells_case):
    image, truth = cells_case
    region = Region((0, 0, 0), (24, 48, 40))
    probabilities = noisy_probabilities(truth)
    probabilities[..., 40:] = 0
    assert save_case(image, probabilities, truth, region)().parameters.enabled


# --- the parts ---


def tile(cell, *counts):
    return Tile(Region((0, 0, cell), (1, 1, cell + 1)), cell, np.array(counts))


def test_cells_are_never_shared_and_the_rare_class_is_on_both_sides():
    tiles = [tile(cell, 100, 5 if cell in (2, 7) else 0) for cell in range(10) for _ in range(3)]
    to_tune, to_judge = split_cells(tiles, np.random.default_rng(0))
    assert {t.cell for t in to_tune} & {t.cell for t in to_judge} == set()
    assert len(to_tune) + len(to_judge) == len(tiles)
    for part in (to_tune, to_judge):
        assert {t.cell for t in part} & {2, 7}


def test_every_cell_is_drawn_from_before_any_twice(open_inputs):
    tiles = [tile(cell, 1) for cell in range(5) for _ in range(4)]
    drawn = draw_tiles(tiles, open_inputs(), 10**9, 7, np.random.default_rng(0))
    assert len(drawn) == 7
    assert {t.cell for t in drawn[:5]} == set(range(5))
    assert len(draw_tiles(tiles, open_inputs(), 1, 7, np.random.default_rng(0))) == 4


def test_a_tile_is_read_with_what_is_around_it_but_nothing_outside_the_volume(open_inputs, cells_case):
    image, truth = cells_case
    core = Region((12, 10, 20), (16, 20, 32))
    loaded = load_tile(open_inputs(), Tile(core, 0, np.ones(3)))
    np.testing.assert_array_equal(loaded.classes, truth[core.slices] - 1)
    # 16 voxels of 10 nm along y and x, 8 of 20 nm along z.
    grey, stored = loaded.arrays
    np.testing.assert_array_equal(grey[0], image[4:24, 0:36, 4:48])
    assert loaded.core == (slice(8, 12), slice(10, 20), slice(16, 28))
    np.testing.assert_array_equal(stored[:, *loaded.core], loaded.stored_core)


def test_penalties_spare_the_classes_that_touch():
    contacts = np.array([[900, 90, 10], [90, 800, 0], [10, 0, 50]])
    penalties = contact_penalties(contacts)
    np.testing.assert_array_equal(np.diag(penalties), 0)
    np.testing.assert_allclose(penalties, penalties.T)
    assert penalties[~np.eye(3, dtype=bool)].mean() == pytest.approx(1)
    assert penalties[1, 2] > penalties[0, 2] > penalties[0, 1]
    np.testing.assert_allclose(contact_penalties(np.zeros((3, 3), int)), 1 - np.eye(3))


def test_points_of_the_search_are_parameters_within_bounds():
    contacts = np.array([[9, 4, 1], [4, 9, 0], [1, 0, 9]])
    space = SearchSpace(VOXEL_SIZE_NM, THREE, 10, 1, None, contacts, np.array([900, 100, 100]))
    for values in HAND_PICKED:
        parameters = space.parameters(space.locate(values))
        assert parameters.bilateral_sigma_nm[0] == pytest.approx(values[0] * 10)
        assert parameters.intensity_sigma == pytest.approx(values[1])
        parameters.make_crf()
        assert parameters.image_sigma_nm == pytest.approx(values[5] * 10 if values[5] > 0.3 else 0)
    potts = space.parameters(space.locate(HAND_PICKED[0]))
    assert potts.bilateral_weight == ((0, 4, 4), (4, 0, 4), (4, 4, 0))
    assert space.pairs == [(0, 1), (0, 2), (1, 2)]
    factors = np.log([1, 1, 0.5, 2, 1, 1])  # of the three classes, then of the three pairs
    changed = space.parameters(space.locate(HAND_PICKED[0]), factors).bilateral_weight
    assert changed == ((0, 8, 4), (8, 0, 4), (2, 2, 0))
    sparing = space.parameters(space.locate((*HAND_PICKED[0][:-1], 0.5))).bilateral_weight
    assert sparing[0][1] / sparing[1][0] == pytest.approx(3, rel=1e-3)
    assert space.bounds[1][0] < replace(space, n_channels=3).bounds[1][0]
    corners = _simplex(np.array([0.1, 0.9, 0.5, 1, 0, 0.3]))
    assert corners.shape == (7, 6)
    assert corners.min() >= 0
    assert corners.max() <= 1


# --- bad input ---


def one_place(image, truth):
    labels = np.zeros_like(truth)
    labels[:16, :16, :30] = truth[:16, :16, :30]
    return labels


BAD = [
    (lambda image, truth: np.zeros_like(truth), {}, 2, "hold no labelled voxel"),
    (lambda image, truth: (truth > 0).astype(np.uint8), {}, 2, "hold only one class"),
    (lambda image, truth: np.where(truth == 1, 9, truth).astype(np.uint8), {}, 2, "ids that are no class: 9"),
    (one_place, {}, 2, "only 1 cells of at least 16 voxels .* at least 4 are needed"),
    (lambda image, truth: truth[:-1], {}, 2, r"shape \(23, 48, 52\) but the volume has \(24, 48, 52\)"),
    (lambda image, truth: truth, {"time": "soon"}, 2, "--time was 'soon': give a number and a unit, for example 90s"),
    (lambda image, truth: truth, {"voxel-size": "20,10,20"}, 2, r"voxel size .* nm but"),
]


@pytest.mark.parametrize(("relabel", "options", "code", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_has_its_own_message(save_case, cells_case, tmp_path, capsys, relabel, options, code, message):
    image, truth = cells_case
    save_case(image, noisy_probabilities(truth), relabel(image, truth))
    paths = [str(tmp_path / f"{name}.zarr") for name in ("probabilities", "image", "labels")]
    given = [f"--{name}={value}" for name, value in options.items()]
    assert cli.main(["crf-tune", *paths, "-o", str(tmp_path / "crf.toml"), *given]) == code
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "crf.toml").exists()


def test_a_file_that_is_there_is_kept(save_case, cells_case, tmp_path, capsys):
    image, truth = cells_case
    save_case(image, noisy_probabilities(truth), truth)
    (tmp_path / "crf.toml").write_text("mine")
    paths = [str(tmp_path / f"{name}.zarr") for name in ("probabilities", "image", "labels")]
    command = ["crf-tune", *paths, "-o", str(tmp_path / "crf.toml"), "--n-iterations", "2"]
    assert cli.main(command) == 3
    assert (tmp_path / "crf.toml").read_text() == "mine"
    assert cli.main([*command, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert "the gain is significant" in printed
    assert CrfParameters.load(tmp_path / "crf.toml").enabled


def test_tiles_are_found_where_labels_are(save_case, cells_case, tmp_path):
    from voxclf.progress import last
    from voxclf.sampling import survey_labels

    image, truth = cells_case
    sparse = np.zeros_like(truth)
    sparse[12] = truth[12]
    save_case(image, noisy_probabilities(truth), sparse)
    labels = open_volume(tmp_path / "labels.zarr", kind="labels")
    image, probabilities = (open_volume(tmp_path / name) for name in ("image.zarr", "probabilities.zarr"))
    survey = last(survey_labels(labels, 0)).total
    whole = Region((0, 0, 0), SHAPE)
    tiles = find_tiles(TuningInputs((image,), probabilities, THREE, labels), survey, whole, np.random.default_rng(0))
    assert sum(t.counts for t in tiles).tolist() == np.bincount(truth[12].ravel(), minlength=4)[1:].tolist()
    assert all(t.core.start[0] == 12 and t.core.shape[0] == 1 for t in tiles)
    assert len({t.cell for t in tiles}) == 3 * 3
    assert all(t.core.shape[1:] in {(16, 18), (16, 16)} for t in tiles)
