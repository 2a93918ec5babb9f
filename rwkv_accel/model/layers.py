"""Building blocks that fix the precision contract: parameters are cast where they are used, norms are wide.

Shapes: B batch, T tokens, C channels, H heads, N head size, S sequences of a packed batch. "Wide" is fp32, or
fp64 when the activations are fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_accel.model.precision import wide_dtype
from rwkv_accel.ops.devices import to_device
from rwkv_accel.ops.elementwise import head_gate, start_table


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
    """GroupNorm with one group per head (eps is 1e-5 * N: 64e-5 for the released N = 64), then bonus and gate."""

    def __init__(self, n_head: int, head_size: int):
        super().__init__(n_head, n_head * head_size, eps=1e-5 * head_size)

    def forward(self, y_BTC: Tensor, r_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, gate_BTC: Tensor, r_k: Tensor):
        """(norm(y) + (sum_n r k r_k) v) * gate -> [B,T,C] in y's dtype; see `ops.elementwise.head_gate`."""
        head_size = self.num_channels // self.num_groups
        return head_gate(
            y_BTC, r_BTC, k_BTC, v_BTC, gate_BTC, self.weight, self.bias, r_k, head_size=head_size, eps=self.eps
        )


@dataclass(frozen=True)
class Documents:
    """Borders of the S documents in a packed batch (B = 1)."""

    cu_seqlens: Tensor
    """[S+1] int64 on the host: document s is tokens cu_seqlens[s] .. cu_seqlens[s+1] - 1."""
    first_S: Tensor
    """Position of each document's first token, on the device of the batch."""
    last_S: Tensor
    """Position of each document's last token, on the device of the batch."""
    starts_T: Tensor
    """int32: the number of the document that starts at a token, -1 elsewhere; on the device of the batch."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int], ids_BT: Tensor) -> Documents:
        """Borders for a batch of one row; ValueError unless they rise strictly from 0 to T.

        One wait for the device if cu_seqlens lies there, none if it comes from the host or as numbers.
        """
        batch, num_tokens = ids_BT.shape
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of one row (flatten the rows), got {batch} rows")
        borders = torch.as_tensor(cu_seqlens).long().cpu()
        if borders.dim() != 1 or borders.numel() < 2:
            raise ValueError(f"cu_seqlens must be a vector of at least 2 borders, got {list(borders.shape)}")
        if borders[0] != 0 or borders[-1] != num_tokens or bool((borders.diff() <= 0).any()):
            raise ValueError(f"cu_seqlens must rise strictly from 0 to {num_tokens}, got {borders.tolist()}")
        on_device = to_device(borders, ids_BT.device)
        return cls(borders, on_device[:-1], on_device[1:] - 1, start_table(borders, ids_BT.device))


def last_tokens(h_BTC: Tensor, documents: Documents | None) -> Tensor:
    """Last position of every sequence, [B,C] or with documents [S,C]: a copy that does not keep h alive."""
    if documents is None:
        return h_BTC[:, -1].clone()
    return h_BTC[0].index_select(0, documents.last_S)
