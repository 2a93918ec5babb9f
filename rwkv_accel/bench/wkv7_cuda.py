"""The algorithm of RWKV's own CUDA kernel for WKV-7, as a baseline: token by token, in fp32, one thread per row.

Forward a block per sequence and head keeps the state in registers and writes it out after every 16 tokens, and every
token's S a. Backward it walks back from each of these states, undoing one token after the other by a division by its
decay; the state is held by columns, its gradient by rows and by columns. Source of the algorithm: RWKV-LM
train_temp/cuda; the code is this project's, written from the recurrence.

It is compiled at run time by the NVRTC that comes with torch: no CUDA toolkit is needed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.ops.devices import on_device
from rwkv_accel.ops.wkv7.decay import DECAY_SCALE

NAME = "the algorithm of RWKV's CUDA kernel"
HEAD_SIZE, KEPT_EVERY = 64, 16
KERNELS = ("wkv7_forward", "wkv7_backward")

SOURCE = r"""
typedef unsigned short bf16;

__device__ float wide(bf16 x) { return __uint_as_float((unsigned)x << 16); }

__device__ bf16 narrow(float x) {
    unsigned bits = __float_as_uint(x);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ float share_of(float logit) { return 1.0f / (1.0f + __expf(-logit)); }

extern "C" __global__ void __launch_bounds__(N) wkv7_forward(
    int T, int H, const bf16* r_p, const bf16* w_p, const bf16* k_p, const bf16* v_p, const bf16* a_p, const bf16* b_p,
    bf16* out_p, float* states_p, float* removed_p, float* final_p) {
    const int i = threadIdx.x, matrix = blockIdx.x, row = matrix / H, head = matrix % H;
    __shared__ float r[N], w[N], k[N], a[N], b[N];
    float s[N];
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = 0.0f;
    for (int t = 0; t < T; t++) {
        const long long at = (((long long)row * T + t) * H + head) * N + i;
        __syncthreads();
        r[i] = wide(r_p[at]);
        w[i] = __expf(SCALE * share_of(wide(w_p[at])));
        k[i] = wide(k_p[at]);
        a[i] = wide(a_p[at]);
        b[i] = wide(b_p[at]);
        __syncthreads();
        const float v = wide(v_p[at]);
        float removed = 0.0f, out = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) removed += s[j] * a[j];
#pragma unroll
        for (int j = 0; j < N; j++) {
            s[j] = s[j] * w[j] + removed * b[j] + v * k[j];
            out += s[j] * r[j];
        }
        out_p[at] = narrow(out);
        removed_p[at] = removed;
        if ((t + 1) % KEPT_EVERY == 0) {
            const long long kept = ((long long)matrix * (T / KEPT_EVERY) + t / KEPT_EVERY) * N * N;
#pragma unroll
            for (int j = 0; j < N; j++) states_p[kept + j * N + i] = s[j];
        }
    }
#pragma unroll
    for (int j = 0; j < N; j++) final_p[((long long)matrix * N + i) * N + j] = s[j];
}

extern "C" __global__ void __launch_bounds__(N) wkv7_backward(
    int T, int H, const bf16* r_p, const bf16* w_p, const bf16* k_p, const bf16* v_p, const bf16* a_p, const bf16* b_p,
    const bf16* d_out_p, const float* d_final_p, const float* states_p, const float* removed_p,
    bf16* dr_p, bf16* dw_p, bf16* dk_p, bf16* dv_p, bf16* da_p, bf16* db_p) {
    const int i = threadIdx.x, matrix = blockIdx.x, row = matrix / H, head = matrix % H;
    __shared__ float r[N], w[N], k[N], v[N], a[N], b[N], d_out[N], removed[N], d_removed[N];
    float column[N], d_row[N], d_column[N];
#pragma unroll
    for (int m = 0; m < N; m++) {
        column[m] = 0.0f;
        d_row[m] = d_final_p[((long long)matrix * N + i) * N + m];
        d_column[m] = d_final_p[((long long)matrix * N + m) * N + i];
    }
    for (int t = T - 1; t >= 0; t--) {
        const long long at = (((long long)row * T + t) * H + head) * N + i;
        __syncthreads();
        const float share = share_of(wide(w_p[at])), decay = __expf(SCALE * share);
        const float r_i = wide(r_p[at]), k_i = wide(k_p[at]), a_i = wide(a_p[at]), b_i = wide(b_p[at]);
        const float d_out_i = wide(d_out_p[at]);
        r[i] = r_i;
        w[i] = decay;
        k[i] = k_i;
        v[i] = wide(v_p[at]);
        a[i] = a_i;
        b[i] = b_i;
        d_out[i] = d_out_i;
        removed[i] = removed_p[at];
        __syncthreads();
        if ((t + 1) % KEPT_EVERY == 0) {
            const long long kept = ((long long)matrix * (T / KEPT_EVERY) + t / KEPT_EVERY) * N * N;
#pragma unroll
            for (int m = 0; m < N; m++) column[m] = states_p[kept + i * N + m];
        }
        const float growth = 1.0f / decay;
        float dr = 0.0f, dw = 0.0f, dk = 0.0f, dv = 0.0f, da = 0.0f, db = 0.0f, d_removed_i = 0.0f;
        // Rows and columns apart: fewer registers are needed at once.
#pragma unroll
        for (int m = 0; m < N; m++) {
            d_row[m] += d_out_i * r[m];
            dv += d_row[m] * k[m];
            d_removed_i += d_row[m] * b[m];
        }
#pragma unroll
        for (int m = 0; m < N; m++) {
            dr += column[m] * d_out[m];
            column[m] = (column[m] - k_i * v[m] - b_i * removed[m]) * growth;
            d_column[m] += r_i * d_out[m];
            dw += d_column[m] * column[m];
            dk += d_column[m] * v[m];
            db += d_column[m] * removed[m];
        }
        d_removed[i] = d_removed_i;
        __syncthreads();
#pragma unroll
        for (int m = 0; m < N; m++) d_row[m] = d_row[m] * w[m] + d_removed_i * a[m];
#pragma unroll
        for (int m = 0; m < N; m++) {
            da += column[m] * d_removed[m];
            d_column[m] = d_column[m] * decay + a_i * d_removed[m];
        }
        dr_p[at] = narrow(dr);
        dw_p[at] = narrow(dw * decay * SCALE * share * (1.0f - share));
        dk_p[at] = narrow(dk);
        dv_p[at] = narrow(dv);
        da_p[at] = narrow(da);
        db_p[at] = narrow(db);
    }
}
"""


def source(head_size: int = HEAD_SIZE) -> str:
    """The kernels for a head size."""
    return f"#define N {head_size}\n#define KEPT_EVERY {KEPT_EVERY}\n#define SCALE {DECAY_SCALE:.9f}f\n{SOURCE}"


def wkv7_cuda(r: Tensor, w_logit: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 [B,T,H,64], w_logit the whole logit of the decay -> out [B,T,H,64], final state [B,H,value,key] in fp32."""
    num_tokens = r.shape[1]
    # A token that is not there keeps the state: it decays nothing, and removes and adds nothing.
    padding = -num_tokens % KEPT_EVERY
    if padding:
        values = (0.0, float("-inf"), 0.0, 0.0, 0.0, 0.0)
        r, w_logit, k, v, a, b = (
            F.pad(x, (0, 0, 0, 0, 0, padding), value=value) for x, value in zip((r, w_logit, k, v, a, b), values)
        )
    out, final = _CudaWKV7.apply(*(x.contiguous() for x in (r, w_logit, k, v, a, b)))
    return out[:, :num_tokens], final


class _CudaWKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        batch, num_tokens, heads, size = inputs[0].shape
        out = torch.empty_like(inputs[0])
        states = out.new_empty(batch * heads, num_tokens // KEPT_EVERY, size, size, dtype=torch.float32)
        removed, final = states.new_empty(out.shape), states.new_empty(batch, heads, size, size)
        _launch(KERNELS[0], inputs[0], [*inputs, out, states, removed, final])
        ctx.save_for_backward(*inputs, states, removed)
        return out, final

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
        *inputs, states, removed = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        given = [d_out.contiguous(), d_final.contiguous()]
        _launch(KERNELS[1], inputs[0], [*inputs, *given, states, removed, *grads])
        return tuple(grads)


def _launch(name: str, like: Tensor, tensors: list[Tensor]) -> None:
    batch, num_tokens, heads, size = like.shape
    if size != HEAD_SIZE or like.dtype != torch.bfloat16:
        raise ValueError(f"the kernels are made for bf16 and head size {HEAD_SIZE}, not for {like.dtype} and {size}")
    with on_device(like.device):
        kernel = compiled(torch.cuda.get_device_capability(like.device))[name]
        kernel(grid=(batch * heads, 1, 1), block=(size, 1, 1), args=[num_tokens, heads, *tensors])


@cache
def compiled(capability: tuple[int, int]) -> dict[str, Any]:
    """Kernels by name. RuntimeError if NVRTC refuses the source; its log is the message."""
    from torch.cuda._utils import _cuda_load_module, _get_nvrtc_library

    # Not torch.cuda._compile_kernel, which asks for a toolkit's headers.
    nvrtc, program = _get_nvrtc_library(), ctypes.c_void_p()
    text = source().encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"wkv7.cu", 0, None, None))
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(), b"--use_fast_math"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if result:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    binary = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, binary))
    loaded = _cuda_load_module(binary.raw, list(KERNELS))
    assert isinstance(loaded, dict)
    return loaded


def _check(nvrtc: Any, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")
