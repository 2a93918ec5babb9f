"""The decode kernel against its torch twin in fp64: output, and the state after several tokens in place."""

import pytest
import torch

from rwkv_accel.ops.wkv7 import triton_step
from rwkv_accel.ops.wkv7.step import StepInputs, StepWeights, wkv7_step
from tests.unit.ops.wkv7_cases import step_case

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
EPS = 64e-5


def relative(x, y):
    return float((x.cpu().double() - y).norm() / y.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 16), (3, 2, 32), (2, 3, 64)])
def test_three_tokens(rows, heads, size, dtype, device):
    state = step_case(rows, heads, size, dtype, device=device)[2]
    exact_state = state.cpu().double()
    for seed in range(3):
        x, weights, _ = step_case(rows, heads, size, dtype, device=device, seed=seed)
        x.k[0, :size] = 0
        out = wkv7_step(x, weights, state, EPS, backend="triton")
        exact = [[t.cpu().double() for t in group] for group in (x, weights)]
        want = wkv7_step(StepInputs(*exact[0]), StepWeights(*exact[1]), exact_state, EPS, backend="reference")
        assert out.dtype == dtype
        assert relative(out, want) < max(TOLERANCE[dtype], 1e-5 if device.type == "cuda" else 0)
    assert relative(state, exact_state) < (5e-6 if device.type == "cuda" else 1e-6)


def test_head_size_128(device):
    test_three_tokens(1, 2, 128, torch.bfloat16, device)


def test_strided_inputs_and_guard_bands(device, monkeypatch):
    x, weights, state = step_case(2, 2, 32, torch.float32, device=device)
    plain_state = state.clone()
    plain = wkv7_step(x, weights, plain_state, EPS, backend="triton")
    whole = torch.full((state.numel() + 512,), 7.0, device=device)
    inside = whole[256:-256].view(state.shape)
    inside.copy_(state)
    wide = torch.stack(x).transpose(0, 1)
    whole_out = torch.full((x.r.numel() + 512,), 7.0, device=device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like: whole_out[256:-256].view(like.shape))
        out = wkv7_step(StepInputs(*(wide[:, i] for i in range(6))), weights, inside, EPS, backend="triton")
    assert out.data_ptr() == whole_out[256:].data_ptr()
    assert torch.equal(out, plain)
    assert torch.equal(inside, plain_state)
    for guarded in (whole, whole_out):
        assert (guarded[:256] == 7).all()
        assert (guarded[-256:] == 7).all()


def test_generation_uses_it(device, monkeypatch):
    from rwkv_accel.generation.decode import RecurrentStep
    from rwkv_accel.model.config import RWKV7Config
    from rwkv_accel.model.init import init_state_dict
    from rwkv_accel.model.rwkv7 import RWKV7

    config = RWKV7Config.for_new_model(2, 32, 50, 16)
    model = RWKV7(config)
    model.load_state_dict(init_state_dict(config, 0))
    model.to(device)
    if device.type == "cpu":  # the interpreter is never chosen by itself
        monkeypatch.setattr("rwkv_accel.ops.wkv7.step.select_backend", lambda *a: ("triton", ""))
    steps = []
    plain = triton_step.step_triton
    monkeypatch.setattr(triton_step, "step_triton", lambda *a: steps.append(1) or plain(*a))
    ids = torch.tensor([3, 4], device=device)
    with torch.no_grad():
        state = model.fresh_state(2)
        want, want_state = model.forward_one(ids, state.clone())
        got, got_state = RecurrentStep(model).step(ids, state)
    assert len(steps) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for one, two in zip(got_state.wkv, want_state.wkv):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
