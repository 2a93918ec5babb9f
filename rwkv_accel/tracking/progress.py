"""Progress on the terminal: a bar where someone watches, now and then a plain line where a file does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Progress of a run in optimizer updates, and messages that do not tear the bar. Writes to stderr by default."""

    def __init__(
        self,
        mode: str,
        total_steps: int,
        resume_step: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            mode: `tracking.progress` of the recipe: auto, bar, lines or none. Messages are shown in every mode.
        """
        self._stream = stream or sys.stderr
        self._clock = clock
        self._total_steps = total_steps
        self._mode = choose_mode(mode, self._stream)
        self._bar: Any = None
        self._last_line: float | None = None
        if self._mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=resume_step,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def show(self, step: int, text: str) -> None:
        """The state after this step. Lines come at most every few seconds, but the last step always has one."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._mode == "lines":
            now, is_last = self._clock(), step >= self._total_steps
            if is_last or self._last_line is None or now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                self._write(f"step {step}/{self._total_steps} {text}")

    def message(self, text: str) -> None:
        """Text above the bar, or as lines of its own."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def progress(
    items: Iterable[Item] | int,
    desc: str,
    *,
    mode: str = "auto",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Pass the items on (a number n means range(n)), and show how far long work has come.

    Plain lines come every few seconds, so work that is quick says nothing. Call it on the main process, or with
    mode="none" on the others.
    """
    work: Any = range(items) if isinstance(items, int) else items
    stream = stream or sys.stderr
    mode = choose_mode(mode, stream)
    if mode == "bar":
        from tqdm import tqdm

        yield from tqdm(work, desc=desc, file=stream, dynamic_ncols=True, leave=False)
        return
    of_total = f"/{len(work)}" if hasattr(work, "__len__") else ""
    last = clock()
    for done, item in enumerate(work):
        if mode == "lines" and clock() - last >= SECONDS_BETWEEN_LINES:
            last = clock()
            stream.write(f"{desc} {done}{of_total}\n")
            stream.flush()
        yield item


def choose_mode(mode: str, stream: TextIO) -> str:
    """auto: a bar on a terminal, lines elsewhere."""
    if mode != "auto":
        return mode
    return "bar" if stream.isatty() else "lines"


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front where there are any."""
    hours, rest = divmod(round(seconds), 3600)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
