"""train_log.txt read back: when the run started, resumed, stopped, and what it said."""

from __future__ import annotations

import fcntl
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_accel.tracking import LOCK_FILE, TRAIN_LOG_FILE

START = re.compile(r"^NEW RUN (\S+ \S+)")
RESUME = re.compile(r"^RESUMED RUN (\S+ \S+) at step (\d+)")
MESSAGE = re.compile(r"^# (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)$")
STOPPED = re.compile(r"^stopped by .* after step (\d+)")
FAILED = re.compile(r"^given up after step (\d+)")
FINISHED = re.compile(r"^finished after step (\d+)")
# What the loop says about the course of the run, as opposed to samples, saves and numbers.
NOTABLE = re.compile(
    r"^(stopped by|given up|stopping early|finished|validation loss has stopped|wandb:|loss_data\.json)"
)
NUM_MESSAGES = 400


@dataclass
class Timeline:
    """The last run of a log; a fresh start in the same folder begins a new one."""

    num_starts: int = 0
    started: str = ""
    """Local time of the first start."""
    state: str = "unknown"
    """running, stopped, failed or finished, by the last word of the log; killed if nobody is there to say one; or
    unknown."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """(step, text) of resumes."""
    events: list[str] = field(default_factory=list)
    """Starts, stops and what else decided on the course of the run."""
    messages: list[str] = field(default_factory=list)
    """The last NUM_MESSAGES messages."""


def read_timeline(folder: Path) -> Timeline:
    """The course of the run in a folder; without a train_log.txt it has no events."""
    timeline = _read(folder / TRAIN_LOG_FILE)
    if timeline.state == "running" and _is_left(folder / LOCK_FILE):
        timeline.state = "killed"
    return timeline


def _is_left(lock_file: Path) -> bool:
    """Whether the process that wrote here is gone. Only the machine that it ran on can tell."""
    try:
        with open(lock_file, encoding="utf-8", errors="replace") as file:
            if not file.read(200).endswith(f" on {socket.gethostname()}"):
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or there is none
        return False
    return True


def _read(path: Path) -> Timeline:
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
            elif FAILED.match(match[2]):
                timeline.state = "failed"
            elif FINISHED.match(match[2]):
                timeline.state = "finished"
    del timeline.messages[:-NUM_MESSAGES]
    return timeline


def _to_second(stamp: str) -> str:
    return stamp.split(".")[0]
