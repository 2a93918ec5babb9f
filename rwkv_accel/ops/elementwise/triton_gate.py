"""Triton kernels of `head_gate`: one program per head and tile of tokens.

Shapes: M tokens of a tile, N head size. Formulas: head_gate.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rwkv_accel.ops.elementwise.head_gate import GateSources
from rwkv_accel.ops.elementwise.triton_common import (
    SUM_STEPS,
    empty_like,
    empty_sums,
    head_tile,
    launch,
    load_tile,
    store_tile,
)


@triton.jit
def normed_tile(y_MN, here_MN, eps, N: tl.constexpr):
    """(y - mean) / deviation and 1 / deviation, per row."""
    mean_M = tl.sum(y_MN, 1) / N
    centred_MN = tl.where(here_MN, y_MN - mean_M[:, None], 0.0)
    inverse_M = 1.0 / tl.sqrt(tl.sum(centred_MN * centred_MN, 1) / N + eps)
    return centred_MN * inverse_M[:, None], inverse_M


@triton.jit(do_not_specialize=["num_tokens", "heads", "eps"])
def head_gate_kernel(
    y_p, r_p, k_p, v_p, gate_p, weight_p, bias_p, r_k_p, out_p, num_tokens, heads, eps,
    N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    tokens_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    here_MN = (tokens_M < num_tokens)[:, None] & (tl.arange(0, N) >= 0)[None, :]
    columns_N = tl.program_id(1) * N + tl.arange(0, N)
    at_MN = tokens_M[:, None] * (heads * N) + columns_N[None, :]
    normed_MN, _ = normed_tile(load_tile(y_p, at_MN, here_MN), here_MN, eps, N)
    weight_N, bias_N = tl.load(weight_p + columns_N).to(tl.float32), tl.load(bias_p + columns_N).to(tl.float32)
    r_k_N = tl.load(r_k_p + columns_N).to(tl.float32)
    bonus_M = tl.sum(load_tile(r_p, at_MN, here_MN) * load_tile(k_p, at_MN, here_MN) * r_k_N[None, :], 1)
    out_MN = normed_MN * weight_N[None, :] + bias_N[None, :] + bonus_M[:, None] * load_tile(v_p, at_MN, here_MN)
    store_tile(out_p, at_MN, here_MN, out_MN * load_tile(gate_p, at_MN, here_MN))


@triton.jit(do_not_specialize=["num_tokens", "heads", "eps"])
def head_gate_grad_kernel(
    y_p, r_p, k_p, v_p, gate_p, weight_p, bias_p, r_k_p, d_out_p,
    dy_p, dr_p, dk_p, dv_p, d_gate_p, d_weight_p, d_bias_p, d_r_k_p, num_tokens, heads, eps,
    N: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile; those of the vectors as partial sums of STEPS tiles."""
    columns_N = tl.program_id(1) * N + tl.arange(0, N)
    weight_N, bias_N = tl.load(weight_p + columns_N).to(tl.float32), tl.load(bias_p + columns_N).to(tl.float32)
    r_k_N = tl.load(r_k_p + columns_N).to(tl.float32)
    d_weight_N = tl.zeros([N], tl.float32)
    d_bias_N = tl.zeros([N], tl.float32)
    d_r_k_N = tl.zeros([N], tl.float32)
    for step in range(STEPS):
        tokens_M = (tl.program_id(0).to(tl.int64) * STEPS + step) * M + tl.arange(0, M)
        here_MN = (tokens_M < num_tokens)[:, None] & (tl.arange(0, N) >= 0)[None, :]
        at_MN = tokens_M[:, None] * (heads * N) + columns_N[None, :]
        normed_MN, inverse_M = normed_tile(load_tile(y_p, at_MN, here_MN), here_MN, eps, N)
        r_MN, k_MN = load_tile(r_p, at_MN, here_MN), load_tile(k_p, at_MN, here_MN)
        v_MN, d_out_MN = load_tile(v_p, at_MN, here_MN), load_tile(d_out_p, at_MN, here_MN)
        bonus_M = tl.sum(r_MN * k_MN * r_k_N[None, :], 1)
        if d_gate_p is not None:
            ungated_MN = normed_MN * weight_N[None, :] + bias_N[None, :] + bonus_M[:, None] * v_MN
            store_tile(d_gate_p, at_MN, here_MN, d_out_MN * ungated_MN)
        d_MN = d_out_MN * load_tile(gate_p, at_MN, here_MN)
        d_bonus_MN = tl.sum(d_MN * v_MN, 1)[:, None]
        store_tile(dr_p, at_MN, here_MN, d_bonus_MN * k_MN * r_k_N[None, :])
        store_tile(dk_p, at_MN, here_MN, d_bonus_MN * r_MN * r_k_N[None, :])
        store_tile(dv_p, at_MN, here_MN, d_MN * bonus_M[:, None])
        if dy_p is not None:
            d_normed_MN = d_MN * weight_N[None, :]
            mean_M = tl.sum(d_normed_MN, 1) / N
            projection_M = tl.sum(d_normed_MN * normed_MN, 1) / N
            dy_MN = (d_normed_MN - mean_M[:, None] - normed_MN * projection_M[:, None]) * inverse_M[:, None]
            store_tile(dy_p, at_MN, here_MN, dy_MN)
        if d_weight_p is not None:
            d_weight_N += tl.sum(d_MN * normed_MN, 0)
            d_bias_N += tl.sum(d_MN, 0)
            d_r_k_N += tl.sum(d_bonus_MN * r_MN * k_MN, 0)
    if d_weight_p is not None:
        at_N = tl.program_id(0).to(tl.int64) * (heads * N) + columns_N
        tl.store(d_weight_p + at_N, d_weight_N)
        tl.store(d_bias_p + at_N, d_bias_N)
        tl.store(d_r_k_p + at_N, d_r_k_N)


def head_gate_forward(s: GateSources, head_size: int, eps: float) -> Tensor:
    s = GateSources(*(x.contiguous() for x in s))
    tokens, heads, tile = _sizes(s.y, head_size)
    out = empty_like(s.y)
    grid = (triton.cdiv(tokens, tile), heads)
    launch(head_gate_kernel, grid, *s, out, tokens, heads, eps, head_size, tile)
    return out


def head_gate_backward(
    s: GateSources, needs: GateSources, d_out: Tensor, head_size: int, eps: float
) -> tuple[Tensor | None, ...]:
    s = GateSources(*(x.contiguous() for x in s))
    tokens, heads, tile = _sizes(s.y, head_size)
    sums = needs.weight or needs.bias or needs.r_k
    steps = SUM_STEPS if sums else 1
    blocks = triton.cdiv(tokens, tile * steps)
    grads = [empty_like(x) if need else None for x, need in zip(s[:5], needs[:5])]
    partial = [empty_sums(blocks, heads * head_size, s.y) if sums else None for _ in range(3)]
    launch(
        head_gate_grad_kernel, (blocks, heads),
        *s, d_out.contiguous(), *grads, *partial, tokens, heads, eps, head_size, tile, steps,
    )  # fmt: skip
    vectors = [
        part.sum(0).to(x.dtype) if need and part is not None else None
        for part, x, need in zip(partial, s[5:], needs[5:])
    ]
    return (*grads, *vectors)


def _sizes(y: Tensor, head_size: int) -> tuple[int, int, int]:
    channels = y.shape[-1]
    return y.numel() // channels, channels // head_size, head_tile(head_size)
