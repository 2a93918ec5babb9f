"""Snapshots onto the disk behind the training: one thread, one checkpoint at a time.

The thread is not a daemon: a program that ends by an error still finishes the checkpoint in flight. One that is
killed leaves a folder under a temporary name, and the checkpoint before is whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from torch import Tensor

from rwkv_accel.checkpoint.collective import on_main_for_long
from rwkv_accel.checkpoint.format import CHECKPOINTS_DIR, CheckpointWriteError, write_folder
from rwkv_accel.checkpoint.remote import Remote
from rwkv_accel.checkpoint.retention import prune, remove_leftovers
from rwkv_accel.checkpoint.uploads import Uploads
from rwkv_accel.config.checkpoint import CheckpointConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the memory of the main process, out of reach of later steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """CPU tensors of each .safetensors file."""
    documents: dict[str, str]
    """Text of each .json file."""


class CheckpointWriter:
    """Writes out_dir/checkpoints on the main process, and removes there what retention does not keep."""

    def __init__(self, out_dir: str | Path, config: CheckpointConfig, remote: Remote | None = None) -> None:
        self.checkpoints = Path(out_dir) / CHECKPOINTS_DIR
        self._config = config
        self._after = remote.newest_sequence if remote else 0
        self.uploads = Uploads(remote.store, out_dir, config) if remote else None
        """What goes to remote storage; None on all but the main process, and without storage."""
        self._thread: Thread | None = None
        self._failures: deque[CheckpointWriteError] = deque()
        self._last_failure: CheckpointWriteError | None = None
        self._defect: BaseException | None = None

    def write(self, snapshot: Snapshot, name: str) -> None:
        """Put a snapshot under checkpoints/<name>: behind the caller's back, or before returning. Main process only."""
        self.wait()
        self._thread = Thread(target=self._write, args=(snapshot, name), name="checkpoint writer")
        self._thread.start()
        if not self._config.background:
            self.wait()

    def wait(self) -> None:
        """Until nothing is in flight. Before a snapshot is taken, so that memory never holds two of them."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._defect is not None:
            raise self._defect

    def take_failures(self) -> list[CheckpointWriteError]:
        """Why checkpoints finished since the last call are not on disk; older ones are, and the training may go on."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def finish(self, accelerator: Accelerator) -> None:
        """Wait until everything is on disk. Collective.

        Raises:
            CheckpointWriteError: on every rank: the last checkpoint is not.
        """

        def last_result() -> None:
            self.wait()
            if self._last_failure is not None:
                raise self._last_failure

        on_main_for_long(accelerator, last_result)

    def finish_uploads(self, accelerator: Accelerator) -> list[str]:
        """Wait for uploads, within bounds; what is not in remote storage after that. Collective."""
        return on_main_for_long(accelerator, self.uploads.finish if self.uploads is not None else list)

    def _write(self, snapshot: Snapshot, name: str) -> None:
        self._last_failure = None
        try:
            # First, for what a killed save left behind may be the space that is missing.
            self._tidy_up(lambda: remove_leftovers(self.checkpoints))
            folder = self.checkpoints / name
            write_folder(
                folder,
                step=snapshot.step,
                tensors=snapshot.tensors,
                documents=snapshot.documents,
                after=self._after,
            )
            if self.uploads is not None:
                self.uploads.add_checkpoint(folder)
            self._tidy_up(lambda: prune(self.checkpoints, self._config.keep_last, self._config.keep_every_n_steps))
        except CheckpointWriteError as error:
            self._last_failure = error
            self._failures.append(error)
        except BaseException as error:  # noqa: BLE001  raised again where the training sees it
            self._defect = error

    def _tidy_up(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._failures.append(CheckpointWriteError(f"{self.checkpoints} cannot be tidied up: {error}"))
