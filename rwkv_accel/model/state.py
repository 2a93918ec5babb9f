"""The recurrent state of an RWKV-7 model: what a sequence remembers between two calls.

Shapes: B batch (or sequences of a packed batch), C channels, H heads, N head size, L layers. The WKV state is
[B, H, value, key].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.precision import wide_dtype


@dataclass
class RWKV7State:
    """State of B sequences, one entry per layer in each list."""

    att_shift: list[Tensor]
    """L tensors [B, C]: last input of the time mix (after ln1), in the compute dtype."""
    wkv: list[Tensor]
    """L tensors [B, H, N, N] = [B, H, value, key], fp32 (fp64 for an fp64 model)."""
    ffn_shift: list[Tensor]
    """L tensors [B, C]: last input of the channel mix (after ln2), in the compute dtype."""

    @classmethod
    def zeros(
        cls,
        config: RWKV7Config,
        batch: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RWKV7State:
        """State of `batch` sequences that have seen nothing; `dtype` is the compute dtype of the model."""

        def shift() -> Tensor:
            return torch.zeros(batch, config.n_embd, dtype=dtype, device=device)

        heads = (batch, config.n_head, config.head_size, config.head_size)
        layers = range(config.n_layer)
        return cls(
            att_shift=[shift() for _ in layers],
            wkv=[torch.zeros(heads, dtype=wide_dtype(dtype), device=device) for _ in layers],
            ffn_shift=[shift() for _ in layers],
        )

    @classmethod
    def cat(cls, states: Sequence[RWKV7State]) -> RWKV7State:
        """One state with the rows of all `states`, in order."""

        def join(lists: list[list[Tensor]]) -> list[Tensor]:
            return [torch.cat(layer) for layer in zip(*lists, strict=True)]

        return cls(
            join([s.att_shift for s in states]),
            join([s.wkv for s in states]),
            join([s.ffn_shift for s in states]),
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences B."""
        return self.wkv[0].shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> RWKV7State:
        return RWKV7State(*([function(t) for t in group] for group in (self.att_shift, self.wkv, self.ffn_shift)))

    def select(self, rows: Tensor | Sequence[int]) -> RWKV7State:
        """Copy of the given rows, in the given order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.wkv[0].device)
        return self._map(lambda t: t.index_select(0, index))

    def detach(self) -> RWKV7State:
        """Same numbers, cut from the graph (truncated backpropagation)."""
        return self._map(Tensor.detach)

    def clone(self) -> RWKV7State:
        """Copy that shares no memory."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> RWKV7State:
        """Same state on another device."""
        return self._map(lambda t: t.to(device))

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(att_shift [B,C], wkv [B,H,N,N], ffn_shift [B,C]) of one layer."""
        return self.att_shift[index], self.wkv[index], self.ffn_shift[index]

    def to_flat(self, row: int = 0) -> list[Tensor]:
        """One row as the official flat list: [3i] att shift [C], [3i+1] wkv [H,N,N], [3i+2] ffn shift [C]."""
        return [t[row] for i in range(len(self.wkv)) for t in self.layer(i)]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> RWKV7State:
        """State of one sequence from the official flat list. Raises ValueError unless 3 tensors per layer."""
        if len(tensors) % 3 or not tensors:
            raise ValueError(f"a flat RWKV-7 state has 3 tensors per layer, got {len(tensors)}")
        batched = [t.unsqueeze(0) for t in tensors]
        return cls(batched[0::3], batched[1::3], batched[2::3])
