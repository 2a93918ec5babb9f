"""Triton kernels of `wkv_inputs`: one program per head and tile of tokens.

Shapes: M tokens of a tile, N head size. Formulas: wkv_inputs.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_accel.ops.elementwise.triton_common import (
    SUM_STEPS,
    empty_like,
    empty_sums,
    head_tile,
    launch,
    load_tile,
    store_tile,
)
from rwkv_accel.ops.elementwise.wkv_inputs import NORM_EPS, Sources


@triton.jit
def load_vector(pointer, columns_N):
    """[1,N] as fp32."""
    return tl.load(pointer + columns_N).to(tl.float32)[None, :]


@triton.jit
def removal_key(k_MN, k_k_1N, EPS: tl.constexpr):
    """(kappa, 1 / norm [M,1])."""
    q_MN = k_MN * k_k_1N
    inverse_M = 1.0 / tl.maximum(tl.sqrt(tl.sum(q_MN * q_MN, 1)), EPS)
    return q_MN * inverse_M[:, None], inverse_M[:, None]


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def wkv_inputs_kernel(
    k_p, v_p, v_first_p, a_low_p, v_low_p, a0_p, v0_p, k_k_p, k_a_p,
    k_out_p, v_out_p, a_p, b_p, num_tokens, heads,
    N: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    tokens_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    here_MN = (tokens_M < num_tokens)[:, None] & (tl.arange(0, N) >= 0)[None, :]
    columns_N = tl.program_id(1) * N + tl.arange(0, N)
    at_MN = tokens_M[:, None] * (heads * N) + columns_N[None, :]
    k_MN = load_tile(k_p, at_MN, here_MN)
    iclr_MN = tl.sigmoid(load_vector(a0_p, columns_N) + load_tile(a_low_p, at_MN, here_MN))
    kappa_MN, _ = removal_key(k_MN, load_vector(k_k_p, columns_N), EPS)
    store_tile(a_p, at_MN, here_MN, -kappa_MN)
    store_tile(b_p, at_MN, here_MN, kappa_MN * iclr_MN)
    store_tile(k_out_p, at_MN, here_MN, k_MN * (1.0 + (iclr_MN - 1.0) * load_vector(k_a_p, columns_N)))
    if v_p is not None:
        v_MN = load_tile(v_p, at_MN, here_MN)
        rho_MN = tl.sigmoid(load_vector(v0_p, columns_N) + load_tile(v_low_p, at_MN, here_MN))
        store_tile(v_out_p, at_MN, here_MN, v_MN + (load_tile(v_first_p, at_MN, here_MN) - v_MN) * rho_MN)


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def wkv_inputs_grad_kernel(
    k_p, v_p, v_first_p, a_low_p, v_low_p, a0_p, v0_p, k_k_p, k_a_p,
    dk_out_p, dv_out_p, da_p, db_p,
    dk_p, dv_p, dv_first_p, da_low_p, dv_low_p, sums_p, num_tokens, heads,
    N: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile; those of a0, v0, k_k, k_a as four rows of partial sums of STEPS tiles."""
    columns_N = tl.program_id(1) * N + tl.arange(0, N)
    k_k_1N, k_a_1N = load_vector(k_k_p, columns_N), load_vector(k_a_p, columns_N)
    a0_1N = load_vector(a0_p, columns_N)
    da0_N = tl.zeros([N], tl.float32)
    dv0_N = tl.zeros([N], tl.float32)
    dk_k_N = tl.zeros([N], tl.float32)
    dk_a_N = tl.zeros([N], tl.float32)
    for step in range(STEPS):
        tokens_M = (tl.program_id(0).to(tl.int64) * STEPS + step) * M + tl.arange(0, M)
        here_MN = (tokens_M < num_tokens)[:, None] & (tl.arange(0, N) >= 0)[None, :]
        at_MN = tokens_M[:, None] * (heads * N) + columns_N[None, :]

        k_MN = load_tile(k_p, at_MN, here_MN)
        iclr_MN = tl.sigmoid(a0_1N + load_tile(a_low_p, at_MN, here_MN))
        kappa_MN, inverse_M1 = removal_key(k_MN, k_k_1N, EPS)
        dk_out_MN, db_MN = load_tile(dk_out_p, at_MN, here_MN), load_tile(db_p, at_MN, here_MN)
        di_MN = (db_MN * kappa_MN + dk_out_MN * k_MN * k_a_1N) * iclr_MN * (1.0 - iclr_MN)
        store_tile(da_low_p, at_MN, here_MN, di_MN)
        d_kappa_MN = db_MN * iclr_MN - load_tile(da_p, at_MN, here_MN)
        along_M = tl.sum(kappa_MN * d_kappa_MN, 1)
        dq_MN = (d_kappa_MN - kappa_MN * along_M[:, None]) * inverse_M1
        store_tile(dk_p, at_MN, here_MN, dk_out_MN * (1.0 + (iclr_MN - 1.0) * k_a_1N) + dq_MN * k_k_1N)

        if v_p is not None:
            rho_MN = tl.sigmoid(load_vector(v0_p, columns_N) + load_tile(v_low_p, at_MN, here_MN))
            dv_out_MN = load_tile(dv_out_p, at_MN, here_MN)
            store_tile(dv_p, at_MN, here_MN, dv_out_MN * (1.0 - rho_MN))
            store_tile(dv_first_p, at_MN, here_MN, dv_out_MN * rho_MN)
            difference_MN = load_tile(v_first_p, at_MN, here_MN) - load_tile(v_p, at_MN, here_MN)
            dv_MN = dv_out_MN * difference_MN * rho_MN * (1.0 - rho_MN)
            store_tile(dv_low_p, at_MN, here_MN, dv_MN)
            if sums_p is not None:
                dv0_N += tl.sum(dv_MN, 0)
        if sums_p is not None:
            da0_N += tl.sum(di_MN, 0)
            dk_k_N += tl.sum(tl.where(here_MN, dq_MN * k_MN, 0.0), 0)
            dk_a_N += tl.sum(dk_out_MN * k_MN * (iclr_MN - 1.0), 0)
    if sums_p is not None:
        channels = heads * N
        at_N = tl.program_id(0).to(tl.int64) * 4 * channels + columns_N
        tl.store(sums_p + at_N, da0_N)
        tl.store(sums_p + at_N + channels, dv0_N)
        tl.store(sums_p + at_N + 2 * channels, dk_k_N)
        tl.store(sums_p + at_N + 3 * channels, dk_a_N)


def wkv_inputs_forward(s: Sources, head_size: int) -> tuple[Tensor | None, ...]:
    s = _contiguous(s)
    tokens, heads, tile = _sizes(s.k, head_size)
    k_out, a, b = (empty_like(s.k) for _ in range(3))
    v_out = None if s.v is None else empty_like(s.k)
    launch(
        wkv_inputs_kernel, (triton.cdiv(tokens, tile), heads),
        *s, k_out, v_out, a, b, tokens, heads, head_size, tile, NORM_EPS,
    )  # fmt: skip
    return k_out, v_out, a, b


def wkv_inputs_backward(
    s: Sources, needs: Sources, grads: tuple[Tensor | None, ...], head_size: int
) -> tuple[Tensor | None, ...]:
    s = _contiguous(s)
    tokens, heads, tile = _sizes(s.k, head_size)
    dk_out, dv_out, da, db = (torch.zeros_like(s.k) if g is None else g.contiguous() for g in grads)
    sums = any(needs[5:])
    steps = SUM_STEPS if sums else 1
    blocks = triton.cdiv(tokens, tile * steps)
    results = [None if x is None or not need else empty_like(x) for x, need in zip(s[:5], needs[:5])]
    partial = empty_sums(blocks, 4 * heads * head_size, s.k) if sums else None
    launch(
        wkv_inputs_grad_kernel, (blocks, heads),
        *s, dk_out, dv_out, da, db, *results, partial, tokens, heads,
        head_size, tile, steps, NORM_EPS,
    )  # fmt: skip
    vectors: list[Tensor | None] = [None] * 4
    if partial is not None:
        rows = partial.sum(0).view(4, -1)
        vectors = [row.to(x.dtype) if need else None for row, x, need in zip(rows, s[5:], needs[5:])]
    return (*results, *vectors)


def _contiguous(s: Sources) -> Sources:
    return Sources(*(None if x is None else x.contiguous() for x in s))


def _sizes(k: Tensor, head_size: int) -> tuple[int, int, int]:
    channels = k.shape[-1]
    return k.numel() // channels, channels // head_size, head_tile(head_size)
