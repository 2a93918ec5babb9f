"""When a resume checkpoint is due: by updates, which every rank counts, and by minutes, which one clock decides."""

from __future__ import annotations

import time
from collections.abc import Callable

from rwkv_accel.config.checkpoint import CheckpointConfig


class SaveCadence:
    """Counts updates and minutes since the last checkpoint."""

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._saved_at = clock()
        self.agreed = False
        """The ranks have agreed that the minutes are over. Set where they agree on stopping: no extra exchange."""

    def wanted(self) -> bool:
        """Whether the minutes are over by this process's clock; the ranks' clocks differ, so one of them is asked."""
        minutes = self._config.every_n_minutes
        return minutes is not None and self._clock() - self._saved_at >= 60 * minutes

    def due(self, step: int) -> bool:
        """Whether to save after this update; the same answer on every rank."""
        by_steps = (self._config.every_n_steps, self._config.keep_every_n_steps)
        return self.agreed or any(every is not None and step % every == 0 for every in by_steps)

    def restart(self) -> None:
        """Count anew: a checkpoint was taken."""
        self._saved_at, self.agreed = self._clock(), False
