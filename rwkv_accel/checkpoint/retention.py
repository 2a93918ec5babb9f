"""Which checkpoints stay: the newest few, and always at least one complete one."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from rwkv_accel.checkpoint.format import REPLACED_SUFFIX, TMP_SUFFIX, list_complete, list_folders, sync_folder

logger = logging.getLogger(__name__)


def prune(checkpoints: Path, keep_last: int) -> list[Path]:
    """Remove all but the `keep_last` newest complete checkpoints; returns what it removed. Main process only.

    Damaged folders stay: they count for nothing, and someone may want to look at them.
    """
    assert keep_last >= 1, "at least one checkpoint must stay"
    surplus = [folder for folder, _ in list_complete(checkpoints)[:-keep_last]]
    return [folder for folder in surplus if _remove(folder)]


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
        sync_folder(folder.parent)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("old checkpoint %s could not be removed: %s", folder, error.strerror)
        return False
    return True
