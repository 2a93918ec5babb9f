"""Runs the tests of `cases/` in a process where Triton interprets its kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
def test_cases_pass_under_the_interpreter():
    # Without cache: it would overwrite what the tests around it remember of failures.
    command = [sys.executable, "-m", "pytest", "tests/kernels/cases", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1150, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
