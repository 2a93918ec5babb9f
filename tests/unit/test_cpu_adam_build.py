"""DeepSpeed's CPU Adam is built by one process at a time, and a lock that a killed one left behind stops nobody."""

import fcntl
import os
import time
from types import SimpleNamespace

import pytest

from rwkv_accel.runtime import STALE_LOCK_SECONDS, load_cpu_adam


def accelerator(device):
    config = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(folder) -> whether the lock file was there while CPU Adam was built; None: it was not built."""
    import deepspeed.ops.op_builder

    seen = []

    class Builder:
        NAME = "cpu_adam"

        def load(self):
            folder = tmp_path / os.environ["TORCH_EXTENSIONS_DIR"] / self.NAME
            with open(folder / ".in_turn") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append((folder / "lock").exists())

    monkeypatch.setattr(deepspeed.ops.op_builder, "CPUAdamBuilder", Builder)
    monkeypatch.setenv("HOME", str(tmp_path))

    def build(folder, *, age=0, device="cpu"):
        lock = tmp_path / folder / "cpu_adam" / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / folder))
        load_cpu_adam(accelerator(device))
        return seen.pop() if seen else None

    return build


def test_lock_in_our_own_folder_is_nobodys(build):
    assert build(".cache/rwkv_accel/ext") is False


def test_lock_in_a_folder_that_others_use_must_be_old(build):
    assert build("fresh") is True
    assert build("old", age=STALE_LOCK_SECONDS + 60) is False


def test_nothing_is_built_without_offload(build):
    assert build("none", device="none") is None
    load_cpu_adam(SimpleNamespace(state=SimpleNamespace()))
