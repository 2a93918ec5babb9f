"""How far long work has come: a bar on a terminal, a plain line now and then elsewhere, on the first process only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TextIO, TypeVar

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


def progress(
    items: Iterable[Item],
    desc: str,
    *,
    total: int | None = None,
    unit: str = "",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Pass the items on, and show how far long work has come. Work that is quick says nothing.

    total: number of items where they do not know it themselves. unit: what they are.
    """
    stream = stream or sys.stderr
    mode = choose_mode(_mode, stream) if is_main_process() else "none"
    if total is None and isinstance(items, Sized):
        total = len(items)
    if mode == "bar":
        from tqdm import tqdm

        shown = tqdm(
            items, desc=desc, total=total, unit=f" {unit or 'it'}", file=stream, dynamic_ncols=True, leave=False,
            delay=SECONDS_BEFORE_BAR,
        )  # fmt: skip
        for item in shown:
            beat(desc)
            yield item
        return
    of_total = "" if total is None else f"/{total:,}"
    last = clock()
    for done, item in enumerate(items):
        beat(desc)
        if mode == "lines" and clock() - last >= SECONDS_BETWEEN_LINES:
            last = clock()
            stream.write(f"{desc}: {done:,}{of_total} {unit}".rstrip() + "\n")
            stream.flush()
        yield item


def choose_mode(mode: str, stream: TextIO) -> str:
    """auto: a bar on a terminal, lines elsewhere."""
    if mode != "auto":
        return mode
    return "bar" if stream.isatty() else "lines"
