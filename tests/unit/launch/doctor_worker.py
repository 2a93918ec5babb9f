"""The doctor in one of several processes, with a fault in rank 1: python doctor_worker.py FAULT [recipe ...]."""

import os
import sys
import time
from dataclasses import replace

from rwkv_accel.doctor import __main__ as doctor
from rwkv_accel.doctor import group, machine
from rwkv_accel.doctor.report import Check

FAULTY = os.environ["RANK"] == "1"


def silent():
    """Never introduces itself."""
    group.ANSWER_SECONDS = 4.0
    if FAULTY:
        time.sleep(8)
        sys.exit(0)


def impatient():
    """Waits less for rank 0 than the doctor does."""
    group.ANSWER_SECONDS = 4.0


def hangs():
    """Introduces itself and then stops in the middle of the collectives."""
    group.STEP_SECONDS = 4.0
    if FAULTY:
        group.shared_folder_checks = lambda *_: time.sleep(60)


def differs():
    """Another host with other code, recipe and files, a clock five seconds fast, another out_dir and a full disk."""
    honest_facts, honest_time = group.gather_facts, time.time
    if FAULTY:
        strange = {"code": "0" * 64, "recipe": "1" * 64, "missing": ("its.jsonl",), "hostname": "elsewhere"}
        group.gather_facts = lambda *a: replace(honest_facts(*a), **strange)
        group.time.time = lambda: honest_time() + 5
        group._sees = lambda *_: False
        machine.check_disk = lambda folder: [Check("disk", "FAIL", f"{folder} is full")]


def shares_a_gpu():
    """One GPU for the two processes of this host."""
    honest_facts = group.gather_facts
    group.gather_facts = lambda *a: replace(honest_facts(*a), num_gpus=1)


globals()[sys.argv[1]]()
sys.exit(doctor.main(sys.argv[2:]))
