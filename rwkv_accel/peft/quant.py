"""Weights in 4 and 8 bits: NF4 (arXiv 2305.14314) with bitsandbytes' codes and packing, and int8 per row.

On GPUs bitsandbytes restores the weights where it is installed; the plain torch path gives the same bits.
Shapes: weight [O, I] with n = O * I values, flattened row by row; NF4 blocks of 64 values; two codes per byte, the
even one in the high nibble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
ABSMAX_BLOCK = 256
CHUNK = 1 << 20
"""Values that are quantised or restored at a time, a multiple of BLOCK: small enough for a CPU's cache."""
_TINY = 1e-38


@dataclass(frozen=True)
class Quant:
    """How a frozen weight is stored."""

    kind: str
    """nf4 or int8."""
    double: bool = False
    """nf4: store the block maxima in 8 bits as well (0.127 bits per weight in place of 0.5)."""


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Any shape, fp32/bf16/fp16 -> (codes uint8 [ceil(n/2), 1], absmax fp32 [ceil(n/64)]).

    The same bits as bitsandbytes.functional.quantize_4bit(quant_type="nf4", blocksize=64), a few million values at a
    time: the memory beside the weight stays small.
    """
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // BLOCK), device=flat.device)
    for start in range(0, count, CHUNK):
        part = slice(start // 2, (min(start + CHUNK, count) + 1) // 2)
        codes[part], absmax[start // BLOCK : -(-min(start + CHUNK, count) // BLOCK)] = _quantize_chunk(
            flat[start : start + CHUNK].float()
        )
    return codes[:, None], absmax


def _quantize_chunk(flat: Tensor) -> tuple[Tensor, Tensor]:
    full = flat.numel() // BLOCK * BLOCK
    blocks, tail = flat[:full].view(-1, BLOCK), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).view(-1)
    if tail.numel():
        # bitsandbytes divides in the short last block and multiplies by the reciprocal elsewhere: other bits.
        tail_max = tail.abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, tail_max[None]])
        scaled = torch.cat([scaled, (tail / tail_max).clamp(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    code = torch.tensor(NF4_CODE, device=flat.device)
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


def dequantize_nf4(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(codes uint8 [ceil(n/2), 1], absmax fp32 [ceil(n/64)]) -> weight of `shape`; fp32 product, rounded once."""
    if codes.is_cuda and _has_bitsandbytes() and dtype != torch.float64:
        return dequantize_by_bitsandbytes(codes, absmax, shape, dtype)
    count = math.prod(shape)
    table = torch.tensor(NF4_CODE, device=codes.device)
    out = torch.empty(count, dtype=dtype, device=codes.device)
    flat = codes.view(-1)
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        packed = flat[start // 2 : (start + length + 1) // 2]
        # Not table[...], which makes 64-bit indices of these first.
        values = table.index_select(0, torch.stack([packed >> 4, packed & 15], dim=1).view(-1).int())[:length]
        scales = absmax[start // BLOCK : -(-(start + length) // BLOCK)]
        if length % BLOCK:
            values = torch.nn.functional.pad(values, (0, -length % BLOCK))
        out[start : start + length] = (values.view(-1, BLOCK) * scales[:, None]).view(-1)[:length]
    return out.view(shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """absmax fp32 [M] -> (codes uint8 [M], scales fp32 [ceil(M/256) + 1]: block maxima, then the mean).

    Double quantisation as in bitsandbytes: the mean is subtracted, the rest is coded with the signed 8-bit
    dynamic map (arXiv 2110.02861) in blocks of 256.
    """
    mean = absmax.mean()
    centred = absmax - mean
    padding = -centred.numel() % ABSMAX_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, padding)).view(-1, ABSMAX_BLOCK)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / largest.clamp(min=_TINY))[:, None]).clamp(-1, 1).view(-1)[: absmax.numel()]
    table = dynamic_map().to(absmax.device)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes, torch.cat([largest, mean[None]])


def dequantize_absmax(codes: Tensor, scales: Tensor) -> Tensor:
    """(codes uint8 [M], scales fp32 [ceil(M/256) + 1]) -> absmax fp32 [M]."""
    values = dynamic_map().to(codes.device)[codes.int()]
    return values * scales[:-1].repeat_interleave(ABSMAX_BLOCK)[: codes.numel()] + scales[-1]


@cache
def dynamic_map() -> Tensor:
    """The 256 ascending values of bitsandbytes' signed 8-bit dynamic map."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        means = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-value for value in means]
    return torch.tensor(sorted(values))


def quantize_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] -> (codes int8 [O, I], absmax fp32 [O]): round(127 w / absmax) per row, as LLM.int8's weights."""
    weight_OI = weight_OI.detach()
    codes = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    absmax = torch.empty(weight_OI.shape[0], device=weight_OI.device)
    rows = max(1, CHUNK // weight_OI.shape[1])
    for start in range(0, weight_OI.shape[0], rows):
        wide = weight_OI[start : start + rows].float()
        largest = wide.abs().amax(dim=1)
        codes[start : start + rows] = torch.round(wide * (127.0 / largest.clamp(min=_TINY))[:, None])
        absmax[start : start + rows] = largest
    return codes, absmax


def dequantize_int8(codes_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype) -> Tensor:
    """(codes int8 [O, I], absmax fp32 [O]) -> weight [O, I]; fp32 product, rounded once."""
    out = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    scales_O1 = (absmax_O / 127.0)[:, None]
    rows = max(1, CHUNK // codes_OI.shape[1])
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        out[part] = codes_OI[part].float() * scales_O1[part]
    return out


def pack(weight_OI: Tensor, quant: Quant) -> dict[str, Tensor]:
    """The stored tensors of a quantised weight, by parameter name.

    fp32 scales are stored under an int32 view: engines cast every floating-point parameter of a model to
    bf16, and that must not touch them.
    """
    if quant.kind == "int8":
        codes, absmax = quantize_int8(weight_OI)
        return {"weight_codes": codes, "weight_scales": absmax.view(torch.int32)}
    assert quant.kind == "nf4", quant.kind
    codes, absmax = quantize_nf4(weight_OI)
    if not quant.double:
        return {"weight_codes": codes, "weight_scales": absmax.view(torch.int32)}
    absmax_codes, scales = quantize_absmax(absmax)
    return {
        "weight_codes": codes,
        "weight_absmax_codes": absmax_codes,
        "weight_scales": scales.view(torch.int32),
    }


def unpack(stored: Mapping[str, Tensor], quant: Quant, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Weight [O, I] in `dtype` from what `pack` made."""
    scales = stored["weight_scales"].view(torch.float32)
    if quant.kind == "int8":
        return dequantize_int8(stored["weight_codes"], scales, dtype)
    if quant.double:
        scales = dequantize_absmax(stored["weight_absmax_codes"], scales)
    return dequantize_nf4(stored["weight_codes"], scales, shape, dtype)


class QuantizedMatmul(torch.autograd.Function):
    """x W^T with a stored W: the dense weight lives only within the forward and within the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quant: Quant, shape: tuple[int, int], names: tuple[str, ...], *stored: Tensor
    ) -> Tensor:
        """x [..., I] -> [..., O]."""
        ctx.quant, ctx.shape, ctx.names = quant, shape, names
        ctx.save_for_backward(*stored)
        return torch.nn.functional.linear(x, unpack(dict(zip(names, stored)), quant, shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = unpack(dict(zip(ctx.names, ctx.saved_tensors)), ctx.quant, ctx.shape, grad.dtype)
        return grad @ weight, None, None, None, *(None for _ in ctx.names)


def dequantize_by_bitsandbytes(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`dequantize_nf4` in one kernel, used on GPUs.

    Not on the CPU: its AVX-512 kernel (0.50) restarts the blocks at every row, which is wrong unless the width is a
    multiple of 64, and importing it takes seconds.
    """
    return torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", list(shape), dtype)


@cache
def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401  (registers its operators)
    except ImportError:
        return False
    return True
