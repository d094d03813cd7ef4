"""How far a training is to go: rounds, steps, time, and the step size on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from voxclf.config import NetworkFitOptions
from voxclf.training.training_state import TrainingState

ROUND_STEPS = 100
"""Most steps between two validations, if no time is given and the task does not say otherwise."""
LEAST_ROUNDS = 10
"""Rounds that a limited number of steps is divided into, so that there is a best one to choose."""
ROUNDS_IN_TIME = 20
"""Rounds that a time is divided into: quick steps are many in a round, so that patience is a length of time, too."""
LONGEST_ROUND_S = 300.0
"""What a training that is killed loses at most."""
LEAST_TIMES_VALIDATION = 9.0
"""The steps of a round take at least this many times as long as judging it, so a tenth of a time goes into that."""
FIRST_ROUND_STEPS = 10
"""Steps from which it is known how many fit into a round."""
DEFAULT_EPOCHS = 200
"""Rounds of a training that has no other end but patience."""
NO_LIMIT = 10**9
WARM_UP = 0.3
"""Part of a one-cycle schedule in which the step size rises (Smith and Topin 2018, arXiv 1708.07120)."""
FIRST_FACTOR = 0.04
CALM_PART = 0.75
"""Part of a training after which the rounds of a falling step size compete. Before, steps are so large that scores of
what is held out leap: half an hour of patches took its 11th of 22 rounds for the best."""
DEFAULT_PATIENCE = 10
"""Rounds, as published."""


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
    most_steps: int = ROUND_STEPS
    """Most steps of a round, if no time is given."""
    validation_s: float = 0.0
    """What the last validation took."""
    step_s: float = 0.0
    """What a step of the last round took, once one has been done since the start of the program."""

    @property
    def patience(self) -> float:
        """Rounds without a better network after which training ends."""
        if self.options.patience is not None:
            return self.options.patience
        return DEFAULT_PATIENCE if self.options.chosen_schedule == "constant" else math.inf

    @property
    def is_calm(self) -> bool:
        """Whether steps are no longer so large that the best round is the best by chance."""
        return self.options.chosen_schedule == "constant" or self.part_done(self.state.seconds) >= CALM_PART

    @property
    def is_tired(self) -> bool:
        """Whether patience has ended."""
        return self.state.epoch - self.state.best_epoch >= self.patience

    @property
    def round_steps(self) -> int:
        """Steps of the round that begins now."""
        if self.options.steps is not None:
            return min(self.most_steps, max(1, self.options.steps // LEAST_ROUNDS))
        if self.options.time is None:
            return self.most_steps
        if self.state.step == 0:
            return FIRST_ROUND_STEPS
        seconds = max(self.options.time / ROUNDS_IN_TIME, LEAST_TIMES_VALIDATION * self.validation_s)
        step_s = self.step_s or self.state.seconds / self.state.step
        return max(1, int(min(seconds, LONGEST_ROUND_S) / step_s))

    @property
    def epochs(self) -> int:
        """Rounds after which training ends in any case."""
        if self.options.epochs is not None:
            return self.options.epochs
        return DEFAULT_EPOCHS if self.options.time is None and self.options.steps is None else NO_LIMIT

    @property
    def last_step(self) -> int:
        """Steps after which training ends in any case."""
        if self.options.steps is None:
            return self.epochs * self.most_steps if self.options.time is None else NO_LIMIT
        return min(self.epochs * self.round_steps, self.options.steps)

    @property
    def end_of_round(self) -> int:
        """Step at which the round begun now ends."""
        return min(self.state.step + self.round_steps, self.last_step)

    @property
    def n_rounds_left(self) -> int:
        """Most rounds still to do."""
        if self.options.steps is None:
            return self.epochs - self.state.epoch
        return -(-(self.last_step - self.state.step) // self.round_steps)

    def part_done(self, seconds: float) -> float:
        """Part of the training that is over, by steps or by time, whichever is further."""
        by_time = 0.0 if self.options.time is None else seconds / self.options.time
        return min(1.0, max(by_time, self.state.step / max(1, self.last_step)))
