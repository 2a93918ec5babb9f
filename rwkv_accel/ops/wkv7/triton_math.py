"""Building blocks of the Triton kernels: loads, products in a named precision, the inverse of a unit triangle.

Everything is fp32 between a load and a product: elementwise work in fp32, products of operands rounded to the named
precision, sums in fp32.

Shapes: C tokens of a chunk, N head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rwkv_accel.ops.wkv7.decay import DECAY_SCALE

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_SCALE = tl.constexpr(DECAY_SCALE * 1.4426950408889634)


@triton.jit
def chunk_of_program(chunks_p, heads):
    """Chunk, head, first token and number of tokens of a program that has a chunk and head to itself."""
    chunk = (tl.program_id(0) // heads).to(tl.int64)
    first_token = tl.load(chunks_p + 2 * chunk)
    return chunk, tl.program_id(0) % heads, first_token, tl.load(chunks_p + 2 * chunk + 1).to(tl.int32)


@triton.jit
def piece_of_program(pieces_p, heads, V: tl.constexpr, ROWS: tl.constexpr):
    """Piece, head and rows of the state of a program that walks over a piece; its first token, number of tokens, first
    chunk."""
    index = tl.program_id(0) // (ROWS // V)
    row = (tl.program_id(0) % (ROWS // V)) * V + tl.arange(0, V)
    piece = (index // heads).to(tl.int64)
    first_token = tl.load(pieces_p + 3 * piece)
    num_tokens = tl.load(pieces_p + 3 * piece + 1).to(tl.int32)
    return piece, index % heads, row, first_token, num_tokens, tl.load(pieces_p + 3 * piece + 2)


@triton.jit
def load_rows(pointer, offsets, mask):
    """fp32 values; 0 where the mask is off, which stands for a token that is not there."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_log2_decay(w_low_p, offsets, mask, w0):
    """log2 of the decay of every token and channel; 0, which decays nothing, for a token that is not there."""
    logit = tl.load(w_low_p + offsets, mask=mask, other=float("-inf")).to(tl.float32) + w0[None, :]
    return LOG2_SCALE / (1.0 + tl.exp2(-logit * LOG2_E))


@triton.jit
def decay_logit_grad(d_w_log, log2_decay):
    """From the gradient of the natural logarithm of the decay to that of its logit: share (1 - share) of the scale."""
    return d_w_log * (log2_decay / LOG2_E) * (1.0 - log2_decay / LOG2_SCALE)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as `dot` reads it; converting once spares a second conversion where x is used twice."""
    DTYPE: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else tl.float32
    return x.to(DTYPE)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    """x @ y in fp32. PRECISION of the operands: bf16, tf32, tf32x3 (about fp32 on NVIDIA) or ieee (fp32 units)."""
    # One return only: the compiler takes a second one behind an `if` for another type of the result.
    INPUT_PRECISION: tl.constexpr = None if PRECISION == "bf16" else PRECISION
    return tl.dot(operand(x, PRECISION), operand(y, PRECISION), input_precision=INPUT_PRECISION)


@triton.jit
def lower_part(x_CC, C: tl.constexpr, STRICT: tl.constexpr):
    i = tl.arange(0, C)
    if STRICT:
        keep = i[:, None] > i[None, :]
    else:
        keep = i[:, None] >= i[None, :]
    return tl.where(keep, x_CC, 0.0)


@triton.jit
def _double(inverse_CC, lower_CC, C: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, C)
    same_pair = (i[:, None] // (2 * SIZE)) == (i[None, :] // (2 * SIZE))
    off_diagonal = same_pair & ((i[:, None] // SIZE) != (i[None, :] // SIZE))
    between = tl.where(off_diagonal, lower_CC, 0.0)
    return inverse_CC + dot(dot(inverse_CC, between, PRECISION), inverse_CC, PRECISION)


@triton.jit
def inverse_of_unit_lower(lower_CC, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - L)^-1 of a strictly lower triangle L, by doubling the inverted diagonal blocks.

    With T the inverse of the diagonal blocks of size s, and L_s what L holds between the two blocks of each pair,
    T + T L_s T inverts the blocks of size 2s. Only true inverses are ever multiplied, so near-identical keys cost no
    accuracy; the powers of L that a Neumann series sums grow like binomials there, and cancel.
    """
    i = tl.arange(0, C)
    pairs = tl.where((i[:, None] // 2) == (i[None, :] // 2), lower_CC, 0.0)
    inverse_CC = pairs + tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    inverse_CC = _double(inverse_CC, lower_CC, C, 2, PRECISION)
    inverse_CC = _double(inverse_CC, lower_CC, C, 4, PRECISION)
    inverse_CC = _double(inverse_CC, lower_CC, C, 8, PRECISION)
    if C > 16:
        inverse_CC = _double(inverse_CC, lower_CC, C, 16, PRECISION)
    if C > 32:
        inverse_CC = _double(inverse_CC, lower_CC, C, 32, PRECISION)
    return inverse_CC
