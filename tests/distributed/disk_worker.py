"""Worker of test_full_disk.py: a run whose disk is full from its third update to its fourth."""

from pathlib import Path

from rwkv_accel import loop
from rwkv_accel.config.load import load_config
from rwkv_accel.runtime import set_environment_defaults

FULL_AFTER, ROOM_AFTER = 2, 4


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


def fill(ballast):
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                continue
