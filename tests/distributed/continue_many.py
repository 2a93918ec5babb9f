"""Worker of test_stream_resume.py: runs recipes one after the other inside the same launched processes.

An argument is a recipe, or `FOLDER+STEP+RECIPE`: first the run in FOLDER is copied to the recipe's out_dir as it was
when the checkpoint of STEP had just been written, as after a kill.
"""

import shutil
import sys
from pathlib import Path

from accelerate.state import PartialState

from rwkv_accel.config.load import load_config
from rwkv_accel.runtime import set_environment_defaults
from tests.distributed.train_many import run


def copy_killed(folder: str, step: str, out_dir: str) -> None:
    shutil.copytree(folder, out_dir)
    for checkpoint in (Path(out_dir) / "checkpoints").iterdir():
        if checkpoint.name > f"step-{int(step):08d}":
            shutil.rmtree(checkpoint)
    shutil.rmtree(Path(out_dir) / "adapter")


if __name__ == "__main__":
    set_environment_defaults()
    state = PartialState(cpu=True)
    for argument in sys.argv[1:]:
        *killed, recipe = argument.split("+")
        if killed and state.is_main_process:
            copy_killed(*killed, load_config(recipe).out_dir)
        state.wait_for_everyone()
        run(recipe)
    PartialState().destroy_process_group()
