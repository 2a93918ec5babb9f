"""Throughput: tokens and updates per second of training time, the share of it spent waiting for data, time to go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")

LOSS_DECAY = 0.98  # per update: the smoothed loss remembers about 50 updates
PACE_DECAY = 0.95  # per update: the time to go follows about 20 updates


@dataclass(frozen=True)
class Rates:
    """Speed over the updates of one record; pauses (saves, evaluation) are not counted as training time."""

    kt_s: float
    """Thousands of processed tokens per second, padding excluded, over all processes."""
    target_kt_s: float
    """Thousands of target tokens per second, over all processes."""
    it_s: float
    """Optimizer updates per second."""
    wait_share: float
    """Share of the time in which the main process waited for its next batch, 0..1."""
    eta_seconds: float
    """Training time to the last step at the recent pace."""
    wall_seconds: float
    """Time since the start of the run, pauses included, over all its starts."""


class Meter:
    """Turns counts into rates. The clock is any monotonic function that returns seconds."""

    def __init__(self, clock: Callable[[], float], wall_seconds: float = 0.0):
        """
        Args:
            wall_seconds: what earlier starts of the run have already taken.
        """
        self._clock = clock
        now = clock()
        self._start = now - wall_seconds
        self._mark = now
        self._paused = self._waited = 0.0
        self._pace_seconds: float | None = None

    def wall_seconds(self) -> float:
        return self._clock() - self._start

    def update(self, *, num_steps: int, tokens: int, target_tokens: int, steps_left: int) -> Rates:
        """Close the interval since the last call (or the start) and return its rates."""
        now = self._clock()
        seconds = max(now - self._mark - self._paused, 1e-9)
        waited = self._waited
        self._mark, self._paused, self._waited = now, 0.0, 0.0
        pace = seconds / num_steps
        keep = 0.0 if self._pace_seconds is None else PACE_DECAY**num_steps
        self._pace_seconds = pace if self._pace_seconds is None else pace + keep * (self._pace_seconds - pace)
        return Rates(
            kt_s=tokens / seconds / 1000,
            target_kt_s=target_tokens / seconds / 1000,
            it_s=num_steps / seconds,
            wait_share=min(waited / seconds, 1.0),
            eta_seconds=steps_left * self._pace_seconds,
            wall_seconds=now - self._start,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        start, before = self._clock(), self._paused
        try:
            yield
        finally:
            # An inner pause lies within this one: counting both would count it twice.
            self._paused = before + self._clock() - start

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass the items on; the time until each one comes is time spent waiting for data."""
        iterator = iter(items)
        while True:
            start = self._clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += self._clock() - start
            yield item


def smooth(previous: float | None, loss: float, num_steps: int) -> float:
    """Exponential mean of the loss; starts at the first loss. A non-finite loss leaves a finite mean alone."""
    if previous is None or not math.isfinite(previous):
        return loss
    return loss + LOSS_DECAY**num_steps * (previous - loss) if math.isfinite(loss) else previous


def peak_memory_bytes(device: Any) -> int:
    """Most memory held so far: tensors on the device, or the resident set of the process when that is the CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: that begins with what the parent process held when it started this one.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
