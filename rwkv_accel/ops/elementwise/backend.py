"""Which implementation of the elementwise ops runs on a device."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")

logger = logging.getLogger(__name__)


@cache
def select_backend(backend: str, device_type: str) -> tuple[str, str]:
    """(name, reason) of the implementation for a request on a device type ("cpu", "cuda", ...).

    "auto" takes Triton on a GPU if it is installed, else torch; one asked for by name is taken. Raises ValueError for
    a name that does not exist. The choice is logged once.
    """
    if backend == "auto":
        if device_type != "cuda":
            name, reason = "torch", f"auto: Triton compiles for GPUs, not for {device_type}"
        elif find_spec("triton") is None:
            name, reason = "torch", "auto: triton is not installed (pip install triton)"
        else:
            name, reason = "triton", "auto: the fastest on a GPU"
    elif backend in BACKENDS:
        name, reason = backend, "asked for by name"
    else:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    logger.info("elementwise backend on %s: %s (%s)", device_type, name, reason)
    return name, reason


def runs_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor. fp64 is the oracle's dtype: torch computes it.

    torch.compile gets the torch twins: it sees into them, and fuses them with what stands beside them.
    """
    if backend == "auto" and torch.compiler.is_compiling():
        return False
    name, _ = select_backend(backend, tensor.device.type)
    return name == "triton" and tensor.dtype != torch.float64


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic for tensors of `dtype`: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
