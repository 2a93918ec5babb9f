"""Uploads behind the training, in the order of the saves; none of them ever stops it.

What is to be uploaded is first linked into out_dir/uploads: the run may remove or replace its own copy meanwhile. A
thread takes one after the other. One that fails after all attempts is announced and stays first in the queue, which
is tried again with the next save and at the end of the run; so storage never holds a checkpoint without the weights
saved before it.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Condition, Thread

from rwkv_accel.checkpoint.format import CHECKPOINTS_DIR, read_manifest, step_name
from rwkv_accel.checkpoint.remote import (
    mebibytes,
    prune_checkpoints,
    prune_weights,
    put_checkpoint,
    put_logs,
    put_report,
    put_weights,
    remote_name,
)
from rwkv_accel.checkpoint.retention import stays
from rwkv_accel.checkpoint.store import Moved, RemoteStore
from rwkv_accel.checkpoint.weights import BEST_DIR, WEIGHTS_DIR, has_weights, latest_weights
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.errors import UserError
from rwkv_accel.progress import ProgressLine
from rwkv_accel.tracking import LOG_FILES, REPORT_FILE

logger = logging.getLogger(__name__)

UPLOADS_DIR = "uploads"
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass
class _Item:
    """One folder that waits for its upload."""

    target: str
    """Where it goes, relative to the store."""
    staged: Path
    upload: Callable[[Moved], None]
    may_be_dropped: bool = True
    """Newer ones of its kind make it superfluous."""
    num_bytes: int = 0
    num_moved: int = 0
    """How many of its bytes are there."""

    @property
    def kind(self) -> str:
        return self.target.partition("/")[0]

    def moved(self, num_bytes: int) -> None:
        self.num_moved = num_bytes


class Uploads:
    """The queue of a run. One process; methods may be called from any thread."""

    def __init__(self, store: RemoteStore, out_dir: str | Path, config: CheckpointConfig) -> None:
        self._store, self._out_dir, self._config = store, Path(out_dir), config
        self._staging = self._out_dir / UPLOADS_DIR
        self._numbers = count()
        self._changed = Condition()
        self._waiting: list[_Item] = []
        self._under_way: _Item | None = None
        self._is_new = self._is_closing = self._is_abandoned = False
        shutil.rmtree(self._staging, ignore_errors=True)
        # A daemon: a program that ends by an error does not wait for a slow line.
        self._thread = Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def add_checkpoint(self, folder: Path) -> None:
        """Have a complete checkpoint uploaded; older ones that still wait give way unless they are kept for good."""
        try:
            manifest = read_manifest(folder)
        except (UserError, OSError) as error:
            logger.warning("%s will not be uploaded: %s", folder, error)
            return
        target = f"{CHECKPOINTS_DIR}/{remote_name(folder.name, manifest)}"
        staged = self._new_staged()

        def upload(moved: Moved) -> None:
            put_logs(self._store, self._out_dir, LOG_FILES)
            put_checkpoint(self._store, staged, target, moved)
            prune_checkpoints(self._store, self._config)

        is_kept = stays(folder.name, manifest.step, self._config.keep_every_n_steps)
        self._add(folder, _Item(target, staged, upload, not is_kept))

    def add_weights(self, folder: Path, step: int) -> None:
        """Have saved weights (adapter/<name>, or best/ as best/<step>) uploaded."""
        target = f"{BEST_DIR}/{step_name(step)}" if folder.name == BEST_DIR else f"{WEIGHTS_DIR}/{folder.name}"
        staged = self._new_staged()

        def upload(moved: Moved) -> None:
            put_weights(self._store, staged, target, step, moved)
            prune_weights(self._store, self._config, target)

        self._add(folder, _Item(target, staged, upload))

    def add_existing(self, checkpoint: Path, saved_step: int, best_step: int) -> None:
        """Have uploaded what a start found in out_dir and an earlier one did not get through."""
        if has_weights(self._out_dir):
            self.add_weights(latest_weights(self._out_dir), saved_step)
        if (self._out_dir / BEST_DIR).is_dir():
            self.add_weights(self._out_dir / BEST_DIR, best_step)
        if checkpoint.parent == self._out_dir / CHECKPOINTS_DIR:
            self.add_checkpoint(checkpoint)

    def finish(self) -> list[str]:
        """Try everything once more, wait for it within bounds, and return what is not uploaded."""
        with self._changed:
            self._is_closing = True
            items = list(self._waiting)
            self._changed.notify()
        end = time.monotonic() + self._config.remote_wait_seconds
        total = mebibytes(sum(item.num_bytes for item in items))
        line = ProgressLine(f"uploading to {self._store.url}", total=total, unit="MiB")
        while self._thread.is_alive() and (left_seconds := end - time.monotonic()) > 0:
            line.at(mebibytes(sum(item.num_moved for item in items)))
            self._thread.join(min(left_seconds, SECONDS_BETWEEN_LOOKS))
        line.close()
        with self._changed:
            self._is_abandoned = True
            left = [item.target for item in self._waiting]
        if not left:
            shutil.rmtree(self._staging, ignore_errors=True)
        return left

    def _new_staged(self) -> Path:
        # Never the same again: an earlier one may be on its way.
        return self._staging / str(next(self._numbers))

    def _add(self, folder: Path, item: _Item) -> None:
        try:
            _link(folder, item.staged)
        except OSError as error:
            shutil.rmtree(item.staged, ignore_errors=True)
            logger.warning("%s will not be uploaded: %s", folder, error.strerror or error)
            return
        item.num_bytes = sum(path.stat().st_size for path in item.staged.iterdir())
        with self._changed:
            self._waiting.append(item)
            self._drop_superfluous(item.kind)
            self._is_new = True
            self._changed.notify()

    def _drop_superfluous(self, kind: str) -> None:
        keep = self._config.keep_weights if kind == WEIGHTS_DIR else 1
        if keep is None:
            return
        droppable = [item for item in self._waiting if item.kind == kind and item.may_be_dropped]
        for item in droppable[:-keep]:
            if item is not self._under_way:
                self._waiting.remove(item)
                shutil.rmtree(item.staged, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_new or self._is_closing)
                is_last = self._is_closing
                self._is_new = False
            self._upload_waiting()
            if is_last:
                if not self._is_abandoned:
                    self._upload_logs()
                return

    def _upload_waiting(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                item = self._under_way = self._waiting[0]
            try:
                item.upload(item.moved)
            except (UserError, OSError) as error:
                # A word to stderr while the interpreter ends would be a crash.
                if not self._is_abandoned:
                    logger.warning("%s is not uploaded: %s; tried again with the next save", item.target, error)
                with self._changed:
                    self._under_way = None
                return
            with self._changed:
                self._under_way = None
                item.moved(item.num_bytes)
                self._waiting.remove(item)
            shutil.rmtree(item.staged, ignore_errors=True)

    def _upload_logs(self) -> None:
        # Checkpoints take the logs along; this is for what came after the last one.
        try:
            put_logs(self._store, self._out_dir, LOG_FILES)
            put_report(self._store, self._out_dir / REPORT_FILE)
        except (UserError, OSError) as error:
            logger.warning("the logs are not uploaded: %s", error)


def _link(folder: Path, staged: Path) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for path in folder.iterdir():
        try:
            os.link(path, staged / path.name)
        except OSError:  # a disk without hard links
            shutil.copy2(path, staged / path.name)
