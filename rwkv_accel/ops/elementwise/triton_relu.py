"""Triton kernels of `relu_squared`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rwkv_accel.ops.elementwise.triton_common import empty_like, launch, load_tile, store_tile

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def relu_squared_kernel(x_p, d_out_p, out_p, count, BLOCK: tl.constexpr):
    """relu(x)^2, or with d_out its gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    positive = tl.maximum(load_tile(x_p, at, here), 0.0)
    if d_out_p is None:
        result = positive * positive
    else:
        result = 2.0 * positive * load_tile(d_out_p, at, here)
    store_tile(out_p, at, here, result)


def relu_squared_forward(x: Tensor) -> Tensor:
    return _run(x, None)


def relu_squared_backward(x: Tensor, d_out: Tensor) -> Tensor:
    return _run(x, d_out)


def _run(x: Tensor, d_out: Tensor | None) -> Tensor:
    out = empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    launch(relu_squared_kernel, grid, x, d_out, out, x.numel(), BLOCK)
    return out
