"""A training whose checkpoint writer stops at a chosen place for ever; test_resume.py kills it there.

python held_writer.py STEP PLACE SIGN RECIPE: when the writer is at PLACE of the checkpoint of STEP, the file SIGN
appears. The training itself goes on until it needs the writer.
"""

import sys
import threading
from pathlib import Path

from rwkv_accel.checkpoint import format as checkpoint_format
from rwkv_accel.checkpoint import writer
from rwkv_accel.train import main

step, place, sign, recipe = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
module, name = {
    "the tensors": (checkpoint_format, "save_file"),
    "the final name": (checkpoint_format, "give_final_name"),
    "the retention": (writer, "prune"),
}[place]
real = getattr(module, name)


def held(*args):
    if any(f"step-{step:08d}" in str(path) for path in args) or (place == "the retention" and written(args[0])):
        sign.touch()
        threading.Event().wait()
    return real(*args)


def written(checkpoints):
    return (checkpoints / f"step-{step:08d}").exists()


setattr(module, name, held)
sys.exit(main([recipe]))
