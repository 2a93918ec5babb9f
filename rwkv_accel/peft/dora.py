"""DoRA layer.

Shapes: I in_features, O out_features, R rank: `lora_A` [R, I], `lora_B` [O, R], `lora_m` [O], weight [O, I].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.peft.base import AdapterSpec
from rwkv_accel.peft.linear import LoraLinear


class DoraLinear(LoraLinear):
    """W' = (m / |W + s B A|) (W + s B A) with one magnitude m per output row (arXiv 2402.09353, as in HF
    peft).

    The norm is a constant for the gradient (section 4.3 of the paper). Dropout acts on the low-rank path
    only.
    """

    method = "dora"
    paper = "arXiv 2402.09353"
    adapter_names = ("lora_A", "lora_B", "lora_m")

    lora_m: torch.nn.Parameter

    @classmethod
    def adapter_shapes(cls, in_features: int, out_features: int, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {**super().adapter_shapes(in_features, out_features, spec), "lora_m": (out_features,)}

    @classmethod
    def merge(cls, weight_OI: Tensor, tensors: dict[str, Tensor], spec: AdapterSpec) -> Tensor:
        changed_OI = super().merge(weight_OI, tensors, spec)
        norm_O = changed_OI.norm(dim=1)
        return changed_OI * (tensors["lora_m"] / norm_O.where(norm_O > 0, 1))[:, None]

    def init_adapter(self, generator: torch.Generator) -> dict[str, Tensor]:
        # A zero row has no direction: its magnitude 1 leaves it free to follow B A, and 0 / 0 never appears.
        norm_O = _row_norms(self.base_weight(torch.float32))
        return {**super().init_adapter(generator), "lora_m": norm_O.where(norm_O > 0, 1)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        ratio_O = self.lora_m.float() / self._norm()
        return super().forward(x) * ratio_O.to(x.dtype)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Row norms of W + s B A, fp32 [O], without forming B A: |W|^2 + 2 s B.(W A^T) + s^2 B.(B A A^T)."""
        # A quantised weight is taken in fp32, as when m was set: its rounding to bf16 would move the norm.
        weight_OI = self.weight if self.quant is None else self.base_weight(torch.float32)
        lora_A, lora_B = self.lora_A.float(), self.lora_B.float()
        norm_O = _row_norms(weight_OI)
        cross_O = (lora_B * F.linear(weight_OI, self.lora_A.to(weight_OI.dtype)).float()).sum(1)
        square_O = (lora_B * (lora_B @ (lora_A @ lora_A.T))).sum(1)
        changed_O = norm_O.square() + 2 * self.spec.scale * cross_O + self.spec.scale**2 * square_O
        norm_O = torch.where(lora_B.any(1), changed_O.clamp_min(0).sqrt(), norm_O)
        return norm_O.where(norm_O > 0, 1)


def _row_norms(weight_OI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.float32)
