"""What follows the WKV-7 recurrence: norm per head, bonus of the current token, gate.

    out = (norm(y) * weight + bias + (sum_n r k r_k) v) * gate

Shapes: B batch, T tokens, C channels, H heads, N head size.
Sources: arXiv 2503.14456 section 4; RWKV-LM train_temp/src/model.py. The backward pass is this project's derivation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_accel.ops.elementwise.backend import check_alike, check_vectors, runs_triton, wide_dtype
from rwkv_accel.ops.first_order import check_first_order


class GateSources(NamedTuple):
    """What `head_gate` reads: five [B,T,C] tensors and three vectors of C values."""

    y: Tensor
    r: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    weight: Tensor
    bias: Tensor
    r_k: Tensor


def head_gate(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    r_k: Tensor,
    *,
    head_size: int,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """Normed, bonus added, gated -> [B,T,C] in y's dtype.

    Args:
        y: [B,T,C] output of the recurrence; r, k, v: its inputs; gate: the gate.
        weight, bias, r_k: C values each, any float dtype.
        head_size: N, a divisor of C; eps: added to the variance of each head.
        backend: "auto", "torch" or "triton".

    Arithmetic is wide. Raises ValueError for shapes that do not fit.
    """
    channels = y.shape[-1]
    if channels % head_size:
        raise ValueError(f"{channels} channels are not a multiple of head_size {head_size}")
    check_alike("y", y, {"r": r, "k": k, "v": v, "gate": gate})
    check_vectors("y", y, {"weight": weight, "bias": bias, "r_k": r_k})
    vectors = [vector.reshape(-1) for vector in (weight, bias, r_k)]
    return _HeadGate.apply(head_size, eps, runs_triton(backend, y), y, r, k, v, gate, *vectors)


class _HeadGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_size: int, eps: float, triton: bool, *tensors: Tensor) -> Tensor:
        sources = GateSources(*tensors)
        ctx.head_size, ctx.eps, ctx.triton = head_size, eps, triton
        ctx.save_for_backward(*tensors)
        if triton:
            from rwkv_accel.ops.elementwise.triton_gate import head_gate_forward

            return head_gate_forward(sources, head_size, eps)
        ungated = _normed_with_bonus(sources, head_size, eps)[0]
        return ungated.mul_(sources.gate).to(sources.y.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("head_gate")
        sources, needs = GateSources(*ctx.saved_tensors), GateSources(*ctx.needs_input_grad[3:])
        if ctx.triton:
            from rwkv_accel.ops.elementwise.triton_gate import head_gate_backward

            return None, None, None, *head_gate_backward(sources, needs, d_out, ctx.head_size, ctx.eps)
        return None, None, None, *_backward(sources, needs, d_out, ctx.head_size, ctx.eps)


def _normed_with_bonus(s: GateSources, head_size: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ungated output [B,T,C], normed y [B,T,H,N], 1 / deviation and bonus [B,T,H,1]), wide."""
    wide = wide_dtype(s.y.dtype)
    y, r, k, v = (x.unflatten(-1, (-1, head_size)).to(wide) for x in (s.y, s.r, s.k, s.v))
    heads = y.shape[-2:]
    variance, mean = torch.var_mean(y, dim=-1, keepdim=True, correction=0)
    inverse = variance.add_(eps).rsqrt_()
    normed = (y - mean).mul_(inverse)
    bonus = (r * k).mul_(s.r_k.to(wide).view(heads)).sum(-1, keepdim=True)
    ungated = torch.addcmul(s.bias.to(wide).view(heads), normed, s.weight.to(wide).view(heads))
    return ungated.addcmul_(bonus, v).flatten(-2), normed, inverse, bonus


def _backward(
    s: GateSources, needs: GateSources, d_out: Tensor, head_size: int, eps: float
) -> tuple[Tensor | None, ...]:
    dtype, wide = s.y.dtype, wide_dtype(s.y.dtype)
    out: dict[str, Tensor | None] = dict.fromkeys(GateSources._fields)
    ungated, normed, inverse, bonus = _normed_with_bonus(s, head_size, eps)
    heads = normed.shape[-2:]
    d_out = d_out.to(wide)
    if needs.gate:
        out["gate"] = ungated.mul_(d_out).to(dtype)
    d_BTHN = (d_out * s.gate).unflatten(-1, heads)
    if needs.bias:
        out["bias"] = d_BTHN.sum((0, 1)).flatten().to(s.bias.dtype)
    if needs.weight:
        out["weight"] = (d_BTHN * normed).sum((0, 1)).flatten().to(s.weight.dtype)
    if needs.r or needs.k or needs.r_k:
        r, k, v = (x.unflatten(-1, heads) for x in (s.r, s.k, s.v))
        d_bonus = (d_BTHN * v).sum(-1, keepdim=True)
        scaled = d_bonus * s.r_k.to(wide).view(heads)
        out["r"] = (scaled * k).flatten(-2).to(dtype) if needs.r else None
        out["k"] = (scaled * r).flatten(-2).to(dtype) if needs.k else None
        if needs.r_k:
            out["r_k"] = (d_bonus * r * k).sum((0, 1)).flatten().to(s.r_k.dtype)
    if needs.v:
        out["v"] = (d_BTHN * bonus).flatten(-2).to(dtype)
    if needs.y:
        d_normed = d_BTHN * s.weight.to(wide).view(heads)
        projection = (d_normed * normed).mean(-1, keepdim=True)
        d_normed.sub_(d_normed.mean(-1, keepdim=True)).addcmul_(normed, projection, value=-1)
        out["y"] = d_normed.mul_(inverse).flatten(-2).to(dtype)
    return tuple(out.values())
