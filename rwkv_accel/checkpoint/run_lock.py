"""One run writes into a run folder at a time.

A second start of the same command, while trainers of the first still live (their launcher was killed, a node came back
from the dead, two terminals), would remove checkpoints under the feet of the first and mix both into one log. The
kernel drops the lock with the process that holds it, however that process ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_accel.checkpoint.collective import on_main
from rwkv_accel.errors import UserError
from rwkv_accel.tracking import LOCK_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# What a trainer that was just asked to stop may need for its last checkpoint.
WAIT_SECONDS = 120.0
SAY_AFTER_SECONDS = 2.0


class RunLock:
    """The right to write into a run folder, until `release` or the process's end. Empty on all but the main process."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the next run in. Again is nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_run_folder(accelerator: Accelerator, out_dir: str | Path) -> RunLock:
    """Create the run folder and lock it; the main process does so, and waits for one that is ending. Collective.

    Raises:
        UserError: another process keeps it, or the folder cannot be written.
    """
    taken: list[RunLock] = []
    on_main(accelerator, lambda: taken.append(take(Path(out_dir))))
    return taken[0] if taken else RunLock()


def take(folder: Path, wait_seconds: float = WAIT_SECONDS) -> RunLock:
    """lock_run_folder on this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(descriptor := os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    except OSError as error:
        raise UserError(f"out_dir {folder} cannot be written: {error.strerror}; choose another out_dir") from None
    try:
        _wait(descriptor, folder, wait_seconds)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:
        # Some network file systems know no locks.
        logger.warning("%s cannot be locked (%s): do not start a second run in it", folder, error.strerror)
    except UserError:
        lock.release()
        raise
    return lock


def _wait(descriptor: int, folder: Path, wait_seconds: float) -> None:
    started, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        waited = time.monotonic() - started
        if waited >= wait_seconds:
            raise UserError(
                f"{holder} still trains in {folder}; end it first, or give another out_dir for a second run"
            )
        if waited >= SAY_AFTER_SECONDS and not said:
            said = True
            logger.warning("waiting for %s to leave %s (at most %.0f s)", holder, folder, wait_seconds)
        time.sleep(0.1)
