"""Makes Triton's interpreter compute what a GPU computes, for tests of precision on a CPU.

Left alone it multiplies the bit patterns of bf16 operands, truncates fp32 to bf16 instead of rounding, and keeps all
bits of tf32 operands. Elementwise arithmetic on bf16 stays wrong in it: kernels convert to fp32 first.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to(x, dropped_bits):
    """fp32 bit patterns without their lowest bits, rounded to nearest even. Infinities and NaN stay."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    half = (1 << (dropped_bits - 1)) - 1
    rounded = bits + half + ((bits >> dropped_bits) & 1)
    kept = np.where(np.isfinite(x), rounded, bits) >> dropped_bits << dropped_bits
    return kept.astype(np.uint32)


def to_bf16(x):
    patterns = (round_to(x, 16) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), patterns)


def from_bf16(patterns):
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def install():
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast, plain_convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            x, y = from_bf16(a.data), from_bf16(b.data)
        elif a.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
            x, y = (round_to(z.data, 13).view(np.float32) for z in (a, b))
        else:
            return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        return interpreter.TensorHandle(np.matmul(x, y) + d.data, d.dtype.scalar)

    def rounding(plain):
        def convert(self, src, dst_type, *args):
            if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
                return interpreter.TensorHandle(to_bf16(src.data), dst_type.scalar)
            return plain(self, src, dst_type, *args)

        return convert

    builder.create_dot = create_dot
    builder.cast_impl = rounding(plain_cast)
    builder.create_fp_to_fp = rounding(plain_convert)
