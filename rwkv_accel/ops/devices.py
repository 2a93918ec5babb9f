"""On which device a Triton kernel is queued, and how tables of the host get there without waiting."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which kernels run on the tensors' device."""
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for the work that the device has queued."""
    # Memory that is not pinned is read before the call returns, in its turn on the device if it is more than 64 KiB.
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)
