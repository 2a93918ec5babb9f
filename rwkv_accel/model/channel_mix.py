"""RWKV-7 channel mix: squared-ReLU feed-forward with its own token shift.

Shapes: B batch, T tokens, C channels, F ffn width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.layers import Documents, Linear, token_shift


class ChannelMix(nn.Module):
    """value(relu(key(lerp(h_t, h_{t-1}; x_k)))^2) (RWKV-LM train_temp/src/model.py)."""

    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.full((1, 1, config.n_embd), float("nan")))
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, h_BTC: Tensor, shift_BC: Tensor | None, documents: Documents | None) -> Tensor:
        """h [B,T,C] after ln2 -> [B,T,C]; shift_BC is the h before the first token (None: zeros)."""
        delta_BTC = token_shift(h_BTC, shift_BC, documents) - h_BTC
        mixed_BTC = torch.addcmul(h_BTC, delta_BTC, self.x_k.to(h_BTC.dtype))
        return self.value(torch.relu(self.key(mixed_BTC)).square())
