"""Worker of test_watchdog.py: a run of two processes of which the second comes to a halt in its third update.

main(recipe, how)    hang: its thread waits until both ranks have reported, then goes on; stop: SIGSTOP, for ever
"""

import os
import signal
import time
from pathlib import Path

from rwkv_accel import loop
from rwkv_accel.config.load import load_config
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.runtime import set_environment_defaults


def main(recipe, how):
    set_environment_defaults()
    config = load_config(recipe)
    halt_in_third_update(Path(config.out_dir), how)
    loop.train(config)
    return True


def halt_in_third_update(out_dir, how):
    calls, forward = [0], RWKV7.forward

    def halting(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 3 and os.environ["RANK"] == "1":
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            wait_in_vain(out_dir)
        return forward(self, *args, **kwargs)

    RWKV7.forward = halting


def wait_in_vain(out_dir):
    """Named in the stacks of the report."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not all(is_reported(out_dir / f"stall-rank{rank}.txt") for rank in (0, 1)):
        time.sleep(0.05)


def is_reported(path):
    """Whether the last report is of this halt: a slow machine may have looked stalled before, each time anew."""
    text = path.read_text() if path.exists() else ""
    last = text.split("stall:")[-1]
    return "rank 1 is behind" in last and "forward pass, step 3" in last and last.endswith("end of the report\n\n")
