"""train_log.txt read back: when the run started, resumed, stopped, and what it said."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

START = re.compile(r"^NEW RUN (\S+ \S+)")
RESUME = re.compile(r"^RESUMED RUN (\S+ \S+) at step (\d+)")
MESSAGE = re.compile(r"^# (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)$")
STOPPED = re.compile(r"^stopped by .* after step (\d+)")
FINISHED = re.compile(r"^finished after step (\d+)")
# What the loop says about the course of the run, as opposed to samples, saves and numbers.
NOTABLE = re.compile(r"^(stopped by|stopping early|finished|validation loss has stopped|wandb:|loss_data\.json)")
NUM_MESSAGES = 400


@dataclass
class Timeline:
    """The last run of a log; a fresh start in the same folder begins a new one."""

    num_starts: int = 0
    started: str = ""
    """Local time of the first start."""
    state: str = "unknown"
    """running, stopped or finished, by the last word of the log; unknown without one."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """(step, text) of resumes."""
    events: list[str] = field(default_factory=list)
    """Starts, stops and what else decided on the course of the run."""
    messages: list[str] = field(default_factory=list)
    """The last NUM_MESSAGES messages."""


def read_timeline(path: Path) -> Timeline:
    """Read train_log.txt; a missing file has no events, and bytes that are no text are shown as such."""
    try:
        lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    except OSError:
        return Timeline()
    timeline = Timeline()
    for line in lines:
        if match := START.match(line):
            timeline = Timeline(1, _to_second(match[1]), "running")
            timeline.events.append(f"{timeline.started} started")
        elif match := RESUME.match(line):
            timeline.num_starts += 1
            timeline.state = "running"
            timeline.marks.append((int(match[2]), f"resumed at step {match[2]}"))
            timeline.events.append(f"{_to_second(match[1])} resumed at step {match[2]}")
        elif match := MESSAGE.match(line):
            timeline.messages.append(f"{match[1]} {match[2]}")
            if NOTABLE.match(match[2]):
                timeline.events.append(timeline.messages[-1])
            if STOPPED.match(match[2]):
                timeline.state = "stopped"
            elif FINISHED.match(match[2]):
                timeline.state = "finished"
    del timeline.messages[:-NUM_MESSAGES]
    return timeline


def _to_second(stamp: str) -> str:
    return stamp.split(".")[0]
