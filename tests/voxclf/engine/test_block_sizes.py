"""Blocks that fit a memory budget, for steps that say what they need."""

from dataclasses import dataclass

import numpy as np
import pytest

from voxclf.engine.run import choose_chunk_shape, choose_core_shape

KB = 1000


@dataclass(frozen=True)
class Hungry:
    """A step that needs one kilobyte per voxel it reads."""

    halo: tuple
    alignment: tuple = (1, 1, 1)
    out_channels: int = 1

    def working_bytes(self, core_shape):
        return KB * int(np.prod([n + 2 * h for n, h in zip(core_shape, self.halo, strict=True)]))


@pytest.mark.parametrize("halo", [(0, 0, 0), (8, 8, 8), (0, 30, 30)])
@pytest.mark.parametrize("n_workers", [1, 4])
def test_cores_fit_the_budget_in_whole_chunks(halo, n_workers):
    step = Hungry(halo)
    core = choose_core_shape(step, (16, 16, 16), (512, 512, 512), 3 * 10**9, n_workers)
    assert step.working_bytes(core) * n_workers <= 3 * 10**9
    assert all(n % 16 == 0 for n in core)
    larger = [tuple(n + 16 * (axis == a) for a, n in enumerate(core)) for axis in range(3)]
    assert max(step.working_bytes(shape) for shape in larger) * n_workers > 3 * 10**9


def test_cores_grow_where_the_halo_costs_most():
    z, y, x = choose_core_shape(Hungry((0, 30, 30)), (16, 16, 16), (512, 512, 512), 3 * 10**9, 1)
    assert z < y
    assert z < x


def test_a_small_region_is_still_shared_among_workers():
    core = choose_core_shape(Hungry((0, 0, 0)), (16, 16, 16), (64, 64, 64), 10**12, 2)
    assert np.prod(-(-64 // np.array(core))) >= 8


def test_a_budget_below_one_chunk_per_worker_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"leaves 0\.00 GB.*2 workers.*need 0\.01 GB; raise --memory"):
        choose_core_shape(Hungry((0, 0, 0)), (16, 16, 16), (64, 64, 64), 4000 * KB, 2)


@pytest.mark.parametrize(
    ("halo", "budget", "expected"),
    [((9, 9, 9), 10**12, (64, 64, 64)), ((1, 9, 9), 300_000 * KB, (32, 64, 64)), ((1, 9, 9), 10, (8, 8, 8))],
)
def test_chunks_shrink_until_a_block_fits_first_where_the_halo_is_small(halo, budget, expected):
    assert choose_chunk_shape(Hungry(halo), (64, 64, 64), budget, 1) == expected
