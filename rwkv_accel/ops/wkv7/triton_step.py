"""The decode step of step.py as one kernel: a program per row and head reads the state once and writes it once.

Shapes: R rows (sequences), H heads, N head size; N values (rows of the state), K keys (its columns), K = N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_accel.ops.devices import on_device
from rwkv_accel.ops.wkv7 import triton_op
from rwkv_accel.ops.wkv7.decay import DECAY_SCALE
from rwkv_accel.ops.wkv7.step import StepInputs, StepWeights
from rwkv_accel.ops.wkv7.triton_config import Launch
from rwkv_accel.ops.wkv7.triton_math import LOG2_E

WARPS = {16: 1, 32: 1, 64: 4, 128: 8}
"""Head size -> warps: 32 values of the state or fewer per thread, 64 at 128."""


def step_triton(x: StepInputs, weights: StepWeights, state_RHNN: Tensor, eps: float) -> Tensor:
    """As `wkv7_step`, for checked inputs."""
    rows, heads, size, _ = state_RHNN.shape
    x = StepInputs(*(t.contiguous() for t in x))
    out = torch.empty_like(x.r)
    with on_device(out.device):
        triton_op.launch(
            decode_step,
            rows * heads,
            Launch(size, WARPS[size]),
            *(*x, *weights, state_RHNN, out, eps, heads),
            N=size,
            DECAY_SCALE=DECAY_SCALE,
        )
    return out


@triton.jit(do_not_specialize=["heads", "eps"])
def decode_step(
    r_p,
    w_logit_p,
    k_p,
    v_p,
    rate_p,
    gate_p,
    k_k_p,
    k_a_p,
    r_k_p,
    norm_weight_p,
    norm_bias_p,
    state_p,
    out_p,
    eps,
    heads,
    N: tl.constexpr,
    DECAY_SCALE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    # [R,C] is [R*H,N], so a program's channels are its row; the vectors of the layer repeat with the heads.
    here, channel = index * N + n, (index % heads) * N + n
    r_K = tl.load(r_p + here).to(tl.float32)
    k_K = tl.load(k_p + here).to(tl.float32)
    v_V = tl.load(v_p + here).to(tl.float32)
    rate_K = tl.load(rate_p + here).to(tl.float32)
    w_logit_K = tl.load(w_logit_p + here).to(tl.float32)
    share_K = 1.0 / (1.0 + tl.exp2(-w_logit_K * LOG2_E))
    decay_K = tl.exp2(share_K * DECAY_SCALE * LOG2_E)
    kappa_K = k_K * tl.load(k_k_p + channel)
    kappa_K = kappa_K / tl.maximum(tl.sqrt(tl.sum(kappa_K * kappa_K, 0)), 1e-12)
    k_K = k_K * (1 + (rate_K - 1) * tl.load(k_a_p + channel))

    square = index * N * N + n[:, None] * N + n[None, :]
    state_VK = tl.load(state_p + square)
    removed_V = tl.sum(state_VK * kappa_K[None, :], 1)
    state_VK = state_VK * decay_K[None, :] - removed_V[:, None] * (kappa_K * rate_K)[None, :]
    state_VK += v_V[:, None] * k_K[None, :]
    tl.store(state_p + square, state_VK)

    y_V = tl.sum(state_VK * r_K[None, :], 1)
    y_V = y_V - tl.sum(y_V, 0) / N
    y_V = y_V / tl.sqrt(tl.sum(y_V * y_V, 0) / N + eps)
    y_V = y_V * tl.load(norm_weight_p + channel) + tl.load(norm_bias_p + channel)
    bonus = tl.sum(r_K * k_K * tl.load(r_k_p + channel), 0)
    y_V = (y_V + bonus * v_V) * tl.load(gate_p + here).to(tl.float32)
    tl.store(out_p + here, y_V.to(out_p.dtype.element_ty))
