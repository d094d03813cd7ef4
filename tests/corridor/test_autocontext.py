"""A second round that reads the first one's probabilities: no leakage, no seams, saved like any other."""

import numpy as np
import pytest
import tifffile

from features.bank import FilterBank
from tests.corridor.conftest import SHAPE, run
from voxclf.engine.executors import SerialExecutor, ThreadExecutor
from voxclf.feature_stack import FeatureStack
from voxclf.geometry import Region
from voxclf.labels import LabelSet
from voxclf.models.checkpoint import load_model
from voxclf.models.trees import TreePredictor
from voxclf.probabilities import quantise
from voxclf.progress import last
from voxclf.sampling import split_into_slabs, survey_labels
from voxclf.training.autocontext import predict_out_of_fold
from voxclf.volume import open_volume

OPTIONS = ["--sigmas", "10,20", "--trees", "6", "--max-depth", "6", "--folds", "3"]


@pytest.fixture(scope="module")
def context_model(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("autocontext") / "model"
    fit = ("fit", "image.tif", "labels.tif", "-o", folder, "--autocontext", "2", "--calibrate", *OPTIONS)
    assert run(project, *fit) == 0
    return folder


def labels_of(folder):
    return open_volume(folder / "labels.zarr", kind="labels").read((0, 0, 0), SHAPE)[0]


def test_the_model_keeps_both_rounds(context_model):
    model = load_model(context_model)
    assert model.n_rounds == 2
    assert model.calibration is not None
    n_image, n_all = (classifier.n_features for classifier in model.classifiers)
    assert n_image == model.bank.n_features
    assert n_all == n_image + 3 * model.context.n_features == len(model.feature_names)
    assert model.feature_names[n_image].startswith("p(class 1): gaussian")
    assert len(model.training["honest_macro_f1_by_round"]) == 2
    assert not list(context_model.parent.glob(".autocontext-*"))


def test_prediction_equals_the_rounds_applied_to_the_whole_volume(project, context_model, tmp_path):
    assert run(project, "predict", context_model, "image.tif", "-o", tmp_path, "--probabilities", "float32") == 0
    model = load_model(context_model)
    image = tifffile.imread(project / "image.tif")[None]
    probabilities = []
    for index in range(2):
        step = model.step(index)
        widths = [(0, 0), *((h, h) for h in step.halo)]
        result = step(*(np.pad(array, widths, mode="symmetric") for array in (image, *probabilities)))
        probabilities = [quantise(result)]
    found = open_volume(tmp_path / "probabilities.zarr").read((0, 0, 0), SHAPE)
    np.testing.assert_array_equal(found, result)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


def test_a_region_equals_that_part_of_the_whole(project, context_model, tmp_path):
    assert run(project, "predict", context_model, "image.tif", "-o", tmp_path / "whole") == 0
    region = ("--region", "9:14,20:30,30:40")
    assert run(project, "predict", context_model, "image.tif", "-o", tmp_path / "part", *region) == 0
    whole, part = labels_of(tmp_path / "whole"), labels_of(tmp_path / "part")
    np.testing.assert_array_equal(part[9:14, 20:30, 30:40], whole[9:14, 20:30, 30:40])


class Brightness:
    """Says its own number wherever it is asked, so that who predicted a voxel can be read off the result."""

    n_features, n_classes = 1, 2

    def __init__(self, value):
        self.value = value

    def predict_probabilities(self, features):
        return np.stack([np.full(features.shape[1], self.value), np.full(features.shape[1], 1 - self.value)])


@pytest.mark.parametrize("executor", [SerialExecutor(), ThreadExecutor(2)])
def test_every_slab_is_predicted_by_the_model_that_did_not_see_it(save_volume, tmp_path, executor):
    image = save_volume(np.zeros((20, 90, 40), np.uint8))
    labels = np.zeros((20, 90, 40), np.uint8)
    labels[10] = 1
    labels[10, :, 20:] = 2
    labels = save_volume(labels, "labels.zarr", "labels")
    survey = last(survey_labels(labels, 0)).total
    split = split_into_slabs(np.argwhere(labels.read((0, 0, 0), labels.shape)[0]), 3, (0, 5, 5))
    models = {0: Brightness(0.1), 2: Brightness(0.9)}
    stack = FeatureStack(FilterBank("intensity", 3), image.voxel_size_nm)
    path = tmp_path / "oof.zarr"
    label_set = LabelSet.from_ids([1, 2])
    found = predict_out_of_fold([image], stack, models, split, survey, label_set, (2, 3, 3), path, executor)
    first = found.read((8, 0, 0), (13, 90, 40))[0]
    expected = np.repeat([26, 0, 230], 30)  # quantised 0.1, no model, 0.9
    np.testing.assert_array_equal(first, np.broadcast_to(expected[None, :, None], first.shape))


def test_calibration_corrects_only_the_last_round(context_model):
    model = load_model(context_model)
    assert model.step(0).calibration is None
    assert isinstance(model.step(), TreePredictor)
    assert model.step().calibration is not None


def test_slab_regions_cover_the_volume_once(save_volume):
    from voxclf.training.autocontext import _slab_region

    split = split_into_slabs(np.argwhere(np.ones((3, 40, 7))) + np.array([0, 10, 0]), 4, (0, 2, 9))
    covered = np.zeros((5, 70, 9), int)
    for slab in range(4):
        region = _slab_region(split, slab, covered.shape)
        assert isinstance(region, Region)
        covered[region.slices] += 1
    assert (covered == 1).all()
