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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxclf.config import NetworkFitOptions
from voxclf.models.torchvision_import import prepare_torchvision
from voxclf.progress import Progress
from voxclf.training.training_state import TrainingState, load_state

prepare_torchvision()  # Lightning imports it where it is installed, and a build for GPUs fails without them

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402

ROUND_STEPS = 100
"""Most steps between two validations."""
LEAST_ROUNDS = 10
"""Rounds that a limited number of steps is divided into, so that there is a best one to choose."""
SETTLING_S = 2.0
"""Seconds of training from which its rate is known well enough to say how long the rest takes."""
WARM_UP = 0.3
"""Part of a one-cycle schedule in which the step size rises (Smith and Topin 2018, arXiv 1708.07120)."""
FIRST_FACTOR = 0.04


class Task(pl.LightningModule):
    """What is trained and how it is judged.

    Parameters
    ----------
    network : nn.Module
        Its parameters are trained.
    options : NetworkFitOptions
    """

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that the options name."""
        return make_optimizer(self.network, self.options)

    def train_dataloader(self) -> Iterable[Any]:
        """Batches of the next round; several GPUs take turns."""
        assert self.plan is not None
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
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
    return kinds[options.optimizer](parameters, lr=rate, weight_decay=decay)


def step_size_factor(schedule: str, done: float) -> float:
    """What the learning rate is multiplied by when a part ``done`` (0 to 1) of the training is over."""
    if schedule == "constant":
        return 1.0
    if schedule == "one_cycle":
        if done < WARM_UP:
            rise = 0.5 * (1 - math.cos(math.pi * done / WARM_UP))
            return FIRST_FACTOR + (1 - FIRST_FACTOR) * rise
        done = (done - WARM_UP) / (1 - WARM_UP)
    # Not quite to zero, so that the last steps still count.
    return max(1e-3, 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass
class Plan:
    """How far the training is to go, and how far it is."""

    options: NetworkFitOptions
    seed: int
    state: TrainingState
    n_reading: int

    @property
    def round_steps(self) -> int:
        """Steps of a round."""
        if self.options.steps is None:
            return ROUND_STEPS
        return min(ROUND_STEPS, max(1, self.options.steps // LEAST_ROUNDS))

    @property
    def last_step(self) -> int:
        """Steps after which training ends in any case."""
        most = self.options.epochs * self.round_steps
        return most if self.options.steps is None else min(most, self.options.steps)

    @property
    def end_of_round(self) -> int:
        """Step at which the round begun now ends."""
        return min(self.state.step + self.round_steps, self.last_step)

    @property
    def n_rounds_left(self) -> int:
        """Rounds still to do."""
        return -(-(self.last_step - self.state.step) // self.round_steps)

    def part_done(self, seconds: float) -> float:
        """Part of the training that is over, by steps or by time, whichever is further."""
        by_time = 0.0 if self.options.time is None else seconds / self.options.time
        return min(1.0, max(by_time, self.state.step / max(1, self.last_step)))


class _Book(pl.Callback):
    """Keeps the books of a training: step size, time, history, best network, state on disk, progress."""

    def __init__(self, plan: Plan, folder: Path, steps_shown: _Shown) -> None:
        self.plan = plan
        self.folder = folder
        self.shown = steps_shown
        self.started = time.perf_counter() - plan.state.seconds
        self.validation_s = self.train_loss = 0.0
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
        """Dropout and the like draw the same numbers in a resumed run."""
        torch.manual_seed(self.plan.seed + 7919 * self.plan.state.epoch + 104729 * trainer.global_rank)

    def on_train_batch_start(self, trainer: pl.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        """Set the step size."""
        options = self.plan.options
        factor = step_size_factor(options.schedule, self.plan.part_done(self.seconds))
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
        is_over = limit is not None and self.seconds + self.validation_s >= limit
        if trainer.strategy.reduce_boolean_decision(is_over, all=False):
            trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, task: Any) -> None:
        """Start the clock of the validation, unless there is nothing left to validate."""
        self.validation_s = -time.perf_counter()
        self.train_loss = float(task.round_loss) / max(1, task.round_steps)
        if not math.isfinite(self.train_loss):
            raise ValueError(
                f"training loss became {self.train_loss} in round {self.plan.state.epoch + 1} with --learning-rate "
                f"{self.plan.options.learning_rate}; it must stay finite: use a smaller one, or --precision 32"
            )
        task.round_loss, task.round_steps = torch.zeros(()), 0

    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        """Write the round down; keep the network if it is the best; stop where patience ends."""
        self.validation_s += time.perf_counter()
        state, options = self.plan.state, self.plan.options
        scores = task.verdict()
        state.epoch += 1
        state.seconds = self.seconds
        if scores["score"] > state.best_score or not state.best:
            state.best_score, state.best_epoch = scores["score"], state.epoch
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
        is_tired = state.epoch - state.best_epoch >= options.patience
        if trainer.strategy.reduce_boolean_decision(is_tired, all=False):
            trainer.should_stop = True
        if trainer.is_global_zero:
            state.save(self.folder, task.network, trainer.optimizers[0])

    def on_exception(self, trainer: pl.Trainer, task: Any, exception: BaseException) -> None:
        """Note an interruption by the user, which Lightning turns into the end of the program."""
        self.was_interrupted = isinstance(exception, KeyboardInterrupt)


@dataclass(frozen=True)
class _Counted:
    """One step, as progress counts it."""

    n_voxels: int


class _Shown:
    """Hands steps to a :class:`Progress`, which draws items from an iterator, as they happen in Lightning's loop.

    How many labelled voxels there will be is known after a few steps only, where the limit is time; steps until then
    are handed on together.
    """

    def __init__(self, progress: Progress, stage: str, plan: Plan) -> None:
        self._progress, self._stage, self._plan = progress, stage, plan
        self._first_s: float | None = None
        self._waiting = self._n_pushed = self._n_steps = 0
        self._shown: Iterator[_Counted] | None = None
        self._is_over = False

    def push(self, n_labelled: int, seconds: float) -> None:
        """Count one step."""
        self._waiting += n_labelled
        self._n_pushed += n_labelled
        self._n_steps += 1
        if self._first_s is None:
            # The first step includes compilation and allocation, so the clock starts after it.
            self._first_s, self._n_pushed = seconds, 0
            return
        if self._shown is None:
            if seconds - self._first_s < SETTLING_S:
                return
            self._shown = iter(self._progress(self._stage, self._steps(), self._expect(seconds), "voxel"))
        next(self._shown)

    def close(self) -> None:
        """Nothing follows."""
        self._is_over = True
        if self._shown is not None:
            for _ in self._shown:
                continue

    def _expect(self, seconds: float) -> float:
        assert self._first_s is not None
        plan = self._plan
        per_step = self._n_pushed / max(1, self._n_steps - 1)
        total = self._waiting + per_step * (plan.last_step - plan.state.step)
        if plan.options.time is not None:
            rate = self._n_pushed / (seconds - self._first_s)
            total = min(total, self._waiting + rate * (plan.options.time - seconds))
        return max(total, 1.0)

    def _steps(self) -> Iterator[_Counted]:
        while not self._is_over:
            waiting, self._waiting = self._waiting, 0
            yield _Counted(waiting)


class StepBatches:
    """The batches of some steps, as tensors; threads may draw them ahead."""

    def __init__(self, draw: Callable[[int], Any], steps: range, n_threads: int) -> None:
        self._draw, self._steps, self._n_threads = draw, steps, n_threads

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Any]:
        if self._n_threads == 0:
            yield from (as_tensors(self._draw(step)) for step in self._steps)
            return
        with ThreadPoolExecutor(self._n_threads) as pool:
            ahead: deque[Future[Any]] = deque()
            for step in self._steps:
                ahead.append(pool.submit(self._draw, step))
                if len(ahead) > 2 * self._n_threads:
                    yield as_tensors(ahead.popleft().result())
            while ahead:
                yield as_tensors(ahead.popleft().result())


class ReadBatches:
    """Batches that are read anew at each walk."""

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        return (as_tensors(batch) for batch in self._read())


def as_tensors(batch: Any) -> Any:
    """The arrays of a named tuple as tensors."""
    return type(batch)(*(torch.as_tensor(v) if hasattr(v, "__array__") else v for v in batch))


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
    # On a CPU the cores are the network's; a GPU waits for windows unless several threads read them.
    n_reading = 0 if accelerator == "cpu" else max(1, min(8, n_threads))
    state = load_state(folder, task.network, None) or TrainingState()
    task.plan = plan = Plan(options, seed, state, n_reading)
    use_channels_last(task.network)
    shown = _Shown(progress, stage, plan)
    book = _Book(plan, folder, shown)
    is_tired = state.epoch - state.best_epoch >= options.patience
    is_late = options.time is not None and state.seconds >= options.time
    if plan.n_rounds_left and not is_tired and not is_late:
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
            _fit(trainer, task, book)
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


def use_channels_last(network: nn.Module) -> None:
    """Lay out 3D kernels with channels last: 15 to 30 % faster on CPUs, and max pools 20 times."""
    for parameter in network.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)


def choose_accelerator(device: str) -> str:
    """Name Lightning's accelerator for ``--device``.

    Raises
    ------
    ValueError
        If a GPU is asked for that is not there.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError(
            "--device was cuda, but torch finds no such GPU on this machine; use --device cpu or auto, or install the "
            "GPU's driver and a torch that was built for it"
        )
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
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
