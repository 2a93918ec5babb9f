"""Forward kernels of WKV-7: the inverse of every chunk in parallel, then a scan over the chunks of every piece.

A piece is a run of chunks of one sequence (all of it, unless the sequence is cut to fill the device). The maths and
its names are those of chunked.py; S is the state [value, key], U holds the rows u_t = S_{t-1} a_t.

    invert_chunks    one program per chunk and head          (I - Aab)^-1
    scan_pieces      one per piece, head and slice of values  out, U, the state before every chunk, the last state
    join_pieces      one per sequence, head and slice         the states between the pieces of a cut sequence

A row of the state needs no other row, so the slices of values never talk to each other.

Tables (int64): pieces [P,3] = first token, number of tokens, first chunk; chunks [n,2] = first token, number of tokens.
Tokens count rows of [B*T]. Offsets that grow with the batch or with T are int64, offsets within a chunk are int32.

Shapes: H heads, N head size, C tokens of a chunk, V values of a slice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rwkv_accel.ops.wkv7.triton_math import (
    chunk_of_program,
    dot,
    inverse_of_unit_lower,
    load_log2_decay,
    load_rows,
    lower_part,
    operand,
    store_rows,
)


@triton.jit(do_not_specialize=["heads"])
def invert_chunks(
    w_low_p,
    a_p,
    b_p,
    w0_p,
    chunks_p,
    inverse_p,
    heads,
    N: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr,
):
    chunk, head, first_token, num_tokens = chunk_of_program(chunks_p, heads)
    t, n = tl.arange(0, C), tl.arange(0, N)
    rows = t[:, None] * (heads * N) + n[None, :]
    here = (t < num_tokens)[:, None]
    base = (first_token * heads + head) * N

    w_CN = load_log2_decay(w_low_p + base, rows, here, tl.load(w0_p + head * N + n))
    sum_CN = tl.cumsum(w_CN, 0)
    a_CN = load_rows(a_p + base, rows, here) * tl.exp2(sum_CN - w_CN)
    b_CN = load_rows(b_p + base, rows, here) * tl.exp2(-sum_CN)
    lower_CC = lower_part(dot(a_CN, tl.trans(b_CN), PRECISION), C, True)
    inverse_CC = inverse_of_unit_lower(lower_CC, C, INVERSE_PRECISION)
    square = t[:, None] * C + t[None, :]
    tl.store(inverse_p + (chunk * heads + head) * C * C + square, inverse_CC.to(inverse_p.dtype.element_ty))


@triton.jit(do_not_specialize=["heads"])
def scan_pieces(
    r_p,
    w_low_p,
    k_p,
    v_p,
    a_p,
    b_p,
    w0_p,
    inverse_p,
    start_p,
    pieces_p,
    out_p,
    u_p,
    states_p,
    final_p,
    heads,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSITION: tl.constexpr,
):
    """`start_p` None: zeros. `u_p`, `states_p` None: they are not kept (no gradient will be asked for).

    TRANSITION makes what a piece does to any state instead, S -> S M + P, in `final_p` [pieces,H,2N,N]: M above
    (from the identity, without values), P below (from zeros). `r_p`, `out_p` and `start_p` are None then.
    """
    ROWS: tl.constexpr = 2 * N if TRANSITION else N
    NUM_SLICES: tl.constexpr = ROWS // V
    index = tl.program_id(0) // NUM_SLICES
    row = (tl.program_id(0) % NUM_SLICES) * V + tl.arange(0, V)
    piece = (index // heads).to(tl.int64)
    head = index % heads
    first_token = tl.load(pieces_p + 3 * piece)
    num_tokens = tl.load(pieces_p + 3 * piece + 1).to(tl.int32)
    first_chunk = tl.load(pieces_p + 3 * piece + 2)
    t, n = tl.arange(0, C), tl.arange(0, N)
    value = row % N
    square = t[:, None] * C + t[None, :]
    keys = t[:, None] * (heads * N) + n[None, :]
    values = t[:, None] * (heads * N) + value[None, :]
    state_rows = row[:, None] * N + n[None, :]
    w0_N = tl.load(w0_p + head * N + n)

    if TRANSITION:
        state_VN = tl.where(row[:, None] == n[None, :], 1.0, 0.0)
    elif start_p is not None:
        state_VN = tl.load(start_p + (piece * heads + head) * N * N + state_rows)
    else:
        state_VN = tl.zeros([V, N], tl.float32)

    for c in range(tl.cdiv(num_tokens, C)):
        here_C = c * C + t < num_tokens
        here = here_C[:, None]
        base = ((first_token + c * C) * heads + head) * N
        chunk = (first_chunk + c) * heads + head
        w_CN = load_log2_decay(w_low_p + base, keys, here, w0_N)
        sum_CN = tl.cumsum(w_CN, 0)
        total_N = tl.sum(w_CN, 0)
        growth_CN = tl.exp2(-sum_CN)
        a_CN = operand(load_rows(a_p + base, keys, here) * tl.exp2(sum_CN - w_CN), PRECISION)
        b_CN = operand(load_rows(b_p + base, keys, here) * growth_CN, PRECISION)
        k_CN = operand(load_rows(k_p + base, keys, here) * growth_CN, PRECISION)
        if TRANSITION:
            v_CV = load_rows(v_p + base, values, here & (row >= N)[None, :])
        else:
            v_CV = load_rows(v_p + base, values, here)
        v_CV = operand(v_CV, PRECISION)
        inverse_CC = tl.load(inverse_p + chunk * C * C + square)
        if not TRANSITION and states_p is not None:
            tl.store(states_p + chunk * N * N + state_rows, state_VN.to(states_p.dtype.element_ty))

        state_NV = operand(tl.trans(state_VN), PRECISION)
        k_NC = tl.trans(k_CN)
        read_CV = dot(a_CN, state_NV, PRECISION)
        read_CV += dot(lower_part(dot(a_CN, k_NC, PRECISION), C, True), v_CV, PRECISION)
        u_CV = dot(inverse_CC, read_CV, PRECISION)
        if not TRANSITION and u_p is not None:
            store_rows(u_p + base, values, u_CV, here)
        u_CV = operand(u_CV, PRECISION)
        if not TRANSITION:
            r_CN = operand(load_rows(r_p + base, keys, here) * tl.exp2(sum_CN), PRECISION)
            out_CV = dot(r_CN, state_NV, PRECISION)
            out_CV += dot(lower_part(dot(r_CN, k_NC, PRECISION), C, False), v_CV, PRECISION)
            out_CV += dot(lower_part(dot(r_CN, tl.trans(b_CN), PRECISION), C, False), u_CV, PRECISION)
            store_rows(out_p + base, values, out_CV, here)
        state_VN += dot(tl.trans(v_CV), k_CN, PRECISION) + dot(tl.trans(u_CV), b_CN, PRECISION)
        state_VN *= tl.exp2(total_N)[None, :]
    tl.store(final_p + (piece * heads + head) * ROWS * N + state_rows, state_VN)


@triton.jit(do_not_specialize=["heads"])
def join_pieces(
    maps_p,
    added_p,
    outer_p,
    spans_p,
    inner_p,
    heads,
    N: tl.constexpr,
    V: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    ADDED_FROM: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """States (or, backward, their gradients) with which every piece of a sequence begins, in the scan's direction.

    `maps_p` [pieces,H,MAP_ROWS,N] holds M in its first N rows, `added_p` what a piece adds, from row ADDED_FROM on.
    `outer_p` [S,H,N,N] is where a sequence starts (None: zeros), `spans_p` [S,2] its first piece and their number,
    `inner_p` [pieces,H,N,N] the result. A gradient goes through M^T.
    """
    NUM_SLICES: tl.constexpr = N // V
    index = tl.program_id(0) // NUM_SLICES
    row = (tl.program_id(0) % NUM_SLICES) * V + tl.arange(0, V)
    sequence = (index // heads).to(tl.int64)
    head = index % heads
    n = tl.arange(0, N)
    first = tl.load(spans_p + 2 * sequence)
    count = tl.load(spans_p + 2 * sequence + 1).to(tl.int32)
    square = n[:, None] * N + n[None, :]
    state_rows = row[:, None] * N + n[None, :]
    if outer_p is not None:
        state_VN = tl.load(outer_p + (sequence * heads + head) * N * N + state_rows)
    else:
        state_VN = tl.zeros([V, N], tl.float32)
    for i in range(count):
        if BACKWARD:
            piece = first + count - 1 - i
        else:
            piece = first + i
        matrix = piece * heads + head
        tl.store(inner_p + matrix * N * N + state_rows, state_VN)
        map_NN = tl.load(maps_p + matrix * MAP_ROWS * N + square)
        if BACKWARD:
            map_NN = tl.trans(map_NN)
            added_VN = tl.load(added_p + matrix * N * N + state_rows)
        else:
            added_VN = tl.load(added_p + matrix * MAP_ROWS * N + ADDED_FROM * N + state_rows)
        state_VN = dot(state_VN, map_NN, PRECISION) + added_VN
