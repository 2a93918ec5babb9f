"""Stopping on a signal without losing anything.

Before the first step and after the last one a signal ends the process at once: nothing is half done there. Between,
it only raises a flag; all ranks agree on it at the next micro-batch, validation batch or answer, drop what they are
in the midst of, and the loop saves. What was dropped starts over at the next start.
A second signal, sent on its own at least a second later, ends the process immediately; what is on disk is whole at
any moment.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_accel.runtime import SIGNALS, end_by_signal, is_main_process, stop_file

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rwkv_accel.checkpoint.cadence import SaveCadence

# A terminal and a launcher both pass a Ctrl-C on: two signals within this time are one.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(Exception):
    """The ranks agreed to stop in the midst of work that starts over at the next start; raised on all of them."""


class StopRequest:
    """The wish to stop, from a signal or from the stop file, and the ranks' agreement on it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._received_at = 0.0
        self._deferred = False
        self._group: Any = None
        self.cadence: SaveCadence | None = None
        """What else is agreed on in the same exchange: that it is time for a checkpoint."""

    def install(self) -> StopRequest:
        """Take over SIGINT, SIGTERM and SIGUSR1; they end the process until `defer` is called."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def defer(self, accelerator: Accelerator) -> None:
        """From now on a signal is a request that `agreed` reports. Collective."""
        if accelerator.num_processes > 1 and self._group is None:
            # On the host: the question must not wait for the device.
            self._group = torch.distributed.new_group(backend="gloo")
        self._deferred = True

    def release(self) -> None:
        """Signals end the process again: everything is saved."""
        self._deferred = False

    def wanted(self) -> bool:
        """Whether this process has met a signal or the stop file, as far as that is still a request."""
        path = stop_file()
        if self.reason is None and path is not None and is_main_process() and path.exists():
            self.reason = f"stop file {path}"
        return self._deferred and self.reason is not None

    def agreed(self) -> bool:
        """Whether any rank wants to stop; the same answer on every rank. Collective, on the host only."""
        save = self.cadence is not None and is_main_process() and self.cadence.wanted()
        wishes = torch.tensor([self.wanted(), save], dtype=torch.int32)
        if self._group is not None:
            torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX, group=self._group)
        if self.cadence is not None and wishes[1]:
            self.cadence.agreed = True
        return bool(wishes[0])

    def any_rank(self, here: bool) -> bool:
        """Whether it is so on any rank; the same answer on every rank. Collective, on the host only."""
        if self._group is None:
            return here
        flag = torch.tensor(int(here))
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self._deferred:
            end_by_signal(number, frame)
        if self.reason is None:
            self.reason, self._received_at = signal.Signals(number).name, now
        elif now - self._received_at > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)


def generator_states(device: torch.device) -> list[Tensor]:
    """States of the generators that a forward pass draws from (dropout)."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_generator_states(states: list[Tensor], device: torch.device) -> None:
    """Go back to what generator_states read."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
