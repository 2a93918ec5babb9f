"""Quantised weights as nodes of a compiled graph.

A compiler that saw into them would find the weight restored in the forward and in the backward pass to be the same, and
keep it, dense, from one to the other. Only torch.compile takes this way: see `ops.wkv7.opaque`.

Shapes: weight [O, I].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.peft import quant


def matmul_opaque(x: Tensor, stored: Mapping[str, Tensor], kind: str, shape: tuple[int, int]) -> Tensor:
    """x [..., I] -> x W^T [..., O], differentiable in x."""
    return _matmul(x, *_operands(stored), kind, shape)


def unpack_opaque(stored: Mapping[str, Tensor], kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Weight [O, I] in `dtype`."""
    return _unpack(*_operands(stored), kind, shape, dtype)


def _operands(stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return stored["weight_codes"], stored["weight_scales"], stored.get("weight_absmax_codes")


@torch.library.custom_op("rwkv_accel::unpack", mutates_args=())
def _unpack(
    codes: Tensor, scales: Tensor, absmax_codes: Tensor | None, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    stored = {"weight_codes": codes, "weight_scales": scales}
    if absmax_codes is not None:
        stored["weight_absmax_codes"] = absmax_codes
    how = quant.Quant(kind, double=absmax_codes is not None)
    return quant.unpack(stored, how, (shape[0], shape[1]), dtype)


@_unpack.register_fake
def _(
    codes: Tensor, scales: Tensor, absmax_codes: Tensor | None, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@torch.library.custom_op("rwkv_accel::quantized_matmul", mutates_args=())
def _matmul(
    x: Tensor, codes: Tensor, scales: Tensor, absmax_codes: Tensor | None, kind: str, shape: Sequence[int]
) -> Tensor:
    return torch.nn.functional.linear(x, _unpack(codes, scales, absmax_codes, kind, shape, x.dtype))


@_matmul.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, absmax_codes: Tensor | None, kind: str, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("rwkv_accel::quantized_matmul_backward", mutates_args=())
def _matmul_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, absmax_codes: Tensor | None, kind: str, shape: Sequence[int]
) -> Tensor:
    return grad @ _unpack(codes, scales, absmax_codes, kind, shape, grad.dtype)


@_matmul_backward.register_fake
def _(
    grad: Tensor, codes: Tensor, scales: Tensor, absmax_codes: Tensor | None, kind: str, shape: Sequence[int]
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, absmax_codes, ctx.kind, ctx.shape = inputs
    ctx.save_for_backward(codes, scales, absmax_codes)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    return _matmul_backward(grad, *ctx.saved_tensors, ctx.kind, ctx.shape), None, None, None, None, None


_matmul.register_autograd(_gradient, setup_context=_keep)
