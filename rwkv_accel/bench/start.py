"""Time from the command to the first update of the demo, and of `--help`: what a user waits for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rwkv_accel.bench.harness import Options, Row

DEMO = "launch/recipes/demo.yaml"
TIMEOUT_SECONDS = 120.0


def measure(options: Options) -> list[Row]:
    rounds = min(options.repeats, 3)
    rows = [Row("--help answers", median(_seconds_of(["--help"]) for _ in range(rounds)), "s")]
    if not Path(DEMO).is_file():
        return rows  # an installed package without its repository has no demo
    return [*rows, Row("demo: command to first update", median(_first_update() for _ in range(rounds)), "s")]


def _seconds_of(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rwkv_accel.train", *arguments], capture_output=True, check=True)
    return time.perf_counter() - start


def _first_update() -> float:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "loss_data.json"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "rwkv_accel.train", DEMO, f"out_dir={folder}", "trainer.log_every_n_steps=1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while time.perf_counter() - start < TIMEOUT_SECONDS:
                if log.is_file() and json.loads(log.read_text() or "[]"):
                    return time.perf_counter() - start
                time.sleep(0.01)
            raise RuntimeError(f"the demo made no update within {TIMEOUT_SECONDS:g} s")
        finally:
            process.kill()
            process.wait()
