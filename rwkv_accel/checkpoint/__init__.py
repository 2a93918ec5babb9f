"""Checkpoints: all that a run needs to go on, from any strategy into any, on any number of processes.

format.py      the folder on disk: written whole or not at all, checked before it is trusted
strategy.py    trained parameters and moments by name, out of and into a prepared model
layouts.py     where they lie under one process, DDP and FSDP2; zero.py: under DeepSpeed's ZeRO
run_lock.py    one run writes into a folder at a time
resume.py      which checkpoint a new start takes, and whether the recipe fits it
cadence.py     when one is due
writer.py      the thread that writes them
retention.py   which ones stay
store.py       files on an S3 server or its likes; remote.py: a run's copy there; uploads.py: the thread that makes it
weights.py     the save that people carry away (adapter or model)
"""

from rwkv_accel.checkpoint.cadence import SaveCadence
from rwkv_accel.checkpoint.format import CheckpointWriteError
from rwkv_accel.checkpoint.portable import load_checkpoint, save_checkpoint
from rwkv_accel.checkpoint.resume import check_same_run, find_resume, find_resume_on_all, read_state
from rwkv_accel.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointWriteError",
    "CheckpointWriter",
    "SaveCadence",
    "check_same_run",
    "find_resume",
    "find_resume_on_all",
    "load_checkpoint",
    "read_state",
    "save_checkpoint",
]
