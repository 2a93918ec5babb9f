"""relu(x)^2, the nonlinearity of RWKV's channel mix, in one pass each way.

Source: RWKV-LM train_temp/src/model.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_accel.ops.elementwise.backend import check_places, runs_triton
from rwkv_accel.ops.first_order import check_first_order


def relu_squared(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x [...] -> relu(x)^2 in x's dtype. Keeps x for the backward pass, nothing else.

    Raises ValueError for an x that is not floating point.
    """
    check_places("x", x, {})
    return _ReluSquared.apply(x, runs_triton(backend, x))


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.triton = triton
        if triton:
            from rwkv_accel.ops.elementwise.triton_relu import relu_squared_forward

            return relu_squared_forward(x.contiguous())
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        check_first_order("relu_squared")
        (x,) = ctx.saved_tensors
        if ctx.triton:
            from rwkv_accel.ops.elementwise.triton_relu import relu_squared_backward

            return relu_squared_backward(x.contiguous(), d_out.contiguous()), None
        return torch.relu(x).mul_(2).mul_(d_out), None
