"""The contract of every adapter on a linear layer, and the frozen linear layer below it.

Shapes: `_OI` is [out_features, in_features], `_RI` [rank, in_features], `_OR` [out_features, rank].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_accel.errors import UserError
from rwkv_accel.peft.quant import Quant, QuantizedMatmul, pack, unpack


@dataclass(frozen=True)
class AdapterSpec:
    """Numbers that shape one adapter."""

    rank: int = 32
    alpha: float | None = None
    """None means alpha = rank, a scale of 1 (also with rslora)."""
    rslora: bool = False
    """Scale alpha / sqrt(rank) (arXiv 2312.03732) in place of alpha / rank."""
    dropout: float = 0.0
    svd_niter: int | None = None
    """PiSSA: power iterations of the randomised SVD, None is the exact one."""
    variant: str = "plain"
    """MiSS: plain, bat or bat_in."""

    @property
    def scale(self) -> float:
        """Factor on B @ A."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class FrozenLinear(nn.Linear):
    """Linear without bias whose weight is not trained; arithmetic in the dtype of the input.

    With `quant` there is no `weight`: the stored tensors are parameters without gradient, so that DDP sends
    them once, sharding engines split them, and their gather hooks cover them.
    """

    def __init__(self, in_features: int, out_features: int, quant: Quant | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.quant = quant
        self.stored_names: tuple[str, ...] = ()
        if quant is None:
            self.weight.requires_grad_(False)
        else:
            self.register_parameter("weight", None)

    def set_base(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        """Take over the base weight, quantised or stored as `dtype`. Before the layer moves to its device."""
        assert weight_OI.shape == (self.out_features, self.in_features), weight_OI.shape
        if self.quant is None:
            self.weight = nn.Parameter(weight_OI.detach().to(dtype), requires_grad=False)
            return
        stored = pack(weight_OI, self.quant)
        self.stored_names = tuple(stored)
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight [out, in] that the forward uses."""
        if self.quant is None:
            return self.weight.to(dtype)
        stored, shape = self._stored(), (self.out_features, self.in_features)
        if torch.compiler.is_compiling():
            from rwkv_accel.peft.opaque import unpack_opaque

            return unpack_opaque(stored, self.quant.kind, shape, dtype)
        return unpack(stored, self.quant, shape, dtype)

    def base_forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] through the frozen weight; no gradient for the weight is computed."""
        if self.quant is None:
            return F.linear(x, self.weight.to(x.dtype))
        stored, shape = self._stored(), (self.out_features, self.in_features)
        if torch.compiler.is_compiling():
            from rwkv_accel.peft.opaque import matmul_opaque

            return matmul_opaque(x, stored, self.quant.kind, shape)
        return QuantizedMatmul.apply(x, self.quant, shape, self.stored_names, *stored.values())

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(x)

    def _stored(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.stored_names}


class NF4Linear(FrozenLinear):
    """A frozen linear layer in 4 bits, without an adapter (QLoRA's base, arXiv 2305.14314)."""

    def __init__(self, in_features: int, out_features: int, double: bool = False) -> None:
        super().__init__(in_features, out_features, Quant("nf4", double))


class Int8Linear(FrozenLinear):
    """A frozen linear layer in 8 bits with one scale per output row, without an adapter."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, Quant("int8"))


def frozen_linear(in_features: int, out_features: int, quant: Quant) -> FrozenLinear:
    """The plain layer for a kind of storage."""
    if quant.kind == "int8":
        return Int8Linear(in_features, out_features)
    return NF4Linear(in_features, out_features, quant.double)


class AdapterLinear(FrozenLinear):
    """A frozen linear layer with a trainable change of its weight. One subclass per method.

    `adapter_names` are the trained tensors, and `frozen_names` tensors that never train but travel in the
    adapter's file; nothing else of the layer is saved. `merge` turns a base weight and these tensors into
    the merged weight without a module, which is what export uses; the forward must equal it.
    """

    method: ClassVar[str]
    paper: ClassVar[str]
    adapter_names: ClassVar[tuple[str, ...]]
    frozen_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, quant: Quant | None = None) -> None:
        self.check_spec(spec, in_features, out_features)
        super().__init__(in_features, out_features, quant)
        self.spec = spec
        for name, shape in self.adapter_shapes(in_features, out_features, spec).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    @classmethod
    def check_spec(cls, spec: AdapterSpec, in_features: int, out_features: int) -> None:
        """Raises UserError when no such adapter fits the matrix."""
        if not 1 <= spec.rank <= min(in_features, out_features):
            raise UserError(
                f"peft.rank {spec.rank} does not fit a matrix of {out_features} x {in_features}; "
                f"use 1 to {min(in_features, out_features)}, or a peft.rank_pattern for this layer"
            )

    @classmethod
    def adapter_shapes(cls, in_features: int, out_features: int, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor in adapter_names."""
        raise NotImplementedError

    @classmethod
    def merge(cls, weight_OI: Tensor, tensors: dict[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Merged weight [out, in] from the fp32 base weight and the fp32 tensors of the adapter's file."""
        raise NotImplementedError

    def init_adapter(self, generator: torch.Generator) -> dict[str, Tensor]:
        """fp32 start values of adapter_names; the base weight is set already."""
        raise NotImplementedError

    def set_up(
        self,
        weight_OI: Tensor,
        frozen: torch.dtype,
        trainable: torch.dtype,
        seed: int,
        name: str,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Give the layer its base weight and its start values; `name` is the module's full name.

        The random numbers depend on the seed and the name only, so every rank, order and world size gets the
        same. `kept` holds the frozen_names of a save that this layer continues.
        """
        self.set_base(weight_OI, frozen)
        start = self.init_adapter(generator_for(seed, name))
        self.set_adapter({key: value.to(trainable) for key, value in start.items()})

    def set_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the trained tensors; dtype and device are those of the values."""
        for name in self.adapter_names:
            setattr(self, name, nn.Parameter(tensors[name].detach().clone(memory_format=torch.contiguous_format)))

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Tensors of frozen_names."""
        return {}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """fp32 weight [out, in] that gives the same outputs as this layer (dropout aside)."""
        tensors = {name: getattr(self, name) for name in self.adapter_names} | self.frozen_tensors()
        whole_OI = self.whole_weight()
        return self.merge(whole_OI, {name: t.to(whole_OI) for name, t in tensors.items()}, self.spec)

    def whole_weight(self) -> Tensor:
        """fp32 weight [out, in] that the adapter changes: the base, with anything that was split off
        added back.
        """
        return self.base_weight(torch.float32)


def generator_for(seed: int, name: str) -> torch.Generator:
    """CPU generator that depends on nothing but the seed and the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
