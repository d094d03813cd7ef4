"""The one training loop of voxclf, on Lightning: patch networks, segmenters and pretraining go through it.

A :class:`Task` says what a step's loss is and how good the network is by now; everything else is here: epochs, step
size, precision, time budget, early stopping, the best network, logs, resumption, progress.

    draw(step) → loss → optimiser step   × steps of a round
    validate → history, best network, state on disk, patience        after each round

A round ("epoch") is a number of steps, not a walk over all labels: windows are drawn without end. Step ``i`` draws the
same windows in every run, so a training that was killed goes on from its last round as if nothing had been.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import signal
import threading
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxclf.config import NetworkFitOptions
from voxclf.freed_memory import keep_freed_memory
from voxclf.models.devices import check_gpu, sees, warn_of_slow_precision
from voxclf.models.memory_layout import use_channels_last
from voxclf.models.subnormal_numbers import subnormals_as_zero
from voxclf.models.torchvision_import import prepare_torchvision
from voxclf.progress import Progress
from voxclf.training.cpu_bfloat16 import SafeConvolutionGradients
from voxclf.training.step_batches import ReadBatches, StepBatches
from voxclf.training.step_progress import StepProgress
from voxclf.training.training_plan import ROUND_STEPS, Plan, step_size_factor
from voxclf.training.training_state import TrainingState, load_state

prepare_torchvision()  # Lightning imports it where it is installed, and a build for GPUs fails without them

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402


class Task(pl.LightningModule):
    """What is trained and how it is judged.

    Parameters
    ----------
    network : nn.Module
        Its parameters are trained.
    options : NetworkFitOptions

    Attributes
    ----------
    unit : str
        What :meth:`n_labelled` counts, for the display of progress.
    most_steps : int
        Of a round, where no time is given: a minute or so on two cores.
    """

    unit = "voxel"
    most_steps = ROUND_STEPS

    def __init__(self, network: nn.Module, options: NetworkFitOptions) -> None:
        super().__init__()
        self.network = network
        self.options = options
        self.round_loss = torch.zeros(())
        self.round_steps = 0
        self.plan: Plan | None = None

    @abstractmethod
    def draw(self, step: int) -> Any:
        """The batch of one step, a named tuple of arrays and numbers; called by threads that read ahead."""

    def begin_round(self, part_done: float) -> None:
        """Prepare for a round that begins when a part (0 to 1) of the training is over; the same in a resumed run."""

    @abstractmethod
    def n_labelled(self, batch: Any) -> int:
        """What a batch counts towards the rate: labelled voxels."""

    @abstractmethod
    def loss_of(self, batch: Any) -> Tensor:
        """The loss to be minimised."""

    @abstractmethod
    def validation_batches(self) -> Iterable[Any]:
        """What the network is judged on after each round."""

    @abstractmethod
    def judge(self, batch: Any) -> None:
        """Take in one validation batch; without gradients, in eval mode."""

    @abstractmethod
    def verdict(self) -> dict[str, float]:
        """Scores over the validation batches taken in, and forget those; "score" is the one to be made large."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        """One step of Lightning's loop."""
        loss = self.loss_of(batch)
        self.round_loss = self.round_loss.to(loss.device) + loss.detach()
        self.round_steps += 1
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        """One validation batch of Lightning's loop."""
        self.judge(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients; some in bfloat16 on a CPU would be wrong."""
        is_doubtful = self.options.precision == "bf16" and loss.device.type == "cpu"
        with SafeConvolutionGradients() if is_doubtful else contextlib.nullcontext():
            loss.backward(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that the options name."""
        return make_optimizer(self.network, self.options)

    def train_dataloader(self) -> Iterable[Any]:
        """Batches of the next round; several GPUs take turns."""
        assert self.plan is not None
        self.begin_round(self.plan.part_done(self.plan.state.seconds))
        world, rank = self.trainer.world_size, self.trainer.global_rank
        steps = range(self.plan.state.step * world + rank, self.plan.end_of_round * world, world)
        return StepBatches(self.draw, steps, self.plan.n_reading)

    def val_dataloader(self) -> Iterable[Any]:
        """Validation batches, as tensors."""
        return ReadBatches(self.validation_batches)


def make_optimizer(network: nn.Module, options: NetworkFitOptions) -> torch.optim.Optimizer:
    """Make the optimiser for a network's trainable parameters."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    if options.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, rate, weight_decay=decay)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    # One pass over the parameters in place of ten: without, it takes half of a step of a 2D UNet.
    return kinds[options.optimizer](parameters, lr=rate, weight_decay=decay, fused=True)


class _Book(pl.Callback):
    """Keeps the books of a training: step size, time, history, best network, state on disk, progress."""

    def __init__(self, plan: Plan, folder: Path, steps_shown: StepProgress) -> None:
        self.plan = plan
        self.folder = folder
        self.shown = steps_shown
        self.started = time.perf_counter() - plan.state.seconds
        self.round_began = self.validation_began = self.train_loss = 0.0
        self.was_interrupted = False

    @property
    def seconds(self) -> float:
        """Training time, with that before interruptions."""
        return time.perf_counter() - self.started

    def on_fit_start(self, trainer: pl.Trainer, task: Any) -> None:
        """Go on where an earlier run was."""
        resumed = load_state(self.folder, task.network, trainer.optimizers[0])
        assert resumed is None or resumed.step == self.plan.state.step

    def on_train_epoch_start(self, trainer: pl.Trainer, task: Any) -> None:
        """Start the clock of the round; dropout and the like draw the same numbers in a resumed run."""
        torch.manual_seed(self.plan.seed + 7919 * self.plan.state.epoch + 104729 * trainer.global_rank)
        self.round_began = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        """Set the step size."""
        options = self.plan.options
        factor = step_size_factor(options.chosen_schedule, self.plan.part_done(self.seconds))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = options.learning_rate * factor

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, and end the round where the time is up."""
        state = self.plan.state
        state.step += 1
        n = task.n_labelled(batch) * trainer.world_size
        state.n_seen += n
        self.shown.push(n, self.seconds)
        limit = self.plan.options.time
        # Validation after the last round is part of the budget.
        is_over = limit is not None and self.seconds + self.plan.validation_s >= limit
        if trainer.strategy.reduce_boolean_decision(is_over, all=False):
            trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, task: Any) -> None:
        """Start the clock of the validation, unless there is nothing left to validate."""
        self.validation_began = time.perf_counter()
        self.plan.step_s = (self.validation_began - self.round_began) / max(1, task.round_steps)
        self.train_loss = float(task.round_loss) / max(1, task.round_steps)
        if not math.isfinite(self.train_loss):
            raise ValueError(
                f"training loss became {self.train_loss} in round {self.plan.state.epoch + 1} with --learning-rate "
                f"{self.plan.options.learning_rate}; it must stay finite: use a smaller one, or --precision 32"
            )
        task.round_loss, task.round_steps = torch.zeros(()), 0

    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        """Write the round down; keep the network if it is the best; stop where patience ends."""
        self.plan.validation_s = time.perf_counter() - self.validation_began
        state = self.plan.state
        scores = task.verdict()
        state.epoch += 1
        state.seconds = self.seconds
        is_calm = self.plan.is_calm
        # The first calm round takes the place of whatever was best before.
        if scores["score"] > state.best_score or not state.best or is_calm > state.best_is_calm:
            state.best_score, state.best_epoch, state.best_is_calm = scores["score"], state.epoch, is_calm
            state.keep_best(task.network)
        entry = {
            "epoch": state.epoch,
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "n_labelled_seen": state.n_seen,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": self.train_loss,
            **{name: value for name, value in scores.items() if name != "score"},
        }
        state.history.append(entry)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in entry.items() if k != "epoch"}, step=state.epoch)
            logger.save()
        if trainer.strategy.reduce_boolean_decision(self.plan.is_tired, all=False):
            trainer.should_stop = True
        if trainer.is_global_zero:
            state.save(self.folder, task.network, trainer.optimizers[0])

    def on_exception(self, trainer: pl.Trainer, task: Any, exception: BaseException) -> None:
        """Note an interruption by the user, which Lightning turns into the end of the program."""
        self.was_interrupted = isinstance(exception, KeyboardInterrupt)


@subnormals_as_zero()
def run_loop(
    task: Task, options: NetworkFitOptions, seed: int, folder: Path, n_threads: int, progress: Progress, stage: str
) -> TrainingState:
    """Train until steps, time or patience are used up; the task's network is the best one afterwards.

    Parameters
    ----------
    task : Task
    options : NetworkFitOptions
    seed : int
        Of dropout; what is drawn is the task's own.
    folder : Path
        For state and logs. If it holds the state of an interrupted run of this job, that is continued.
    n_threads : int
        CPU threads.
    progress : Progress
        Told of labelled voxels.
    stage : str
        What progress calls this.

    Raises
    ------
    ValueError
        If the loss does not stay finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = choose_accelerator(options.device)
    warn_of_slow_precision(options.precision, accelerator)
    # On a CPU the cores are the network's; a GPU waits for windows unless several threads read them.
    n_reading = 0 if accelerator == "cpu" else max(1, min(8, n_threads))
    state = load_state(folder, task.network, None) or TrainingState()
    task.plan = plan = Plan(options, seed, state, n_reading, task.most_steps)
    use_channels_last(task.network)
    if accelerator == "cpu":
        keep_freed_memory()
    shown = StepProgress(progress, stage, task.unit, plan)
    book = _Book(plan, folder, shown)
    is_late = options.time is not None and state.seconds >= options.time
    if plan.n_rounds_left and not plan.is_tired and not is_late:
        with _quiet_lightning(), torch.random.fork_rng(devices=[]), _threads(n_threads):
            trainer = pl.Trainer(
                accelerator=accelerator,
                devices=options.devices if accelerator == "cuda" else 1,
                strategy=options.strategy,
                precision="bf16-mixed" if options.precision == "bf16" else "32-true",
                max_epochs=plan.n_rounds_left,
                logger=make_loggers(folder, state.epoch),
                callbacks=[book],
                reload_dataloaders_every_n_epochs=1,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            try:
                _fit(trainer, task, book)
                shown.finish()
            finally:
                shown.close()
    task.network.load_state_dict(state.best)
    return state


def _fit(trainer: pl.Trainer, task: Task, book: _Book) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task)
    except SystemExit:
        if not book.was_interrupted:
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def choose_accelerator(device: str) -> str:
    """Name Lightning's accelerator for ``--device``.

    Raises
    ------
    ValueError
        If a GPU is asked for that is not there.
    """
    if device == "cuda":
        check_gpu("cuda")
    if device == "auto":
        return "cuda" if sees("cuda") else "cpu"
    return device


def make_loggers(folder: Path, epoch: int) -> list[Logger]:
    """CSV always, TensorBoard where it is installed; a resumed run writes beside what was there."""
    version = f"from_round_{epoch + 1}"
    loggers: list[Logger] = [CSVLogger(folder, name="logs", version=version)]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=version))
    return loggers


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks about devices, workers and files: a user of voxclf can act on none of them."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            warnings.filterwarnings("ignore", module="torch.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
