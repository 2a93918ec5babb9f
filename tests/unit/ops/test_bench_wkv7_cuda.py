"""The CUDA baseline of the benchmark computes WKV-7: its source is compiled for the CPU, a host's thread for each."""

import ctypes
import shutil
import subprocess
from functools import partial

import pytest
import torch

from rwkv_accel.bench import wkv7_cuda, wkv7_gpu
from rwkv_accel.ops.wkv7 import wkv7

HEAD_SIZE = 16
COMPILER = shutil.which("g++") or shutil.which("clang++")
HOST = r"""
#include <cmath>
#include <cstring>
#include <pthread.h>
#include <thread>
#include <vector>
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static pthread_barrier_t barrier;
#define __device__ static
#define __global__
#define __shared__ static
#define __launch_bounds__(n)
static void __syncthreads() { pthread_barrier_wait(&barrier); }
#define __expf(x) std::exp(x)
static float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
"""
RUN = r"""
template <class Kernel> static void run(int blocks, Kernel kernel) {
    for (int block = 0; block < blocks; block++) {
        pthread_barrier_init(&barrier, nullptr, N);
        std::vector<std::thread> threads;
        for (int i = 0; i < N; i++) threads.emplace_back([=] { threadIdx.x = i; blockIdx.x = block; kernel(); });
        for (auto& thread : threads) thread.join();
        pthread_barrier_destroy(&barrier);
    }
}
extern "C" void run_wkv7_forward(int blocks, int T, int H, void** p) {
    run(blocks, [=] {
        wkv7_forward(T, H, (bf16*)p[0], (bf16*)p[1], (bf16*)p[2], (bf16*)p[3], (bf16*)p[4], (bf16*)p[5], (bf16*)p[6],
                     (float*)p[7], (float*)p[8], (float*)p[9]);
    });
}
extern "C" void run_wkv7_backward(int blocks, int T, int H, void** p) {
    run(blocks, [=] {
        wkv7_backward(T, H, (bf16*)p[0], (bf16*)p[1], (bf16*)p[2], (bf16*)p[3], (bf16*)p[4], (bf16*)p[5], (bf16*)p[6],
                      (float*)p[7], (float*)p[8], (float*)p[9], (bf16*)p[10], (bf16*)p[11], (bf16*)p[12], (bf16*)p[13],
                      (bf16*)p[14], (bf16*)p[15]);
    });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("wkv7_cuda")
    (folder / "wkv7.cpp").write_text(HOST + wkv7_cuda.source(HEAD_SIZE) + RUN)
    command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", "wkv7.cpp", "-o", "wkv7.so"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return ctypes.CDLL(str(folder / "wkv7.so"))


@pytest.fixture
def on_cpu(library, monkeypatch):
    def launch(name, like, tensors):
        batch, num_tokens, heads, _ = like.shape
        assert all(t.is_contiguous() for t in tensors)
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        getattr(library, f"run_{name}")(batch * heads, num_tokens, heads, pointers)

    monkeypatch.setattr(wkv7_cuda, "_launch", launch)


@pytest.mark.parametrize("num_tokens", [16, 37])
def test_outputs_and_gradients_are_those_of_the_recurrence(on_cpu, num_tokens):
    shape = (2, num_tokens, 2, HEAD_SIZE)
    tensors = wkv7_gpu.inputs(shape, torch.bfloat16, "cpu")
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(shape, generator=generator)
    d_state = torch.randn(2, 2, HEAD_SIZE, HEAD_SIZE, generator=generator)
    found = wkv7_gpu.forward_backward(wkv7_gpu.OFFICIAL.on_inputs_of_wkv7, tensors, d_out, d_state)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = wkv7_gpu.forward_backward(partial(wkv7, backend="reference"), exact, d_out, d_state)
    # Its decay's logit is rounded to bf16 as a whole.
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize(("size", "dtype"), [(32, torch.bfloat16), (64, torch.float16)])
def test_what_it_is_not_made_for_is_refused(size, dtype):
    inputs = [torch.zeros(1, 16, 1, size, dtype=dtype)] * 6
    with pytest.raises(ValueError, match="made for bf16 and head size 64"):
        wkv7_cuda.wkv7_cuda(*inputs)


def test_kernels_are_compiled_once_for_a_device(monkeypatch):
    """The calls of NVRTC, to a stand-in for it."""
    calls = []

    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, arguments))
                return 0

            return call

    monkeypatch.setattr("torch.cuda._utils._get_nvrtc_library", Library)
    monkeypatch.setattr("torch.cuda._utils._cuda_load_module", lambda binary, names: dict.fromkeys(names, binary))
    wkv7_cuda.compiled.cache_clear()
    try:
        found = wkv7_cuda.compiled((9, 0))
        assert wkv7_cuda.compiled((9, 0)) is found
    finally:
        wkv7_cuda.compiled.cache_clear()
    assert set(found) == set(wkv7_cuda.KERNELS)
    assert [name for name, _ in calls] == [
        "nvrtcCreateProgram", "nvrtcCompileProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN",
    ]  # fmt: skip
    _, number, options = calls[1][1]
    assert list(options)[:number] == [b"--gpu-architecture=sm_90", b"--use_fast_math"]
