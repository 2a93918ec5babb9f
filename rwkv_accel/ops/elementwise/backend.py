"""Which implementation of the elementwise ops runs on a device."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
STANDS_FOR: dict[str, str] = {}
"""Device type -> device type in whose place it is computed on: tensors without data, of which a plan is made."""

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
    device_type = tensor.device.type
    name, _ = select_backend(backend, STANDS_FOR.get(device_type, device_type))
    return name == "triton" and tensor.dtype != torch.float64


def check_alike(like_name: str, like: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError for a tensor whose shape, device or kind of dtype is not that of `like`; None is absent."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != like.shape:
            raise ValueError(f"{name} must have {like_name}'s shape {list(like.shape)}, got {list(tensor.shape)}")
    check_places(like_name, like, tensors)


def check_places(like_name: str, like: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError for a tensor that is on another device than `like`, or does not hold floating point values."""
    if not like.is_floating_point():
        raise ValueError(f"{like_name} must be a floating point tensor, got {like.dtype}")
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on {like_name}'s device {like.device}, got {tensor.device}")


def check_vectors(like_name: str, like: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """Raise ValueError for a vector that does not hold a floating point value per channel of `like`, on its device."""
    channels = like.shape[-1]
    for name, vector in vectors.items():
        if vector is not None and vector.numel() != channels:
            raise ValueError(f"{name} must have {channels} values, got {vector.numel()}")
    check_places(like_name, like, vectors)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic for tensors of `dtype`: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
