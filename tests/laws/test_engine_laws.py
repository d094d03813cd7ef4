"""What must be true of every step that runs through the engine, shown with steps SciPy can check."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import ndimage

from voxclf.engine.executors import ProcessExecutor, SerialExecutor, ThreadExecutor
from voxclf.engine.ledger import Ledger
from voxclf.engine.run import Output, map_blocks, reduce_blocks
from voxclf.errors import BlockError
from voxclf.geometry import Region, split_into_blocks
from voxclf.volume import create_volume, open_volume


@dataclass(frozen=True)
class Smoothing:
    """A Gaussian of radius 5, 3, 4: its valid part only, so a halo too small must show."""

    halo: tuple = (5, 3, 4)
    alignment: tuple = (1, 1, 1)
    out_channels: int = 1
    radius: tuple = (5, 3, 4)

    def working_bytes(self, core_shape):
        return 8 * int(np.prod(core_shape))

    def __call__(self, image):
        full = ndimage.gaussian_filter(image[0].astype(np.float64), 2.0, radius=self.radius, mode="reflect")
        inner = tuple(slice(h, n - h) for h, n in zip(self.halo, full.shape, strict=True))
        return full[inner][None].astype(np.float32)


@dataclass(frozen=True)
class Pooling:
    """Means of 4 x 2 x 2 boxes, spread over them again: aligned, as a network with strides is."""

    halo: tuple = (0, 0, 0)
    alignment: tuple = (4, 2, 2)
    out_channels: int = 1

    def working_bytes(self, core_shape):
        return 8 * int(np.prod(core_shape))

    def __call__(self, image):
        z, y, x = image.shape[1:]
        boxes = image[0].reshape(z // 4, 4, y // 2, 2, x // 2, 2).astype(np.float32).mean(axis=(1, 3, 5))
        return boxes.repeat(4, 0).repeat(2, 1).repeat(2, 2)[None]


@dataclass(frozen=True)
class FailingAt:
    """Smoothing that breaks where the block starts at a given corner."""

    corner: float
    halo: tuple = (0, 0, 0)
    alignment: tuple = (1, 1, 1)
    out_channels: int = 1

    def working_bytes(self, core_shape):
        return 1

    def __call__(self, image):
        if image[0, 0, 0, 0] == self.corner:
            raise ArithmeticError("no such luck")
        return image.astype(np.float32)


EXECUTORS = [SerialExecutor(), ThreadExecutor(2), ProcessExecutor(2)]


def run_step(step, volume, path, core_shape, executor=None, ledger=None, chunk_shape=None, region=None):
    output = create_volume(
        path, volume.shape, 1, np.float32, volume.voxel_size_nm, chunk_shape or core_shape, kind="image", overwrite=True
    )
    blocks = split_into_blocks(volume.shape, core_shape, step.halo, step.alignment, region)
    receipts = list(map_blocks(step, [volume], [Output(output, np.asarray)], blocks, executor, ledger))
    return open_volume(path).read((0, 0, 0), volume.shape)[0], receipts


@pytest.mark.parametrize("core_shape", [(23, 37, 41), (8, 8, 8), (8, 16, 24), (1, 37, 8)])
def test_blocks_equal_whole_and_scipy(cells, save_volume, tmp_path, core_shape):
    image, _ = cells
    found, _ = run_step(Smoothing(), save_volume(image), tmp_path / "out.zarr", core_shape)
    expected = ndimage.gaussian_filter(image.astype(np.float64), 2.0, radius=(5, 3, 4), mode="reflect")
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_halo_of_one_voxel_less_fails(cells, save_volume, tmp_path, axis):
    halo = tuple(h - (a == axis) for a, h in enumerate((5, 3, 4)))
    volume = save_volume(cells[0])
    whole, _ = run_step(Smoothing(), volume, tmp_path / "whole.zarr", (23, 37, 41))
    blocks, _ = run_step(Smoothing(halo=halo), volume, tmp_path / "blocks.zarr", (8, 8, 8))
    assert np.abs(whole - blocks).max() > 1e-3


@pytest.mark.parametrize("core_shape", [(8, 8, 8), (4, 16, 6)])
def test_aligned_steps_do_not_depend_on_blocks(cells, save_volume, tmp_path, core_shape):
    image, _ = cells
    volume = save_volume(image)
    found, _ = run_step(Pooling(), volume, tmp_path / "out.zarr", core_shape)
    padded = np.pad(image, ((0, 1), (0, 1), (0, 1)), mode="symmetric")
    expected = Pooling()(padded[None])[0][:23, :37, :41]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "threads", "processes"])
def test_every_executor_writes_the_same_bytes(cells, save_volume, tmp_path, executor):
    volume = save_volume(cells[0])
    serial, receipts = run_step(Smoothing(), volume, tmp_path / "serial.zarr", (8, 16, 24))
    found, again = run_step(Smoothing(), volume, tmp_path / "other.zarr", (8, 16, 24), executor)
    np.testing.assert_array_equal(found, serial)
    assert {r.index: r.digest for r in again} == {r.index: r.digest for r in receipts}
    files = sorted(path.relative_to(tmp_path / "serial.zarr") for path in (tmp_path / "serial.zarr").rglob("c/**/*"))
    for name in files:
        if (tmp_path / "serial.zarr" / name).is_file():
            one, two = ((tmp_path / folder / name).read_bytes() for folder in ("serial.zarr", "other.zarr"))
            assert one == two


@dataclass(frozen=True)
class SumFold:
    """A sum of floats, whose rounding would show another order of blocks."""

    def __call__(self, block, image):
        inner = tuple(slice(h, n - h) for h, n in zip(block.halo, image.shape[1:], strict=True))
        return np.float32(image[0][inner].astype(np.float32).sum() / 7)


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "threads", "processes"])
def test_sums_of_blocks_equal_the_whole_on_every_executor(cells, save_volume, executor):
    image, _ = cells
    volume = save_volume(image)
    blocks = split_into_blocks(volume.shape, (8, 8, 8), halo=(2, 0, 3))
    assert reduce_blocks(SumFold(), [volume], blocks, executor) == reduce_blocks(SumFold(), [volume], blocks)
    np.testing.assert_allclose(reduce_blocks(SumFold(), [volume], blocks, executor), image.sum() / 7, rtol=1e-5)


def test_a_region_equals_that_part_of_the_whole(cells, save_volume, tmp_path):
    volume = save_volume(cells[0])
    region = Region((3, 9, 0), (20, 31, 41))
    whole, _ = run_step(Smoothing(), volume, tmp_path / "whole.zarr", (8, 8, 8))
    part, _ = run_step(Smoothing(), volume, tmp_path / "part.zarr", (8, 8, 8), region=region)
    np.testing.assert_array_equal(part[region.slices], whole[region.slices])
    part[region.slices] = 0
    assert not part.any()


def test_resuming_computes_only_what_is_missing(cells, save_volume, tmp_path):
    volume = save_volume(cells[0])
    whole, receipts = run_step(Smoothing(), volume, tmp_path / "whole.zarr", (8, 8, 8))
    output = create_volume(tmp_path / "out.zarr", volume.shape, 1, np.float32, (20, 10, 10), (8, 8, 8), kind="image")
    blocks = split_into_blocks(volume.shape, (8, 8, 8), (5, 3, 4))
    outputs = [Output(output, np.asarray)]
    interrupted = map_blocks(Smoothing(), [volume], outputs, blocks, ledger=Ledger.open(tmp_path / "l", {}))
    first = [next(interrupted).index for _ in range(11)]
    interrupted.close()
    ledger = Ledger.open(tmp_path / "l", {})
    assert sorted(ledger.done) == first
    rest = list(map_blocks(Smoothing(), [volume], outputs, blocks, ledger=ledger))
    assert len(first) + len(rest) == len(receipts)
    np.testing.assert_array_equal(open_volume(tmp_path / "out.zarr").read((0, 0, 0), volume.shape)[0], whole)


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "threads", "processes"])
def test_a_failing_block_is_named_and_finished_ones_stay(save_volume, tmp_path, executor):
    image = np.arange(16**3, dtype=np.float32).reshape(16, 16, 16)
    volume = save_volume(image)
    output = create_volume(tmp_path / "out.zarr", volume.shape, 1, np.float32, (1, 1, 1), (8, 8, 8), kind="image")
    blocks = split_into_blocks(volume.shape, (8, 8, 8))
    ledger = Ledger.open(tmp_path / "ledger", {})
    step = FailingAt(corner=float(image[8, 8, 0]))
    with pytest.raises(BlockError, match=r"block 6 \(8:16,8:16,0:8\) failed: ArithmeticError: no such luck"):
        list(map_blocks(step, [volume], [Output(output, np.asarray)], blocks, executor, ledger))
    assert 6 not in ledger.done
    for index in ledger.done:
        core = blocks[index].core
        np.testing.assert_array_equal(output.read(core.start, core.stop)[0], image[core.slices])


def test_nan_is_reported_with_its_voxel(save_volume, tmp_path):
    image = np.ones((16, 16, 16), np.float32)
    image[9, 3, 12] = np.nan
    with pytest.raises(BlockError, match=r"NaN or infinity at voxel \(9, 3, 12\)"):
        run_step(FailingAt(corner=-1), save_volume(image), tmp_path / "out.zarr", (8, 8, 8))


def test_cores_that_split_a_chunk_are_refused(cells, save_volume, tmp_path):
    with pytest.raises(ValueError, match=r"must be a multiple of the chunks .*use \(16, 16, 16\)"):
        run_step(Smoothing(), save_volume(cells[0]), tmp_path / "o.zarr", (12, 12, 12), chunk_shape=(8, 8, 8))
