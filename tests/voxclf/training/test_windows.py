"""Training windows: where they lie, what they hold, and that they depend on seed and step only."""

import itertools

import numpy as np
import pytest

from voxclf.engine.transfer import read_block
from voxclf.geometry import Region, add, make_block, subtract
from voxclf.labels import LabelSet
from voxclf.models.network_inputs import NetworkInput
from voxclf.progress import last
from voxclf.sampling import survey_labels
from voxclf.training.held_out import HeldOut, choose_held_out, count_along_axes
from voxclf.training.scored_windows import list_scored_windows, read_scored, scored_batches
from voxclf.training.volume_memory import RememberedSource, cell_shape, remember
from voxclf.training.windows import (
    LabelIndex,
    WindowReader,
    WindowSampler,
    crop_form,
    effective_count,
    loss_weights,
    patch_form,
    slab_forms,
    window_side,
)
from voxclf.volume import Volume

NOTHING_HELD_OUT = HeldOut(0, -9, -9, 0, 0, 0, 0, 0)
PATCH, SIGHT = (6, 7, 8), (5, 7, 7)


@pytest.fixture
def make_index(save_volume, cells):
    """Index labels on the (23, 37, 41) image; intensities are left as they are."""
    numbers = itertools.count()

    def make(labels, image=cells[0]):
        # A test may make several indices; each has files of its own.
        number = next(numbers)
        volume = save_volume(image, f"volume{number}.zarr")
        label_volume = save_volume(labels, f"labels{number}.zarr", "labels")
        label_set = LabelSet.from_ids([1, 2, 3])
        reader = WindowReader(volume, label_volume, NetworkInput((0.0,), (1.0,)), label_set)
        return LabelIndex(reader, last(survey_labels(label_volume, 0)).total)

    return make


def sampler_of(index, forms, n_windows=6, balance="labelled", seed=3, held_out=NOTHING_HELD_OUT, **options):
    return WindowSampler(index, held_out, forms, n_windows, balance, seed, **options)


def padded(array, margin, **options):
    return np.pad(array, margin, **options)


# --- what a window holds ---


@pytest.mark.parametrize(
    "forms",
    [
        slab_forms(PATCH, SIGHT, (5, 9, 11)),
        slab_forms(PATCH, SIGHT, (6, 9, 11), (2, 4, 1)),
        (patch_form(PATCH),),
        (crop_form((9, 11, 13)),),
    ],
)
def test_window_is_the_image_around_its_labels(make_index, cells, sparse_labels, forms):
    index = make_index(sparse_labels)
    image = padded(cells[0], 50, mode="symmetric")
    truth = padded(sparse_labels.astype(int) - 1, 50, constant_values=-1)
    for step in range(8):
        batch = sampler_of(index, forms).draw(step)
        form = forms[batch.form]
        for window, target, start in zip(batch.images, batch.targets, batch.starts, strict=True):
            first = tuple(start + 50)
            middle = Region(first, add(first, form.target))
            around = Region(subtract(middle.start, form.before), add(middle.stop, form.after))
            counting = tuple(slice(a, b, s) for a, b, s in zip(middle.start, middle.stop, form.spacing, strict=True))
            np.testing.assert_array_equal(target, truth[counting])
            np.testing.assert_array_equal(window[0], image[around.slices])
            assert (target >= 0).any()


def test_slab_is_one_patch_thick_and_dense_in_its_plane():
    for normal, form in enumerate(slab_forms(PATCH, SIGHT, (5, 9, 11))):
        expected = [w + r - 1 for w, r in zip((5, 9, 11), SIGHT, strict=True)]
        expected[normal] = PATCH[normal]
        assert form.image_shape == tuple(expected)
        assert form.dense_axes == tuple(axis != normal for axis in range(3))
        # The first result belongs to the patch that starts at the first voxel, so to voxel P // 2.
        assert form.before == tuple(p // 2 for p in PATCH)


def test_spaced_slab_begins_and_ends_with_a_voxel_that_counts():
    for normal, form in enumerate(slab_forms(PATCH, SIGHT, (5, 10, 11), (1, 4, 2))):
        expected = [5, 9, 11]
        expected[normal] = 1
        assert form.target == tuple(expected)
        assert form.pick(np.zeros(form.target)).shape == tuple(
            (n - 1) // s + 1 for n, s in zip(expected, (1, 4, 2), strict=True)
        )


@pytest.mark.parametrize("side", [13, 33])
def test_voxel_that_was_drawn_counts_even_at_the_edge(make_index, cells, side):
    """Single labelled voxels in the corners and the middle: every window must have one among those that count."""
    labels = np.zeros_like(cells[1])
    for position in ((0, 0, 0), (22, 36, 40), (0, 36, 1), (11, 18, 20)):
        labels[position] = 1
    sampler = sampler_of(make_index(labels), slab_forms(PATCH, SIGHT, (side,) * 3, (4, 4, 4)))
    for step in range(20):
        batch = sampler.draw(step)
        assert (batch.targets.reshape(len(batch.targets), -1) >= 0).any(axis=1).all()
        if side == 13:  # shorter than the volume: inside it
            stops = batch.starts + sampler.forms[batch.form].target
            assert (batch.starts >= 0).all() and (stops <= labels.shape).all()


def test_patch_is_around_the_voxel_p_over_2():
    form = patch_form((32, 5, 8))
    assert (form.before, form.after, form.image_shape) == ((16, 2, 4), (15, 2, 3), (32, 5, 8))


@pytest.mark.parametrize("axis", range(3))
def test_normal_is_that_of_the_labelled_plane(make_index, cells, axis):
    labels = np.zeros_like(cells[1])
    plane = [slice(None)] * 3
    plane[axis] = 13
    labels[tuple(plane)] = cells[1][tuple(plane)]
    sampler = sampler_of(make_index(labels), slab_forms(PATCH, SIGHT, (8, 8, 8)))
    for step in range(5):
        batch = sampler.draw(step)
        assert batch.form == axis
        assert (batch.starts[:, axis] == 13).all()
        assert batch.n_labelled == batch.targets.size


def test_dense_labels_are_seen_across_all_three_axes(make_index, cells):
    sampler = sampler_of(make_index(cells[1]), slab_forms(PATCH, SIGHT, (8, 8, 8)))
    assert {sampler.draw(step).form for step in range(20)} == {0, 1, 2}


def test_thin_stack_of_labels_is_seen_across_z_only(make_index, cells):
    labels = np.zeros_like(cells[1])
    labels[4:7] = cells[1][4:7]
    sampler = sampler_of(make_index(labels), slab_forms(PATCH, SIGHT, (16, 16, 16)))
    assert {sampler.draw(step).form for step in range(20)} == {0}


def test_scribble_is_drawn_in_its_plane(make_index, cells):
    labels = np.zeros_like(cells[1])
    labels[9, 10:30, 12:15], labels[9, 20:23, 5:38] = 1, 2
    sampler = sampler_of(make_index(labels), slab_forms(PATCH, SIGHT, (16, 16, 16)))
    batch = sampler.draw(0)
    assert batch.form == 0 and (batch.starts[:, 0] == 9).all()


def test_same_seed_and_step_draw_the_same(make_index, sparse_labels):
    forms = slab_forms(PATCH, SIGHT, (8, 8, 8))
    first, again = (sampler_of(make_index(sparse_labels), forms) for _ in range(2))
    first.draw(0)  # what was drawn before does not matter
    for a, b in zip(first.draw(7), again.draw(7), strict=True):
        np.testing.assert_array_equal(a, b)
    other = sampler_of(make_index(sparse_labels), forms, seed=4).draw(7)
    assert not np.array_equal(other.starts, again.draw(7).starts) or other.form != again.draw(7).form


def test_labels_are_counted_as_they_are_drawn(make_index, sparse_labels):
    sampler = sampler_of(make_index(sparse_labels), slab_forms(PATCH, SIGHT, (5, 9, 11)))
    for step, (counts, n_image) in enumerate(sampler.count_labels(4)):
        batch = sampler.draw(step)
        assert counts.tolist() == [[(target == k).sum() for k in range(3)] for target in batch.targets]
        assert n_image == batch.images[:, 0].size


@pytest.mark.parametrize("balance", ["equal", "sqrt", "labelled"])
def test_patches_follow_the_shares_asked_for(make_index, sparse_labels, balance):
    sampler = sampler_of(make_index(sparse_labels), (patch_form(PATCH),), 200, balance)
    drawn = sum(counts.sum(axis=0) for counts, _ in sampler.count_labels(10))
    totals = np.bincount(sparse_labels[sparse_labels > 0] - 1, minlength=3)
    wanted = {"labelled": totals, "sqrt": np.sqrt(totals), "equal": np.ones(3)}[balance]
    np.testing.assert_allclose(drawn / drawn.sum(), wanted / wanted.sum(), atol=0.04)


def test_loss_weights_make_up_for_what_was_drawn():
    weights = loss_weights(np.array([900, 100, 0]), "equal", np.array([400, 100, 0]))
    # equal shares of 0.5 out of 0.8 and 0.2 drawn: 0.625 and 2.5
    np.testing.assert_allclose(weights, [0.625, 2.5, 0.0], rtol=1e-6)


def test_flipped_window_keeps_labels_on_their_voxels(make_index, cells):
    """An image that is its own label: after any flip the two must still agree, also for even patches."""
    labels = cells[1]
    index = make_index(labels, image=labels)

    def flip(image, target, rng):
        axes = [axis for axis in range(3) if rng.random() < 0.5]
        return np.flip(image, [1 + axis for axis in axes]), np.flip(target, axes)

    for forms in (slab_forms(PATCH, SIGHT, (5, 9, 11)), (patch_form(PATCH),), (crop_form((9, 10, 11)),)):
        sampler = sampler_of(index, forms, augment=flip)
        for step in range(10):
            batch = sampler.draw(step)
            form = forms[batch.form]
            middle = Region(form.before, add(form.before, form.target))
            for image, target in zip(batch.images, batch.targets, strict=True):
                inside = target >= 0
                np.testing.assert_array_equal(image[0][middle.slices][inside], target[inside] + 1)


def test_window_side_is_one_length_in_nm():
    assert window_side(32, (50.0, 4.6, 4.6)) == (3, 32, 32)
    assert window_side(32, (10.0, 10.0, 10.0)) == (32, 32, 32)
    assert window_side(4, (500.0, 10.0, 10.0)) == (1, 4, 4)


# --- what is held out ---


def held_out_of(index, sight):
    reader = index.reader
    counts = last(count_along_axes(reader.labels, index.survey, reader.label_set))
    return counts, choose_held_out(counts, sight, reader.label_set.names)


def test_counts_along_axes_are_those_of_the_labels(make_index, sparse_labels):
    counts, _ = held_out_of(make_index(sparse_labels), (3, 3, 3))
    for k in range(3):
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            np.testing.assert_array_equal(counts[axis][k], (sparse_labels == k + 1).sum(axis=others))


@pytest.mark.parametrize("sight", [(3, 5, 5), (8, 8, 8)])
def test_no_window_to_train_on_shows_labels_within_the_gap(make_index, cells, sparse_labels, sight):
    for labels in (cells[1], sparse_labels):
        index = make_index(labels)
        _, held_out = held_out_of(index, sight)
        assert held_out.gap == held_out.wanted_gap == sight[held_out.axis]
        training, validation = (
            LabelIndex(index.reader, part) for part in held_out.split(index.survey, index.reader.labels, 0)
        )
        assert training.totals.sum() == held_out.n_training
        assert validation.totals.sum() == held_out.n_held_out
        assert held_out.n_training + held_out.n_held_out + held_out.n_unused == (labels > 0).sum()
        assert held_out.n_training >= (labels > 0).sum() / 2
        sampler = sampler_of(training, slab_forms((9, 9, 9), sight, (11, 11, 11)), held_out=held_out)
        for step in range(10):
            batch = sampler.draw(step)
            window, *local = np.nonzero(batch.targets >= 0)
            along = batch.starts[window, held_out.axis] + local[held_out.axis]
            assert ((along < held_out.start - held_out.gap) | (along >= held_out.stop + held_out.gap)).all()


def test_three_crossing_slices_lose_an_end_in_the_plane(make_index, sparse_labels):
    index = make_index(sparse_labels)
    _, held_out = held_out_of(index, (8, 8, 8))
    assert held_out.axis in (1, 2)
    assert held_out.start == 0 or held_out.stop == sparse_labels.shape[held_out.axis]


def test_gap_gives_way_where_labels_have_no_room(make_index, cells):
    labels = np.zeros_like(cells[1])
    labels[9, 5:25, 5:25] = cells[1][9, 5:25, 5:25]
    labels[9, ::2, 5:25:3] = 1  # every class everywhere
    labels[9, 1::2, 6:25:3] = 2
    labels[9, 1::2, 7:25:3] = 3
    _, held_out = held_out_of(make_index(labels), (40, 40, 40))
    assert 0 <= held_out.gap < 40
    assert not held_out.to_dict()["is_gap_kept"]
    assert "no room for more" in held_out.note
    assert held_out.n_training > 0 and held_out.n_held_out > 0


def test_labels_in_a_single_voxel_per_class_cannot_be_split():
    counts = [np.zeros((2, 10), int) for _ in range(3)]
    for table in counts:
        table[0, 3] = table[1, 4] = 1
    with pytest.raises(ValueError, match="label a second place"):
        choose_held_out(counts, (3, 3, 3), ("membrane", "vesicle"))


# --- what is scored ---


@pytest.mark.parametrize(
    "forms", [slab_forms(PATCH, SIGHT, (8, 8, 8)), (patch_form(PATCH),), (crop_form((12, 12, 12), (2, 2, 2)),)]
)
def test_every_label_is_scored_once(make_index, cells, sparse_labels, forms):
    for labels in (sparse_labels, cells[1]):
        full = np.zeros_like(labels)
        full[3:17, 4:19, 6:25] = labels[3:17, 4:19, 6:25]
        index = make_index(full)
        times = np.zeros(full.shape, int)
        windows = list_scored_windows(index, forms, 10**9, seed=0)
        for window in windows:
            _, target = read_scored(index, forms, window)
            assert (target >= 0).sum() == window.n_labelled
            z, y, x = np.nonzero(target >= 0)
            position = (z + window.start[0], y + window.start[1], x + window.start[2])
            np.testing.assert_array_equal(target[z, y, x], full[position].astype(int) - 1)
            np.add.at(times, position, 1)
        np.testing.assert_array_equal(times, full > 0)


@pytest.mark.parametrize("forms", [slab_forms(PATCH, SIGHT, (8, 8, 8)), (patch_form(PATCH),)])
def test_scored_sample_keeps_to_its_limit(make_index, cells, forms):
    index = make_index(cells[1])
    n = sum(window.n_labelled for window in list_scored_windows(index, forms, 3000, seed=1))
    assert 2000 < n < 4000


def test_scored_batches_hold_windows_of_one_form(make_index, sparse_labels):
    index = make_index(sparse_labels)
    forms = slab_forms(PATCH, SIGHT, (8, 8, 8))
    windows = list_scored_windows(index, forms, 10**9, seed=0)
    batches = list(scored_batches(index, forms, windows, 5))
    assert sum(len(batch.images) for batch in batches) == len(windows)
    assert {batch.form for batch in batches} == {0, 1, 2}
    for batch in batches:
        assert batch.images.shape[1:] == (1, *forms[batch.form].image_shape)


# --- memory ---


def test_remembered_volume_reads_each_cell_once(save_volume, cells):
    volume = save_volume(cells[0])
    reads = []

    class Counted(Volume):
        def read(self, start, stop):
            reads.append((start, stop))
            return super().read(start, stop)

    source = RememberedSource(Counted(volume.path, volume.info, volume.voxel_size_nm, volume.opener), 10**8)
    for start, stop in (((0, 0, 0), (23, 37, 41)), ((3, 4, 5), (20, 36, 40)), ((22, 0, 40), (23, 1, 41))):
        np.testing.assert_array_equal(source.read(start, stop)[0], cells[0][Region(start, stop).slices])
    assert reads == [((0, 0, 0), (23, 37, 41))]


def test_remembered_volume_is_mirrored_like_any_other(save_volume, cells):
    volume = save_volume(cells[0])
    kept = remember(volume, 10**8)
    block = make_block(0, Region((-4, -4, -4), (9, 9, 9)))
    np.testing.assert_array_equal(read_block(kept, block), read_block(volume, block))


@pytest.mark.parametrize(
    ("chunk", "cell"),
    [((1, 1536, 2048), (32, 128, 128)), ((64, 64, 64), (64, 128, 128)), ((20, 100, 100), (40, 200, 200))],
)
def test_cells_are_whole_chunks_where_those_are_small(chunk, cell):
    assert cell_shape(chunk) == cell


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[4, 0], [0, 4]], 2.0),  # all of a window alike: as many as windows
        ([[2, 2], [2, 2]], 8.0),  # every window like the whole: no more than there are labels
        ([[3, 1], [1, 3]], 8.0),  # scatter as of labels drawn one by one: 2 · 1² = 8 · 1/4
        ([[8, 0], [2, 2]], 12 * (12 * 10 / 12 * 2 / 12) / (2 * (8 - 8 * 10 / 12) ** 2)),
        ([[4, 0, 0], [0, 4, 0]], 2.0),  # a class that was not drawn tells nothing
        ([[5], [3]], 8.0),
    ],
)
def test_alike_labels_of_a_window_tell_less(counts, expected):
    assert effective_count(np.array(counts)) == pytest.approx(expected)


def test_effective_count_is_that_of_the_shares_variance():
    """Simulated: the variance of an estimated share over repetitions is p (1 − p) / effective count."""
    rng = np.random.default_rng(0)
    shares = rng.beta(0.5, 0.5, (400, 300))
    positive = rng.binomial(20, shares)
    estimates = positive.sum(axis=1) / (300 * 20)
    found = np.mean([effective_count(np.stack([p, 20 - p], axis=1)) for p in positive])
    assert found == pytest.approx(0.25 / estimates.var(), rel=0.15)
