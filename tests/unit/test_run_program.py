"""How a command ends its process: one of several leaves at once when all is well, and in the usual way otherwise."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import environment, ragged_jsonl, tiny_checkpoint, write_recipe

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
        ("1", "raise KeyboardInterrupt", 130, True),
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


def catches(process, number):
    """Whether a process has a handler for a signal by now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_before_anything_is_loaded_asks_for_another_start(tmp_path, number):
    tiny_checkpoint(tmp_path / "base.pth", n_layer=1)
    ragged_jsonl(tmp_path / "data.jsonl", 8)
    tree = {
        "out_dir": str(tmp_path / "out"),
        "model": {"path": str(tmp_path / "base.pth")},
        "data": {
            "path": str(tmp_path / "data.jsonl"),
            "prompt_column": "q",
            "response_column": "a",
            "tokenizer": "byte",
        },
    }
    command = [sys.executable, "-m", "rwkv_accel.train", str(write_recipe(tmp_path / "r.yaml", tree))]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    # Of SIGUSR1: the interpreter itself catches SIGINT.
    while not catches(process, signal.SIGUSR1):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert f"stopped by {number.name}" in said
    assert "Traceback" not in said


def run_module(module, *args, **env):
    argv = [sys.executable, "-m", f"rwkv_accel.{module}", *map(str, args)]
    return subprocess.run(argv, env=environment(**env), capture_output=True, timeout=120)


def test_a_terminal_without_the_character_shows_its_escape(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "smile 😀"}\n', encoding="utf-8")
    done = run_module("data", "preview", tmp_path / "d.jsonl", "data.tokenizer=byte", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert b"smile \\U0001f600" in done.stdout


def test_a_reader_that_has_seen_enough_ends_generate_quietly(tmp_path):
    base = tiny_checkpoint(tmp_path / "base.pth", n_layer=1)
    argv = [sys.executable, "-m", "rwkv_accel.generate", str(base), "hi", "--max-new-tokens", "20", "--ban-id", "0"]
    job = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.close()
    assert b"Traceback" not in job.stderr.read()
    assert job.wait(timeout=120) == 0
