"""How far long work has come: a bar on a terminal, a plain line now and then elsewhere, on the first process only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

from rwkv_accel.heartbeat import beat
from rwkv_accel.runtime import is_main_process

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BEFORE_BAR = 2.0

_mode = "auto"


def set_progress_mode(mode: str) -> None:
    """What `progress` does from here on: auto, bar, lines or none (`tracking.progress` of the recipe)."""
    global _mode
    _mode = mode


class ProgressLine:
    """How far one piece of work has come, told with `at`. Work that is quick says nothing."""

    def __init__(
        self,
        desc: str,
        *,
        total: int | None = None,
        unit: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desc, self._unit, self._clock = desc, unit, clock
        self._of_total = "" if total is None else f"/{total:,}"
        self._stream = stream or sys.stderr
        self._mode = choose_mode(_mode, self._stream) if is_main_process() else "none"
        self._last = clock()
        self._bar: Any = None
        if self._mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                desc=desc, total=total, unit=f" {unit or 'it'}", file=self._stream, dynamic_ncols=True, leave=False,
                delay=SECONDS_BEFORE_BAR, miniters=0,
            )  # fmt: skip

    def at(self, done: int) -> None:
        """This much is done; again the same is a sign of life."""
        beat(self._desc)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._mode == "lines" and self._clock() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = self._clock()
            self._stream.write(f"{self._desc}: {done:,}{self._of_total} {self._unit}".rstrip() + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def progress(
    items: Iterable[Item],
    desc: str,
    *,
    total: int | None = None,
    unit: str = "",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Pass the items on, and show how far long work has come.

    total: number of items where they do not know it themselves. unit: what they are.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    line = ProgressLine(desc, total=total, unit=unit, stream=stream, clock=clock)
    try:
        for done, item in enumerate(items):
            line.at(done)
            yield item
    finally:
        line.close()


def choose_mode(mode: str, stream: TextIO) -> str:
    """auto: a bar on a terminal, lines elsewhere."""
    if mode != "auto":
        return mode
    return "bar" if stream.isatty() else "lines"
