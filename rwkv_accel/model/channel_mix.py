"""RWKV-7 channel mix: squared-ReLU feed-forward with its own token shift.

Shapes: B batch, T tokens, C channels, F ffn width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.layers import Documents, Linear
from rwkv_accel.ops.elementwise import relu_squared, shift_lerp


class ChannelMix(nn.Module):
    """value(relu(key(lerp(h_t, h_{t-1}; x_k)))^2) (RWKV-LM train_temp/src/model.py)."""

    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.full((1, 1, config.n_embd), float("nan")))
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, h_BTC: Tensor, shift_BC: Tensor | None, documents: Documents | None) -> Tensor:
        """h [B,T,C] after ln2 -> [B,T,C]; shift_BC is the h before the first token (None: zeros)."""
        first_S, starts_T = (None, None) if documents is None else (documents.first_S, documents.starts_T)
        lerp_1C = self.x_k.view(1, -1).to(h_BTC.dtype)
        (mixed_BTC,) = shift_lerp(h_BTC, lerp_1C, shift=shift_BC, first_S=first_S, starts_T=starts_T)
        return self.value(relu_squared(self.key(mixed_BTC)))
