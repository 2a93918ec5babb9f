"""Worker of test_full_disk.py: runs whose disk is full for a while.

main             from the third update to the fourth
stopped_while_full   when a signal asks for the last checkpoint
"""

import errno
import os
import signal
from pathlib import Path

from rwkv_accel import loop, train
from rwkv_accel.checkpoint import format as checkpoint_format
from rwkv_accel.config.load import load_config
from rwkv_accel.runtime import set_environment_defaults

FULL_AFTER, ROOM_AFTER = 2, 4
STOPPED_AFTER = 3


def main(recipe, disk, seen):
    """seen: file that gets the names of the run's checkpoints while the disk is full."""
    set_environment_defaults()
    config, ballast = load_config(recipe), Path(disk) / "ballast"
    on_batch_start = loop.on_batch_start

    def start(state, *args):
        if state.step == FULL_AFTER:
            fill(ballast)
        if state.step == ROOM_AFTER:
            folders = (Path(config.out_dir) / "checkpoints").iterdir()
            Path(seen).write_text("\n".join(sorted(folder.name for folder in folders)))
            ballast.unlink()
        on_batch_start(state, *args)

    loop.on_batch_start = start
    loop.train(config)
    return True


def stopped_while_full(recipe, disk, code_file):
    """The command; before its fourth update the disk fills up and SIGTERM comes. Leaves the exit code of rank 0.

    disk: folder of the small file system; None: the writer is refused as by a full disk.
    """
    on_batch_start = loop.on_batch_start

    def start(state, *args):
        if state.step == STOPPED_AFTER:
            if disk is not None:
                fill(Path(disk) / "ballast")
            else:
                checkpoint_format.save_file = no_space
            os.kill(os.getpid(), signal.SIGTERM)
        on_batch_start(state, *args)

    loop.on_batch_start = start
    return command(recipe, code_file)


def command(recipe, code_file):
    """`python -m rwkv_accel.train RECIPE`, whose exit code goes into a file."""
    try:
        code = train.main([recipe])
    except SystemExit as end:
        code = end.code
    if os.environ.get("RANK", "0") == "0":
        Path(code_file).write_text(str(code))
    return True


def no_space(tensors, path):
    Path(path).write_bytes(b"as far as it went")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(ballast):
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                continue
