"""How a command ends its process: one of several leaves at once when all is well, and in the usual way otherwise."""

import subprocess
import sys

import pytest

from tests.helpers import environment

PROGRAM = """
import atexit, sys
from rwkv_accel.runtime import run_program
atexit.register(lambda: print("torn down", flush=True))

def main():
    sys.stdout.write("said ")
    {end}

run_program(main)
"""


@pytest.mark.parametrize(
    ("world", "end", "code", "torn_down"),
    [
        ("1", "return 0", 0, True),
        ("2", "return 0", 0, False),
        ("2", "raise SystemExit(75)", 75, False),
        ("2", "return 2", 2, True),
        ("2", "raise RuntimeError", 1, True),
    ],
)
def test_end_of_a_process(world, end, code, torn_down):
    env = environment()
    env["WORLD_SIZE"] = world
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "said " + ("torn down\n" if torn_down else "")
