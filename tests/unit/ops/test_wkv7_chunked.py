"""The chunked backend against the reference: outputs, final state and all seven gradients."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import wkv7
from tests.unit.ops.wkv7_cases import NAMES, assert_close, logit, make_inputs, results

FP64, FP32 = 1e-9, 1e-5
LENGTHS = [1, 15, 16, 17, 63, 130]


def check(inputs, tolerance, flat=(), **kwargs):
    expected = results(wkv7, [x.double() for x in inputs], backend="reference", **kwargs)
    assert_close(results(wkv7, inputs, backend="chunked", **kwargs), expected, tolerance, flat=flat)


@pytest.mark.parametrize("T", [*LENGTHS, 1000])
def test_lengths_fp64(T):
    check(make_inputs(2, T, 2, 8) if T < 1000 else make_inputs(1, T, 1, 8), FP64)


@pytest.mark.parametrize("T", LENGTHS)
def test_uninitialised_memory_is_never_read(T, nan_memory):
    check(make_inputs(2, T, 2, 8), FP64)


@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_head_sizes_fp32(N):
    check(make_inputs(1, 70, 2, N, dtype=torch.float32), FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_identical_keys(dtype):
    check(make_inputs(1, 130, 2, 64, dtype=dtype, hard=True), FP64 if dtype == torch.float64 else FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pattern", ["fastest", "slowest", "chunks", "channels", "tokens"])
def test_extreme_decays(pattern, dtype):
    inputs = make_inputs(1, 128, 2, 32, dtype=dtype)
    fast, slow = (float(logit(w_log)) for w_log in (-0.60653, -1e-7))
    w_low = torch.full_like(inputs[1], slow if pattern == "slowest" else fast)
    if pattern == "chunks":
        w_low[:, 32:64] = slow
        w_low[:, 96:] = slow
    elif pattern == "channels":
        w_low[..., ::2] = slow
    elif pattern == "tokens":
        w_low[:, ::3] = slow
    inputs[1], inputs[6] = w_low, torch.zeros_like(inputs[6])
    check(inputs, FP64 if dtype == torch.float64 else FP32, flat=("w_low", "w0"))


def test_gradcheck():
    leaves = [x.requires_grad_() for x in make_inputs(1, 19, 1, 3)]
    packed = [x.detach().requires_grad_() for x in make_inputs(1, 21, 1, 2, S=2)]
    borders = torch.tensor([0, 18, 21])
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x[:7], state=x[7], backend="chunked"), leaves)
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x[:7], state=x[7], cu_seqlens=borders, backend="chunked"), packed)


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("T", [96, 100])
def test_any_cut_into_segments(limit, T, segment_chunks, nan_memory):
    segment_chunks(limit, heads=2, size=8)
    check(make_inputs(3, T, 2, 8), FP64)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "lengths",
    [
        [33, 32, 31],
        [1, 1, 1],
        [16],
        [5, 70, 5, 128, 33, 64],
        [3] * 40,
        [64, 64],
        [32] * 3,
        [128],
    ],
    ids=str,
)
def test_packed_documents(lengths, limit, segment_chunks, nan_memory):
    segment_chunks(limit, heads=2, size=4)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    check(make_inputs(1, sum(lengths), 2, 4, S=len(lengths)), FP64, cu_seqlens=borders)


def test_packed_documents_equal_separate_runs():
    lengths = [40, 3, 65, 32]
    inputs = make_inputs(1, sum(lengths), 2, 16, S=4)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    out, final = wkv7(*inputs[:7], state=inputs[7], cu_seqlens=borders)
    for i, (low, high) in enumerate(zip(borders[:-1], borders[1:])):
        alone = wkv7(*(x[:, low:high] for x in inputs[:6]), inputs[6], state=inputs[7][i : i + 1])
        assert torch.allclose(out[:, low:high], alone[0], rtol=1e-12, atol=1e-12)
        assert torch.allclose(final[i], alone[1][0], rtol=1e-12, atol=1e-12)


def test_documents_do_not_see_each_other():
    inputs = make_inputs(1, 100, 2, 8, S=3)
    borders = torch.tensor([0, 30, 73, 100])
    leaves = [x.requires_grad_() for x in inputs]
    out, final = wkv7(*leaves[:7], state=leaves[7], cu_seqlens=borders)
    grads = torch.autograd.grad(out[:, 30:73].sum() + final[1].sum(), leaves)
    for grad in grads[:6]:
        assert grad[:, 30:73].abs().amin(dim=(0, 2, 3)).gt(0).sum() >= 42
        assert not grad[:, :30].any()
        assert not grad[:, 73:].any()
    assert grads[7][1].any()
    assert not grads[7][[0, 2]].any()


def test_split_sequence_equals_whole():
    inputs = make_inputs(2, 90, 2, 16)

    def in_two_parts(*x, state):
        first, state = wkv7(*(y[:, :37] for y in x[:6]), x[6], state=state)
        second, state = wkv7(*(y[:, 37:] for y in x[:6]), x[6], state=state)
        return torch.cat([first, second], dim=1), state

    assert_close(results(in_two_parts, inputs), results(wkv7, inputs), 1e-12)


def test_zero_tokens_leave_the_state_alone():
    inputs = make_inputs(2, 70, 2, 16)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 58)) for x in inputs[:6]]
    padded[1][:, 70:] = -torch.inf  # no decay at all
    out, final = wkv7(*inputs[:7], state=inputs[7])
    out_padded, final_padded = wkv7(*padded, inputs[6], state=inputs[7])
    assert torch.allclose(out_padded[:, :70], out, rtol=1e-12, atol=1e-12)
    assert torch.allclose(final_padded, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES[2:])
def test_one_input_alone_gets_the_same_gradient(name):
    inputs = make_inputs(1, 50, 2, 8)
    expected = results(wkv7, inputs)[name]
    index = NAMES.index(name) - 2
    leaf = inputs[index].requires_grad_()
    out, final = wkv7(*inputs[:7], state=inputs[7])
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (out, final)]
    ((out * weights[0]).sum() + (final * weights[1]).sum()).backward()
    assert_close({name: leaf.grad}, {name: expected}, 1e-12)
    assert all(x.grad is None for i, x in enumerate(inputs) if i != index)


@pytest.mark.parametrize("used", ["out", "final"])
def test_gradient_of_one_result(used):
    inputs = make_inputs(1, 50, 2, 8)

    def grads(backend):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out, final = wkv7(*leaves[:7], state=leaves[7], backend=backend)
        loss = (out if used == "out" else final).square().sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(NAMES[2:], found))

    chunked, reference = grads("chunked"), grads("reference")
    if used == "final":
        assert not chunked.pop("r").any()
        assert not reference.pop("r").any()
    assert_close(chunked, reference, 1e-12)


def test_bf16_inputs_are_computed_in_fp32():
    inputs = make_inputs(2, 70, 2, 32, dtype=torch.bfloat16)
    inputs[6] = make_inputs(2, 70, 2, 32, dtype=torch.float32)[6]
    found = results(wkv7, inputs, backend="chunked")
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name in ("final", "w0") else torch.bfloat16)
    # Rounding to bf16 is all that separates them from fp64: 2^-9 per value.
    check(inputs, 2.5e-3)
    final = {"final": found["final"]}
    assert_close(final, {"final": results(wkv7, [x.double() for x in inputs])["final"]}, 1e-6)


def test_strided_inputs():
    inputs = make_inputs(2, 45, 3, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]]
    assert not strided[0].is_contiguous()
    assert_close(results(wkv7, [*strided, *inputs[6:]]), results(wkv7, inputs), 1e-12)
    leaf = inputs[0][:, :, :1].clone().requires_grad_()
    wkv7(leaf.expand(-1, -1, 3, -1), *inputs[1:7])[0].sum().backward()
    full = inputs[0][:, :, :1].repeat(1, 1, 3, 1).requires_grad_()
    wkv7(full, *inputs[1:7])[0].sum().backward()
    assert torch.allclose(leaf.grad, full.grad.sum(2, keepdim=True), rtol=1e-12)


def test_only_inputs_and_chunk_states_are_kept():
    inputs = [x.requires_grad_() for x in make_inputs(2, 128, 3, 16, dtype=torch.float32)]
    kept = {}
    # The log decay is kept by two, and is one tensor.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        out, _ = wkv7(*inputs[:7], state=inputs[7], backend="chunked")
    assert out.requires_grad
    input_bytes, state_bytes = 6 * inputs[0].nbytes, inputs[7].nbytes
    assert sum(kept.values()) == input_bytes + (1 + 128 // 32) * state_bytes


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in make_inputs(1, 20, 1, 4)]
    out, _ = wkv7(*inputs[:7], backend="chunked")
    with pytest.raises(RuntimeError, match=r"wkv7 \(chunked\) can be differentiated once"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


def test_training_after_inference_mode(segment_chunks):
    # The layout is cached; made in inference mode, it must still serve a differentiable call.
    segment_chunks(2, heads=2, size=8)
    inputs = make_inputs(1, 70, 2, 8, S=2)
    borders = torch.tensor([0, 20, 70])
    with torch.inference_mode():
        out, _ = wkv7(*inputs[:7], state=inputs[7], cu_seqlens=borders)
    found = results(wkv7, inputs, cu_seqlens=borders)
    assert torch.equal(found["out"], out)
    assert_close(found, results(wkv7, inputs, cu_seqlens=borders, backend="reference"), FP64)
