"""The compiled CPU backend against the reference in fp64, and how its library is built."""

import logging
import os
import stat
import subprocess
import sys

import pytest
import torch

from rwkv_accel.ops.wkv7 import native, native_build, select_backend, wkv7
from rwkv_accel.runtime import cpp_compiler
from tests.helpers import needs_compiler
from tests.unit.ops.wkv7_cases import NAMES, assert_close, logit, make_inputs, results

pytestmark = needs_compiler
FP32 = 2e-6


def check(inputs, tolerance=FP32, flat=(), **kwargs):
    expected = results(wkv7, [x.double() for x in inputs], backend="reference", **kwargs)
    assert_close(results(wkv7, inputs, backend="native", **kwargs), expected, tolerance, flat=flat)


def fp32_inputs(*shape, **kwargs):
    return make_inputs(*shape, dtype=torch.float32, **kwargs)


@pytest.mark.parametrize("N", [4, 8, 12, 16, 24, 32, 40, 64, 96, 128])
def test_head_sizes(N):
    check(fp32_inputs(2, 37, 2, N))


# A chunk of head size 64 has 64 tokens.
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths(T, nan_memory):
    check(fp32_inputs(2, T, 3, 64))


@pytest.mark.parametrize("lengths", [[33, 132, 31], [1, 1, 1], [5, 70, 5, 128, 33, 64], [3] * 40, [128]], ids=str)
def test_packed_documents(lengths, nan_memory):
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    check(fp32_inputs(1, sum(lengths), 2, 32, S=len(lengths)), cu_seqlens=borders)


def test_near_identical_keys():
    check(fp32_inputs(1, 300, 2, 64, hard=True), 5e-6)


@pytest.mark.parametrize("w_log", [-0.60653, -0.3, -1e-7, -1e-20])
def test_extreme_decays(w_log):
    inputs = fp32_inputs(1, 128, 2, 32)
    inputs[1], inputs[6] = torch.full_like(inputs[1], float(logit(w_log))), torch.zeros_like(inputs[6])
    check(inputs, flat=("w_low", "w0"))


def test_logits_beyond_the_range_of_exp():
    inputs = fp32_inputs(1, 8, 1, 16)
    sizes = torch.tensor([80.0, 90, 100, 130, 250, 1e3, 1e4, 1e30])
    inputs[1] = torch.cat([sizes, -sizes]).expand(1, 8, 1, 16)
    check(inputs, flat=("w_low", "w0"))


@pytest.mark.parametrize("number", range(8), ids=NAMES[2:])
def test_nan_is_not_lost(number):
    inputs = fp32_inputs(1, 70, 1, 16)
    inputs[number].view(-1)[3] = torch.nan
    out, final = wkv7(*inputs[:7], state=inputs[7], backend="native")
    assert out.isnan().any()
    assert final.isnan().any() or number == 0  # r is not written into the state


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = fp32_inputs(3, 100, 5, 16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(wkv7, inputs, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES)


def test_strided_and_expanded_inputs():
    inputs = fp32_inputs(2, 45, 3, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    strided += [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs[3:6]]
    assert not any(x.is_contiguous() for x in strided)
    expected = results(wkv7, inputs, backend="native")
    out, final = wkv7(*strided, inputs[6], state=inputs[7], backend="native")
    assert torch.equal(out, expected["out"])
    assert torch.equal(final, expected["final"])
    row = inputs[0][:, :, :1].clone().requires_grad_()
    wkv7(row.expand(-1, -1, 3, -1), *inputs[1:7], backend="native")[0].sum().backward()
    full = inputs[0][:, :, :1].repeat(1, 1, 3, 1).requires_grad_()
    wkv7(full, *inputs[1:7], backend="native")[0].sum().backward()
    assert torch.allclose(row.grad, full.grad.sum(2, keepdim=True), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    inputs = make_inputs(2, 70, 2, 32, dtype=dtype)
    inputs[6] = fp32_inputs(2, 70, 2, 32)[6]
    found = results(wkv7, inputs, backend="native")
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name in ("final", "w0") else dtype)
    check(inputs, 2.5e-3)  # their own rounding
    exact = results(wkv7, [x.double() for x in inputs], backend="reference")["final"]
    assert_close({"final": found["final"]}, {"final": exact}, FP32)


@pytest.mark.parametrize("used", ["out", "final"])
@pytest.mark.parametrize("trained", [(0,), (1,), (6,), (7,), (2, 3, 4, 5)], ids=str)
def test_gradients_of_what_asks_for_them(trained, used):
    def grads(backend, dtype):
        given = fp32_inputs(1, 70, 2, 8)
        leaves = [x.to(dtype).requires_grad_(i in trained) for i, x in enumerate(given)]
        out, final = wkv7(*leaves[:7], state=leaves[7], backend=backend)
        (out if used == "out" else final).square().sum().backward()
        return {name: x.grad for name, x in zip(NAMES[2:], leaves)}

    if used == "final" and trained == (0,):
        with pytest.raises(RuntimeError, match="does not require grad"):
            grads("reference", torch.float64)
        assert not grads("native", torch.float32)["r"].any()
        return
    found, expected = grads("native", torch.float32), grads("reference", torch.float64)
    assert [name for name, x in found.items() if x is not None] == [NAMES[2 + i] for i in trained]
    assert_close(*({name: g[name] for name in found if found[name] is not None} for g in (found, expected)), FP32)


def test_nothing_but_the_inputs_and_a_state_per_chunk_is_kept():
    inputs = [x.requires_grad_() for x in fp32_inputs(2, 130, 3, 64)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        wkv7(*inputs[:7], state=inputs[7], backend="native")
    assert sum(kept) == sum(x.nbytes for x in inputs[:7]) + 3 * inputs[7].nbytes
    with torch.no_grad():
        layout = native.make_layout(inputs[0].shape, None)
        assert native.run_forward(inputs[:7], None, layout, False)[2] is None


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in fp32_inputs(1, 20, 1, 4)]
    out, _ = wkv7(*inputs[:7], backend="native")
    with pytest.raises(RuntimeError, match=r"wkv7 \(native\) can be differentiated once"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


def test_given_state_is_left_alone():
    inputs = fp32_inputs(1, 20, 1, 8)
    before = inputs[7].clone()
    wkv7(*inputs[:7], state=inputs[7], backend="native")
    assert torch.equal(inputs[7], before)


@pytest.mark.parametrize("N", [12, 64])
@pytest.mark.parametrize("borders", [None, [0, 1, 66, 70]], ids=str)
def test_guard_bands_stay_and_all_within_is_written(N, borders, monkeypatch):
    wholes = []

    def guarded(fill):
        def make(like, *shape):
            shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
            whole = torch.full((shape.numel() + 512,), 7.0)
            wholes.append(whole)
            return whole[256:-256].fill_(fill).view(shape)

        return make

    layout = native.make_layout(torch.Size((1 if borders else 2, 70, 2, N)), borders and tuple(borders))
    inputs = fp32_inputs(1 if borders else 2, 70, 2, N, S=3 if borders else None)
    d_out = torch.randn_like(inputs[0])
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_zeros", guarded(0.0))
    _, _, states = native.run_forward(inputs[:7], None, layout, True)
    native.run_backward(inputs[:7], d_out, None, states, layout, (True,) * 8)
    assert len(wholes) == 3 + 8
    for whole in wholes:
        assert (whole[:256] == 7).all()
        assert (whole[-256:] == 7).all()
        assert not whole[256:-256].isnan().any()


# ---- choice


def test_auto_takes_it_on_a_cpu():
    assert select_backend("auto", "cpu") == ("native", "auto: the fastest backend on cpu")
    inputs = fp32_inputs(1, 20, 1, 8)
    assert torch.equal(wkv7(*inputs[:7])[0], wkv7(*inputs[:7], backend="native")[0])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cpu", 64, torch.float64), "it computes in fp32"),
        (("cpu", 6), "head size 6 is not a multiple of 4"),
        (("cuda",), "it runs on a CPU, not on cuda"),
    ],
)
def test_what_it_cannot_run(arguments, reason):
    with pytest.raises(ValueError, match=f"^backend native cannot run: {reason}; take auto or chunked$"):
        select_backend("native", *arguments)
    if arguments[0] == "cpu":
        assert select_backend("auto", *arguments) == ("chunked", f"auto: not native, {reason}")


# ---- building


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; choices are made anew."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(native_build, "cache_folder", lambda: folder)
    native_build.library.cache_clear()
    select_backend.cache_clear()
    yield folder
    native_build.library.cache_clear()
    select_backend.cache_clear()


def fake_compiler(tmp_path, monkeypatch, script):
    path = tmp_path / "fake-c++"
    path.write_text(f'#!/bin/sh\nreal="{cpp_compiler()}"\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(native_build, "cpp_compiler", lambda: str(path))


def test_it_is_compiled_once(cache, caplog):
    with caplog.at_level(logging.INFO, logger=native_build.__name__):
        path = native_build.library_path(8)
        assert native_build.library_path(8) == path
        assert native_build.library_path(16) != path
    assert len(caplog.records) == 2
    assert len(os.listdir(cache)) == 2


def test_without_a_compiler(cache, monkeypatch, caplog):
    monkeypatch.setattr(native_build, "cpp_compiler", lambda: None)
    reason = "there is no C++ compiler (g++, clang++ or $CXX)"
    for _ in range(2):
        assert select_backend("auto", "cpu") == ("chunked", f"auto: not native, {reason}")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"wkv7 cannot be compiled for this CPU: {reason}"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('case "$*" in *-dM*) exec "$real" "$@";; esac; echo "x.cpp:1: error: no room" >&2; exit 1', "error: no room"),
        ("exit 3", "knows neither -march=native nor -mcpu=native"),
        ('case "$*" in *-dM*) exec "$real" "$@";; esac; for last; do :; done; echo no > "$last"', "cannot be loaded"),
    ],
    ids=["fails", "knows no native", "makes no library"],
)
def test_a_compiler_that_does_not_work_is_named(cache, tmp_path, monkeypatch, script, reason):
    fake_compiler(tmp_path, monkeypatch, script)
    name, why = select_backend("auto", "cpu")
    assert name == "chunked"
    assert why.startswith("auto: not native, ")
    assert reason in why
    assert "\n" not in why


def test_without_openmp_it_runs_on_one_thread_and_says_so(cache, tmp_path, monkeypatch, caplog):
    script = 'case "$*" in *-fopenmp*) echo "error: no -fopenmp" >&2; exit 1;; esac; exec "$real" "$@"'
    fake_compiler(tmp_path, monkeypatch, script)
    with caplog.at_level(logging.WARNING, logger=native_build.__name__):
        check(fp32_inputs(2, 20, 2, 8))
    assert "wkv7 runs on one thread" in caplog.text
    assert "error: no -fopenmp" in caplog.text


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.write_text("a file where the folder should be")
    name, why = select_backend("auto", "cpu")
    assert name == "chunked"
    assert why == f"auto: not native, {cache} cannot be written (File exists)"


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    code = "from rwkv_accel.ops.wkv7 import native_build; native_build.library(8); print(native_build.library_path(8))"
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=300)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert os.listdir(tmp_path / ".cache/rwkv_accel") == [os.path.basename(paths.pop().strip())]
