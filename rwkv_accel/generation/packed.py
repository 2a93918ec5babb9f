"""Projections in oneDNN's own weight layout: on a CPU several times faster than a plain matrix product.

Decoding multiplies a few rows with large matrices. The BLAS behind `F.linear` reads the weights once per row there
and falls back to slow kernels on some CPUs; oneDNN with a weight packed once reads it once for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_accel.model.layers import Linear
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.peft.base import AdapterLinear

MANY_ROWS = 64
"""Rows that the layout for batches is chosen for: the fastest from 2 rows to thousands (measured on a CPU). A single
row is read faster from the layout for one, which in turn makes batches slower."""


class PackedLinear(nn.Module):
    """Inference-only replacement of a bias-free linear layer."""

    def __init__(self, weight_OI: Tensor, num_rows: int = MANY_ROWS):
        """num_rows: rows that it will mostly be asked for at once."""
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            weight_OI.contiguous(), 1 if num_rows == 1 else MANY_ROWS
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def pack_linears(model: RWKV7, num_rows: int = MANY_ROWS) -> int:
    """Replace the projections and the head of a model by packed ones; returns how many were replaced.

    num_rows: sequences that will be decoded at once.

    Adapters on an unquantised base are merged (in fp32). Leaves the model as it is, and returns 0, away from
    a CPU with oneDNN or for an fp64 model. Layers are replaced one by one: no second copy is held.
    """
    dtype, device = model.compute_dtype, model.ln_out.weight.device
    if device.type != "cpu" or dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return 0
    replaced = 0
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, AdapterLinear):
                if module.quant is not None:
                    continue
                weight_OI = module.merged_weight()
            elif isinstance(module, Linear):
                weight_OI = module.weight
            else:
                continue
            model.set_submodule(name, PackedLinear(weight_OI.detach().to(dtype), num_rows), strict=True)
            replaced += 1
    return replaced
