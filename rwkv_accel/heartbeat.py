"""What this process was last seen doing: work calls `beat`, and the watchdog looks at it."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Pulse:
    """The last sign of progress."""

    phase: str = "starting"
    step: int = 0
    """Optimizer update that is being worked on."""
    beats: int = 0
    """Signs of progress so far."""
    marks: int = 0
    """Those of work that all ranks do in step: a rank with fewer is the one that the others wait for."""
    at: float = 0.0
    """When the last one came, by time.monotonic."""


pulse = Pulse(at=time.monotonic())


def beat(phase: str, *, step: int | None = None, in_step: bool = False) -> None:
    """A sign of progress, cheap enough for every token and record.

    step: None keeps the last one. in_step: every rank comes by here equally often.
    """
    pulse.phase = phase
    pulse.step = pulse.step if step is None else step
    pulse.beats += 1
    pulse.marks += in_step
    pulse.at = time.monotonic()
