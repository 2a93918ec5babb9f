"""One run writes into a folder at a time, however the one before ended; trainers end with their launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_accel.checkpoint.run_lock import LOCK_FILE, take
from rwkv_accel.errors import UserError
from tests.helpers import ROOT, environment

HOLD = (
    "import sys; from pathlib import Path; from rwkv_accel.checkpoint.run_lock import take\n"
    "lock = take(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def holder(folder):
    """A process that has the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path):
    with holder(tmp_path) as first:
        with pytest.raises(UserError) as refused:
            take(tmp_path, wait_seconds=0)
        first.stdin.close()
        first.wait()
    assert f"process {first.pid} on " in str(refused.value)
    assert f"still trains in {tmp_path}; end it first, or give another out_dir" in str(refused.value)


def test_a_killed_run_leaves_no_lock(tmp_path):
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
    take(tmp_path, wait_seconds=0).release()


def test_a_second_run_waits_for_one_that_is_ending(tmp_path):
    with holder(tmp_path) as first, holder_later(tmp_path) as second:
        assert any("waiting for process" in line for line in second.stderr)
        first.stdin.close()
        assert second.stdout.readline() == "held\n"
        second.stdin.close()


def holder_later(folder):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_release_lets_the_same_process_in_again(tmp_path):
    first = take(tmp_path / "run")
    first.release()
    first.release()
    take(tmp_path / "run", wait_seconds=0).release()
    assert (tmp_path / "run" / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory; choose another out_dir"):
        take(tmp_path / "file" / "run")


def test_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    take(tmp_path).release()
    assert "No locks available): do not start a second run in it" in caplog.text


LAUNCHER = """
import os, subprocess, sys
name, value = sys.argv[2].split("=")
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, name: value})
sys.stdin.read()
"""
TRAINER = """
import signal
from rwkv_accel.runtime import end_with_launcher
end_with_launcher()
print("ready", flush=True)
print(signal.Signals(signal.sigwait({signal.SIGTERM, signal.SIGALRM})).name, flush=True)
"""
BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})\n"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="not Linux: no signal at the death of a parent")
@pytest.mark.parametrize(
    ("launched", "met"),
    [("TORCHELASTIC_RUN_ID=a", "SIGTERM"), ("ACCELERATE_MIXED_PRECISION=no", "SIGTERM"), ("NOBODY=a", "SIGALRM")],
)
def test_trainer_of_a_killed_launcher_is_asked_to_stop(launched, met):
    # Without a launcher nothing comes: the alarm ends the wait.
    trainer = BLOCKED + ("signal.alarm(2)\n" if met == "SIGALRM" else "") + TRAINER
    env = environment()
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        env.pop(name, None)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, trainer, launched], cwd=ROOT, env=env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGKILL)
    assert launcher.stdout.readline() == f"{met}\n"
    launcher.wait()
