"""When a run ends: steps, tokens and epochs are known beforehand, validation losses and the clock decide on the way."""

from __future__ import annotations

import time
from collections.abc import Callable

from rwkv_accel.config.schema import EvalConfig, TrainerConfig
from rwkv_accel.errors import UserError
from rwkv_accel.interrupt import StopRequest
from rwkv_accel.state import TrainState


class RunLimits:
    """The end of a run, the same on every rank."""

    def __init__(
        self,
        trainer: TrainerConfig,
        evaluation: EvalConfig,
        total_steps: int,
        stop: StopRequest,
        *,
        started_at: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            total_steps: updates of the whole run, by max_epochs, max_steps and max_tokens.
            started_at: time of the clock from which max_time counts.

        Raises:
            UserError: the run is shorter than trainer.min_steps.
        """
        if trainer.min_steps > total_steps:
            raise UserError(
                f"trainer.min_steps {trainer.min_steps} is above the {total_steps} updates of this run; raise "
                "trainer.max_epochs, or lower min_steps"
            )
        self._trainer, self._evaluation, self._total_steps, self._stop = trainer, evaluation, total_steps, stop
        self._started_at, self._clock = started_at, clock
        self._out_of_time = False

    def reached(self, state: TrainState) -> bool:
        """Whether the run is over. Collective where trainer.max_time is set, on the host only."""
        return state.step >= self._total_steps or self.reason(state) is not None

    def reason(self, state: TrainState) -> str | None:
        """Why the run ends before its last step, or None. Collective as `reached` is."""
        control = state.control
        if state.step >= self._total_steps or state.step < self._trainer.min_steps:
            return None
        if control.wants_stop(self._evaluation):
            return (
                f"stopping early: no improvement in {control.num_without_gain} evaluations; best validation loss "
                f"{control.best:.4f} at step {control.best_step}"
            )
        if self._time_is_up():
            return (
                f"trainer.max_time is up after step {state.step} of {self._total_steps}; start the same command "
                "again to continue"
            )
        return None

    def _time_is_up(self) -> bool:
        max_time = self._trainer.max_time
        if max_time is not None and not self._out_of_time:
            self._out_of_time = self._stop.any_rank(self._clock() - self._started_at >= max_time)
        return self._out_of_time
