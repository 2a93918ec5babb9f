"""Checks of wkv7's arguments, made before any work.

Shapes: B batch, T tokens, H heads, N head size, S sequences of a packed batch.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

INPUT_NAMES = ("r", "w_low", "k", "v", "a", "b")


def wide_dtype(*inputs: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of the state: fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def data_dtype(*inputs: Tensor) -> torch.dtype:
    """What decides which backend can run r, w_low, k, v, a, b, w0: a w0 in fp32 does not widen the data."""
    *narrow, w0 = inputs
    return torch.float64 if w0.dtype == torch.float64 else common_dtype(*narrow)


def common_dtype(*inputs: Tensor) -> torch.dtype:
    """The least dtype that holds the values of all inputs."""
    return reduce(torch.promote_types, (x.dtype for x in inputs))


def check_inputs(
    r: Tensor,
    w_low: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    w0: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...] | None:
    """Raise ValueError for inputs that do not fit together, else return cu_seqlens as a tuple (or None)."""
    shape, device = r.shape, r.device
    if r.dim() != 4 or 0 in shape:
        raise ValueError(f"r must be a non-empty [batch, tokens, heads, head size] tensor, got {list(shape)}")
    for name, x in zip(INPUT_NAMES, (r, w_low, k, v, a, b)):
        if x.shape != shape:
            raise ValueError(f"{name} must have r's shape {list(shape)}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on r's device {device}, got {x.device}")
    batch, num_tokens, heads, head_size = shape
    _check_like("w0", w0, [heads, head_size], "a value per head and channel", device)
    borders = None if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, batch, num_tokens)
    if state is not None:
        rows = batch if borders is None else len(borders) - 1
        _check_like("state", state, [rows, heads, head_size, head_size], "one per sequence", device)
    return borders


def _check_like(name: str, x: Tensor, shape: list[int], what: str, device: torch.device) -> None:
    if list(x.shape) != shape:
        raise ValueError(f"{name} must be {shape} ({what}), got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on r's device {device}, got {x.device}")


def _check_cu_seqlens(cu_seqlens: Tensor, batch: int, num_tokens: int) -> tuple[int, ...]:
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of one row (flatten the rows), got {batch} rows")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be a vector of at least 2 borders, got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    borders = tuple(cu_seqlens.tolist())
    if borders[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {borders[0]}")
    if borders[-1] != num_tokens:
        raise ValueError(f"cu_seqlens must end at the number of tokens {num_tokens}, got {borders[-1]}")
    for i, (left, right) in enumerate(pairwise(borders)):
        if right <= left:
            raise ValueError(
                f"cu_seqlens must rise strictly (no empty sequence), got {left} then {right} at index {i + 1}"
            )
    return borders
