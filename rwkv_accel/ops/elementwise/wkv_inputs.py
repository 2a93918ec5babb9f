"""From the outputs of a block's linear layers to the inputs of the WKV-7 recurrence.

    iclr  = sigmoid(a0 + a_low)                     in-context learning rate
    kappa = normalize_per_head(k * k_k)             removal key
    k'    = k * (1 + (iclr - 1) * k_a)
    v'    = v + (v_first - v) * sigmoid(v0 + v_low) (v itself in the first layer)
    a, b  = -kappa, kappa * iclr

Shapes: B batch, T tokens, C channels, H heads, N head size. Sources: arXiv 2503.14456 section 4; RWKV-LM
train_temp/src/model.py. The backward pass is this project's derivation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_accel.ops.elementwise.backend import check_alike, check_vectors, runs_triton, wide_dtype
from rwkv_accel.ops.first_order import check_first_order

NORM_EPS = 1e-12
"""Smallest norm that k * k_k is divided by."""


class WKVInputs(NamedTuple):
    """Inputs of `wkv7` beside r and the decay: [B,T,C] in k's dtype."""

    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class Sources(NamedTuple):
    """What `wkv_inputs` reads; the value part is None in the first layer."""

    k: Tensor
    v: Tensor | None
    v_first: Tensor | None
    a_low: Tensor
    v_low: Tensor | None
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor


def wkv_inputs(
    k: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    low_rank: tuple[Tensor, Tensor | None],
    vectors: tuple[Tensor, Tensor | None, Tensor, Tensor],
    *,
    head_size: int,
    backend: str = "auto",
) -> WKVInputs:
    """Keys, value and removal of every token.

    Args:
        k, v: [B,T,C] outputs of the key and value layers.
        v_first: [B,T,C] value of the first layer; None in that layer itself, whose v passes unchanged.
        low_rank: (a_low, v_low) [B,T,C], outputs of the low-rank layers; v_low is None without v_first.
        vectors: (a0, v0, k_k, k_a), C values each, any float dtype; v0 is None without v_first.
        head_size: N, a divisor of C.
        backend: "auto", "torch" or "triton".

    Arithmetic is wide. Raises ValueError for shapes that do not fit.
    """
    a_low, v_low = low_rank
    a0, v0, k_k, k_a = (None if vector is None else vector.reshape(-1) for vector in vectors)
    channels = k.shape[-1]
    if channels % head_size:
        raise ValueError(f"{channels} channels are not a multiple of head_size {head_size}")
    if (v_first is None) != (v_low is None) or (v_first is None) != (v0 is None):
        raise ValueError("v_first, v_low and v0 go together: give all or none")
    check_alike("k", k, {"v": v, "v_first": v_first, "a_low": a_low, "v_low": v_low})
    check_vectors("k", k, {"a0": a0, "v0": v0, "k_k": k_k, "k_a": k_a})
    value = v if v_first is not None else None
    triton = runs_triton(backend, k)
    k_out, v_out, a, b = _WKVInputs.apply(head_size, triton, k, value, v_first, a_low, v_low, a0, v0, k_k, k_a)
    return WKVInputs(k_out, v if v_out is None else v_out, a, b)


class _WKVInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_size: int, triton: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        sources = Sources(*tensors)
        ctx.head_size, ctx.triton = head_size, triton
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if triton:
            from rwkv_accel.ops.elementwise.triton_inputs import wkv_inputs_forward

            return wkv_inputs_forward(sources, head_size)
        return _forward(sources, head_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_order("wkv_inputs")
        sources = Sources(*ctx.saved_tensors)
        needs = Sources(*ctx.needs_input_grad[2:])
        if ctx.triton:
            from rwkv_accel.ops.elementwise.triton_inputs import wkv_inputs_backward

            return None, None, *wkv_inputs_backward(sources, needs, grads, ctx.head_size)
        return None, None, *_backward(sources, needs, grads, ctx.head_size)


def _heads(x: Tensor, head_size: int) -> Tensor:
    return x.unflatten(-1, (-1, head_size))


def _kappa(s: Sources, head_size: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(kappa [B,T,H,N], norm [B,T,H,1]) in the wide dtype."""
    q_BTHN = _heads(s.k.to(wide) * s.k_k.to(wide), head_size)
    norm_BTH1 = torch.linalg.vector_norm(q_BTHN, dim=-1, keepdim=True).clamp_min_(NORM_EPS)
    return q_BTHN.div_(norm_BTH1), norm_BTH1


def _gate(bias: Tensor, low: Tensor, wide: torch.dtype) -> Tensor:
    return torch.add(low.to(wide), bias.to(wide)).sigmoid_()


def _forward(s: Sources, head_size: int) -> tuple[Tensor | None, ...]:
    dtype, wide = s.k.dtype, wide_dtype(s.k.dtype)
    iclr = _gate(s.a0, s.a_low, wide)
    kappa = _kappa(s, head_size, wide)[0].flatten(-2)
    b = (kappa * iclr).to(dtype)
    # k * (1 + (iclr - 1) * k_a)
    k_out = (iclr.sub_(1).mul_(s.k_a.to(wide)).add_(1).mul_(s.k)).to(dtype)
    v_out = None
    if s.v is not None and s.v_first is not None:
        v_out = torch.lerp(s.v.to(wide), s.v_first.to(wide), _gate(s.v0, s.v_low, wide)).to(dtype)
    return k_out, v_out, kappa.neg_().to(dtype), b


def _backward(
    s: Sources, needs: Sources, grads: tuple[Tensor | None, ...], head_size: int
) -> tuple[Tensor | None, ...]:
    dtype, wide = s.k.dtype, wide_dtype(s.k.dtype)
    dk_out, dv_out, da, db = (None if g is None else g.to(wide) for g in grads)
    out: dict[str, Tensor | None] = dict.fromkeys(Sources._fields)
    if dv_out is not None and s.v is not None and s.v_first is not None:
        rho = _gate(s.v0, s.v_low, wide)
        if needs.v_low or needs.v0:
            difference = s.v_first.to(wide) - s.v.to(wide)
            _pass_on(out, needs, "v_low", "v0", dv_out * difference * rho * (1 - rho), dtype)
        d_first = rho.mul_(dv_out)
        out["v"] = (dv_out - d_first).to(dtype) if needs.v else None
        out["v_first"] = d_first.to(dtype) if needs.v_first else None
    if not (needs.k or needs.k_k or needs.k_a or needs.a_low or needs.a0):
        return tuple(out.values())

    k, iclr, k_a = s.k.to(wide), _gate(s.a0, s.a_low, wide), s.k_a.to(wide)
    kappa_BTHN, norm_BTH1 = _kappa(s, head_size, wide)
    kappa = kappa_BTHN.flatten(-2)
    zero = k.new_zeros(())
    dk_out, da, db = (zero.expand(k.shape) if g is None else g for g in (dk_out, da, db))
    if needs.a_low or needs.a0:
        d_iclr = torch.addcmul(db * kappa, dk_out * k, k_a)
        _pass_on(out, needs, "a_low", "a0", d_iclr * iclr * (1 - iclr), dtype)
    d_kappa = _heads((db * iclr).sub_(da), head_size)
    dq_BTHN = d_kappa - kappa_BTHN * (kappa_BTHN * d_kappa).sum(-1, keepdim=True)
    dq = dq_BTHN.div_(norm_BTH1).flatten(-2)
    if needs.k_k:
        out["k_k"] = _over_tokens(dq * k).to(s.k_k.dtype)
    if needs.k_a:
        out["k_a"] = _over_tokens(dk_out * k * (iclr - 1)).to(s.k_a.dtype)
    if needs.k:
        slope = iclr.sub_(1).mul_(k_a).add_(1)
        out["k"] = torch.addcmul(dk_out * slope, dq, s.k_k.to(wide)).to(dtype)
    return tuple(out.values())


def _pass_on(
    out: dict[str, Tensor | None], needs: Sources, low: str, bias: str, d_logit: Tensor, dtype: torch.dtype
) -> None:
    if getattr(needs, bias):
        out[bias] = _over_tokens(d_logit)
    if getattr(needs, low):
        out[low] = d_logit.to(dtype)


def _over_tokens(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)
