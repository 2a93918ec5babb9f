"""Shared by all tests: one thread, no network, no environment of the machine."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Servers of tests are on this machine: a proxy of the environment must not be asked for them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
# A shell starts what it puts into the background deaf to Ctrl-C, and its children with it; tests send that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
