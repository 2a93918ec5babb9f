"""Backward kernels of WKV-7: a light scan for the gradients of the states, then everything else chunk by chunk.

    scan_pieces_backward   one program per piece, head and slice of values   dZ, the state's gradient after every chunk
    chunk_gradients        one program per chunk and head                    the gradients of all inputs

Z = (I - Aab) U is what the inverse acts on, dZ its gradient; D is the gradient of the state behind a chunk. The scan
reads neither k nor v; the second kernel has no serial part and no inverse, so it fills the device at any batch size.

Tables and names as in triton_forward.py. Shapes: H heads, N head size, C tokens of a chunk, V values of a slice
(scan) or of a block, K keys of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rwkv_accel.ops.wkv7.triton_math import (
    chunk_of_program,
    decay_logit_grad,
    dot,
    load_log2_decay,
    load_rows,
    lower_part,
    operand,
    piece_of_program,
    store_rows,
)


@triton.jit(do_not_specialize=["heads"])
def scan_pieces_backward(
    r_p,
    w_low_p,
    a_p,
    b_p,
    w0_p,
    d_out_p,
    inverse_p,
    d_end_p,
    pieces_p,
    dz_p,
    d_states_p,
    d_start_p,
    heads,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`d_end_p` None: zeros. `dz_p` and `d_states_p` None: only the gradient of the piece's first state is wanted."""
    piece, head, row, first_token, num_tokens, first_chunk = piece_of_program(pieces_p, heads, V, N)
    t, n = tl.arange(0, C), tl.arange(0, N)
    square = t[:, None] * C + t[None, :]
    keys = t[:, None] * (heads * N) + n[None, :]
    values = t[:, None] * (heads * N) + row[None, :]
    state_rows = row[:, None] * N + n[None, :]
    w0_N = tl.load(w0_p + head * N + n)
    if d_end_p is not None:
        d_state_VN = tl.load(d_end_p + (piece * heads + head) * N * N + state_rows)
    else:
        d_state_VN = tl.zeros([V, N], tl.float32)

    num_chunks = tl.cdiv(num_tokens, C)
    for i in range(num_chunks):
        c = num_chunks - 1 - i
        here = (c * C + t < num_tokens)[:, None]
        base = ((first_token + c * C) * heads + head) * N
        chunk = (first_chunk + c) * heads + head
        if d_states_p is not None:
            tl.store(d_states_p + chunk * N * N + state_rows, d_state_VN.to(d_states_p.dtype.element_ty))
        w_CN = load_log2_decay(w_low_p + base, keys, here, w0_N)
        sum_CN = tl.cumsum(w_CN, 0)
        total_N = tl.sum(w_CN, 0)
        a_CN = operand(load_rows(a_p + base, keys, here) * tl.exp2(sum_CN - w_CN), PRECISION)
        b_CN = operand(load_rows(b_p + base, keys, here) * tl.exp2(-sum_CN), PRECISION)
        r_CN = operand(load_rows(r_p + base, keys, here) * tl.exp2(sum_CN), PRECISION)
        d_out_CV = operand(load_rows(d_out_p + base, values, here), PRECISION)
        inverse_CC = tl.load(inverse_p + chunk * C * C + square)

        d_written_VN = d_state_VN * tl.exp2(total_N)[None, :]
        rb_CC = lower_part(dot(r_CN, tl.trans(b_CN), PRECISION), C, False)
        du_CV = dot(tl.trans(rb_CC), d_out_CV, PRECISION) + dot(b_CN, tl.trans(d_written_VN), PRECISION)
        dz_CV = dot(tl.trans(inverse_CC), du_CV, PRECISION)
        if dz_p is not None:
            store_rows(dz_p + base, values, dz_CV, here)
        d_state_VN = d_written_VN + dot(tl.trans(d_out_CV), r_CN, PRECISION)
        d_state_VN += dot(tl.trans(dz_CV), a_CN, PRECISION)
    tl.store(d_start_p + (piece * heads + head) * N * N + state_rows, d_state_VN)


@triton.jit(do_not_specialize=["heads"])
def chunk_gradients(
    r_p,
    w_low_p,
    k_p,
    v_p,
    a_p,
    b_p,
    w0_p,
    d_out_p,
    u_p,
    dz_p,
    states_p,
    d_states_p,
    chunks_p,
    dr_p,
    dw_low_p,
    dk_p,
    dv_p,
    da_p,
    db_p,
    d_w0_p,
    heads,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`d_w0_p` [chunks,H,N]: what every chunk adds to the gradient of w0; None: it is not wanted.

    V < N: what is multiplied along the values does not fit into the registers at once, and is taken V at a time.
    """
    chunk, head, first_token, num_tokens = chunk_of_program(chunks_p, heads)
    t, n = tl.arange(0, C), tl.arange(0, N)
    here = (t < num_tokens)[:, None]
    base = (first_token * heads + head) * N
    state_base = (chunk * heads + head) * N * N
    values = t[:, None] * (heads * N) + n[None, :]

    v_CN = operand(load_rows(v_p + base, values, here), PRECISION)
    d_out_CN = operand(load_rows(d_out_p + base, values, here), PRECISION)
    u_CN = operand(load_rows(u_p + base, values, here), PRECISION)
    dz_CN = operand(load_rows(dz_p + base, values, here), PRECISION)
    d_ab_CC, d_ak_CC, d_rb_CC, d_rk_CC = _score_gradients(
        v_p + base, d_out_p + base, u_p + base, dz_p + base, here, heads, N, C, V, PRECISION
    )
    ak_CC, rk_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dv_CN = tl.zeros([C, N], tl.float32)

    for block in range(N // K):
        key = block * K + tl.arange(0, K)
        keys = t[:, None] * (heads * N) + key[None, :]
        w_CK = load_log2_decay(w_low_p + base, keys, here, tl.load(w0_p + head * N + key))
        sum_CK = tl.cumsum(w_CK, 0)
        total_K = tl.sum(w_CK, 0)
        before_CK, decay_CK, growth_CK = tl.exp2(sum_CK - w_CK), tl.exp2(sum_CK), tl.exp2(-sum_CK)
        a_CK = load_rows(a_p + base, keys, here) * before_CK
        r_CK = load_rows(r_p + base, keys, here) * decay_CK
        b_CK = load_rows(b_p + base, keys, here) * growth_CK
        k_CK = load_rows(k_p + base, keys, here) * growth_CK
        state_NK = tl.load(states_p + state_base + n[:, None] * N + key[None, :]).to(tl.float32)
        d_state_NK = tl.load(d_states_p + state_base + n[:, None] * N + key[None, :]).to(tl.float32)
        d_written_NK = d_state_NK * tl.exp2(total_K)[None, :]
        # dG of the end: the last state scales with it. Its parts are state * D here, then k dk and b db below.
        d_total_K = tl.sum(state_NK * d_written_NK, 0)

        d_read_CK = _along_values(
            dz_CN, state_NK, dz_p + base, states_p + state_base, None, key, here, heads, V, PRECISION
        )
        d_read_CK = d_read_CK + dot(d_ab_CC, b_CK, PRECISION) + dot(d_ak_CC, k_CK, PRECISION)
        store_rows(da_p + base, keys, d_read_CK * before_CK, here)
        from_a_CK = d_read_CK * a_CK
        d_sum_CK = from_a_CK
        d_read_CK = _along_values(
            d_out_CN, state_NK, d_out_p + base, states_p + state_base, None, key, here, heads, V, PRECISION
        )
        d_read_CK = d_read_CK + dot(d_rb_CC, b_CK, PRECISION) + dot(d_rk_CC, k_CK, PRECISION)
        store_rows(dr_p + base, keys, d_read_CK * decay_CK, here)
        d_sum_CK += d_read_CK * r_CK

        d_kept_CK = _along_values(
            u_CN, d_written_NK, u_p + base, d_states_p + state_base, tl.exp2(total_K), key, here, heads, V, PRECISION
        )
        d_total_K += tl.sum(d_kept_CK * b_CK, 0)
        d_kept_CK += dot(tl.trans(d_ab_CC), a_CK, PRECISION) + dot(tl.trans(d_rb_CC), r_CK, PRECISION)
        store_rows(db_p + base, keys, d_kept_CK * growth_CK, here)
        d_sum_CK -= d_kept_CK * b_CK
        d_kept_CK = _along_values(
            v_CN, d_written_NK, v_p + base, d_states_p + state_base, tl.exp2(total_K), key, here, heads, V, PRECISION
        )
        d_total_K += tl.sum(d_kept_CK * k_CK, 0)
        d_kept_CK += dot(tl.trans(d_ak_CC), a_CK, PRECISION) + dot(tl.trans(d_rk_CC), r_CK, PRECISION)
        store_rows(dk_p + base, keys, d_kept_CK * growth_CK, here)
        d_sum_CK -= d_kept_CK * k_CK

        k_KC = tl.trans(k_CK)
        ak_CC += dot(a_CK, k_KC, PRECISION)
        rk_CC += dot(r_CK, k_KC, PRECISION)
        dv_CN += dot(k_CK, tl.trans(d_written_NK), PRECISION)
        # The log decay of a token is in G of this token and of all later ones; a reads G of the token before.
        dw_CK = tl.sum(d_sum_CK, 0)[None, :] - tl.cumsum(d_sum_CK, 0) + d_sum_CK - from_a_CK + d_total_K[None, :]
        dw_CK = decay_logit_grad(dw_CK, w_CK)
        store_rows(dw_low_p + base, keys, dw_CK, here)
        if d_w0_p is not None:
            tl.store(d_w0_p + (chunk * heads + head) * N + key, tl.sum(dw_CK, 0))

    dv_CN += dot(tl.trans(lower_part(rk_CC, C, False)), d_out_CN, PRECISION)
    dv_CN += dot(tl.trans(lower_part(ak_CC, C, True)), dz_CN, PRECISION)
    store_rows(dv_p + base, values, dv_CN, here)


@triton.jit
def _score_gradients(
    v_p,
    d_out_p,
    u_p,
    dz_p,
    here,
    heads,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Which row of what is read, times which row of what is written. (Where V = N the compiler loads all this once.)"""
    d_ab_CC, d_ak_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    d_rb_CC, d_rk_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for block in range(N // V):
        values = tl.arange(0, C)[:, None] * (heads * N) + (block * V + tl.arange(0, V))[None, :]
        v_CV = operand(load_rows(v_p, values, here), PRECISION)
        d_out_CV = operand(load_rows(d_out_p, values, here), PRECISION)
        u_CV = operand(load_rows(u_p, values, here), PRECISION)
        dz_CV = operand(load_rows(dz_p, values, here), PRECISION)
        d_ab_CC += dot(dz_CV, tl.trans(u_CV), PRECISION)
        d_ak_CC += dot(dz_CV, tl.trans(v_CV), PRECISION)
        d_rb_CC += dot(d_out_CV, tl.trans(u_CV), PRECISION)
        d_rk_CC += dot(d_out_CV, tl.trans(v_CV), PRECISION)
    d_ab_CC = operand(lower_part(d_ab_CC, C, True), PRECISION)
    d_ak_CC = operand(lower_part(d_ak_CC, C, True), PRECISION)
    d_rb_CC = operand(lower_part(d_rb_CC, C, False), PRECISION)
    d_rk_CC = operand(lower_part(d_rk_CC, C, False), PRECISION)
    return d_ab_CC, d_ak_CC, d_rb_CC, d_rk_CC


@triton.jit
def _along_values(
    rows_CN, matrix_NK, rows_p, matrix_p, scale_K, key, here, heads, V: tl.constexpr, PRECISION: tl.constexpr
):
    """rows @ matrix; where V < N as a sum over blocks of V values, which are read again (and the matrix scaled)."""
    C: tl.constexpr = rows_CN.shape[0]
    N: tl.constexpr = rows_CN.shape[1]
    if V == N:
        product_CK = dot(rows_CN, matrix_NK, PRECISION)
    else:
        product_CK = tl.zeros([C, matrix_NK.shape[1]], tl.float32)
        for block in range(N // V):
            value = block * V + tl.arange(0, V)
            rows_CV = load_rows(rows_p, tl.arange(0, C)[:, None] * (heads * N) + value[None, :], here)
            matrix_VK = tl.load(matrix_p + value[:, None] * N + key[None, :]).to(tl.float32)
            if scale_K is not None:
                matrix_VK *= scale_K[None, :]
            product_CK += dot(rows_CV, matrix_VK, PRECISION)
    return product_CK
