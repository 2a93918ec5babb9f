"""Reports a run that has come to a halt: which rank, where, with the stacks of its threads.

A thread of each process leaves the process's pulse in out_dir/heartbeat/rank-N.json. When no rank has made progress
for a while, each one that still can writes out_dir/stall-rankN.txt and says the same on stderr: the ranks that wait
for the others as well as the one that they wait for. Files need no collective, which would hang too; a rank whose
file is not even renewed is stopped as a whole, or gone.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkv_accel.heartbeat import beat, pulse
from rwkv_accel.runtime import EXIT_STALLED

HEARTBEAT_DIR = "heartbeat"
STDERR = 2
# Looks per timeout; a report comes at most one look late.
LOOKS = 4
MAX_SECONDS_BETWEEN_LOOKS = 10.0


class Watchdog:
    """One per process; a daemon thread between `start` and `stop`."""

    def __init__(self, out_dir: str | Path, *, rank: int, world_size: int, timeout: float | None, action: str) -> None:
        """
        Args:
            timeout: seconds without progress of any rank; None for no watchdog.
            action: report, or exit: also end the process, so that a launcher can start the run again.
        """
        self._out_dir, self._rank, self._world_size = Path(out_dir), rank, world_size
        self._timeout, self._action = timeout, action
        self._seen: dict[int, dict[str, Any]] = {}
        self._looks = 0
        self._end = threading.Event()

    def start(self) -> Watchdog:
        if self._timeout is not None:
            beat("reading the data")
            self._leave_pulse()
            atexit.register(self.stop)
            threading.Thread(target=self._watch, args=(self._timeout,), name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """The run is over: nothing is watched any more."""
        atexit.unregister(self.stop)
        if self._timeout is not None and not self._end.is_set():
            self._end.set()
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):  # the folder has become read-only, or another rank's file is still there
                self._file(self._rank).unlink(missing_ok=True)
                self._file(self._rank).parent.rmdir()

    def _watch(self, timeout: float) -> None:
        pause = min(timeout / LOOKS, MAX_SECONDS_BETWEEN_LOOKS)
        progress_at, beats, reported = time.monotonic(), -1, False
        while not self._end.wait(pause):
            self._leave_pulse()
            # Should a thread hold the interpreter for ever, this one cannot speak; the C library then does.
            faulthandler.dump_traceback_later(2 * timeout, exit=self._action == "exit", file=STDERR)
            if pulse.beats != beats:
                progress_at, beats, reported, self._seen = pulse.at, pulse.beats, False, {}
            elif time.monotonic() - progress_at > timeout / 2 and self._others_go_on():
                progress_at, reported = time.monotonic(), False
            elif time.monotonic() - progress_at > timeout and not reported:
                reported = True
                self._report(time.monotonic() - progress_at, pause)
                if self._action == "exit":
                    # The others, whose clocks may be a look behind, should speak before a launcher ends them.
                    self._wait(3, pause)
                    os._exit(EXIT_STALLED)

    def _wait(self, looks: int, pause: float) -> None:
        for _ in range(looks):
            self._end.wait(pause)
            self._leave_pulse()

    def _others_go_on(self) -> bool:
        """Whether another rank has made progress since the last call: one rank may wait long for one that works."""
        before, self._seen = self._seen, self._read_all()
        return any(before[rank]["beats"] != found["beats"] for rank, found in self._seen.items() if rank in before)

    def _report(self, seconds: float, pause: float) -> None:
        lines = [
            f"stall: no rank has made progress for {seconds:.0f} s",
            f"this is rank {self._rank} of {self._world_size}, pid {os.getpid()} on {socket.gethostname()}: "
            f"{pulse.phase}, step {pulse.step}",
            *self._others(pause),
        ]
        text = "\n".join(lines) + "\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        faulthandler.dump_traceback(STDERR, all_threads=True)
        try:
            with (self._out_dir / f"stall-rank{self._rank}.txt").open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("end of the report\n\n")
        except OSError as error:
            sys.stderr.write(f"stall-rank{self._rank}.txt could not be written: {error.strerror}\n")

    def _others(self, pause: float) -> list[str]:
        """Where the ranks stand, as far as they are remarkable: stopped as a whole, never seen, or behind."""
        before = self._read_all()
        self._wait(2, pause)
        found = self._read_all()
        most = max((of_rank["marks"] for of_rank in found.values()), default=0)
        lines = []
        for rank in range(self._world_size):
            if rank not in found:
                lines.append(f"rank {rank} has left no sign of life")
                continue
            of_rank = found[rank]
            remarks = ["is behind"] if of_rank["marks"] < most else []
            if before.get(rank) == of_rank and rank != self._rank:
                remarks.append("is stopped as a whole or gone")
            if remarks:
                where = f"pid {of_rank['pid']} on {of_rank['host']}: {of_rank['phase']}, step {of_rank['step']}"
                lines.append(f"rank {rank} {' and '.join(remarks)}; {where}")
        return lines or ["no rank is behind the others"]

    def _leave_pulse(self) -> None:
        if self._end.is_set():
            return
        self._looks += 1
        content = {"host": socket.gethostname(), "pid": os.getpid(), "looks": self._looks, **asdict(pulse)}
        part = self._file(self._rank).with_suffix(".tmp")
        try:
            part.parent.mkdir(exist_ok=True)
            part.write_text(json.dumps(content), encoding="utf-8")
            os.replace(part, self._file(self._rank))
        except OSError:
            return  # a full disk must not end the run; the others will say that this rank gave no sign

    def _read_all(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self._world_size):
            try:
                found[rank] = json.loads(self._file(rank).read_bytes())
            except (OSError, ValueError):
                continue
        return found

    def _file(self, rank: int) -> Path:
        return self._out_dir / HEARTBEAT_DIR / f"rank-{rank}.json"
