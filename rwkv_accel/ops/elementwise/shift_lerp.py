"""Token shift and its interpolations: out_i = h_t + (h_{t-1} - h_t) * x_i for n vectors x_i at once.

Shapes: B batch, T tokens, C channels, n interpolations, S sequences of a packed batch.
Source: RWKV-LM train_temp/src/model.py (time shift and the six x_*).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.ops.devices import to_device
from rwkv_accel.ops.elementwise.backend import check_places, runs_triton
from rwkv_accel.ops.first_order import check_first_order


def start_table(borders: Tensor, device: torch.device | str) -> Tensor:
    """int32 [T] on the device: the number of the sequence that starts at a token, -1 elsewhere.

    borders: int64 [S+1] on the host, rising strictly from 0 to T.
    """
    table_T = torch.full((int(borders[-1]),), -1, dtype=torch.int32)
    table_T[borders[:-1]] = torch.arange(len(borders) - 1, dtype=torch.int32)
    return to_device(table_T, device)


def shift_lerp(
    h_BTC: Tensor,
    x_nC: Tensor,
    *,
    shift: Tensor | None = None,
    first_S: Tensor | None = None,
    starts_T: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """h_t + (h_{t-1} - h_t) * x_i -> [n,B,T,C] in h's dtype.

    Args:
        h_BTC: [B,T,C], any float dtype.
        x_nC: [n,C] interpolation weights in h's dtype.
        shift: what stands before the first token of each sequence, [B,C], or [S,C] for packed rows. None: zeros.
        first_S, starts_T: the packed sequences of a batch of one row: position of each first token, int64 [S], and
            `start_table`. None: every row is one sequence.
        backend: "auto", "torch" or "triton".

    Raises ValueError, before any work, for tensors that do not fit together.
    """
    if h_BTC.dim() != 3 or x_nC.dim() != 2 or x_nC.shape[1] != h_BTC.shape[2] or x_nC.dtype != h_BTC.dtype:
        raise ValueError(
            f"h must be [B,T,C] and x [n,C] of one dtype, got {list(h_BTC.shape)} {h_BTC.dtype} and "
            f"{list(x_nC.shape)} {x_nC.dtype}"
        )
    if (first_S is None) != (starts_T is None):
        raise ValueError("first_S and starts_T describe the same packed sequences: give both or none")
    if first_S is not None and starts_T is not None:
        tables = f"first_S and starts_T must be int64 [S] and int32 [T] on {h_BTC.device} for a batch of one row"
        good = first_S.dtype == torch.int64 and starts_T.dtype == torch.int32 and first_S.dim() == 1
        if not good or h_BTC.shape[0] != 1 or starts_T.shape != h_BTC.shape[1:2]:
            raise ValueError(
                f"{tables}, got {first_S.dtype} {list(first_S.shape)} and {starts_T.dtype} "
                f"{list(starts_T.shape)} for {list(h_BTC.shape)}"
            )
        if first_S.device != h_BTC.device or starts_T.device != h_BTC.device:
            raise ValueError(f"{tables}, got {first_S.device} and {starts_T.device}")
    check_places("h", h_BTC, {"x": x_nC, "shift": shift})
    sequences = h_BTC.shape[0] if first_S is None else len(first_S)
    if shift is not None and shift.shape != (sequences, h_BTC.shape[2]):
        raise ValueError(f"shift must be [{sequences}, {h_BTC.shape[2]}], got {list(shift.shape)}")
    if shift is not None:
        shift = shift.to(h_BTC.dtype)
    return _ShiftLerp.apply(h_BTC, x_nC, shift, first_S, starts_T, runs_triton(backend, h_BTC))


def previous_tokens(h_BTC: Tensor, shift: Tensor | None, first_S: Tensor | None) -> Tensor:
    """h_{t-1} for every t; the first token of a sequence gets its row of `shift` (None: zeros)."""
    if first_S is None and shift is not None:
        return torch.cat([shift.unsqueeze(1), h_BTC[:, :-1]], dim=1)
    prev_BTC = F.pad(h_BTC[:, :-1], (0, 0, 1, 0))
    if first_S is None:
        return prev_BTC
    if shift is None:
        return prev_BTC.index_fill_(1, first_S, 0.0)
    return prev_BTC.index_copy_(1, first_S, shift.unsqueeze(0))


class _ShiftLerp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BTC: Tensor,
        x_nC: Tensor,
        shift: Tensor | None,
        first_S: Tensor | None,
        starts_T: Tensor | None,
        triton: bool,
    ) -> Tensor:
        ctx.triton = triton
        # A frozen x needs h no more in the backward pass.
        kept = (h_BTC, shift) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(x_nC, first_S, starts_T, *kept)
        ctx.has_shift = shift is not None
        if triton:
            from rwkv_accel.ops.elementwise.triton_shift import shift_lerp_forward

            return shift_lerp_forward(h_BTC, x_nC, shift, starts_T)
        delta_BTC = previous_tokens(h_BTC, shift, first_S).sub_(h_BTC)
        return torch.addcmul(h_BTC, delta_BTC, x_nC[:, None, None])

    @staticmethod
    def backward(ctx: Any, d_nBTC: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("shift_lerp")
        x_nC, first_S, starts_T, h_BTC, shift = ctx.saved_tensors
        need_h, need_x, need_shift = ctx.needs_input_grad[:3]
        dh = dx = d_shift = None
        if ctx.triton:
            from rwkv_accel.ops.elementwise.triton_shift import shift_lerp_backward

            dh, dx = shift_lerp_backward(d_nBTC.contiguous(), x_nC, h_BTC, shift, starts_T, need_h, need_x)
            if need_shift:
                d_first = d_nBTC[:, :, 0] if first_S is None else d_nBTC[:, 0].index_select(1, first_S)
                d_shift = torch.einsum("nsc,nc->sc", d_first, x_nC)
            return dh, dx, d_shift, None, None, None
        if need_x:
            delta_BTC = previous_tokens(h_BTC, shift, first_S).sub_(h_BTC)
            dx = torch.stack([(d * delta_BTC).sum((0, 1)) for d in d_nBTC])
        if need_h or need_shift:
            # What each token gives to its successor's interpolation goes one token back.
            d_prev_BTC = torch.mul(d_nBTC[0], x_nC[0])
            for d_BTC, x_C in zip(d_nBTC[1:], x_nC[1:]):
                d_prev_BTC.addcmul_(d_BTC, x_C)
            if need_shift:
                d_shift = d_prev_BTC[:, 0].clone() if first_S is None else d_prev_BTC[0].index_select(0, first_S)
            if need_h:
                dh = d_nBTC.sum(0).sub_(d_prev_BTC)
                if first_S is not None:
                    d_prev_BTC.index_fill_(1, first_S, 0.0)
                dh[:, :-1] += d_prev_BTC[:, 1:]
        return dh, dx, d_shift, None, None, None
