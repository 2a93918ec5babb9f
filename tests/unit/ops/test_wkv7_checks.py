"""Bad arguments are refused before any work, in one line that names the argument and the value."""

import logging

import pytest
import torch

from rwkv_accel.ops.wkv7 import available_backends, select_backend, wkv7
from rwkv_accel.ops.wkv7.triton_config import DTYPES
from tests.unit.ops.wkv7_cases import make_inputs

NAMES = ["r", "w_low", "k", "v", "a", "b"]


def call(inputs, cu_seqlens=None, backend="auto"):
    return wkv7(*inputs[:7], state=inputs[7], cu_seqlens=cu_seqlens, backend=backend)


@pytest.mark.parametrize("index", range(1, 6))
def test_every_input_has_the_shape_dtype_and_device_of_r(index):
    name = NAMES[index]
    for bad, expected in [
        (lambda x: x[:, :-1], rf"^{name} must have r's shape \[1, 4, 2, 8\], got \[1, 3, 2, 8\]$"),
        (lambda x: x[..., :1], rf"^{name} must have r's shape"),
        (lambda x: x.long(), rf"^{name} must be a floating point tensor, got torch.int64$"),
        (lambda x: x.to("meta"), rf"^{name} must be on r's device cpu, got meta$"),
    ]:
        inputs = make_inputs(1, 4, 2, 8)
        inputs[index] = bad(inputs[index])
        with pytest.raises(ValueError, match=expected):
            call(inputs)


@pytest.mark.parametrize("shape", [(1, 0, 2, 8), (0, 4, 2, 8), (4, 2, 8)])
def test_empty_or_flat_inputs(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"^r must be a non-empty \[batch, tokens, heads, head size\] tensor"):
        wkv7(x, x, x, x, x, x, torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (torch.zeros(2, 2, 8, 8), r"^state must be \[1, 2, 8, 8\] \(one per sequence\), got \[2, 2, 8, 8\]$"),
        (torch.zeros(1, 2, 8, 4), r"^state must be \[1, 2, 8, 8\]"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.int64), "^state must be a floating point tensor"),
        (torch.zeros(1, 2, 8, 8, device="meta"), "^state must be on r's device cpu, got meta$"),
    ],
)
def test_state(state, expected):
    with pytest.raises(ValueError, match=expected):
        call([*make_inputs(1, 4, 2, 8)[:7], state])


@pytest.mark.parametrize(
    ("w0", "expected"),
    [
        (torch.zeros(16), r"^w0 must be \[2, 8\] \(a value per head and channel\), got \[16\]$"),
        (torch.zeros(8, 2), r"^w0 must be \[2, 8\]"),
        (torch.zeros(2, 8, dtype=torch.int64), "^w0 must be a floating point tensor, got torch.int64$"),
        (torch.zeros(2, 8, device="meta"), "^w0 must be on r's device cpu, got meta$"),
    ],
)
def test_w0(w0, expected):
    inputs = make_inputs(1, 4, 2, 8)
    with pytest.raises(ValueError, match=expected):
        call([*inputs[:6], w0, inputs[7]])


@pytest.mark.parametrize(
    ("cu_seqlens", "expected"),
    [
        ([1, 4], "must start at 0, got 1$"),
        ([0, 3], "must end at the number of tokens 4, got 3$"),
        ([0, 5], "must end at the number of tokens 4, got 5$"),
        ([0, 2, 2, 4], r"must rise strictly \(no empty sequence\), got 2 then 2 at index 2$"),
        ([0, 3, 1, 4], "must rise strictly .* got 3 then 1 at index 2$"),
        ([4], r"must be a vector of at least 2 borders, got \[1\]$"),
        ([[0, 4]], r"must be a vector of at least 2 borders, got \[1, 2\]$"),
    ],
)
def test_malformed_cu_seqlens(cu_seqlens, expected):
    inputs = make_inputs(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"^cu_seqlens " + expected):
        wkv7(*inputs[:7], cu_seqlens=torch.tensor(cu_seqlens))


def test_cu_seqlens_needs_one_row_and_integers():
    inputs = make_inputs(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"^cu_seqlens needs a batch of one row .* got 2 rows$"):
        wkv7(*inputs[:7], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"^cu_seqlens must be int32 or int64, got torch.float32$"):
        wkv7(*(x[:1] for x in inputs[:6]), inputs[6], cu_seqlens=torch.tensor([0.0, 4.0]))


def test_packed_state_has_a_row_per_document():
    inputs = make_inputs(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"^state must be \[2, 2, 8, 8\]"):
        call(inputs, torch.tensor([0, 1, 4]))


def test_backend_by_name():
    assert select_backend("reference", "cpu") == ("reference", "asked for by name")
    assert select_backend("chunked", "cuda") == ("chunked", "asked for by name")
    for op in (lambda: select_backend("cuda", "cpu"), lambda: call(make_inputs(1, 4, 2, 8), backend="cuda")):
        with pytest.raises(
            ValueError, match=r"^backend must be one of auto, reference, chunked, native, triton, got 'cuda'$"
        ):
            op()


def test_triton_is_taken_on_gpus_and_refused_with_the_reason_elsewhere():
    assert select_backend("auto", "cuda") == ("triton", "auto: the fastest backend on cuda")
    for arguments, reason in [
        (("cpu",), r"a CPU runs them only under Triton's interpreter \(TRITON_INTERPRET=1\)"),
        (("mps",), "there are kernels for NVIDIA and AMD GPUs, not for mps"),
        (("cuda", 24), "head size 24 is none of 16, 32, 64, 128"),
        (("cuda", 64, torch.float64), "the kernels compute in fp32 at most, not in float64"),
    ]:
        with pytest.raises(ValueError, match=f"^backend triton cannot run: {reason}; take auto or chunked$"):
            select_backend("triton", *arguments)
        if arguments[0] != "cpu":
            assert select_backend("auto", *arguments)[0] == "chunked"
        assert "triton" not in available_backends(*arguments)
    assert all(select_backend("auto", "cuda", 128, dtype)[0] == "triton" for dtype in DTYPES)
    assert select_backend("auto", "cuda", 24)[1] == "auto: not triton, head size 24 is none of 16, 32, 64, 128"
    with pytest.raises(ValueError, match=r"^backend triton cannot run"):
        call(make_inputs(1, 4, 2, 16), backend="triton")


def test_without_the_package_triton(monkeypatch):
    monkeypatch.setattr("rwkv_accel.ops.wkv7.find_spec", lambda name: None)
    select_backend.cache_clear()
    try:
        reason = "auto: not triton, the package triton is not installed"
        assert select_backend("auto", "cuda") == ("chunked", reason)
    finally:
        select_backend.cache_clear()


def test_old_gpus_take_the_chunked_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    select_backend.cache_clear()
    try:
        assert "before compute capability 8.0" in select_backend("auto", "cuda")[1]
    finally:
        select_backend.cache_clear()


def test_choice_is_logged_once(caplog):
    select_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="rwkv_accel.ops.wkv7"):
        for _ in range(3):
            call(make_inputs(1, 4, 2, 8), backend="chunked")
    assert [r.getMessage() for r in caplog.records] == ["wkv7 backend on cpu: chunked (asked for by name)"]
