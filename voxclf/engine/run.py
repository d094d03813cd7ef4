"""The engine's two verbs: ``map_blocks`` writes volumes, ``reduce_blocks`` sums small results.

Both walk the same grid with the same executors. Workers open volumes by path, do one block, and hand back a
small receipt; the engine yields receipts and never prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from voxclf.engine.executors import Executor, SerialExecutor
from voxclf.engine.ledger import Ledger
from voxclf.engine.step import EdgeAwareStep, Step
from voxclf.engine.transfer import check_write_grid, crop_to_core, find_nonfinite, read_block, read_inside, write_core
from voxclf.errors import BlockError
from voxclf.geometry import Block, BlockGrid, SelectedBlocks, Zyx
from voxclf.progress import last
from voxclf.volume import Volume

Total = TypeVar("Total")
Encode = Callable[[np.ndarray], np.ndarray]
Check = Callable[[Block, np.ndarray], None]
"""Sees every block with its result, before that is written; raises where something is wrong with it."""


@dataclass(frozen=True)
class Receipt:
    """What is left of a finished block: where it was, how long it took, what was written."""

    index: int
    n_voxels: int
    seconds: float
    digest: str


@dataclass(frozen=True)
class Output:
    """A volume to write, and how a step's result is stored in it (quantised, argmax, as it is)."""

    volume: Volume
    encode: Encode


@dataclass(frozen=True)
class _MapTask:
    """Read, compute, write one block; picklable, so it is the same in a thread and in another process."""

    step: Step
    inputs: tuple[Volume, ...]
    outputs: tuple[Output, ...]
    check: Check | None = None

    def __call__(self, block: Block) -> Receipt:
        started = time.perf_counter()
        try:
            step, read = self.step, read_block
            if isinstance(step, EdgeAwareStep):
                step, read = step.at_edge(block.outside(self.inputs[0].shape)), read_inside
            result = crop_to_core(step(*_read_inputs(self.inputs, block, read)), block)
            if self.check is not None:
                self.check(block, result)
            digests = [write_core(out.volume, block, out.encode(result)) for out in self.outputs]
        except Exception as error:
            raise BlockError(_describe_failure(block, error)) from error
        return Receipt(block.index, block.core.n_voxels, time.perf_counter() - started, "+".join(digests))


def map_blocks(
    step: Step,
    inputs: Sequence[Volume],
    outputs: Sequence[Output],
    blocks: BlockGrid | SelectedBlocks,
    executor: Executor | None = None,
    ledger: Ledger | None = None,
    check: Check | None = None,
) -> Iterator[Receipt]:
    """Run a step over every block and write the results; yields a receipt per block as it finishes.

    Blocks that the ledger holds are not computed again. Nothing runs until the iterator is consumed. A block that
    ``check`` refuses is not written.

    Raises
    ------
    ValueError
        If two blocks would write into one chunk of an output (checked at once).
    BlockError
        If a block failed; the message names it. Blocks finished before it stay written and recorded.
    """
    for output in outputs:
        check_write_grid(blocks.core_shape, output.volume)
    task = _MapTask(step, tuple(inputs), tuple(outputs), check)
    return _run_recorded(task, blocks, executor or SerialExecutor(), ledger)


def _run_recorded(
    task: _MapTask, blocks: Sequence[Block], executor: Executor, ledger: Ledger | None
) -> Iterator[Receipt]:
    done = ledger.done if ledger else {}
    todo = (block for block in blocks if block.index not in done)
    for receipt in executor.run(task, todo):
        if ledger:
            ledger.mark_done(receipt.index, receipt.digest)
        yield receipt


@dataclass(frozen=True)
class _ReduceTask(Generic[Total]):
    fold: Callable[..., Total]
    inputs: tuple[Volume, ...]

    def __call__(self, item: tuple[int, Block]) -> tuple[int, int, Total]:
        position, block = item
        try:
            return position, block.core.n_voxels, self.fold(block, *_read_inputs(self.inputs, block))
        except Exception as error:
            raise BlockError(_describe_failure(block, error)) from error


@dataclass(frozen=True)
class Partial(Generic[Total]):
    """The sum over the blocks finished so far; the last one of ``fold_blocks`` is the result."""

    n_voxels: int
    total: Total


def fold_blocks(
    fold: Callable[..., Total],
    inputs: Sequence[Volume],
    blocks: Iterable[Block],
    executor: Executor | None = None,
) -> Iterator[Partial[Total]]:
    """Call ``fold(block, *arrays)`` on every block and yield the running sum of the results.

    Results are added in the order of the blocks whatever order they finish in, so sums of floats are the same
    on every executor. What a fold returns needs ``+``.
    """
    task = _ReduceTask(fold, tuple(inputs))
    waiting: dict[int, tuple[int, Total]] = {}
    total: Any = None
    n_added = 0
    for position, n_voxels, value in (executor or SerialExecutor()).run(task, enumerate(blocks)):
        waiting[position] = (n_voxels, value)
        while n_added in waiting:
            voxels, ready = waiting.pop(n_added)
            total = ready if n_added == 0 else total + ready
            n_added += 1
            yield Partial(voxels, total)


def reduce_blocks(
    fold: Callable[..., Total],
    inputs: Sequence[Volume],
    blocks: Iterable[Block],
    executor: Executor | None = None,
) -> Total:
    """Sum ``fold(block, *arrays)`` over the blocks; see :func:`fold_blocks` for one with progress.

    Raises
    ------
    ValueError
        If there is no block.
    """
    return last(fold_blocks(fold, inputs, blocks, executor)).total


def _read_inputs(
    inputs: tuple[Volume, ...], block: Block, read: Callable[[Volume, Block], np.ndarray] = read_block
) -> list[np.ndarray]:
    arrays = [read(volume, block) for volume in inputs]
    for volume, array in zip(inputs, arrays, strict=True):
        z, y, x = (max(0, a) for a in block.read.start) if read is read_inside else block.read.start
        bad = find_nonfinite(array, (z, y, x))
        if bad is not None:
            raise ValueError(
                f"{volume.path} holds NaN or infinity at voxel {bad} (z, y, x); replace such voxels "
                "(for example by the median of their neighbours) and run again"
            )
    return arrays


def _describe_failure(block: Block, error: Exception) -> str:
    return f"block {block.index} ({block.core}) failed: {type(error).__name__}: {error}"


def choose_chunk_shape(step: Step, largest: Zyx, memory_bytes: int, n_workers: int) -> Zyx:
    """Choose the chunk of an output so that a block of one chunk fits the budget on every worker at once.

    Starts from ``largest`` and halves the side along which the halo costs least, down to 8 voxels; whether that
    fits is for :func:`choose_core_shape` to say.
    """
    chunk = list(largest)
    while step.working_bytes((chunk[0], chunk[1], chunk[2])) > memory_bytes // n_workers:
        divisible = [axis for axis in range(3) if chunk[axis] >= 2 * LEAST_CHUNK]
        if not divisible:
            break
        axis = min(divisible, key=lambda a: (step.halo[a], -chunk[a]))
        chunk[axis] //= 2
    return chunk[0], chunk[1], chunk[2]


def choose_core_shape(
    step: Step,
    write_shape: Zyx,
    region_shape: Zyx,
    memory_bytes: int,
    n_workers: int,
) -> Zyx:
    """Choose the largest block core whose working memory fits the budget on every worker at once.

    Larger cores waste less on halos. The core grows by whole chunks, always along the axis where the halo
    costs most, and never beyond the region.

    Raises
    ------
    ValueError
        If even one chunk per worker is over the budget; the message says what would be enough.
    """
    share = memory_bytes // n_workers
    core = list(write_shape)
    if step.working_bytes(write_shape) > share:
        need = step.working_bytes(write_shape) * n_workers
        raise ValueError(
            f"the memory budget leaves {max(0, memory_bytes) / 1e9:.2f} GB for blocks, too little: {n_workers} workers "
            "with the smallest block "
            f"{tuple(write_shape)} need {need / 1e9:.2f} GB; raise --memory, lower --workers or use smaller chunks"
        )
    growable = {0, 1, 2}
    while growable:
        n_blocks = math.prod(-(-n // c) for n, c in zip(region_shape, core, strict=True))
        if n_blocks <= BLOCKS_PER_WORKER * n_workers:
            break
        overhead = {axis: 2 * step.halo[axis] / core[axis] for axis in growable}
        # Without a halo to save, grow the shortest axis: fewer, rounder blocks.
        axis = max(growable, key=lambda a: (overhead[a], -core[a]))
        larger = list(core)
        larger[axis] += write_shape[axis]
        z, y, x = larger
        too_long = core[axis] >= region_shape[axis] or larger[axis] > MAX_CORE
        if too_long or step.working_bytes((z, y, x)) > share:
            growable.remove(axis)
        else:
            core = larger
    return (core[0], core[1], core[2])


LEAST_CHUNK = 8
"""Shortest side a chunk is cut to, voxels: smaller ones cost more files and halos than memory is worth."""

BLOCKS_PER_WORKER = 4
"""Fewest blocks a worker gets, where the region allows: with fewer, workers would wait for the last one."""

MAX_CORE = 512
"""Longest core side, voxels: beyond it halos cost little and a killed run would lose more work."""
