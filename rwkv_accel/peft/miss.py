"""MiSS layers (also known as DiSHA and Bone), arXiv 2409.15371.

Shapes: T rows, I in_features, O out_features, R rank (the block size), a = output block, b = input block of R x R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.errors import UserError
from rwkv_accel.peft.base import AdapterLinear, AdapterSpec


class MissLinear(AdapterLinear):
    """A weight change made of one small matrix D that is repeated over the blocks of W; no alpha.

    plain   dW[o, j] = D[j mod R, o], D [R, O]
    bat     dW_ab = W_ab D_a + D_a, D [O/R, R, R], as HF peft's "bat"
    bat_in  dW_ab = W_ab D_b + D_b, D [I/R, R, R], as RWKV-PEFT's "bat"; not interchangeable with bat
    """

    method = "miss"
    paper = "arXiv 2409.15371"
    adapter_names = ("miss_D",)

    miss_D: torch.nn.Parameter

    @classmethod
    def check_spec(cls, spec: AdapterSpec, in_features: int, out_features: int) -> None:
        if spec.variant != "plain" and (in_features % spec.rank or out_features % spec.rank):
            raise UserError(
                f"peft.rank {spec.rank} must divide both sides of a {out_features} x {in_features} matrix with "
                f"peft.miss_variant {spec.variant}; use a power of 2, or the plain variant"
            )
        super().check_spec(spec, in_features, out_features)

    @classmethod
    def adapter_shapes(cls, in_features: int, out_features: int, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        if spec.variant == "plain":
            return {"miss_D": (spec.rank, out_features)}
        blocks = (out_features if spec.variant == "bat" else in_features) // spec.rank
        return {"miss_D": (blocks, spec.rank, spec.rank)}

    @classmethod
    def merge(cls, weight_OI: Tensor, tensors: dict[str, Tensor], spec: AdapterSpec) -> Tensor:
        return weight_OI + cls.delta(weight_OI, tensors["miss_D"], spec)

    @staticmethod
    def delta(weight_OI: Tensor, miss_D: Tensor, spec: AdapterSpec) -> Tensor:
        """The change of the weight [O, I] in the dtype of miss_D."""
        out_features, in_features = weight_OI.shape
        if spec.variant == "plain":
            repeats = -(-in_features // spec.rank)
            return miss_D.T.repeat(1, repeats)[:, :in_features]
        rank = spec.rank
        blocks_aibj = weight_OI.to(miss_D.dtype).view(out_features // rank, rank, in_features // rank, rank)
        if spec.variant == "bat":
            delta_aibj = torch.einsum("aibj,ajk->aibk", blocks_aibj, miss_D) + miss_D[:, :, None]
        else:
            delta_aibj = torch.einsum("aibj,bjk->aibk", blocks_aibj, miss_D) + miss_D.transpose(0, 1)
        return delta_aibj.reshape(out_features, in_features)

    def init_adapter(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"miss_D": torch.zeros(self.miss_D.shape)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        miss_D, rank = self.miss_D.to(x.dtype), self.spec.rank
        x_TI = x.reshape(-1, self.in_features)
        dropped_TI = F.dropout(x_TI, self.spec.dropout, self.training)
        if self.spec.variant == "bat":
            # D depends on the output block: only the changed weight itself can be applied.
            delta_OI = self.delta(self.base_weight(x.dtype), miss_D, self.spec)
            out_TO = self.base_forward(x_TI) + F.linear(dropped_TI, delta_OI)
        elif self.spec.variant == "bat_in":
            blocks_TbR = dropped_TI.unflatten(1, (-1, rank))
            turned_TbR = torch.einsum("tbk,bjk->tbj", blocks_TbR, miss_D)
            out_TO = self.base_forward(x_TI + turned_TbR.flatten(1))
            out_TO = out_TO + turned_TbR.sum(1).repeat(1, self.out_features // rank)
        else:
            if padding := -self.in_features % rank:
                dropped_TI = F.pad(dropped_TI, (0, padding))
            summed_TR = dropped_TI.unflatten(1, (-1, rank)).sum(1)
            # In place: a separate sum would read and write [T, O] twice more.
            out_TO = self.base_forward(x_TI).addmm_(summed_TR, miss_D)
        return out_TO.view(*x.shape[:-1], self.out_features)
