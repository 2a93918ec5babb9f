"""Building blocks that fix the precision contract: parameters are cast where they are used, norms are wide.

Shapes: B batch, T tokens, C channels, H heads, N head size, S sequences of a packed batch. "Wide" is fp32, or
fp64 when the activations are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_accel.model.precision import wide_dtype


class Linear(nn.Linear):
    """Bias-free linear layer that computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, **kwargs):
        super().__init__(in_features, out_features, bias=False, **kwargs)

    def reset_parameters(self) -> None:
        """NaN: weights come from a checkpoint or init.py, and a forgotten one must not pass unnoticed."""
        nn.init.constant_(self.weight, float("nan"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """LayerNorm over C, computed wide, returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        if x.dtype == self.weight.dtype and not self.weight.requires_grad:
            # Frozen: the kernel is wide inside and keeps x as it is, not a wide copy. Its sums of weight gradients
            # are not wide for bf16, so that a trained norm takes the long way.
            return super().forward(x)
        wide = wide_dtype(x.dtype)
        out = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return out.to(x.dtype)


class HeadNorm(nn.GroupNorm):
    """GroupNorm with one group per head; eps is 1e-5 * N (64e-5 for the released N = 64)."""

    def __init__(self, n_head: int, head_size: int):
        super().__init__(n_head, n_head * head_size, eps=1e-5 * head_size)

    def forward(self, y_BTHN: Tensor) -> Tensor:
        """y [B,T,H,N] -> wide [B,T,H,N]."""
        wide = wide_dtype(y_BTHN.dtype)
        heads = y_BTHN.shape[2:]
        normed = F.layer_norm(y_BTHN.to(wide), heads[1:], eps=self.eps)
        return torch.addcmul(self.bias.to(wide).view(heads), normed, self.weight.to(wide).view(heads))


@dataclass(frozen=True)
class Documents:
    """Borders of the S documents in a packed batch (B = 1)."""

    cu_seqlens: Tensor
    """[S+1] int64 on the host: document s is tokens cu_seqlens[s] .. cu_seqlens[s+1] - 1."""
    first_S: Tensor
    """Position of each document's first token, on the device of the batch."""
    last_S: Tensor
    """Position of each document's last token, on the device of the batch."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, ids_BT: Tensor) -> Documents:
        """Borders for a batch of one row; ValueError unless they rise strictly from 0 to T.

        One wait for the device if cu_seqlens lies there, none if it comes from the host.
        """
        batch, num_tokens = ids_BT.shape
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of one row (flatten the rows), got {batch} rows")
        borders = cu_seqlens.long().cpu()
        if borders.dim() != 1 or borders.numel() < 2:
            raise ValueError(f"cu_seqlens must be a vector of at least 2 borders, got {list(borders.shape)}")
        if borders[0] != 0 or borders[-1] != num_tokens or bool((borders.diff() <= 0).any()):
            raise ValueError(f"cu_seqlens must rise strictly from 0 to {num_tokens}, got {borders.tolist()}")
        on_device = borders.to(ids_BT.device, non_blocking=True)
        return cls(borders, on_device[:-1], on_device[1:] - 1)


def token_shift(h_BTC: Tensor, shift_BC: Tensor | None, documents: Documents | None) -> Tensor:
    """h_{t-1} for every t; the first token of a sequence gets its row of `shift_BC` (None: zeros).

    h [B,T,C], shift [B,C] or, with documents, [S,C] -> [B,T,C].
    """
    if documents is None and shift_BC is not None:
        return torch.cat([shift_BC.to(h_BTC.dtype).unsqueeze(1), h_BTC[:, :-1]], dim=1)
    prev_BTC = F.pad(h_BTC[:, :-1], (0, 0, 1, 0))
    if documents is None:
        return prev_BTC
    if shift_BC is None:
        return prev_BTC.index_fill_(1, documents.first_S, 0.0)
    return prev_BTC.index_copy_(1, documents.first_S, shift_BC.to(h_BTC.dtype).unsqueeze(0))


def last_tokens(h_BTC: Tensor, documents: Documents | None) -> Tensor:
    """Last position of every sequence, [B,C] or with documents [S,C]: a copy that does not keep h alive."""
    if documents is None:
        return h_BTC[:, -1].clone()
    return h_BTC[0].index_select(0, documents.last_S)
