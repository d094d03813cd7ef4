"""Cells of the spatial bootstrap: every voxel in one cell, pieces agree with numbers, tables join."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from voxclf.geometry import Region
from voxclf.metrics.cells import CELLS_PER_AXIS, CellGrid, CellTables
from voxclf.metrics.scored import ScoredLabels
from voxclf.metrics.voxelwise import score_block

corners = st.tuples(*[st.integers(0, 50)] * 3)
extents = st.tuples(*[st.integers(1, 90)] * 3)


@given(corners, extents, st.integers(1, 40))
def test_pieces_cover_a_region_once_and_carry_the_number_of_their_voxels(start, extent, least):
    region = Region(start, tuple(a + n for a, n in zip(start, extent, strict=True)))
    grid = CellGrid.over(region, (least,) * 3)
    assert max(grid.counts) <= CELLS_PER_AXIS
    inner = Region(start, tuple(a + (n + 1) // 2 for a, n in zip(start, extent, strict=True)))
    pieces = list(grid.split(inner))
    assert sum(piece.n_voxels for _, piece in pieces) == inner.n_voxels
    for number, piece in pieces:
        ends = np.array([piece.start, tuple(b - 1 for b in piece.stop)])
        assert (grid.number(ends) == number).all()


def test_cells_are_cut_evenly():
    grid = CellGrid.over(Region((0, 0, 130), (4, 250, 160)), (1, 32, 32))
    assert grid.counts == (4, 7, 1)
    assert grid.side == (1, 36, 30)


def test_tables_join_by_cell_and_sum_to_the_whole():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, (2, 600))
    parts = [CellTables({i % 2: score_block(truth[i::4], None, found[i::4], 3)}) for i in range(4)]
    joined = sum(parts[1:], parts[0])
    assert len(joined.cells) == 2
    whole = score_block(truth, None, found, 3)
    np.testing.assert_array_equal(joined.total(3).confusion, whole.confusion)
    np.testing.assert_array_equal(joined.cells[0].confusion, score_block(truth[::2], None, found[::2], 3).confusion)


def test_scores_survive_saving(tmp_path):
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 500)
    probabilities = rng.dirichlet(np.ones(3), 500).T.astype(np.float32)
    cells = CellTables({i: score_block(truth[i::5], probabilities[:, i::5], None, 3) for i in range(5)})
    scored = ScoredLabels.from_cells(cells, 3, "five cells")
    scored.save(tmp_path / "scores.json")
    again = ScoredLabels.load(tmp_path / "scores.json")
    assert again.note == "five cells"
    assert again.to_dict() == scored.to_dict()
    assert again.intervals["macro_f1"].low < again.scores.macro_f1 < again.intervals["macro_f1"].high
