"""The decay of WKV-7 from its logit, for backends that read the logarithm of the decay.

    w_log = -e^-0.5 * sigmoid(w0 + w_low)

Shapes: B batch, T tokens, H heads, N head size. Sources: arXiv 2503.14456 section 4; RWKV-LM train_temp/src/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.ops.first_order import check_first_order
from rwkv_accel.ops.wkv7.checks import wide_dtype

DECAY_SCALE = -math.exp(-0.5)
"""w_log = DECAY_SCALE * sigmoid(w_logit): a channel keeps between 54.5% and 100% of its state per token."""


def log_decay(w_low: Tensor, w0: Tensor, wide: torch.dtype) -> Tensor:
    """w_low [B,T,H,N], w0 [H,N] -> w_log [B,T,H,N] in the wide dtype."""
    return torch.add(w_low.to(wide), w0.to(wide)).sigmoid_().mul_(DECAY_SCALE)


def logit_grad(w_log: Tensor, d_log: Tensor) -> Tensor:
    """Gradient of w0 + w_low. sigmoid' = share (1 - share), and share = w_log / DECAY_SCALE."""
    return torch.addcmul(w_log, w_log, w_log, value=-1 / DECAY_SCALE).mul_(d_log)


def reading_w_log(backend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A backend of `wkv7` out of one that takes (r, w_log, k, v, a, b, state, borders)."""

    def run(
        r: Tensor,
        w_low: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        w0: Tensor,
        state: Tensor | None,
        borders: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        w_log = _LogDecay.apply(w_low, w0, wide_dtype(r, w_low, k, v, a, b, w0))
        return backend(r, w_log, k, v, a, b, state, borders)

    return run


class _LogDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_low: Tensor, w0: Tensor, wide: torch.dtype) -> Tensor:
        w_log = log_decay(w_low, w0, wide)
        # The recurrence keeps it as well, so nothing of w_low stays.
        ctx.save_for_backward(w_log)
        ctx.dtypes = w_low.dtype, w0.dtype
        return w_log

    @staticmethod
    def backward(ctx: Any, d_log: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("the decay of wkv7")
        d_logit = logit_grad(ctx.saved_tensors[0], d_log)
        need_low, need_w0, _ = ctx.needs_input_grad
        low_dtype, w0_dtype = ctx.dtypes
        d_w0 = d_logit.sum((0, 1)).to(w0_dtype) if need_w0 else None
        return d_logit.to(low_dtype) if need_low else None, d_w0, None
