"""One token of the time mix between its projections, for generation: the state is updated in place.

Per head, from what the projections give:

    w     = exp(-e^-1/2 sigmoid(w_logit))
    kappa = k k_k / max(|k k_k|, 1e-12)         k' = k (1 + (rate - 1) k_a)
    S    <- S diag(w) - (S kappa) (kappa rate)^T + v k'^T
    out   = (norm(S r) + (sum r k' r_k) v) gate

Shapes: R rows (sequences), C channels, H heads, N head size. "Wide" is fp32, or fp64 for fp64 input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.ops.wkv7 import select_backend
from rwkv_accel.ops.wkv7.checks import wide_dtype
from rwkv_accel.ops.wkv7.decay import DECAY_SCALE


class StepInputs(NamedTuple):
    """What the projections make of one token of every row: [R,C], one dtype."""

    r: Tensor
    w_logit: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    gate: Tensor


class StepWeights(NamedTuple):
    """Vectors of a layer: [C], wide."""

    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def wkv7_step(x: StepInputs, weights: StepWeights, state_RHNN: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Output [R,C] in the inputs' dtype; the state (wide, contiguous) is advanced in place. Not differentiable.

    `backend` as in `wkv7`; all but Triton are the same torch code. Raises ValueError, before any work, for inputs that
    do not fit together.
    """
    _check(x, weights, state_RHNN)
    name, _ = select_backend(backend, x.r.device.type, state_RHNN.shape[-1], x.r.dtype)
    if name == "triton":
        # Not at the top: triton is absent on some platforms.
        from rwkv_accel.ops.wkv7.triton_step import step_triton

        return step_triton(x, weights, state_RHNN, eps)
    return _step_torch(x, weights, state_RHNN, eps)


def _check(x: StepInputs, weights: StepWeights, state: Tensor) -> None:
    if state.dim() != 4 or 0 in state.shape or state.shape[2] != state.shape[3]:
        raise ValueError(f"the state must be a non-empty [rows, heads, N, N] tensor, got {list(state.shape)}")
    if not x.r.is_floating_point():
        raise ValueError(f"r must be a floating point tensor, got {x.r.dtype}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*x, *weights, state)):
        raise ValueError("the decode step has no gradient; call it under torch.no_grad(), or wkv7 for training")
    rows, heads, size, _ = state.shape
    wide = wide_dtype(x.r)
    if state.dtype != wide or not state.is_contiguous():
        raise ValueError(f"the state must be a contiguous {wide} tensor, got {state.dtype}, strides {state.stride()}")
    for tensors, shape, dtype in ((x, [rows, heads * size], x.r.dtype), (weights, [heads * size], wide)):
        for name, tensor in zip(tensors._fields, tensors):
            if list(tensor.shape) != shape:
                raise ValueError(f"{name} must be {shape} for a state of {list(state.shape)}, got {list(tensor.shape)}")
            if tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tensor.device != state.device:
                raise ValueError(f"{name} must be on the state's device {state.device}, got {tensor.device}")


def _step_torch(x: StepInputs, weights: StepWeights, state_RHNN: Tensor, eps: float) -> Tensor:
    rows, heads, size, _ = state_RHNN.shape
    per_head, wide = (rows, heads, size), state_RHNN.dtype
    w_decay = x.w_logit.to(wide, copy=True).sigmoid_().mul_(DECAY_SCALE).exp_()
    k_wide, v_wide, r_wide, rate = (t.to(wide) for t in (x.k, x.v, x.r, x.rate))
    kappa = (k_wide * weights.k_k).view(per_head)
    kappa = kappa / torch.linalg.vector_norm(kappa, dim=-1, keepdim=True).clamp_min_(1e-12)
    k_wide = k_wide * torch.addcmul(1 - weights.k_a, rate, weights.k_a)

    state = state_RHNN.view(-1, size, size)
    kappa_row = kappa.view(-1, 1, size)
    removed = torch.bmm(state, kappa_row.transpose(1, 2))
    left = torch.cat([removed, v_wide.view(-1, size, 1)], dim=2)
    right = torch.cat([kappa_row * rate.view(-1, 1, size).neg(), k_wide.view(-1, 1, size)], dim=1)
    state.mul_(w_decay.view(-1, 1, size)).baddbmm_(left, right)
    y_RC = torch.bmm(state, r_wide.reshape(-1, size, 1)).view(x.r.shape)

    y_RC = F.group_norm(y_RC, heads, weights.norm_weight, weights.norm_bias, eps)
    bonus = (r_wide * k_wide * weights.r_k).view(per_head).sum(-1, keepdim=True)
    y_RHN = torch.addcmul(y_RC.view(per_head), bonus, v_wide.view(per_head))
    return (y_RHN.view(x.r.shape) * x.gate).to(x.r.dtype)
