"""Shared by all tests: one thread, no network, no environment of the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Servers of tests are on this machine: a proxy of the environment must not be asked for them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
