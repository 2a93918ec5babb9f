"""Triton kernels of `shift_lerp`.

Shapes: M rows (tokens of all sequences of the batch), T tokens of a row of the batch, C channels, n interpolations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_accel.ops.elementwise.triton_common import (
    NUM_WARPS,
    SUM_STEPS,
    empty_like,
    empty_sums,
    launch,
    load_tile,
    store_tile,
)

BLOCK_M, BLOCK_C = 4, 128


@triton.jit
def sequence_started(starts_p, rows, here, row_length):
    """Number of the sequence whose first token a row is, -1 for every other row."""
    if starts_p is None:
        started = tl.where(rows % row_length == 0, rows // row_length, -1)
    else:
        started = tl.load(starts_p + rows, mask=here, other=0).to(tl.int64)
    return started


@triton.jit
def load_previous(h_p, shift_p, started_M, rows_M, columns_C, here_MC, channels):
    """h of the token before; at the start of a sequence its row of shift, or zeros."""
    inside = (started_M < 0)[:, None] & here_MC
    prev_MC = load_tile(h_p, (rows_M - 1)[:, None] * channels + columns_C[None, :], inside)
    if shift_p is not None:
        first = (started_M >= 0)[:, None] & here_MC
        prev_MC += load_tile(shift_p, started_M[:, None] * channels + columns_C[None, :], first)
    return prev_MC


@triton.jit(do_not_specialize=["num_rows", "row_length", "channels"])
def shift_lerp_kernel(
    h_p, x_p, shift_p, starts_p, out_p, num_rows, row_length, channels,
    n: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here_M, here_C = rows_M < num_rows, columns_C < channels
    here_MC = here_M[:, None] & here_C[None, :]
    at_MC = rows_M[:, None] * channels + columns_C[None, :]
    started_M = sequence_started(starts_p, rows_M, here_M, row_length)
    h_MC = load_tile(h_p, at_MC, here_MC)
    delta_MC = load_previous(h_p, shift_p, started_M, rows_M, columns_C, here_MC, channels) - h_MC
    size = num_rows.to(tl.int64) * channels
    for i in tl.static_range(n):
        x_C = load_tile(x_p + i * channels, columns_C, here_C)
        store_tile(out_p + i * size, at_MC, here_MC, h_MC + delta_MC * x_C[None, :])


@triton.jit(do_not_specialize=["num_rows", "row_length", "channels"])
def shift_lerp_grad_kernel(
    d_p, x_p, starts_p, dh_p, num_rows, row_length, channels,
    n: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A token's own share of its interpolations, and its share of the next token's, unless a sequence starts there."""
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here_M, here_C = rows_M < num_rows, columns_C < channels
    here_MC = here_M[:, None] & here_C[None, :]
    at_MC = rows_M[:, None] * channels + columns_C[None, :]
    next_M = rows_M + 1
    next_here_M = next_M < num_rows
    next_here_M &= sequence_started(starts_p, next_M, next_here_M, row_length) < 0
    next_here_MC = next_here_M[:, None] & here_C[None, :]
    size = num_rows.to(tl.int64) * channels
    dh_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in tl.static_range(n):
        x_C = load_tile(x_p + i * channels, columns_C, here_C)[None, :]
        dh_MC += load_tile(d_p + i * size, at_MC, here_MC) * (1.0 - x_C)
        dh_MC += load_tile(d_p + i * size, at_MC + channels, next_here_MC) * x_C
    store_tile(dh_p, at_MC, here_MC, dh_MC)


@triton.jit(do_not_specialize=["num_rows", "row_length", "channels"])
def shift_lerp_weights_kernel(
    d_p, h_p, shift_p, starts_p, sums_p, num_rows, row_length, channels,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Partial sums over tokens of d_i (h_{t-1} - h_t), one program per interpolation, block of channels and tokens."""
    columns_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here_C = columns_C < channels
    interpolation = tl.program_id(2).to(tl.int64)
    size = num_rows.to(tl.int64) * channels
    sum_C = tl.zeros([BLOCK_C], tl.float32)
    for step in range(STEPS):
        rows_M = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        here_M = rows_M < num_rows
        here_MC = here_M[:, None] & here_C[None, :]
        at_MC = rows_M[:, None] * channels + columns_C[None, :]
        started_M = sequence_started(starts_p, rows_M, here_M, row_length)
        delta_MC = load_previous(h_p, shift_p, started_M, rows_M, columns_C, here_MC, channels)
        delta_MC -= load_tile(h_p, at_MC, here_MC)
        sum_C += tl.sum(load_tile(d_p + interpolation * size, at_MC, here_MC) * delta_MC, 0)
    at_C = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + interpolation) * channels + columns_C
    store_tile(sums_p, at_C, here_C, sum_C)


def shift_lerp_forward(h_BTC: Tensor, x_nC: Tensor, shift: Tensor | None, starts_T: Tensor | None) -> Tensor:
    h_BTC = h_BTC.contiguous()
    out_nBTC = empty_like(h_BTC.unsqueeze(0).expand(len(x_nC), *h_BTC.shape))
    shift = None if shift is None else shift.contiguous()
    rows, length, channels, grid = _sizes(h_BTC)
    launch(
        shift_lerp_kernel, grid,
        h_BTC, x_nC.contiguous(), shift, starts_T, out_nBTC, rows, length, channels,
        len(x_nC), BLOCK_M, BLOCK_C,
    )  # fmt: skip
    return out_nBTC


def shift_lerp_backward(
    d_nBTC: Tensor,
    x_nC: Tensor,
    h_BTC: Tensor | None,
    shift: Tensor | None,
    starts_T: Tensor | None,
    need_h: bool,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dh, dx); h is there when dx is needed."""
    rows, length, channels, grid = _sizes(d_nBTC[0])
    dh = dx = None
    if need_h:
        dh = empty_like(d_nBTC[0])
        launch(
            shift_lerp_grad_kernel, grid,
            d_nBTC, x_nC.contiguous(), starts_T, dh, rows, length, channels,
            # Compiled for sm_90 in fp16, four warps leave a register on the stack.
            len(x_nC), BLOCK_M, BLOCK_C, num_warps=NUM_WARPS * (2 if dh.dtype == torch.float16 else 1),
        )  # fmt: skip
    if need_x:
        assert h_BTC is not None
        blocks = triton.cdiv(rows, BLOCK_M * SUM_STEPS)
        sums = empty_sums(blocks, len(x_nC) * channels, d_nBTC)
        launch(
            shift_lerp_weights_kernel, (blocks, grid[1], len(x_nC)),
            d_nBTC, h_BTC.contiguous(), None if shift is None else shift.contiguous(), starts_T, sums,
            rows, length, channels, BLOCK_M, BLOCK_C, SUM_STEPS,
        )  # fmt: skip
        dx = sums.sum(0).view(x_nC.shape).to(x_nC.dtype)
    return dh, dx


def _sizes(h_BTC: Tensor) -> tuple[int, int, int, tuple[int, int]]:
    batch, length, channels = h_BTC.shape
    rows = batch * length
    assert rows < torch.iinfo(torch.int32).max
    return rows, length, channels, (triton.cdiv(rows, BLOCK_M), triton.cdiv(channels, BLOCK_C))
