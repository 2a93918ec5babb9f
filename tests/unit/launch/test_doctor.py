"""The doctor: what it finds on one machine, and that it names the process that is at fault."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rwkv_accel.doctor import machine
from rwkv_accel.doctor.report import Check, print_checks
from tests.helpers import ROOT, environment, launch

RECIPE = "launch/recipes/demo.yaml"
WORKER = Path(__file__).with_name("doctor_worker.py")


def statuses(checks):
    return {(check.name, check.status) for check in checks}


def test_alone_reports_every_subject_and_exits_0(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_accel.doctor", RECIPE, f"out_dir={tmp_path}"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    subjects = {line.split()[1] for line in done.stdout.splitlines()[:-1]}
    assert subjects == {
        "packages", "devices", "dtypes", "kernels", "memory", "disk", "builds", "trackers", "recipe",
    }  # fmt: skip
    assert f"torch {torch.__version__}" in done.stdout
    assert done.stdout.endswith("fit to train\n")


def test_missing_data_and_wrong_recipe_exit_with_a_reason(capsys):
    from rwkv_accel.doctor.__main__ import main

    assert main([RECIPE, "data.path=none/such.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  recipe    none/such.jsonl does not exist" in out
    assert out.endswith("not fit: recipe\n")
    assert main([RECIPE, "optim.lr=1"]) == 2
    assert "unknown key optim.lr; here it is optim.lr_init" in capsys.readouterr().err


def test_stale_build_lock_is_told_from_a_fresh_one(tmp_path):
    # As in the trainer's folder, and as in torch's own with its level of versions.
    for name, age in (("ours/old_op", 3600), ("ours/new_op", 5), ("torch/py311_cpu/cpu_adam", 1200)):
        (tmp_path / name).mkdir(parents=True)
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    folders = [tmp_path / "ours", tmp_path / "torch"]
    new, old, other = machine.check_build_locks(folders)
    assert (new.status, old.status, other.status) == ("note", "WARN", "WARN")
    assert "ours/new_op/lock (" in new.text
    assert "ours/old_op/lock (60 min old)" in old.text
    assert "py311_cpu/cpu_adam/lock (20 min old)" in other.text
    for lock in tmp_path.rglob("lock"):
        lock.unlink()
    (check,) = machine.check_build_locks(folders)
    assert check.status == "ok"


def test_folders_of_builds_are_the_trainers_and_torchs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours, torchs = machine.build_folders()
    assert ours == tmp_path / "ours"
    assert torchs.name == "torch_extensions"
    assert not ours.exists()


def test_a_build_of_another_host_that_ends_while_locks_are_sought(monkeypatch, tmp_path):
    for name in ("ended", "stale"):
        (tmp_path / name).mkdir()
    (tmp_path / "stale" / "lock").touch()
    os.utime(tmp_path / "stale" / "lock", (0, 0))
    plain = os.scandir

    def scandir(folder):
        if os.fspath(folder) == os.fspath(tmp_path / "ended"):
            raise FileNotFoundError(folder)
        return plain(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    (check,) = machine.check_build_locks([tmp_path])
    assert check.status == "WARN"
    assert f"stale lock {tmp_path}/stale/lock" in check.text


def test_check_that_hangs_or_breaks_is_reported_and_hides_no_other(monkeypatch):
    forever = threading.Event()

    def breaks():
        raise OSError("stale file handle")

    monkeypatch.setattr(machine, "check_disk", lambda folder: forever.wait(100) and [])
    monkeypatch.setattr(machine, "check_memory", breaks)
    monkeypatch.setattr(machine, "check_kernels", lambda device: [Check("kernels", "ok", "fine")])
    checks = machine.examine_machine(None, seconds=2)
    forever.set()
    found = {check.name: check for check in checks}
    assert found["disk"].status == "FAIL"
    assert found["disk"].text.endswith("the file system of out_dir hangs: try `ls` there")
    assert found["memory"].text == "cannot be checked: OSError stale file handle"
    assert found["kernels"].text == "fine"


def test_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setitem(machine.BACKENDS, "broken", lambda *a: (machine.BACKENDS["reference"](*a)[0] * 1.01, None))
    checks = machine.check_kernels(torch.device("cpu"))
    (broken,) = [c for c in checks if c.text.startswith("broken")]
    assert broken.status == "FAIL"
    assert "1.0e-02" in broken.text


def test_folder_that_is_not_there_is_judged_by_its_parent(tmp_path):
    assert machine.check_disk(tmp_path / "a/b")[0].status in ("ok", "WARN")
    blocked = tmp_path / "blocked"
    blocked.mkdir(mode=0o500)
    if os.access(blocked, os.W_OK):
        pytest.skip("root may write everywhere")
    assert machine.check_disk(blocked / "run")[0].status == "FAIL"


def test_exit_code_and_verdict(capsys):
    assert print_checks([Check("a", "WARN", "x"), Check("b", "ok", "y")]) == 0
    assert print_checks([Check("a", "FAIL", "x"), Check("b", "FAIL", "y"), Check("a", "FAIL", "z")]) == 1
    assert capsys.readouterr().out.endswith("not fit: a, b\n")


def test_two_processes_agree(tmp_path):
    done = launch("ddp", 2, "-m", "rwkv_accel.doctor", RECIPE, f"out_dir={tmp_path}", timeout=120)
    out = done.stdout
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["rank", "0", "1"]
    assert f"{tmp_path} is shared by all hosts" in out
    assert "262144 KiB" in out or "16384 KiB" in out
    assert "largest difference" in out
    assert "fit to train\n" in out
    assert list(tmp_path.iterdir()) == []


def run_with_fault(fault, tmp_path):
    done = launch("ddp", 2, WORKER, fault, RECIPE, f"out_dir={tmp_path}", check=False, timeout=120)
    return done.returncode, done.stdout


def test_rank_that_never_comes_is_named(tmp_path):
    code, out = run_with_fault("silent", tmp_path)
    assert "FAIL  network" in out
    assert "rank 1 of 2 did not answer within 4 s" in out
    assert code != 0


def test_rank_that_hangs_in_a_collective_is_named(tmp_path):
    code, out = run_with_fault("hangs", tmp_path)
    assert re.search(r"FAIL  network +out_dir: rank 1 on \S+ does not answer", out)
    assert code != 0


def test_rank_that_differs_is_named(tmp_path):
    code, out = run_with_fault("differs", tmp_path)
    assert re.search(r"FAIL  nodes +rank 1 \(elsewhere\) runs other rwkv_accel code than rank 0", out)
    assert re.search(r"FAIL  nodes +rank 1 \(elsewhere\) runs another recipe than rank 0", out)
    assert re.search(r"FAIL  nodes +rank 1 \(elsewhere\) does not have its.jsonl", out)
    assert re.search(r"FAIL  disk +elsewhere: \S+ is full", out)
    assert re.search(r"WARN  clocks +the clock of rank 1 on elsewhere is off by \+5.0 s", out)
    assert re.search(r"FAIL  out_dir +elsewhere does not see what rank 0 writes", out)
    assert code != 0


def test_more_processes_than_gpus_are_named_and_the_rest_is_checked_without_them(tmp_path):
    code, out = run_with_fault("shares_a_gpu", tmp_path)
    assert re.search(r"FAIL  nodes +\S+ has 1 GPUs for 2 processes; give --num_processes 1 per node", out)
    assert "ok    all-reduce" in out
    assert code != 0


def test_store_that_nobody_serves_is_named():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, WORKER, "impatient"],
        cwd=ROOT, env={**environment(), **launched}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"FAIL  network  {socket.gethostname()} does not reach rank 0" in done.stdout
