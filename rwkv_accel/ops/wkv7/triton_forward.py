"""Forward kernels of WKV-7: the inverse of every chunk in parallel, then a scan over the chunks of every piece.

A piece is a run of chunks of one sequence (all of it, unless the sequence is cut to fill the device). The maths and
its names are those of chunked.py; S is the state [value, key], U holds the rows u_t = S_{t-1} a_t.

    invert_chunks    one program per chunk and head          (I - Aab)^-1
    scan_pieces      one per piece, head and slice of values  out, U, the state before every chunk, the last state
    join_pieces      one per sequence, head and slice         the states between the pieces of a cut sequence

A row of the state needs no other row, so the slices of values never talk to each other.

Tables (int64): pieces [P,3] = first token, number of tokens, first chunk; chunks [n,2] = first token, number of tokens.
Tokens count rows of [B*T]. Offsets that grow with the batch or with T are int64, offsets within a chunk are int32.

Shapes: H heads, N head size, C tokens of a chunk, V values of a slice, K keys of a block.
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
    piece_of_program,
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
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSITION: tl.constexpr,
):
    """`start_p` None: zeros. `u_p`, `states_p` None: they are not kept (no gradient will be asked for).

    TRANSITION makes what a piece does to any state instead, S -> S M + P, in `final_p` [pieces,H,2N,N]: M above
    (from the identity, without values), P below (from zeros). `r_p`, `out_p` and `start_p` are None then.

    K < N: what is multiplied along the keys does not fit into the registers at once. The products are then sums over
    blocks of K keys, and between its uses the state lies in `final_p`, where its blocks can be picked.
    """
    ROWS: tl.constexpr = 2 * N if TRANSITION else N
    piece, head, row, first_token, num_tokens, first_chunk = piece_of_program(pieces_p, heads, V, ROWS)
    t = tl.arange(0, C)
    values = t[:, None] * (heads * N) + (row % N)[None, :]
    state_rows = row[:, None] * N + tl.arange(0, N)[None, :]
    final_base = (piece * heads + head) * ROWS * N
    start_VN = _start(start_p, (piece * heads + head) * N * N + state_rows, row, N, V, TRANSITION)
    if K == N:
        state_VK = start_VN
    else:
        tl.store(final_p + final_base + state_rows, start_VN)

    for c in range(tl.cdiv(num_tokens, C)):
        here = (c * C + t < num_tokens)[:, None]
        base = ((first_token + c * C) * heads + head) * N
        chunk = (first_chunk + c) * heads + head
        read_CV, out_CV = tl.zeros([C, V], tl.float32), tl.zeros([C, V], tl.float32)
        ak_CC, rk_CC, rb_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        for block in tl.static_range(N // K):
            key = block * K + tl.arange(0, K)
            block_rows = row[:, None] * N + key[None, :]
            if K < N:
                tl.debug_barrier()  # Nothing of this block moves up, where its registers are not free yet.
                state_VK = tl.load(final_p + final_base + block_rows)
            keys, w_CK, sum_CK, a_CK, b_CK, k_CK = _block_of_keys(
                w_low_p, a_p, b_p, k_p, w0_p, base, head, key, here, heads, N, C, PRECISION
            )
            if block == 0:
                own = here & (row >= N)[None, :] if TRANSITION else here
                v_CV = operand(load_rows(v_p + base, values, own), PRECISION)
                inverse_CC = tl.load(inverse_p + chunk * C * C + t[:, None] * C + t[None, :])
            if not TRANSITION and states_p is not None:
                tl.store(states_p + chunk * N * N + block_rows, state_VK.to(states_p.dtype.element_ty))
            state_KV, k_KC = operand(tl.trans(state_VK), PRECISION), tl.trans(k_CK)
            read_CV += dot(a_CK, state_KV, PRECISION)
            ak_CC += dot(a_CK, k_KC, PRECISION)

        read_CV += dot(lower_part(ak_CC, C, True), v_CV, PRECISION)
        u_CV = operand(dot(inverse_CC, read_CV, PRECISION), PRECISION)
        if not TRANSITION and u_p is not None:
            store_rows(u_p + base, values, u_CV, here)

        for block in tl.static_range(N // K):
            if K < N:
                tl.debug_barrier()
                key = block * K + tl.arange(0, K)
                block_rows = row[:, None] * N + key[None, :]
                keys, w_CK, sum_CK, _, b_CK, k_CK = _block_of_keys(
                    w_low_p, a_p, b_p, k_p, w0_p, base, head, key, here, heads, N, C, PRECISION
                )
                state_VK = tl.load(final_p + final_base + block_rows)
                state_KV, k_KC = operand(tl.trans(state_VK), PRECISION), tl.trans(k_CK)
            if not TRANSITION:
                r_CK = operand(load_rows(r_p + base, keys, here) * tl.exp2(sum_CK), PRECISION)
                out_CV += dot(r_CK, state_KV, PRECISION)
                rb_CC += dot(r_CK, tl.trans(b_CK), PRECISION)
                rk_CC += dot(r_CK, k_KC, PRECISION)
                if block == N // K - 1:
                    out_CV += dot(lower_part(rk_CC, C, False), v_CV, PRECISION)
                    out_CV += dot(lower_part(rb_CC, C, False), u_CV, PRECISION)
                    store_rows(out_p + base, values, out_CV, here)
            state_VK += dot(tl.trans(v_CV), k_CK, PRECISION) + dot(tl.trans(u_CV), b_CK, PRECISION)
            state_VK *= tl.exp2(tl.sum(w_CK, 0))[None, :]
            if K < N:
                tl.debug_barrier()  # Several threads may have read a value that one overwrites.
                tl.store(final_p + final_base + block_rows, state_VK)
    if K == N:
        tl.store(final_p + final_base + state_rows, state_VK)


@triton.jit
def _start(start_p, offsets, row, N: tl.constexpr, V: tl.constexpr, TRANSITION: tl.constexpr):
    """The state before a piece."""
    if TRANSITION:
        start_VN = tl.where(row[:, None] == tl.arange(0, N)[None, :], 1.0, 0.0)
    elif start_p is not None:
        start_VN = tl.load(start_p + offsets)
    else:
        start_VN = tl.zeros([V, N], tl.float32)
    return start_VN


@triton.jit
def _block_of_keys(
    w_low_p,
    a_p,
    b_p,
    k_p,
    w0_p,
    base,
    head,
    key,
    here,
    heads,
    N: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Offsets, log2 of the decay and its running sum, and three operands. (What is not used is not loaded.)"""
    keys = tl.arange(0, C)[:, None] * (heads * N) + key[None, :]
    w_CK = load_log2_decay(w_low_p + base, keys, here, tl.load(w0_p + head * N + key))
    sum_CK = tl.cumsum(w_CK, 0)
    growth_CK = tl.exp2(-sum_CK)
    a_CK = operand(load_rows(a_p + base, keys, here) * tl.exp2(sum_CK - w_CK), PRECISION)
    b_CK = operand(load_rows(b_p + base, keys, here) * growth_CK, PRECISION)
    k_CK = operand(load_rows(k_p + base, keys, here) * growth_CK, PRECISION)
    return keys, w_CK, sum_CK, a_CK, b_CK, k_CK


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
