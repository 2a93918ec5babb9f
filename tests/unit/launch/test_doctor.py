"""The doctor: what it finds on one machine, and that it names the process that is at fault."""

import os
import re
import subprocess
import sys
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


def test_stale_build_lock_is_found_and_a_fresh_one_is_not(tmp_path):
    for name, age in (("old_op", 3600), ("new_op", 5)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    (check,) = machine.check_build_locks(tmp_path)
    assert check.status == "WARN"
    assert "old_op/lock (60 min old)" in check.text
    (tmp_path / "old_op/lock").unlink()
    assert machine.check_build_locks(tmp_path)[0].status == "ok"


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
    assert re.search(r"WARN  clocks +the clock of rank 1 on elsewhere is off by \+5.0 s", out)
    assert re.search(r"FAIL  out_dir +elsewhere does not see what rank 0 writes", out)
    assert code != 0
