"""How the phantom's tissue is drawn: the fast tessellation and the smooth texture against slow plain versions."""

import numpy as np
from scipy.interpolate import BSpline

from voxclf import phantom

SHAPE, VOXEL_NM = (19, 37, 41), (7.0, 5.0, 4.0)


def texture(seed, spacing_nm):
    return phantom.SmoothField(phantom.generator(seed), SHAPE, VOXEL_NM, spacing_nm)


def test_smooth_field_is_a_tensor_product_of_cubic_b_splines():
    field = texture(1, (30.0, 20.0, 50.0))
    values = field._lattice.astype(float)
    for axis, (n, voxel, spacing) in enumerate(zip(SHAPE, VOXEL_NM, (30.0, 20.0, 50.0), strict=True)):
        knots = np.arange(-3, values.shape[axis] + 1)
        spline = BSpline(knots, np.moveaxis(values, axis, 0), 3)
        values = np.moveaxis(spline(np.arange(n) * voxel / spacing), 0, axis)
    np.testing.assert_allclose(field.read((0, 0, 0), SHAPE), values, atol=1e-5)


def test_smooth_field_has_unit_variance_and_reads_by_region():
    field = phantom.SmoothField(phantom.generator(2), (60, 60, 60), (5.0, 5.0, 5.0), 13.0)
    whole = field.read((0, 0, 0), (60, 60, 60))
    assert abs(whole.std() - 1) < 0.05
    np.testing.assert_array_equal(field.read((5, 11, 30), (9, 40, 31)), whole[5:9, 11:40, 30:31])


def test_tessellation_equals_brute_force_over_all_tubes():
    """Owner and border distance of each voxel, without pruning by blocks and without bookkeeping."""
    neuropil = phantom._tessellate(SHAPE, VOXEL_NM, seed=6)
    extent = np.array(SHAPE) * VOXEL_NM
    tubes, process, _ = phantom._grow_processes(phantom.generator(6, 1), extent)
    point = np.stack(np.meshgrid(*(np.arange(n) * v for n, v in zip(SHAPE, VOXEL_NM, strict=True)), indexing="ij"), -1)
    for a in range(3):
        coarse = phantom.SmoothField(phantom.generator(6, 2, a), SHAPE, VOXEL_NM, 150.0)
        fine = phantom.SmoothField(phantom.generator(6, 3, a), SHAPE, VOXEL_NM, 48.0)
        point[..., a] += 34 * coarse.read((0, 0, 0), SHAPE) + 6.5 * fine.read((0, 0, 0), SHAPE)

    start, vector, radius, change = tubes[:, :3], tubes[:, 3:6], tubes[:, 6], tubes[:, 7]
    away = point[..., None, :] - start
    t = np.clip((away * vector).sum(-1) / (vector**2).sum(-1), 0, 1)
    offset = away - t[..., None] * vector
    length = np.linalg.norm(offset, axis=-1)
    distance = length - (radius + t * change)
    nearest = distance.argmin(-1)[..., None]
    owner = process[nearest]
    gradient = offset / length[..., None]
    slope = np.linalg.norm(gradient - np.take_along_axis(gradient, nearest[..., None], -2), axis=-1)
    border = (distance - np.take_along_axis(distance, nearest, -1)) / np.maximum(slope, 0.25)
    border[process == owner] = np.inf
    expected = border.min(-1)

    same = neuropil.owner == owner[..., 0]
    assert same.mean() > 0.9999  # a tie within rounding may fall either way
    shallow = same & (expected < phantom.EXACT_DEPTH_NM)
    assert 0.3 < shallow.mean() < 0.95
    np.testing.assert_allclose(neuropil.depth_nm[shallow], expected[shallow], rtol=1e-3, atol=0.02)
    assert (neuropil.neighbour == process[border.argmin(-1)])[shallow].mean() > 0.999
    assert (neuropil.depth_nm[same & ~shallow] >= phantom.EXACT_DEPTH_NM - 0.1).all()
