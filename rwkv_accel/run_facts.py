"""What a run is: versions, code, hardware and model size, for environment.json and the trackers."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from rwkv_accel import __version__
from rwkv_accel.errors import UserError
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.ops import elementwise, wkv7
from rwkv_accel.peft.apply import count_parameters
from rwkv_accel.runtime import world_size


def model_facts(model: RWKV7) -> dict[str, Any]:
    """Sizes of the whole model, before it is sharded."""
    config = model.config
    total, trained = count_parameters(model)
    return {
        "layers": config.n_layer,
        "channels": config.n_embd,
        "head_size": config.head_size,
        "vocabulary": config.vocab_size,
        "parameters": total,
        "trained_parameters": trained,
    }


def kernels_of(model: RWKV7, device_type: str) -> str:
    """Which implementation of its operators a model runs on a device type, and why, in one line.

    Raises UserError if the recipe names one that cannot run there.
    """
    try:
        name, reason = wkv7.select_backend(model.wkv_backend, device_type, model.config.head_size, model.compute_dtype)
    except ValueError as error:
        raise UserError(f"model.wkv_backend: {error}") from error
    other, why = elementwise.select_backend("auto", device_type)
    return f"kernels on {device_type}: wkv7 {name} ({reason}), elementwise {other} ({why})"


def environment() -> dict[str, Any]:
    """Versions, code and hardware of this run, for the record."""
    from importlib.metadata import version

    packages = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "pydantic", "safetensors")
    return {
        "rwkv_accel": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size(),
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
