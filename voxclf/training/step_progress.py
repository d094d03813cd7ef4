"""How a training shows that it goes on: steps that happen in Lightning's loop, handed to a :class:`Progress`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from voxclf.progress import Progress
from voxclf.training.training_plan import Plan

SETTLING_S = 2.0
"""Seconds of training from which its rate is known well enough to say how long the rest takes."""


@dataclass(frozen=True)
class _Counted:
    """One step, as progress counts it."""

    n_voxels: int


class StepProgress:
    """Hands steps to a :class:`Progress`, which draws items from an iterator, as they happen in Lightning's loop.

    How many labelled voxels there will be is known after a few steps only, where the limit is time; steps until then
    are handed on together.
    """

    def __init__(self, progress: Progress, stage: str, unit: str, plan: Plan) -> None:
        self._progress, self._stage, self._unit, self._plan = progress, stage, unit, plan
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
            self._shown = iter(self._progress(self._stage, self._steps(), self._expect(seconds), self._unit))
        next(self._shown)

    def finish(self) -> None:
        """All is done: let the progress say so."""
        self._is_over = True
        if self._shown is not None:
            for _ in self._shown:
                continue

    def close(self) -> None:
        """Nothing follows: a bar that stands open after an error would garble what is printed next."""
        if isinstance(self._shown, Generator):
            self._shown.close()

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
