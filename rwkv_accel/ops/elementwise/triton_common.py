"""What the Triton kernels of the elementwise ops share: tiles, launch sizes, memory of results."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_accel.ops.devices import on_device

TILE = 512
"""Values of a tile: four per thread of a program, which leaves registers for a dozen tiles."""
NUM_WARPS = 4
SUM_STEPS = 16
"""Tiles that one program adds up where gradients of vectors are wanted."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = NUM_WARPS) -> None:
    """Queue a kernel whose first argument is a tensor on the device of that tensor."""
    with on_device(args[0].device):
        kernel[grid](*args, num_warps=num_warps)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory for a result; every value of it is written by a kernel."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def empty_sums(blocks: int, values: int, like: Tensor) -> Tensor:
    """fp32 [blocks, values]: one row of partial sums per program."""
    return torch.empty(blocks, values, dtype=torch.float32, device=like.device)


def head_tile(head_size: int) -> int:
    """Tokens of a tile of one head. Raises ValueError for head sizes that are not powers of two."""
    if head_size & (head_size - 1) or not 16 <= head_size <= 256:
        raise ValueError(f"the Triton kernels take head sizes 16, 32, 64, 128 and 256, got {head_size}")
    return TILE // head_size


@triton.jit
def load_tile(pointer, offsets, here):
    """A tile as fp32, zeros where `here` is false."""
    return tl.load(pointer + offsets, mask=here, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, offsets, here, tile):
    """Write a tile in the pointer's dtype; None is a result that nobody asked for."""
    if pointer is not None:
        tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=here)
