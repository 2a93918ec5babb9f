"""WKV-7 as one node of a compiled graph: its forward and its backward pass are operators of torch's dispatcher.

Only torch.compile takes this way. Eager code calls the autograd functions as they are: the dispatcher adds some 30 us
to each forward and backward pass, and would hide what the op allocates from `rwkv_accel.plan`, which counts it on the
meta device.

Shapes: B batch, T tokens, H heads, N head size, S sequences of a packed batch, C tokens per chunk, P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.ops.wkv7 import chunked, native, select_backend
from rwkv_accel.ops.wkv7.checks import check_inputs, common_dtype, data_dtype, wide_dtype
from rwkv_accel.ops.wkv7.decay import log_decay, logit_grad
from rwkv_accel.ops.wkv7.layout import Layout, build_layout


def wkv7_opaque(
    inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`wkv7` for backends with a backward pass of their own.

    cu_seqlens goes into the operator as a tensor: a graph that knew its values would be made anew for every batch.
    """
    kept = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state))
    out, final, _ = _forward(list(inputs), state, cu_seqlens, backend, kept)
    return out, final


@torch.library.custom_op("rwkv_accel::wkv7", mutates_args=())
def _forward(
    inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, backend: str, kept: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, final state, and what the backward pass needs beside the inputs (nothing unless `kept`)."""
    r, w_low, k, v, a, b, w0 = inputs
    borders = check_inputs(r, w_low, k, v, a, b, w0, state, cu_seqlens)
    out_dtype = v.dtype
    name = _backend_of(inputs, backend)
    if name == "native":
        layout = native.make_layout(v.shape, borders)
        out, final, states = native.run_forward(inputs, state, layout, kept)
        extra = [] if states is None else [states]
    elif name == "triton":
        from rwkv_accel.ops.wkv7 import triton_op

        inputs, state = triton_op.uniform(inputs, state)
        setup = triton_op.choose_setup(inputs[0].device, inputs[0].dtype, tuple(inputs[0].shape), borders)
        with triton_op.on_device(inputs[0].device):
            out, final, (inverse, u, states, maps) = triton_op.run_forward(inputs, state, setup, kept)
        extra = [inverse, u, states, _no_maps(final) if maps is None else maps]
    else:
        chunks, wide = _chunked_setup(inputs, borders)
        inputs = _with_log_decay(inputs, wide)
        out, final, states = chunked.run_forward(inputs, None if state is None else state.to(wide), chunks, wide)
        extra = [states]
    return out.to(out_dtype), final, extra if kept else []


@torch.library.custom_op("rwkv_accel::wkv7_backward", mutates_args=())
def _backward(
    inputs: Sequence[Tensor],
    extra: Sequence[Tensor],
    d_out: Tensor | None,
    d_final: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of (*inputs, state) that are needed; the state's is wide."""
    borders = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    dtypes = [x.dtype for x in inputs]
    name = _backend_of(inputs, backend)
    if name == "native":
        layout = native.make_layout(inputs[0].shape, borders)
        *grads, d_state = native.run_backward(inputs, d_out, d_final, extra[0], layout, needed)
    elif name == "triton":
        from rwkv_accel.ops.wkv7 import triton_op

        inputs, _ = triton_op.uniform(inputs, None)
        setup = triton_op.choose_setup(inputs[0].device, inputs[0].dtype, tuple(inputs[0].shape), borders)
        inverse, u, states, maps = extra
        d_out = torch.zeros_like(inputs[3]) if d_out is None else d_out.to(inputs[3].dtype).contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        with triton_op.on_device(d_out.device):
            saved = (inverse, u, states, maps if len(maps) else None)
            *grads, d_state = triton_op.run_backward(inputs, d_out, d_final, saved, setup, needed[6])
    else:
        chunks, wide = _chunked_setup(inputs, borders)
        inputs = _with_log_decay(inputs, wide)
        need_r, need_low, *others, need_w0, need_state = needed
        needed_here = (need_r, need_low or need_w0, *others, need_state)
        *grads, d_state = chunked.run_backward(inputs, d_out, d_final, extra[0], chunks, needed_here)
        d_logit = None if grads[1] is None else logit_grad(inputs[1], grads[1])
        grads[1] = d_logit
        grads.append(None if d_logit is None else d_logit.sum((0, 1)))
    found = [*(None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes)), d_state]
    return [grad for grad, need in zip(found, needed, strict=True) if need]


def _backend_of(inputs: Sequence[Tensor], backend: str) -> str:
    r = inputs[0]
    return select_backend(backend, r.device.type, int(r.shape[-1]), data_dtype(*inputs))[0]


def _chunked_setup(inputs: Sequence[Tensor], borders: tuple[int, ...] | None) -> tuple[Layout, torch.dtype]:
    wide = wide_dtype(*inputs)
    return build_layout(tuple(inputs[0].shape), borders, wide.itemsize, inputs[0].device), wide


def _with_log_decay(inputs: Sequence[Tensor], wide: torch.dtype) -> list[Tensor]:
    """r, w_log, k, v, a, b: what the chunked op reads."""
    r, w_low, *others, w0 = inputs
    return [r, log_decay(w_low, w0, wide), *others]


def _no_maps(state_SHNN: Tensor) -> Tensor:
    """What stands for the maps of pieces where no sequence was cut."""
    heads, size = state_SHNN.shape[1:3]
    return state_SHNN.new_empty(0, heads, 2 * size, size)


@_forward.register_fake
def _(
    inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, backend: str, kept: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    v = inputs[3]
    batch, _, heads, size = v.shape
    wide = wide_dtype(*inputs)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out, final = v.new_empty(v.shape), v.new_empty(rows, heads, size, size, dtype=wide)
    if not kept:
        return out, final, []
    # The number of chunks depends on the borders' values.
    num_chunks = torch.library.get_ctx().new_dynamic_size()
    if _backend_of(inputs, backend) in ("chunked", "native"):
        return out, final, [v.new_empty(num_chunks, heads, size, size, dtype=wide)]
    from rwkv_accel.ops.wkv7.triton_op import choose_sizes

    config, numbers = choose_sizes(v.device, common_dtype(*inputs[:6]), int(size))
    num, kept_dtype = config.chunk_size, numbers.kept
    extra = [
        v.new_empty(num_chunks, heads, num, num, dtype=kept_dtype),
        v.new_empty(v.shape, dtype=kept_dtype),
        v.new_empty(num_chunks, heads, size, size, dtype=kept_dtype),
        v.new_empty(torch.library.get_ctx().new_dynamic_size(), heads, 2 * size, size, dtype=torch.float32),
    ]
    return out, final, extra


@_backward.register_fake
def _(
    inputs: Sequence[Tensor],
    extra: Sequence[Tensor],
    d_out: Tensor | None,
    d_final: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    v = inputs[3]
    batch, _, heads, size = v.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(rows, heads, size, size, dtype=wide_dtype(*inputs))
    return [x.new_empty(x.shape) for x, need in zip((*inputs, state), needed, strict=True) if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    tensors, _, cu_seqlens, ctx.backend, _ = inputs
    ctx.num_inputs = len(tensors)
    ctx.save_for_backward(cu_seqlens, *tensors, *output[2])


def _gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Any) -> tuple[Any, ...]:
    cu_seqlens, *saved = ctx.saved_tensors
    inputs, extra = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
    inputs_needed, need_state = ctx.needs_input_grad[:2]
    needed = [*inputs_needed, need_state]
    found = iter(_backward(inputs, extra, d_out, d_final, cu_seqlens, ctx.backend, needed))
    *grads, d_state = (next(found) if need else None for need in needed)
    return grads, d_state, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
