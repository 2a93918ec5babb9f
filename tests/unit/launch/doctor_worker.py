"""The doctor in one of several processes, with a fault in rank 1: python doctor_worker.py FAULT [recipe ...]."""

import os
import sys
import time
from dataclasses import replace

from rwkv_accel.doctor import __main__ as doctor
from rwkv_accel.doctor import group

FAULTY = os.environ["RANK"] == "1"


def silent():
    """Never introduces itself."""
    group.ANSWER_SECONDS = 4.0
    if FAULTY:
        time.sleep(8)
        sys.exit(0)


def hangs():
    """Introduces itself and then stops in the middle of the collectives."""
    group.STEP_SECONDS = 4.0
    if FAULTY:
        group.shared_folder_checks = lambda *_: time.sleep(60)


def differs():
    """Another host with another version of the package, a clock five seconds fast, and another out_dir."""
    honest_facts, honest_time = group.gather_facts, time.time
    if FAULTY:
        group.gather_facts = lambda *a: replace(honest_facts(*a), code="0" * 64, hostname="elsewhere")
        group.time.time = lambda: honest_time() + 5
        group._sees = lambda *_: False


globals()[sys.argv[1]]()
sys.exit(doctor.main(sys.argv[2:]))
