"""Progress of a run on the terminal: a bar where someone watches, now and then a plain line where a file does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rwkv_accel.progress import SECONDS_BETWEEN_LINES, choose_mode

# The text says what is worth the width; a terminal of 80 columns shows it up to the time to go.
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar:8}| {desc}"


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
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
            )

    def show(self, step: int, text: str) -> None:
        """The state after this step. Lines come at most every few seconds, but the last step always has one."""
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
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


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front where there are any."""
    hours, rest = divmod(round(seconds), 3600)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
