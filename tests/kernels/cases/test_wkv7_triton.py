"""The Triton backend against the fp64 reference: output, final state and all seven gradients."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import triton_op, wkv7
from tests.unit.ops.wkv7_cases import NAMES, assert_close, logit, make_inputs, results

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
ON_GPU_FP32 = 1e-5
"""There three tf32 products stand for one of fp32 and keep 21 bits, and the units' sums are cut off, not rounded."""
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Of fp16 only its products are its own; lengths, heads and keys have tried them.
FP16_LONG = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str
)


def allowed(dtype, device):
    return ON_GPU_FP32 if dtype == torch.float32 and device.type == "cuda" else TOLERANCE[dtype]


def typed(inputs, dtype, device):
    """As the model calls it: w0 and states stay fp32."""
    return [x.to(device, torch.float32 if i > 5 else dtype) for i, x in enumerate(inputs)]


def check(inputs, dtype, device, flat=(), **kwargs):
    given = typed(inputs, dtype, device)
    found = results(wkv7, given, backend="triton", **kwargs)
    expected = results(wkv7, [x.cpu().double() for x in given], backend="reference", **kwargs)
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name in ("final", "w0", "state") else dtype)
    found = {name: x.cpu() for name, x in found.items()}
    assert_close(found, expected, allowed(dtype, device), flat=flat)
    return found


@DTYPES
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 130])
def test_lengths(T, dtype, device):
    check(make_inputs(1, T, 2, 64), dtype, device)


@DTYPES
@pytest.mark.parametrize("N", [16, 32])
def test_head_sizes(N, dtype, device):
    check(make_inputs(2, 37, 1, N), dtype, device)


@DTYPES
@pytest.mark.parametrize("hard", [False, True], ids=["plain", "hard"])
def test_head_size_128(hard, dtype, device):
    check(make_inputs(1, 37, 1, 128, hard=hard), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_head_size_128_cut_into_pieces(dtype, device, programs):
    programs(24)
    inputs = make_inputs(1, 40, 1, 128, hard=True)
    assert triton_op.choose_setup(device, dtype, tuple(inputs[0].shape), None).pieces.num_pieces >= 3
    check(inputs, dtype, device)


@pytest.mark.parametrize(("N", "dtype"), [(64, torch.bfloat16), (64, torch.float32), (128, torch.float16)], ids=str)
@pytest.mark.parametrize("family", ["cuda", "hip"])
def test_sizes_of_other_devices(family, N, dtype, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("compiled kernels take the sizes of their own device")
    monkeypatch.setattr(triton_op, "family", lambda device: family)
    check(make_inputs(1, 20, 1, N), dtype, device)


@DTYPES
def test_near_identical_keys(dtype, device):
    check(make_inputs(1, 130, 1, 64, hard=True), dtype, device)


@FP16_LONG
@pytest.mark.parametrize("pattern", ["fastest", "slowest", "chunks", "channels"])
def test_extreme_decays(pattern, dtype, device):
    inputs = make_inputs(1, 80, 1, 32)
    fast, slow = (float(logit(w_log)) for w_log in (-0.60653, -1e-7))
    w_low = torch.full_like(inputs[1], slow if pattern == "slowest" else fast)
    if pattern == "chunks":
        w_low[:, 32:64] = slow
    elif pattern == "channels":
        w_low[..., ::2] = slow
    inputs[1], inputs[6] = w_low, torch.zeros_like(inputs[6])
    check(inputs, dtype, device, flat=("w_low", "w0"))


@FP16_LONG
@pytest.mark.parametrize("lengths", [[33, 32, 31], [1, 1, 1], [5, 70, 16, 2]], ids=str)
def test_packed_documents(lengths, dtype, device):
    borders = torch.tensor([0, *lengths]).cumsum(0)
    check(make_inputs(1, sum(lengths), 1, 32, S=len(lengths)), dtype, device, cu_seqlens=borders)


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(64, torch.bfloat16), (83, torch.float32), pytest.param(131, torch.float16, marks=pytest.mark.long)],
)
def test_sequences_cut_into_pieces(T, dtype, device, programs):
    programs(12)
    inputs = make_inputs(1, T, 2, 32)
    assert triton_op.choose_setup(device, dtype, tuple(inputs[0].shape), None).pieces.num_pieces >= 3
    check(inputs, dtype, device)


def test_packed_documents_cut_into_pieces(device, programs):
    programs(9)
    borders = torch.tensor([0, 20, 23, 113, 130])
    check(make_inputs(1, 130, 1, 32, S=4), torch.float32, device, cu_seqlens=borders)


def test_near_identical_keys_cut_into_pieces(device, programs):
    programs(8)
    check(make_inputs(1, 130, 1, 64, hard=True), torch.float32, device)


@pytest.mark.parametrize("pieces", [1, 8])
def test_without_state_and_with_one_result_used(pieces, device, programs):
    programs(pieces)
    inputs = typed(make_inputs(1, 50, 1, 16), torch.float32, device)
    for used in (0, 1):
        grads = []
        for backend, given in (("triton", inputs), ("reference", [x.cpu().double() for x in inputs])):
            leaves = [x.detach().clone().requires_grad_() for x in given[:7]]
            loss = wkv7(*leaves, backend=backend)[used].square().sum()
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            grads.append({name: x.cpu() for name, x in zip(NAMES[2:9], found)})
        if used:
            assert not grads[0].pop("r").any()
            assert not grads[1].pop("r").any()
        assert_close(*grads, allowed(torch.float32, device))


def test_strided_and_mixed_inputs(device):
    inputs = typed(make_inputs(2, 21, 3, 16), torch.float32, device)
    plain = results(wkv7, inputs, backend="triton")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]]
    assert not strided[0].is_contiguous()
    found = results(wkv7, [*strided, *inputs[6:]], backend="triton")
    for name, x in plain.items():
        assert torch.equal(found[name], x), name
    # One fp32 input makes all products fp32; every gradient and the output keep their own dtype.
    mixed = [x.bfloat16() if i in (0, 3) else x for i, x in enumerate(inputs)]
    found = results(wkv7, mixed, backend="triton")
    assert {name for name, x in found.items() if x.dtype == torch.bfloat16} == {"out", "r", "v"}
    expected = results(wkv7, [x.cpu().double() for x in mixed], backend="reference")
    assert_close({name: x.cpu() for name, x in found.items()}, expected, 2.5e-3)
    assert_close({"final": found["final"].cpu()}, {"final": expected["final"]}, allowed(torch.float32, device))


def test_a_frozen_w0_costs_nothing_and_changes_nothing(device, monkeypatch):
    inputs = typed(make_inputs(1, 21, 2, 16), torch.bfloat16, device)
    sums = []
    plain = triton_op._empty
    monkeypatch.setattr(triton_op, "_empty", lambda shape, *rest: sums.append(len(shape) == 3) or plain(shape, *rest))
    found = []
    for frozen in (False, True):
        sums.clear()
        leaves = [x.detach().requires_grad_(not (frozen and i == 6)) for i, x in enumerate(inputs)]
        out, final = wkv7(*leaves[:7], state=leaves[7], backend="triton")
        (out.float().square().sum() + final.square().sum()).backward()
        found.append([x.grad for x in leaves])
        assert sum(sums) == (not frozen)  # only the sums of w0 have three dimensions
    assert found[1].pop(6) is None
    assert found[0].pop(6).abs().max() > 0
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_nothing_is_kept_where_no_gradient_is_asked_for(device, monkeypatch):
    inputs = typed(make_inputs(1, 40, 2, 16), torch.float32, device)
    with torch.no_grad():
        quiet = wkv7(*inputs[:7], state=inputs[7], backend="triton")
    made = []
    plain = triton_op._empty
    monkeypatch.setattr(triton_op, "_empty", lambda shape, *rest: made.append(tuple(shape)) or plain(shape, *rest))
    with torch.no_grad():
        wkv7(*inputs[:7], state=inputs[7], backend="triton")
    assert sorted(made) == [(1, 2, 16, 16), (1, 40, 2, 16), (3, 2, 16, 16)]  # final state, out, inverses
    leaves = [x.requires_grad_() for x in inputs]
    loud = wkv7(*leaves[:7], state=leaves[7], backend="triton")
    assert torch.equal(quiet[0], loud[0])
    assert torch.equal(quiet[1], loud[1])


def test_a_model_trains_on_it(device):
    from rwkv_accel.model.config import RWKV7Config
    from rwkv_accel.model.init import init_state_dict
    from rwkv_accel.model.rwkv7 import RWKV7

    config = RWKV7Config.for_new_model(2, 32, 50, 16)
    ids = torch.randint(1, 50, (1, 13), generator=torch.Generator().manual_seed(0)).to(device)
    borders = torch.tensor([0, 5, 13])
    noise = torch.Generator().manual_seed(1)
    weights = init_state_dict(config, 0, dtype=torch.float32)
    weights = {n: w + 0.05 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    found = []
    for backend in ("triton", "reference"):
        model = RWKV7(config, wkv_backend=backend)
        model.load_state_dict(weights)
        loss = model.to(device)(ids, ids, cu_seqlens=borders.to(device))
        loss.backward()
        found.append({"loss": loss.cpu()} | {n: p.grad.cpu() for n, p in model.named_parameters()})
    assert_close(*found, 1e-4)


def test_second_derivative_is_refused(device):
    inputs = [x.requires_grad_() for x in typed(make_inputs(1, 5, 1, 16), torch.float32, device)]
    out, _ = wkv7(*inputs[:7], backend="triton")
    with pytest.raises(RuntimeError, match=r"wkv7 \(triton\) can be differentiated once"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


def test_repeated_calls_give_the_same_bits(device):
    inputs = typed(make_inputs(2, 35, 1, 32), torch.bfloat16, device)
    first, second = (results(wkv7, inputs, backend="triton") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(second[name], x), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x[0][:, :0], *x[1:]], "^r must be a non-empty"),
        (lambda x: [*x[:2], x[2][:, :3], *x[3:]], "^k must have r's shape"),
        (lambda x: [*x[:3], x[3].long(), *x[4:]], "^v must be a floating point tensor, got torch.int64$"),
        (lambda x: [*x[:4], x[4].to("meta"), *x[5:]], "^a must be on r's device"),
        (lambda x: [*x[:7], x[7][:, :, :8]], r"^state must be \[1, 1, 16, 16\]"),
        (lambda x: [*x[:6], x[6].flatten(), x[7]], r"^w0 must be \[1, 16\]"),
        (lambda x: [y[..., :8] for y in x[:7]] + [x[7][..., :8, :8]], "head size 8 is none of 16, 32, 64, 128"),
        (lambda x: [x[0].double(), *x[1:]], "the kernels compute in fp32 at most, not in float64"),
        (lambda x: [*x[:6], x[6].double(), x[7]], "the kernels compute in fp32 at most, not in float64"),
    ],
)
def test_mistakes_are_refused_before_a_kernel_starts(change, message, device, monkeypatch):
    monkeypatch.setattr(triton_op, "launch", lambda *_, **__: pytest.fail("launched"))
    inputs = change(typed(make_inputs(1, 4, 1, 16), torch.float32, device))
    with pytest.raises(ValueError, match=message):
        wkv7(*inputs[:7], state=inputs[7], backend="triton")
