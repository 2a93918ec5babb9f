"""train_log.txt: the run in plain text, append only, in the official trainer's columns (RWKV-LM src/trainer.py).

    NEW RUN 2026-01-31 12:00:00.000000            or: RESUMED RUN <time> at step <step>
    {"out_dir": "out/demo", ...}                  the resolved recipe on one line
    # 2026-01-31 12:00:01 any message             several lines of text keep the mark on each
    0 4.123456 61.7723 0.00060000 2026-01-31 12:34:56.000000 0

Only epoch lines start with a digit. Their columns: epoch (the first is 0), mean loss per target token, perplexity,
learning rate of the last update, date, time, epochs completed before this one since the program started. A run that
was killed between an epoch line and its checkpoint writes the line again; the later line counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any


class TrainLog:
    """Appends whole lines; each is one write, so lines of a killed run are never mixed up."""

    def __init__(self, path: Path, config: dict[str, Any], resume_step: int, now: Callable[[], datetime]):
        self._now = now
        self._unwritten = bytearray()
        self._num_epochs = 0
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        start = f"RESUMED RUN {_stamp(now())} at step {resume_step}" if resume_step else f"NEW RUN {_stamp(now())}"
        self._write(("\n" if torn else "") + start + "\n" + json.dumps(config, ensure_ascii=False) + "\n")

    def epoch(self, epoch: int, loss: float, lr: float) -> None:
        """One line for the epoch with this index (the first is 0)."""
        columns = (epoch, f"{loss:.6f}", f"{perplexity(loss):.4f}", f"{lr:.8f}", _stamp(self._now()), self._num_epochs)
        self._write(" ".join(str(c) for c in columns) + "\n")
        self._num_epochs += 1

    def message(self, text: str) -> None:
        stamp = self._now().isoformat(" ", "seconds")
        self._write("".join(f"# {stamp} {line}\n" for line in text.splitlines()))

    def close(self) -> None:
        with suppress(OSError):
            self._write("")
        os.close(self._fd)

    def _write(self, text: str) -> None:
        """Raises OSError when the disk refuses; the rest comes before the next text."""
        self._unwritten += text.encode()
        while self._unwritten:
            del self._unwritten[: os.write(self._fd, self._unwritten)]


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def _stamp(time: datetime) -> str:
    return time.isoformat(" ", "microseconds")
