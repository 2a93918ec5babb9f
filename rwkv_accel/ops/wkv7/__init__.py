"""The WKV-7 recurrence: one signature, several backends.

    w_log = -e^-0.5 sigmoid(w0 + w_low)
    S_t   = S_{t-1} diag(exp(w_log_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T
    out_t = S_t r_t

Shapes: B batch, T tokens, H heads, N head size, S sequences of a packed batch. States are [B,H,value,key].
Source: arXiv 2503.14456 section 4; RWKV-LM train_temp/src/model.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.ops.wkv7.checks import check_inputs, data_dtype
from rwkv_accel.ops.wkv7.chunked import wkv7_chunked
from rwkv_accel.ops.wkv7.decay import reading_w_log
from rwkv_accel.ops.wkv7.native import obstacle as native_obstacle
from rwkv_accel.ops.wkv7.native import wkv7_native
from rwkv_accel.ops.wkv7.reference import wkv7_reference
from rwkv_accel.ops.wkv7.triton_config import obstacle as triton_obstacle

__all__ = ["BACKENDS", "available_backends", "select_backend", "wkv7"]

logger = logging.getLogger(__name__)


Backend = Callable[..., tuple[Tensor, Tensor]]


def _wkv7_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Not at the top: the package is absent on some platforms, and its import takes a while.
    from rwkv_accel.ops.wkv7.triton_op import wkv7_triton

    return wkv7_triton(*arguments)


BACKENDS: dict[str, Backend] = {
    "reference": reading_w_log(wkv7_reference),
    "chunked": reading_w_log(wkv7_chunked),
    "native": wkv7_native,
    "triton": _wkv7_triton,
}


@cache
def select_backend(
    backend: str, device_type: str, head_size: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """(name, reason) of the backend that `wkv7` runs for a request on a device type ("cpu", "cuda", ...).

    "auto" takes the fastest that runs there; a backend asked for by name is taken or refused, never replaced.
    `dtype` is that of the data (fp64 if any input is). Raises ValueError for a name that does not exist, and for a
    backend that cannot run there. Each choice is logged once; on a CPU the first may compile (native_build.py).
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    name, reason = backend, "asked for by name"
    if backend == "auto":
        fastest = "native" if device_type == "cpu" else "triton"
        problem = _OBSTACLES[fastest](device_type, head_size, dtype)
        name = "chunked" if problem else fastest
        reason = f"auto: not {fastest}, {problem}" if problem else f"auto: the fastest backend on {device_type}"
    elif backend in _OBSTACLES:
        problem = _OBSTACLES[backend](device_type, head_size, dtype)
        if problem is not None:
            raise ValueError(f"backend {backend} cannot run: {problem}; take auto or chunked")
    logger.info("wkv7 backend on %s: %s (%s)", device_type, name, reason)
    return name, reason


def available_backends(device_type: str, head_size: int = 64, dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that run such inputs on a device type."""
    problems = {name: find(device_type, head_size, dtype) for name, find in _OBSTACLES.items()}
    return [name for name in BACKENDS if problems.get(name) is None]


def _native_obstacle(device_type: str, head_size: int, dtype: torch.dtype) -> str | None:
    """Why the compiled functions cannot run there, or None."""
    # The meta device stands for a CPU where memory is counted.
    return (
        native_obstacle(head_size, dtype)
        if device_type in ("cpu", "meta")
        else f"it runs on a CPU, not on {device_type}"
    )


def _triton_obstacle(device_type: str, head_size: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run there, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            return "a CPU runs them only under Triton's interpreter (TRITON_INTERPRET=1)"
    elif device_type != "cuda":
        return f"there are kernels for NVIDIA and AMD GPUs, not for {device_type}"
    elif torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "NVIDIA GPUs before compute capability 8.0 do not multiply bf16"
    return triton_obstacle(dtype, head_size)


_OBSTACLES: dict[str, Callable[[str, int, torch.dtype], str | None]] = {
    "native": _native_obstacle,
    "triton": _triton_obstacle,
}


def wkv7(
    r: Tensor,
    w_low: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    w0: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """WKV-7 over whole sequences -> (out [B,T,H,N] in v's dtype, final state [B,H,N,N], fp32 or fp64).

    Differentiable once in all seven inputs and the state. Computes in fp32, or in fp64 if any input is fp64.

    Args:
        r, w_low, k, v, a, b: [B,T,H,N], any float dtype. w_low is the part of the decay's logit that tokens make.
        w0: [H,N] the part of every channel, any float dtype; fp32 is what the decay's precision rests on.
        state: [B,H,N,N] state before the first token, None for zeros.
        cu_seqlens: int [S+1], borders of S documents packed into a batch of one row, rising strictly from 0
            to T; the state restarts at every border, `state` and the final state are [S,H,N,N]. Best kept on
            the host: its values lay out the work, so a tensor on an accelerator costs a wait for the device.
        backend: "auto", "reference", "chunked", "native" or "triton".

    Raises ValueError, before any work, for inputs that do not fit together.
    """
    if torch.compiler.is_compiling() and backend != "reference":
        from rwkv_accel.ops.wkv7.opaque import wkv7_opaque

        return wkv7_opaque((r, w_low, k, v, a, b, w0), state, cu_seqlens, backend)
    borders = check_inputs(r, w_low, k, v, a, b, w0, state, cu_seqlens)
    dtype = data_dtype(r, w_low, k, v, a, b, w0)
    name, _ = select_backend(backend, r.device.type, r.shape[-1], dtype)
    return BACKENDS[name](r, w_low, k, v, a, b, w0, state, borders)
