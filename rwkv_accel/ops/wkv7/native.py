"""WKV-7 on a CPU by the compiled native.cpp: its autograd function, and what of it torch.compile calls.

Kept for the backward pass: the inputs as they came, and one state per chunk.

Shapes: B batch, T tokens, H heads, N head size, S sequences of a packed batch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_accel.ops.first_order import check_first_order
from rwkv_accel.ops.wkv7.native_build import BuildError, chunk_tokens, library

logger = logging.getLogger(__name__)


class _View(ctypes.Structure):
    """A [B,T,H,N] tensor: where it starts, and the strides of its first three dimensions in values."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class Layout(NamedTuple):
    """Sequences of a call."""

    table: Tensor
    """int64 [S,5]: index, row, first token, end, first chunk; the longest first, for the threads' sake."""
    num_sequences: int
    num_chunks: int


def obstacle(head_size: int, dtype: torch.dtype) -> str | None:
    """Why the compiled functions cannot run such data, or None. Compiles them if they are not there."""
    if dtype == torch.float64:
        return "it computes in fp32"
    if head_size % 4:
        return f"head size {head_size} is not a multiple of 4"
    try:
        library(head_size)
    except BuildError as error:
        # The run's own line is that of its first process; others may be on other machines.
        logger.warning("wkv7 cannot be compiled for this CPU: %s", error)
        return str(error)
    return None


def wkv7_native(
    r: Tensor,
    w_low: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    w0: Tensor,
    state: Tensor | None,
    borders: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Backend of `wkv7` for checked inputs, none of them fp64."""
    given = (r, w_low, k, v, a, b, w0, state)
    kept = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    out, final = _NativeWKV7.apply(*given, make_layout(r.shape, borders), kept)
    return out.to(v.dtype), final


@lru_cache(maxsize=64)
def make_layout(shape: torch.Size, borders: tuple[int, ...] | None) -> Layout:
    """Where the sequences of a [B,T,H,N] call lie."""
    batch, num_tokens, _, size = shape
    spans = [(row, 0, num_tokens) for row in range(batch)] if borders is None else [(0, *s) for s in pairwise(borders)]
    table, num_chunks = [], 0
    for index, (row, begin, end) in enumerate(spans):
        table.append((index, row, begin, end, num_chunks))
        num_chunks += -(-(end - begin) // chunk_tokens(size))
    table.sort(key=lambda entry: entry[2] - entry[3])
    return Layout(torch.tensor(table, dtype=torch.int64, device="cpu"), len(spans), num_chunks)


class _NativeWKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w_low: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        w0: Tensor,
        state_SHNN: Tensor | None,
        layout: Layout,
        kept: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = (r, w_low, k, v, a, b, w0)
        out, final, states_SHNN = run_forward(inputs, state_SHNN, layout, kept)
        ctx.layout = layout
        ctx.state_dtype = None if state_SHNN is None else state_SHNN.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, states_SHNN)
        return out, final

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_order("wkv7 (native)")
        *inputs, states_SHNN = ctx.saved_tensors
        *grads, d_state = run_backward(inputs, d_out, d_final, states_SHNN, ctx.layout, ctx.needs_input_grad[:8])
        grads = [None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs)]
        return (*grads, None if d_state is None else d_state.to(ctx.state_dtype), None, None)


def run_forward(
    inputs: Sequence[Tensor], state_SHNN: Tensor | None, layout: Layout, kept: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(r, w_low, k, v, a, b, w0) -> out (fp32), final state, the states before all chunks if they are to be kept."""
    *inputs_BTHN, w0 = (_readable(x) for x in inputs)
    batch, num_tokens, heads, size = inputs_BTHN[0].shape
    out = w0.new_empty(batch, num_tokens, heads, size)
    if state_SHNN is None:
        final = w0.new_zeros(layout.num_sequences, heads, size, size)
    else:
        final = state_SHNN.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    states_SHNN = w0.new_empty(layout.num_chunks, heads, size, size) if kept else None
    if out.device.type == "cpu":  # on the meta device there is nothing but shapes
        views, w0_HN = _views(inputs_BTHN), w0.contiguous()
        library(size).wkv7_forward(
            views, *_pointers(w0_HN, out, final, states_SHNN, layout.table), *_sizes(layout, num_tokens, heads)
        )
    return out, final, states_SHNN


def run_backward(
    inputs: Sequence[Tensor],
    d_out: Tensor | None,
    d_final: Tensor | None,
    states_SHNN: Tensor,
    layout: Layout,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients (fp32) of the seven inputs and of the initial state; None for what is not needed."""
    *inputs_BTHN, w0 = (_readable(x) for x in inputs)
    shape = inputs_BTHN[0].shape
    _, num_tokens, heads, size = shape
    d_out = w0.new_zeros(size).expand(shape) if d_out is None else _readable(d_out)
    state_shape = (layout.num_sequences, heads, size, size)
    if d_final is None:
        d_state = w0.new_zeros(state_shape)
    else:
        d_state = d_final.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    *inputs_needed, need_w0, need_state = needed
    grads = [w0.new_empty(shape) if need else None for need in inputs_needed]
    d_w0_SHN = w0.new_empty(layout.num_sequences, heads, size) if need_w0 else None
    if w0.device.type == "cpu":
        views, w0_HN = _views([*inputs_BTHN, d_out]), w0.contiguous()
        library(size).wkv7_backward(
            views,
            *_pointers(w0_HN),
            (ctypes.c_void_p * 6)(*(pointer.value for pointer in _pointers(*grads))),
            *_pointers(d_w0_SHN, d_state, states_SHNN, layout.table),
            *_sizes(layout, num_tokens, heads),
        )
    return (*grads, None if d_w0_SHN is None else d_w0_SHN.sum(0), d_state if need_state else None)


def _readable(x: Tensor) -> Tensor:
    """fp32, its last dimension contiguous; any other strides."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _views(tensors: Sequence[Tensor]) -> Any:
    return (_View * len(tensors))(*(_View(x.data_ptr(), *x.stride()[:3]) for x in tensors))


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


def _sizes(layout: Layout, num_tokens: int, heads: int) -> list[ctypes.c_int64 | ctypes.c_int]:
    counts = (layout.num_sequences, num_tokens, heads)
    num_threads = min(torch.get_num_threads(), layout.num_sequences * heads)
    return [*map(ctypes.c_int64, counts), ctypes.c_int(num_threads)]
