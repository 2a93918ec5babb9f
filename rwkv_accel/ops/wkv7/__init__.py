"""The WKV-7 recurrence: one signature, several backends.

    S_t   = S_{t-1} diag(exp(w_log_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T
    out_t = S_t r_t

Shapes: B batch, T tokens, H heads, N head size, S sequences of a packed batch. States are [B,H,value,key].
Source: arXiv 2503.14456 section 4; RWKV-LM train_temp/src/model.py.
"""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from rwkv_accel.ops.wkv7.checks import check_inputs
from rwkv_accel.ops.wkv7.chunked import wkv7_chunked
from rwkv_accel.ops.wkv7.reference import wkv7_reference

__all__ = ["BACKENDS", "select_backend", "wkv7"]

logger = logging.getLogger(__name__)

BACKENDS = {"reference": wkv7_reference, "chunked": wkv7_chunked}


@cache
def select_backend(backend: str, device_type: str) -> tuple[str, str]:
    """(name, reason) of the backend that `wkv7` runs for a request on a device type ("cpu", "cuda", ...).

    "auto" takes the fastest that runs there; a backend asked for by name is taken or refused, never replaced.
    Raises ValueError for a name that does not exist. The choice is logged once.
    """
    if backend == "auto":
        name, reason = "chunked", f"auto: the fastest backend on {device_type}"
    elif backend in BACKENDS:
        name, reason = backend, "asked for by name"
    else:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    logger.info("wkv7 backend on %s: %s (%s)", device_type, name, reason)
    return name, reason


def wkv7(
    r: Tensor,
    w_log: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """WKV-7 over whole sequences -> (out [B,T,H,N] in v's dtype, final state [B,H,N,N], fp32 or fp64).

    Differentiable once in all six inputs and the state. Computes in fp32, or in fp64 if any input is fp64.

    Args:
        r, k, v, a, b: [B,T,H,N], any float dtype.
        w_log: [B,T,H,N] log decay, in (-0.60653, 0).
        state: [B,H,N,N] state before the first token, None for zeros.
        cu_seqlens: int [S+1], borders of S documents packed into a batch of one row, rising strictly from 0
            to T; the state restarts at every border, `state` and the final state are [S,H,N,N]. Best kept on
            the host: its values lay out the work, so a tensor on an accelerator costs a wait for the device.
        backend: "auto", "reference" or "chunked".

    Raises ValueError, before any work, for inputs that do not fit together.
    """
    name, _ = select_backend(backend, r.device.type)
    borders = check_inputs(r, w_log, k, v, a, b, state, cu_seqlens)
    return BACKENDS[name](r, w_log, k, v, a, b, state, borders)
