"""Train a network on sparse labels: the windows, the loss and the scores that the one training loop works with.

    hold a slab of the labels out → windows of the others → loop → best network → score it on the slab

Patch networks that are exact at every voxel are trained on slabs (:mod:`voxclf.training.windows`), others on patches,
segmenters on crops. Unlabelled voxels never count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from voxclf.config import Balance, FitOptions
from voxclf.geometry import Region
from voxclf.labels import LabelSet
from voxclf.metrics.cells import CellGrid, CellTables
from voxclf.metrics.voxelwise import score_block, score_tables
from voxclf.models.dense import DenseNetwork, densify
from voxclf.models.dense_simplify import NormedPool
from voxclf.models.network_inputs import NetworkInput
from voxclf.models.registry import NetworkInfo
from voxclf.models.subnormal_numbers import subnormals_as_zero
from voxclf.progress import Progress, last, silent
from voxclf.sampling import LabelSurvey
from voxclf.training.augment import build_augmentation
from voxclf.training.held_out import choose_held_out, count_along_axes
from voxclf.training.loop import Task, choose_accelerator, run_loop
from voxclf.training.losses import build_loss
from voxclf.training.pretrain import load_pretrained
from voxclf.training.scored_windows import ScoredWindow, list_scored_windows, scored_batches
from voxclf.training.volume_memory import remember
from voxclf.training.window_plan import WindowPlan, choose_windows, plan_windows
from voxclf.training.windows import LabelIndex, WindowBatch, WindowReader, WindowSampler, loss_weights
from voxclf.volume import Volume

IMAGE_MEMORY = 2**30
"""Bytes of image kept around the labels; more labels than fit are read again."""
LABEL_MEMORY = 2**27
DEFAULT_BALANCE: dict[str, Balance] = {"slabs": "equal", "patches": "sqrt", "crops": "sqrt"}
"""A slab shows a voxel's neighbours too, most of them of frequent classes, so it need not be drawn around those: drawn
equally, three times as many slabs hold a synapse of vnc. The weights of the loss make up for what is drawn."""
SCORED_BATCH = {"slabs": 2, "patches": 64, "crops": 2}
"""At least 2: convolutions of a single image take a slow path on CPUs."""
MONITORED_VOXELS = {"slabs": 60_000, "patches": 1_000, "crops": 200_000}
"""Held-out voxels scored after each round: a few per cent of a round's time."""
SCORED_VOXELS = {"slabs": 200_000, "patches": 10_000, "crops": 500_000}
"""Held-out voxels scored at the end, at most."""
SCORING_PART, LEAST_SCORING_S = 0.25, 60.0
"""Each of the two scorings at the end is over after this part of the training time, but not before a minute: a slow
network is scored on fewer voxels, drawn evenly."""
NAIVE_SCORED = 50_000
"""Training labels scored at the end, at most: their score only stands beside the honest one."""
COUNTED_STEPS = 50
"""Steps whose windows are counted to know the shares in which classes are drawn."""
SLAB_ROUND_STEPS = 500
"""Steps between two validations of training on slabs, which are quick."""
FINAL_PART = 2 / 3
"""Part of the training after which --final-patch is used: 20,000 of 30,000 steps in the MitoEM winner's."""


@dataclass(frozen=True)
class TrainedNetwork:
    """What training gives.

    Parameters
    ----------
    network : nn.Module
        With the weights of the best round, in eval mode, on the CPU.
    history : list of dict
        One entry per round: epoch, step, seconds, n_labelled_seen, learning_rate, train_loss, validation_loss,
        validation_macro_f1.
    validation, training : CellTables
        The best network on held-out labels, and on a sample of those that it was trained on.
    split : dict
        What was held out and the gap kept; ``note`` says it in words.
    seconds : float
        Training time, scoring at the end not included.
    n_labelled_seen : int
        Labelled voxels trained on, counted as often as they were.
    best_epoch : int
        Round whose weights these are.
    """

    network: nn.Module
    history: list[dict[str, float]]
    validation: CellTables
    training: CellTables
    split: dict[str, Any]
    seconds: float
    n_labelled_seen: int
    best_epoch: int


def train_network(
    network: nn.Module,
    info: NetworkInfo,
    inputs: NetworkInput,
    volume: Volume,
    labels: Volume,
    survey: LabelSurvey,
    label_set: LabelSet,
    options: FitOptions,
    folder: Path,
    n_threads: int,
    progress: Progress = silent,
) -> TrainedNetwork:
    """Train a network on the labelled voxels of a volume.

    Parameters
    ----------
    network : nn.Module
        From ``registry.build``; it is trained in place. Its ``patch`` is the patch, or a segmenter's crop.
    info : NetworkInfo
        Whether it classifies patches, exactly or not, or segments.
    inputs : NetworkInput
        Makes its channels of grey values.
    volume, labels : Volume
        Of one shape.
    survey : LabelSurvey
        Where the labels are.
    label_set : LabelSet
    options : FitOptions
    folder : Path
        For the state of an unfinished training, which is continued if one is there, and for logs.
    n_threads : int
        CPU threads.
    progress : Progress

    Raises
    ------
    ValueError
        If no labels can be held out, or the loss does not stay finite.
    FileNotFoundError, ModelError
        If ``--init`` names no weights, or weights of another network.

    Notes
    -----
    Memory: up to 1 GB of image around the labels, the listed labels of 64 boxes (128 MB at most), and the network's own
    for one step.
    """
    reader = WindowReader(remember(volume, IMAGE_MEMORY), remember(labels, LABEL_MEMORY), inputs, label_set)
    plans = plan_windows(network, info, options, volume)
    if options.init is not None:
        load_pretrained(network, Path(options.init))
    counted = count_along_axes(reader.labels, survey, label_set)
    counts = last(progress("split labels", counted, len(survey.boxes), "box"))
    held_out = choose_held_out(counts, plans[0].sight, label_set.names)
    training, validation = (
        LabelIndex(reader, part) for part in held_out.split(survey, reader.labels, options.unlabelled)
    )
    balance = options.balance or DEFAULT_BALANCE[plans[0].kind]
    augment = None if options.augment == "none" else build_augmentation(options.augment, volume.voxel_size_nm)
    samplers = [
        WindowSampler(training, held_out, plan.drawn, plan.batch, balance, options.seed, augment) for plan in plans
    ]
    plan, sampler = choose_windows(plans, samplers, progress)
    task = Classification(network, options, plan, sampler, validation)
    _compile(task, progress)
    state = run_loop(task, options, options.seed, folder, n_threads, progress, "train")
    network.eval()
    n_scored = SCORED_VOXELS[plan.scored_kind]
    n_naive = min(n_scored, NAIVE_SCORED)
    return TrainedNetwork(
        network=network.cpu(),
        history=state.history,
        validation=_score(task, validation, n_scored, state.seconds, n_threads, progress, "score held out"),
        training=_score(task, training, n_naive, state.seconds, n_threads, progress, "score trained on"),
        split=held_out.to_dict(),
        seconds=state.seconds,
        n_labelled_seen=state.n_seen,
        best_epoch=state.best_epoch,
    )


def _compile(task: Classification, progress: Progress) -> None:
    """Compile layers before the clock starts: on a machine's first training that takes some seconds."""
    dense = [e for e in task.evaluators["drawn"] if isinstance(e, DenseNetwork)]
    has_pools = any(isinstance(operation.target, NormedPool) for e in dense for operation in e.operations)
    if has_pools and choose_accelerator(task.options.device) == "cpu":
        from voxclf.models.normed_pool import compile_for

        dtype = torch.bfloat16 if task.options.precision == "bf16" else torch.float32
        last(progress("compile", map(compile_for, [dtype]), 1, "layer"))


class Classification(Task):
    """Classes of voxels, from windows.

    Parameters
    ----------
    network : nn.Module
    options : FitOptions
    plan_of_windows : WindowPlan
    sampler : WindowSampler
        Of training windows.
    held_out : LabelIndex
        What it is judged on.
    """

    def __init__(
        self,
        network: nn.Module,
        options: FitOptions,
        plan_of_windows: WindowPlan,
        sampler: WindowSampler,
        held_out: LabelIndex,
    ) -> None:
        super().__init__(network, options)
        self.windows = plan_of_windows
        if plan_of_windows.kind == "slabs":
            self.most_steps = SLAB_ROUND_STEPS
        self.sampler = sampler
        self.is_final = False
        self.final_sampler = replace(sampler, forms=plan_of_windows.final) if plan_of_windows.final else sampler
        self.held_out = held_out
        self.n_classes = held_out.reader.label_set.n_classes
        drawn = np.sum([counts.sum(axis=0) for counts, _ in sampler.count_labels(COUNTED_STEPS)], axis=0)
        weights = loss_weights(sampler.index.totals, options.class_weights, drawn)
        parameters = {"gamma": options.gamma} if options.loss == "focal" else {}
        self.loss = build_loss(options.loss, self.n_classes, torch.from_numpy(weights), **parameters)
        # In plain dictionaries, so that the parameters these share with the network are not registered again.
        self.evaluators = {"drawn": self._evaluators("drawn"), "scored": self._evaluators("scored")}
        monitored = MONITORED_VOXELS[self.windows.scored_kind]
        self.monitored = list_scored_windows(held_out, self.windows.scored, monitored, options.seed)
        self.tally = Tally(self.n_classes, bounding_box(held_out.survey))
        self.judged_loss = self.n_judged = 0.0

    def _evaluators(self, which: str) -> list[nn.Module]:
        forms = self.windows.drawn if which == "drawn" else self.windows.scored
        return [
            self.network
            if form.normal is None
            else densify(self.network, self.network.patch, dense_axes=form.dense_axes, spacing=form.spacing)
            for form in forms
        ]

    def logits(self, batch: WindowBatch, which: str = "drawn") -> Any:
        """Logits of a batch's targets, (B, K, z, y, x); with a boundary output beside it for two-headed networks."""
        images = torch.as_tensor(batch.images).contiguous(memory_format=torch.channels_last_3d)
        result = self.evaluators[which][batch.form](images)
        if isinstance(result, tuple):
            return result
        if result.ndim == 2:
            return result[:, :, None, None, None]
        if result.shape[2:] == batch.targets.shape[1:]:
            return result
        form = (self.windows.drawn if which == "drawn" else self.windows.scored)[batch.form]
        z, y, x = (slice(b, b + t) for b, t in zip(form.before, form.target, strict=True))
        return result[:, :, z, y, x]

    def begin_round(self, part_done: float) -> None:
        """Go over to the final windows when it is time."""
        self.is_final = part_done >= FINAL_PART

    def draw(self, step: int) -> WindowBatch:
        """The windows of one step."""
        return (self.final_sampler if self.is_final else self.sampler).draw(step)

    def n_labelled(self, batch: WindowBatch) -> int:
        """Labelled voxels."""
        return int((batch.targets >= 0).sum())

    def loss_of(self, batch: WindowBatch) -> Tensor:
        """The loss over labelled voxels."""
        return self.loss(self.logits(batch), batch.targets)

    def validation_batches(self) -> Iterator[WindowBatch]:
        """Windows of held-out labels."""
        kind = self.windows.scored_kind
        return scored_batches(self.held_out, self.windows.scored, self.monitored, SCORED_BATCH[kind])

    def judge(self, batch: WindowBatch) -> None:
        """Score one batch of held-out windows."""
        logits = self.logits(batch, "scored")
        n = self.n_labelled(batch)
        self.judged_loss += n * float(self.loss(logits, batch.targets))
        self.n_judged += n
        self.tally.add(logits, batch)

    def verdict(self) -> dict[str, float]:
        """Loss and macro F1 on the held-out windows."""
        loss = self.judged_loss / max(1, self.n_judged)
        macro_f1 = score_tables(self.tally.cells.total(self.n_classes)).macro_f1
        self.tally = Tally(self.n_classes, self.tally.region)
        self.judged_loss = self.n_judged = 0.0
        score = -loss if self.options.monitor == "loss" else macro_f1
        return {"validation_loss": loss, "validation_macro_f1": macro_f1, "score": score}


class Tally:
    """Adds up score tables of windows, by cells of the labels' bounding box."""

    def __init__(self, n_classes: int, region: Region) -> None:
        self.region = region
        self.cells = CellTables()
        self._grid = CellGrid.over(region)
        self._n_classes = n_classes

    def add(self, logits: Tensor, batch: WindowBatch) -> None:
        """Count the labelled voxels of a batch."""
        targets = torch.as_tensor(batch.targets).cpu().numpy()
        window, z, y, x = np.nonzero(targets >= 0)
        if not len(window):
            return
        probabilities = torch.softmax(logits.float(), 1).cpu().numpy()[window, :, z, y, x].T  # (K, N)
        classes = targets[window, z, y, x]
        positions = torch.as_tensor(batch.starts).cpu().numpy()[window] + np.stack([z, y, x], axis=1)
        cell_of = self._grid.number(positions)
        for cell in np.unique(cell_of):
            chosen = cell_of == cell
            tables = score_block(classes[chosen], np.ascontiguousarray(probabilities[:, chosen]), None, self._n_classes)
            self.cells += CellTables({int(cell): tables})


def bounding_box(survey: LabelSurvey) -> Region:
    """The box around all boxes of a survey."""
    starts = np.array([box.region.start for box in survey.boxes])
    stops = np.array([box.region.stop for box in survey.boxes])
    return Region(tuple(starts.min(axis=0).tolist()), tuple(stops.max(axis=0).tolist()))


@dataclass(frozen=True)
class _Scored:
    """A batch that has been scored, as progress counts it."""

    n_voxels: int


@subnormals_as_zero()
def _score(
    task: Classification,
    index: LabelIndex,
    limit: int,
    trained_s: float,
    n_threads: int,
    progress: Progress,
    stage: str,
) -> CellTables:
    """Score the best network on labels, on the device that trained it and in float32."""
    windows = list_scored_windows(index, task.windows.scored, limit, task.sampler.seed)
    tally = Tally(task.n_classes, bounding_box(index.survey))
    deadline = time.perf_counter() + max(LEAST_SCORING_S, SCORING_PART * trained_s)
    scored = _score_windows(task, index, windows, tally, deadline, n_threads)
    for _ in progress(stage, scored, sum(w.n_labelled for w in windows), "voxel"):
        continue
    return tally.cells


def _score_windows(
    task: Classification,
    index: LabelIndex,
    windows: Sequence[ScoredWindow],
    tally: Tally,
    deadline: float,
    n_threads: int,
) -> Iterator[_Scored]:
    device = torch.device(choose_accelerator(task.options.device))
    before = torch.get_num_threads()
    task.network.to(device)
    torch.set_num_threads(n_threads)
    try:
        for batch in scored_batches(index, task.windows.scored, windows, SCORED_BATCH[task.windows.scored_kind]):
            with torch.inference_mode():
                logits = task.logits(batch._replace(images=torch.from_numpy(batch.images).to(device)), "scored")
            tally.add(logits, batch)
            yield _Scored(batch.n_labelled)
            if time.perf_counter() > deadline:
                return
    finally:
        torch.set_num_threads(before)
        task.network.cpu()
