"""WKV-7 in Triton: chooses sizes, allocates, launches; see triton_forward.py and triton_backward.py for the kernels.

Kept for the backward pass: the inputs, and per chunk the state before it, the inverse and U. Nothing of size T is kept
where no gradient is asked for.

Shapes: B batch, T tokens, H heads, N head size, S sequences, P pieces, C tokens per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_accel.ops.devices import on_device
from rwkv_accel.ops.first_order import check_first_order
from rwkv_accel.ops.wkv7.checks import common_dtype
from rwkv_accel.ops.wkv7.pieces import Pieces, build_pieces
from rwkv_accel.ops.wkv7.triton_backward import chunk_gradients, scan_pieces_backward
from rwkv_accel.ops.wkv7.triton_config import Config, Launch, Precision, choose_config, family, precision
from rwkv_accel.ops.wkv7.triton_forward import invert_chunks, join_pieces, scan_pieces

JOIN_ROWS = 16
"""Rows of a state per program where pieces are joined."""


def wkv7_triton(
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
    """Backend of `wkv7` for checked inputs on a device that Triton compiles for (or under its interpreter).

    r, w_low, k, v, a, b are brought to one dtype, strided tensors are copied; w0 and the state are read in fp32.
    """
    inputs, state = uniform((r, w_low, k, v, a, b, w0), state)
    setup = choose_setup(r.device, inputs[0].dtype, tuple(r.shape), borders)
    out, final = _TritonWKV7.apply(*inputs, state, setup)
    return out.to(v.dtype), final


def uniform(inputs: Sequence[Tensor], state: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Inputs and state as the kernels read them."""
    *narrow, w0 = inputs
    dtype = common_dtype(*narrow)
    narrow = [x.to(dtype).contiguous() for x in narrow]
    return [*narrow, w0.float().contiguous()], None if state is None else state.float().contiguous()


class Setup(NamedTuple):
    """Everything about a call that its values do not change."""

    config: Config
    precision: Precision
    pieces: Pieces


def choose_setup(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], borders: tuple[int, ...] | None
) -> Setup:
    batch, num_tokens, heads, size = shape
    config, numbers = choose_sizes(device, dtype, size)
    programs = heads * (size // config.scan.block)
    pieces = build_pieces(batch, num_tokens, borders, config.chunk_size, programs, device)
    return Setup(config, numbers, pieces)


def choose_sizes(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Config, Precision]:
    """What of a setup does not depend on the sequences."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    kind = family(device)
    return choose_config(kind, dtype, head_size, name), precision(kind, dtype, head_size)


def launch(kernel: Any, programs: int, sizes: Launch, *args: Any, **constants: Any) -> None:
    """Queue `programs` programs of a kernel."""
    kernel[(programs,)](*args, **constants, **sizes.options)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel fills: every result and intermediate comes from here."""
    return torch.empty(shape, dtype=dtype, device=device)


class _TritonWKV7(torch.autograd.Function):
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
        state: Tensor | None,
        setup: Setup,
    ) -> tuple[Tensor, Tensor]:
        inputs = (r, w_low, k, v, a, b, w0)
        with on_device(r.device):
            kept = any(ctx.needs_input_grad)
            out, final, extra = run_forward(inputs, state, setup, kept)
        ctx.setup = setup
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *extra)
        return out, final

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_order("wkv7 (triton)")
        inputs, extra = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        *_, need_w0, need_state, _ = ctx.needs_input_grad
        if d_out is None:
            d_out = torch.zeros_like(inputs[3])
        d_final = None if d_final is None else d_final.contiguous()
        with on_device(d_out.device):
            *grads, d_state = run_backward(inputs, d_out.contiguous(), d_final, extra, ctx.setup, need_w0)
        return (*grads, d_state if need_state else None, None)


def run_forward(
    inputs: Sequence[Tensor], state: Tensor | None, setup: Setup, kept: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """From r, w_low, k, v, a, b, w0: out, final state, and what the backward pass needs: inverses, U, states, maps of
    the pieces."""
    r, w_low, k, v, a, b, w0 = inputs
    config, numbers, pieces = setup
    heads, size = r.shape[2:]
    num = config.chunk_size
    constants = {"N": size, "C": num, "PRECISION": numbers.products}
    inverse = _empty((pieces.num_chunks, heads, num, num), numbers.kept, r.device)
    launch(
        invert_chunks,
        pieces.num_chunks * heads,
        config.invert,
        *(w_low, a, b, w0, pieces.chunks_n2, inverse, heads),
        **constants,
        INVERSE_PRECISION=numbers.inverse,
    )
    maps, start = None, state
    if pieces.is_cut:
        maps = _empty((pieces.num_pieces, heads, 2 * size, size), torch.float32, r.device)
        launch(
            scan_pieces,
            pieces.num_pieces * heads * (2 * size // config.transition.block),
            config.transition,
            *(None, w_low, k, v, a, b, w0, inverse, None, pieces.pieces_P3, None, None, None, maps, heads),
            **constants,
            V=config.transition.block,
            K=config.transition.inner or size,
            TRANSITION=True,
        )
        start = _join(maps, maps, state, setup, backward=False)
    out = _empty(v.shape, v.dtype, v.device)
    u = states = None
    if kept:
        u = _empty(v.shape, numbers.kept, v.device)
        states = _empty((pieces.num_chunks, heads, size, size), numbers.kept, v.device)
    final = _empty((pieces.num_pieces, heads, size, size), torch.float32, r.device)
    launch(
        scan_pieces,
        pieces.num_pieces * heads * (size // config.scan.block),
        config.scan,
        *(r, w_low, k, v, a, b, w0, inverse, start, pieces.pieces_P3, out, u, states, final, heads),
        **constants,
        V=config.scan.block,
        K=config.scan.inner or size,
        TRANSITION=False,
    )
    if pieces.is_cut:
        final = final.index_select(0, pieces.last_S)
    return out, final, (inverse, u, states, maps)


def run_backward(
    inputs: Sequence[Tensor],
    d_out: Tensor,
    d_final: Tensor | None,
    extra: tuple[Tensor, ...],
    setup: Setup,
    need_w0: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of r, w_low, k, v, a, b, of w0 (if it is needed) and of the initial state."""
    r, w_low, k, v, a, b, w0 = inputs
    config, numbers, pieces = setup
    inverse, u, states, maps = extra
    heads, size = r.shape[2:]
    constants = {"N": size, "C": config.chunk_size, "PRECISION": numbers.products}
    programs = pieces.num_pieces * heads * (size // config.scan_backward.block)

    def scan(d_end: Tensor | None, dz: Tensor | None, d_states: Tensor | None) -> Tensor:
        d_start = _empty((pieces.num_pieces, heads, size, size), torch.float32, r.device)
        launch(
            scan_pieces_backward,
            programs,
            config.scan_backward,
            *(r, w_low, a, b, w0, d_out, inverse, d_end, pieces.pieces_P3, dz, d_states, d_start, heads),
            **constants,
            V=config.scan_backward.block,
        )
        return d_start

    d_end = d_final
    if maps is not None:
        d_end = _join(maps, scan(None, None, None), d_final, setup, backward=True)
    dz, d_states = (_empty(x.shape, x.dtype, x.device) for x in (u, states))
    d_start = scan(d_end, dz, d_states)
    grads = [_empty(x.shape, x.dtype, x.device) for x in inputs[:6]]
    d_w0 = _empty((pieces.num_chunks, heads, size), torch.float32, r.device) if need_w0 else None
    launch(
        chunk_gradients,
        pieces.num_chunks * heads,
        config.gradients,
        *(r, w_low, k, v, a, b, w0, d_out, u, dz, states, d_states, pieces.chunks_n2, *grads, d_w0, heads),
        **{**constants, "PRECISION": numbers.gradients},
        K=config.gradients.block,
        V=config.gradients.inner or size,
    )
    if pieces.is_cut:
        d_start = d_start.index_select(0, pieces.spans_S2[:, 0])
    return (*grads, None if d_w0 is None else d_w0.sum(0), d_start)


def _join(maps: Tensor, added: Tensor, outer: Tensor | None, setup: Setup, *, backward: bool) -> Tensor:
    """Where every piece begins, in the direction of the scan."""
    pieces = setup.pieces
    heads, _, size = maps.shape[1:]
    inner = _empty((pieces.num_pieces, heads, size, size), torch.float32, maps.device)
    launch(
        join_pieces,
        pieces.num_sequences * heads * (size // JOIN_ROWS),
        Launch(JOIN_ROWS, 4 if size <= 64 else 8),
        *(maps, added, outer, pieces.spans_S2, inner, heads),
        N=size,
        V=JOIN_ROWS,
        MAP_ROWS=2 * size,
        ADDED_FROM=size,
        BACKWARD=backward,
        PRECISION="ieee" if setup.precision.inverse == "ieee" else "tf32x3",
    )
    return inner
