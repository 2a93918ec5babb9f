"""RWKV-7 time mix: token shift, data-dependent decay and learning rate, the WKV-7 recurrence, gate.

Shapes: B batch, T tokens, C channels, H heads, N head size, R inner rank. "Wide" is fp32, or fp64 for fp64
input.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.layers import Documents, HeadNorm, Linear
from rwkv_accel.model.precision import wide_dtype
from rwkv_accel.model.recompute import run_again
from rwkv_accel.ops.elementwise import shift_lerp, wkv_inputs
from rwkv_accel.ops.wkv7 import wkv7


class TimeMix(nn.Module):
    """Time mix of one block (arXiv 2503.14456 section 4; RWKV-LM train_temp/src/model.py)."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        channels = config.n_embd
        self.layer = layer
        self.heads = (config.n_head, config.head_size)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, float("nan")))

        def vector() -> nn.Parameter:
            return parameter(1, 1, channels)

        self.x_r, self.x_w, self.x_k = vector(), vector(), vector()
        self.x_v, self.x_a, self.x_g = vector(), vector(), vector()
        self.w0, self.a0 = vector(), vector()
        self.w1, self.w2 = parameter(channels, config.decay_rank), parameter(config.decay_rank, channels)
        self.a1, self.a2 = parameter(channels, config.iclr_rank), parameter(config.iclr_rank, channels)
        self.g1, self.g2 = parameter(channels, config.gate_rank), parameter(config.gate_rank, channels)
        if layer > 0:
            self.v0 = vector()
            self.v1, self.v2 = parameter(channels, config.value_rank), parameter(config.value_rank, channels)
        elif config.has_layer0_value:
            # The forward pass never reads them. As buffers they survive a load and a save, and can neither be
            # trained nor be a parameter without gradient in DistributedDataParallel.
            self.register_buffer("v0", vector().detach())
            self.register_buffer("v1", parameter(channels, config.value_rank).detach())
            self.register_buffer("v2", parameter(config.value_rank, channels).detach())
        self.k_k, self.k_a = vector(), vector()
        self.r_k = parameter(*self.heads)
        self.receptance = Linear(channels, channels)
        self.key = Linear(channels, channels)
        self.value = Linear(channels, channels)
        self.output = Linear(channels, channels)
        self.ln_x = HeadNorm(*self.heads)
        # State tuning: initial WKV state [H, value, key] of every sequence that starts without a state.
        self.register_parameter("time_state", None)

    def forward(
        self,
        h_BTC: Tensor,
        v_first_BTC: Tensor | None,
        shift_BC: Tensor | None,
        state_BHNN: Tensor | None,
        documents: Documents | None,
        backend: str,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B,T,C] after ln1 -> (output [B,T,C], v_first [B,T,C], final WKV state [B,H,N,N] or [S,H,N,N]).

        v_first is layer 0's value (None on the way into layer 0). shift_BC and state_BHNN carry the past;
        None is a fresh sequence. recompute: keep what goes into the recurrence's surroundings and make the rest again
        in the backward pass.
        """
        dtype = h_BTC.dtype
        lerp_6C = torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])[:, 0].to(dtype)
        first_S, starts_T = (None, None) if documents is None else (documents.first_S, documents.starts_T)
        shifted = shift_lerp(h_BTC, lerp_6C, shift=shift_BC, first_S=first_S, starts_T=starts_T)
        h_r, h_w, h_k, h_v, h_a, h_g = shifted.unbind(0)

        r_BTC = self.receptance(h_r)
        k_BTC = self.key(h_k)
        v_BTC = self.value(h_v)
        w_low = torch.tanh(h_w @ self.w1.to(dtype)) @ self.w2.to(dtype)
        a_low = (h_a @ self.a1.to(dtype)) @ self.a2.to(dtype)
        gate_BTC = torch.sigmoid(h_g @ self.g1.to(dtype)) @ self.g2.to(dtype)
        first = self.layer == 0
        v_low = None if first else (h_v @ self.v1.to(dtype)) @ self.v2.to(dtype)
        inputs = (r_BTC, k_BTC, v_BTC, None if first else v_first_BTC, w_low, a_low, v_low, gate_BTC, state_BHNN)
        mix = partial(self._mix, documents=documents, backend=backend)
        out_BTC, final_BHNN = run_again(mix, self._mix_params(), *inputs) if recompute else mix(*inputs)
        return self.output(out_BTC), v_BTC if first else v_first_BTC, final_BHNN

    def _mix_params(self) -> list[Tensor]:
        own = (self.w0, self.a0, None if self.layer == 0 else self.v0, self.k_k, self.k_a, self.r_k, self.time_state)
        return [param for param in (*own, *self.ln_x.parameters()) if param is not None]

    def _mix(
        self,
        r_BTC: Tensor,
        k_BTC: Tensor,
        v_BTC: Tensor,
        v_first_BTC: Tensor | None,
        w_low: Tensor,
        a_low: Tensor,
        v_low: Tensor | None,
        gate_BTC: Tensor,
        state_BHNN: Tensor | None,
        *,
        documents: Documents | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """From the matrix products to the output's input [B,T,C] and the final state: elementwise, the recurrence."""
        batch, num_tokens = k_BTC.shape[:2]
        per_head = (batch, num_tokens, *self.heads)
        vectors = (self.a0, None if self.layer == 0 else self.v0, self.k_k, self.k_a)
        x = wkv_inputs(k_BTC, v_BTC, v_first_BTC, (a_low, v_low), vectors, head_size=self.heads[1])
        if state_BHNN is None and self.time_state is not None:
            num_sequences = batch if documents is None else len(documents.first_S)
            state_BHNN = self.time_state.to(wide_dtype(k_BTC.dtype)).expand(num_sequences, -1, -1, -1)
        r, w, k, v, a, b = (t.view(per_head) for t in (r_BTC, w_low, x.k, x.v, x.a, x.b))
        y_BTHN, final_BHNN = wkv7(
            *(r, w, k, v, a, b, self.w0.view(self.heads)),
            state=state_BHNN,
            cu_seqlens=None if documents is None else documents.cu_seqlens,
            backend=backend,
        )
        return self.ln_x(y_BTHN.reshape(k_BTC.shape), r_BTC, x.k, x.v, gate_BTC, self.r_k), final_BHNN
