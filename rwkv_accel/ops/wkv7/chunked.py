"""WKV-7 in chunks: matrix products within a chunk, one small product per chunk for the state, hand-written backward.

A chunk of C tokens with start state S0 and G_i = sum of w_log up to and including token i, rows = tokens:

    A~ = a e^(G - w_log)   R~ = r e^G   B~ = b e^-G   K~ = k e^-G
    Aab, Aak = strictly lower A~ B~^T, A~ K~^T          Aqb, Aqk = lower R~ B~^T, R~ K~^T
    U   = (I - Aab)^-1 (A~ S0^T + Aak V)                rows u_t = S_{t-1} a_t
    out = R~ S0^T + Aqb U + Aqk V
    S_C = (S0 + U^T B~ + V^T K~) diag(e^G_C)

With 32 tokens G reaches -19.4: e^-G needs no centring in fp32. The inverse is made by forward substitution, which
stays accurate for near-identical keys, where a power series does not.

The backward pass makes all intermediates again, segment by segment, from the inputs and the chunk states, which are
all that is kept. A segment is small enough for the cache, which is where most of the speed comes from.

Shapes: B batch, T tokens, H heads, N head size, S sequences, C tokens per chunk, D = 2C, Z matrices of a segment.
Source: this project's derivation of the WY form; the recurrence is the one of reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_accel.ops.first_order import check_first_order
from rwkv_accel.ops.wkv7.checks import wide_dtype
from rwkv_accel.ops.wkv7.layout import Layout, Segment, build_layout


def wkv7_chunked(
    r: Tensor,
    w_log: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    borders: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Backend of `wkv7` for checked inputs, but for its decay (decay.py)."""
    wide = wide_dtype(r, w_log, k, v, a, b)
    layout = build_layout(tuple(r.shape), borders, wide.itemsize, r.device)
    state = None if state is None else state.to(wide)
    return _ChunkedWKV7.apply(r, w_log, k, v, a, b, state, layout, wide)


class _Constants(NamedTuple):
    mask_DD: Tensor
    """Which rows of [A~; R~] see which rows of [B~; K~]: lower triangles, strict for A~."""
    lower_CC: Tensor
    identity_CC: Tensor


@lru_cache(maxsize=16)
def _constants(chunk_size: int, dtype: torch.dtype, device: torch.device) -> _Constants:
    ones = torch.ones(chunk_size, chunk_size, dtype=dtype, device=device)
    mask_DD = torch.cat([ones.tril(-1).repeat(1, 2), ones.tril().repeat(1, 2)])
    return _Constants(mask_DD, ones.tril(), torch.eye(chunk_size, dtype=dtype, device=device))


class _Chunks(NamedTuple):
    """Intermediates of a segment that do not depend on its start states."""

    decay_ZCN: Tensor
    """e^G."""
    growth_ZCN: Tensor
    """e^-G."""
    total_Z1N: Tensor
    """e^G_C."""
    reads_ZDN: Tensor
    """[A~; R~]."""
    writes_ZDN: Tensor
    """[B~; K~]."""
    values_ZDN: Tensor
    """[U; V], U still empty."""
    scores_ZDD: Tensor
    """[[Aab, Aak], [Aqb, Aqk]]."""
    inverse_ZCC: Tensor
    """(I - Aab)^-1."""
    u_local_ZCN: Tensor
    """(I - Aab)^-1 Aak V."""
    u_state_ZCN: Tensor
    """(I - Aab)^-1 A~, so that U = u_local + u_state S0^T."""


def _prepare(inputs: Sequence[Tensor], layout: Layout, segment: Segment, dtype: torch.dtype) -> _Chunks:
    """Load a segment of (r, w_log, k, v, a, b) and make what its states do not change."""
    num = layout.chunk_size
    heads, size = inputs[0].shape[2:]
    rows, device = segment.num_chunks * heads, inputs[0].device
    constants = _constants(num, dtype, device)
    w_log_ZCN = torch.empty(rows, num, size, dtype=dtype, device=device)
    reads_ZDN, writes_ZDN, values_ZDN = w_log_ZCN.new_empty(3, rows, 2 * num, size)
    a_ZCN, r_ZCN = reads_ZDN.chunk(2, dim=1)
    b_ZCN, k_ZCN = writes_ZDN.chunk(2, dim=1)
    v_ZCN = values_ZDN[:, num:]
    for x_BTHN, x_ZCN in zip(inputs, (r_ZCN, w_log_ZCN, k_ZCN, v_ZCN, a_ZCN, b_ZCN)):
        layout.load(x_BTHN, segment, x_ZCN)

    decay_ZCN = torch.bmm(constants.lower_CC.expand(rows, num, num), w_log_ZCN).exp_()
    growth_ZCN = decay_ZCN.reciprocal()
    total_Z1N = decay_ZCN[:, -1:]
    # e^(G - w_log) is e^G of the token before, and 1 for the first.
    a_ZCN[:, 1:].mul_(decay_ZCN[:, :-1])
    r_ZCN.mul_(decay_ZCN)
    b_ZCN.mul_(growth_ZCN)
    k_ZCN.mul_(growth_ZCN)

    scores_ZDD = torch.bmm(reads_ZDN, writes_ZDN.mT).mul_(constants.mask_DD)
    # Solved from the right for the transpose, which spares LAPACK's copies: X (I - Aab)^T = I.
    inverse_ZCC = torch.linalg.solve_triangular(
        (constants.identity_CC - scores_ZDD[:, :num, :num]).mT,
        constants.identity_CC.expand(rows, num, num),
        upper=True,
        left=False,
        unitriangular=True,
    ).mT
    u_local_ZCN = torch.bmm(inverse_ZCC, torch.bmm(scores_ZDD[:, :num, num:], v_ZCN))
    u_state_ZCN = torch.bmm(inverse_ZCC, a_ZCN)
    return _Chunks(
        decay_ZCN,
        growth_ZCN,
        total_Z1N,
        reads_ZDN,
        writes_ZDN,
        values_ZDN,
        scores_ZDD,
        inverse_ZCC,
        u_local_ZCN,
        u_state_ZCN,
    )


class _ChunkedWKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w_log: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state_SHNN: Tensor | None,
        layout: Layout,
        wide: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = (r, w_log, k, v, a, b)
        out, final, states_SHNN = run_forward(inputs, state_SHNN, layout, wide)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, states_SHNN)
        return out, final

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_order("wkv7 (chunked)")
        *inputs, states_SHNN = ctx.saved_tensors
        grads = run_backward(inputs, d_out, d_final, states_SHNN, ctx.layout, ctx.needs_input_grad[:7])
        return (*grads, None, None)


def run_forward(
    inputs: Sequence[Tensor], state_SHNN: Tensor | None, layout: Layout, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out, final state, and what the backward pass needs: the states before and behind all chunks."""
    heads, size = inputs[0].shape[2:]
    num, num_sequences = layout.chunk_size, layout.num_sequences
    states_SHNN = inputs[0].new_empty(num_sequences + layout.num_chunks, heads, size, size, dtype=wide)
    states_SHNN[:num_sequences] = 0 if state_SHNN is None else state_SHNN.index_select(0, layout.ranked)
    out = inputs[3].new_empty(inputs[3].shape)
    for segment in layout.segments:
        chunks = _prepare(inputs, layout, segment, wide)
        chunks.values_ZDN[:, :num] = _pass_states(chunks, layout, segment, states_SHNN)
        out_ZCN = torch.bmm(chunks.reads_ZDN[:, num:], segment.start_states(states_SHNN).mT)
        out_ZCN.baddbmm_(chunks.scores_ZDD[:, num:], chunks.values_ZDN)
        layout.store(out_ZCN, segment, out)
    return out, states_SHNN.index_select(0, layout.final_state), states_SHNN


def run_backward(
    inputs: Sequence[Tensor],
    d_out: Tensor | None,
    d_final: Tensor | None,
    states_SHNN: Tensor,
    layout: Layout,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of r, w_log, k, v, a, b and of the initial state; None for what is not needed."""
    if d_out is None:
        d_out = inputs[3].new_zeros(()).expand(inputs[3].shape)
    if d_final is None:
        d_state_SHNN = states_SHNN.new_zeros(layout.num_sequences, *states_SHNN.shape[1:])
    else:
        d_state_SHNN = d_final.index_select(0, layout.ranked)
    *inputs_needed, need_state = needed
    grads = [x.new_empty(x.shape) if need else None for x, need in zip(inputs, inputs_needed)]
    for segment in reversed(layout.segments):
        chunks = _prepare(inputs, layout, segment, states_SHNN.dtype)
        d_values_ZDN = torch.empty_like(chunks.values_ZDN)
        layout.load(d_out, segment, d_values_ZDN[:, layout.chunk_size :])
        state_grads = _pass_state_grads(chunks, segment, d_values_ZDN, d_state_SHNN)
        if not any(inputs_needed):
            continue
        found = _segment_grads(chunks, layout, segment, d_values_ZDN, *state_grads, states_SHNN, inputs_needed)
        for grad_ZCN, grad_BTHN in zip(found, grads):
            if grad_ZCN is not None and grad_BTHN is not None:
                layout.store(grad_ZCN, segment, grad_BTHN)
    return (*grads, d_state_SHNN.index_select(0, layout.rank) if need_state else None)


def _pass_states(chunks: _Chunks, layout: Layout, segment: Segment, states_SHNN: Tensor) -> Tensor:
    """Fill in the states behind the chunks of a segment, return U [Z,C,N]. Serial over rounds, batched within."""
    b_ZCN, k_ZCN = chunks.writes_ZDN.chunk(2, dim=1)
    ends_ZNN = layout.end_states(states_SHNN, segment)
    torch.bmm(chunks.values_ZDN[:, layout.chunk_size :].mT, k_ZCN, out=ends_ZNN)
    u_ZCN = chunks.u_local_ZCN
    sizes = segment.piece_sizes(states_SHNN.shape[1])
    stacks = (u_ZCN, chunks.u_state_ZCN, b_ZCN, chunks.total_Z1N, ends_ZNN)
    for piece, u, u_state, b, total, end in zip(segment.pieces, *(x.split(sizes) for x in stacks)):
        start = states_SHNN[piece.start_states].flatten(0, 1)
        u.baddbmm_(u_state, start.mT)
        end.add_(start).baddbmm_(u.mT, b).mul_(total)
    return u_ZCN


def _pass_state_grads(
    chunks: _Chunks, segment: Segment, d_values_ZDN: Tensor, d_state_SHNN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients [Z,N,N] of the states behind the chunks of a segment, and the same before the decay diag(e^G_C).

    d_values comes as [empty; dOut] and is completed to [dZ; dOut], where U = (I - Aab)^-1 Z. d_state holds, by rank,
    the gradient of the state before the chunk of each sequence that was treated last (to begin with, of the final
    state), and is carried on:  dS0 = dS_C diag(e^G_C) + dOut^T R~ + dZ^T A~.
    """
    num = chunks.u_state_ZCN.shape[1]
    d_out_ZCN = d_values_ZDN[:, num:]
    inverse_ZCC, b_ZCN = chunks.inverse_ZCC, chunks.writes_ZDN[:, :num]
    a_ZCN, r_ZCN = chunks.reads_ZDN.chunk(2, dim=1)
    # dZ = dz_local + dz_state (dS_C diag(e^G_C))^T
    dz_ZCN = torch.bmm(inverse_ZCC.mT, torch.bmm(chunks.scores_ZDD[:, num:, :num].mT, d_out_ZCN))
    dz_state_ZCN = torch.bmm(inverse_ZCC.mT, b_ZCN)
    from_out_ZNN = torch.bmm(d_out_ZCN.mT, r_ZCN)
    d_ends_ZNN, d_written_ZNN = torch.empty_like(from_out_ZNN), torch.empty_like(from_out_ZNN)
    sizes = segment.piece_sizes(d_state_SHNN.shape[1])
    stacks = (dz_ZCN, dz_state_ZCN, a_ZCN, chunks.total_Z1N, from_out_ZNN, d_ends_ZNN, d_written_ZNN)
    slices = zip(segment.pieces, *(x.split(sizes) for x in stacks))
    for piece, dz, dz_state, a, total, from_out, d_end, d_written in reversed(list(slices)):
        d_state = d_state_SHNN[piece.ranks].flatten(0, 1)
        d_end.copy_(d_state)
        torch.mul(d_end, total, out=d_written)
        dz.baddbmm_(dz_state, d_written.mT)
        torch.add(d_written, from_out, out=d_state).baddbmm_(dz.mT, a)
    d_values_ZDN[:, :num] = dz_ZCN
    return d_ends_ZNN, d_written_ZNN


def _segment_grads(
    chunks: _Chunks,
    layout: Layout,
    segment: Segment,
    d_values_ZDN: Tensor,
    d_ends_ZNN: Tensor,
    d_written_ZNN: Tensor,
    states_SHNN: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients [Z,C,N] of (r, w_log, k, v, a, b); those that are not needed may be None."""
    need_r, need_w_log, need_k, need_v, need_a, need_b = needed
    num = layout.chunk_size
    constants = _constants(num, d_values_ZDN.dtype, d_values_ZDN.device)
    starts_ZNN = segment.start_states(states_SHNN)
    chunks.values_ZDN[:, :num] = chunks.u_local_ZCN.baddbmm_(chunks.u_state_ZCN, starts_ZNN.mT)

    dr = dw_log = dk = dv = da = db = None
    if need_v:
        dv = torch.bmm(chunks.writes_ZDN[:, num:], d_written_ZNN.mT)
        dv.baddbmm_(chunks.scores_ZDD[:, :, num:].mT, d_values_ZDN)
    d_scores_ZDD = torch.bmm(d_values_ZDN, chunks.values_ZDN.mT).mul_(constants.mask_DD)
    if need_r or need_a or need_w_log:
        d_reads_ZDN = torch.bmm(d_values_ZDN, starts_ZNN)
        d_reads_ZDN.baddbmm_(d_scores_ZDD, chunks.writes_ZDN)
    if need_b or need_k or need_w_log:
        d_writes_ZDN = torch.bmm(chunks.values_ZDN, d_written_ZNN)
        d_writes_ZDN.baddbmm_(d_scores_ZDD.mT, chunks.reads_ZDN)
    if need_w_log:
        # G of a token raises what it reads and lowers what it writes; G_C also scales the end state.
        read_ZDN, written_ZDN = chunks.reads_ZDN * d_reads_ZDN, chunks.writes_ZDN * d_writes_ZDN
        dg_ZCN = read_ZDN[:, num:].sub_(written_ZDN[:, :num]).sub_(written_ZDN[:, num:])
        dg_ZCN[:, :-1] += read_ZDN[:, 1:num]
        dg_ZCN[:, -1] += (layout.end_states(states_SHNN, segment) * d_ends_ZNN).sum(1)
        dw_log = torch.bmm(constants.lower_CC.mT.expand(len(dg_ZCN), num, num), dg_ZCN)
    if need_r or need_a:
        da, dr = d_reads_ZDN.chunk(2, dim=1)
        da[:, 1:].mul_(chunks.decay_ZCN[:, :-1])
        dr.mul_(chunks.decay_ZCN)
    if need_b or need_k:
        db, dk = d_writes_ZDN.chunk(2, dim=1)
        db.mul_(chunks.growth_ZCN)
        dk.mul_(chunks.growth_ZCN)
    return dr, dw_log, dk, dv, da, db
