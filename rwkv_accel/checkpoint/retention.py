"""Which checkpoints and saved weights stay: the newest few, and always at least one complete one."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from rwkv_accel.checkpoint.format import (
    REPLACED_SUFFIX,
    STEP_PREFIX,
    TMP_SUFFIX,
    list_complete,
    list_folders,
    sync,
)

logger = logging.getLogger(__name__)


def prune(checkpoints: Path, keep_last: int, keep_every_n_steps: int | None = None) -> list[Path]:
    """Remove all but the `keep_last` newest complete checkpoints; returns what it removed. Main process only.

    Multiples of `keep_every_n_steps` stay beside them. Damaged folders stay too: they count for nothing, and someone
    may want to look at them.
    """
    assert keep_last >= 1, "at least one checkpoint must stay"
    old = list_complete(checkpoints)[:-keep_last]
    surplus = [folder for folder, manifest in old if not stays(folder.name, manifest.step, keep_every_n_steps)]
    return [folder for folder in surplus if _remove(folder)]


def stays(name: str, step: int, keep_every_n_steps: int | None) -> bool:
    """Whether a checkpoint is kept for good. What a signal left is not: its name comes again."""
    return keep_every_n_steps is not None and step % keep_every_n_steps == 0 and name.startswith(STEP_PREFIX)


def prune_weights(weights: Path, keep: int | None, newest: str) -> list[Path]:
    """Remove all but the `keep` newest folders of saved weights, `newest` among them; returns what it removed."""
    if keep is None:
        return []
    saved = [folder for folder in list_folders(weights) if folder.name != newest]
    saved.sort(key=lambda folder: (folder.stat().st_mtime_ns, folder.name), reverse=True)
    return [folder for folder in saved[keep - 1 :] if _remove(folder)]


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what a killed save or removal left behind. Main process only, while no save is under way."""
    if not checkpoints.is_dir():
        return
    for folder in checkpoints.glob("*" + TMP_SUFFIX):
        shutil.rmtree(folder, ignore_errors=True)
    complete = {folder for folder, _ in list_complete(checkpoints)}
    for folder in list_folders(checkpoints):
        successor = folder.with_name(folder.name.removesuffix(REPLACED_SUFFIX))
        if successor != folder and successor in complete:
            _remove(folder)


def _remove(folder: Path) -> bool:
    # The rename first: a kill in the middle of the removal must not leave a folder that looks damaged.
    doomed = folder.with_name(folder.name + ".removed" + TMP_SUFFIX)
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        sync(folder.parent)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("old save %s could not be removed: %s", folder, error.strerror)
        return False
    return True
