"""LoRA and PiSSA layers.

Shapes: T rows, I in_features, O out_features, R rank: `x_TI`, `lora_A` [R, I], `lora_B` [O, R], weight [O,
I].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.peft.base import AdapterLinear, AdapterSpec, generator_for


class LoraLinear(AdapterLinear):
    """y = x W' with W' = W + s B A, s = alpha / R or alpha / sqrt(R) (LoRA, arXiv 2106.09685; rsLoRA,
    2312.03732).
    """

    method = "lora"
    paper = "arXiv 2106.09685"
    adapter_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter

    @classmethod
    def adapter_shapes(cls, in_features: int, out_features: int, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (spec.rank, in_features), "lora_B": (out_features, spec.rank)}

    @classmethod
    def merge(cls, weight_OI: Tensor, tensors: dict[str, Tensor], spec: AdapterSpec) -> Tensor:
        return weight_OI + spec.scale * (tensors["lora_B"] @ tensors["lora_A"])

    def init_adapter(self, generator: torch.Generator) -> dict[str, Tensor]:
        # kaiming_uniform with a = sqrt(5), written out: U(-1/sqrt(in), 1/sqrt(in)).
        bound = 1 / math.sqrt(self.in_features)
        lora_A = torch.empty(self.spec.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        return {"lora_A": lora_A, "lora_B": torch.zeros(self.out_features, self.spec.rank)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        x_TI = x.reshape(-1, self.in_features)
        down_TR = F.linear(F.dropout(x_TI, self.spec.dropout, self.training), self.lora_A.to(x.dtype))
        out_TO = self.base_forward(x_TI)
        # In place: a separate sum would read and write [T, O] twice more.
        out_TO = out_TO.addmm_(down_TR, self.lora_B.to(x.dtype).T, alpha=self.spec.scale)
        return out_TO.view(*x.shape[:-1], self.out_features)


class PissaLinear(LoraLinear):
    """LoRA whose A, B start as the leading singular directions, on the residual W - s B0 A0 (arXiv
    2404.02948).

    A0 and B0 never change, are used by no forward, and travel in the adapter's file: with them the residual
    is the same after every load, whatever the SVD of that machine gives. They stay plain attributes on the
    CPU: a buffer would be moved to the device, cast by engines and broadcast by DDP.
    """

    method = "pissa"
    paper = "arXiv 2404.02948"
    frozen_names = ("init_lora_A", "init_lora_B")

    init_lora_A: Tensor
    init_lora_B: Tensor

    @classmethod
    def merge(cls, weight_OI: Tensor, tensors: dict[str, Tensor], spec: AdapterSpec) -> Tensor:
        change = tensors["lora_B"] @ tensors["lora_A"] - tensors["init_lora_B"] @ tensors["init_lora_A"]
        return weight_OI + spec.scale * change

    def set_up(
        self,
        weight_OI: Tensor,
        frozen: torch.dtype,
        trainable: torch.dtype,
        seed: int,
        name: str,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        if kept:
            lora_A, lora_B = kept["init_lora_A"], kept["init_lora_B"]
        else:
            svd_seed = generator_for(seed, name).initial_seed()
            lora_A, lora_B = leading_factors(weight_OI.float(), self.spec, svd_seed)
        # Rounded first: the residual must complement what the trained tensors really hold.
        self.set_residual(weight_OI, lora_A.to(trainable), lora_B.to(trainable), frozen)
        self.set_adapter({"lora_A": self.init_lora_A, "lora_B": self.init_lora_B})

    def set_residual(self, weight_OI: Tensor, init_lora_A: Tensor, init_lora_B: Tensor, frozen: torch.dtype) -> None:
        """Make the base W - s B0 A0, computed in fp32 and stored as `frozen`, from the whole weight W."""
        # Contiguous: the product's last bits depend on the memory layout, and a file has only one.
        self.init_lora_A = init_lora_A.detach().cpu().contiguous()
        self.init_lora_B = init_lora_B.detach().cpu().contiguous()
        product = self.init_lora_B.float() @ self.init_lora_A.float()
        self.set_base(weight_OI.float() - self.spec.scale * product, frozen)

    def whole_weight(self) -> Tensor:
        product = self.init_lora_B.float() @ self.init_lora_A.float()
        return self.base_weight(torch.float32) + self.spec.scale * product.to(self.lora_A.device)

    def frozen_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.frozen_names}


def leading_factors(weight_OI: Tensor, spec: AdapterSpec, seed: int) -> tuple[Tensor, Tensor]:
    """A0 = sqrt(S_R / s) V_R^T [R, I] and B0 = U_R sqrt(S_R / s) [O, R] of the fp32 weight.

    With spec.svd_niter the SVD is the randomised one (torch.svd_lowrank) with that many power iterations,
    seeded.
    """
    if torch.cuda.is_available():
        weight_OI = weight_OI.cuda()  # minutes become seconds on large matrices
    if spec.svd_niter is None:
        left, singular, right_h = torch.linalg.svd(weight_OI, full_matrices=False)
        left, singular, right_h = left[:, : spec.rank], singular[: spec.rank], right_h[: spec.rank]
    else:
        with torch.random.fork_rng(devices=[weight_OI.device] if weight_OI.is_cuda else []):
            torch.manual_seed(seed)
            left, singular, right = torch.svd_lowrank(weight_OI, q=spec.rank, niter=spec.svd_niter)
        right_h = right.T
    root = (singular / spec.scale).sqrt()
    # Directions that W lacks (a zero-initialised matrix) would start with A = B = 0 and never get a gradient:
    # they start like LoRA, with a row norm of kaiming_uniform's size in A.
    absent = singular <= singular[0] * torch.finfo(singular.dtype).eps
    return torch.where(absent, 3**-0.5, root)[:, None] * right_h, left * root.masked_fill(absent, 0)
