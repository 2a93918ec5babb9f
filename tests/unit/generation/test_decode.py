"""The lean recurrent step and the packed projections compute what the model's own modules compute."""

import pytest
import torch

from rwkv_accel.generation.decode import RecurrentStep
from rwkv_accel.generation.packed import PackedLinear, pack_linears
from rwkv_accel.generation.prefill import prefill
from rwkv_accel.model.layers import Linear
from rwkv_accel.peft.base import AdapterSpec
from rwkv_accel.peft.linear import LoraLinear

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2}


def walk(step, state, ids_TR):
    """Logits of every step, and the state at the end."""
    logits = []
    for ids_R in ids_TR:
        out, state = step(ids_R, state)
        logits.append(out)
    return torch.stack(logits), state


def assert_same(got, want, dtype):
    for one, two in zip(got, want):
        assert one.dtype == two.dtype
        assert float((one.double() - two.double()).norm() / two.double().norm()) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_recurrent_step_is_forward_one(make_model, dtype):
    model = make_model(50, n_layer=3, dtype=dtype)
    model.blocks[1].att.k_k *= 0.02  # norms below 1 too
    ids_TR = torch.randint(0, 50, (9, 3), generator=torch.Generator().manual_seed(1))
    start = model.fresh_state(3)
    want, want_state = walk(model.forward_one, start.clone(), ids_TR)
    got, got_state = walk(RecurrentStep(model).step, start.clone(), ids_TR)
    assert_same(got, want, dtype)
    for name in ("att_shift", "wkv", "ffn_shift"):
        assert_same(getattr(got_state, name), getattr(want_state, name), dtype)


@torch.no_grad()
def test_recurrent_step_starts_from_time_state_and_calls_adapters(make_model):
    model = make_model(50)
    for block in model.blocks:
        block.att.time_state = torch.nn.Parameter(torch.randn(2, 16, 16, dtype=torch.float64))
    plain = model.blocks[1].ffn.key
    lora = LoraLinear(plain.in_features, plain.out_features, AdapterSpec(rank=4))
    lora.set_up(plain.weight, torch.float64, torch.float64, 0, "x")
    lora.lora_B.normal_()
    model.blocks[1].ffn.key = lora
    ids = torch.tensor([[3], [4], [5]])
    want = model(ids.T)
    got, _ = walk(RecurrentStep(model).step, model.fresh_state(1), ids)
    torch.testing.assert_close(got[:, 0], want[0], rtol=1e-9, atol=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_model_is_the_model(make_model, dtype):
    model, packed = make_model(60, dtype=dtype), make_model(60, dtype=dtype)
    assert pack_linears(packed) == 2 * 6 + 1
    assert not [m for m in packed.modules() if isinstance(m, Linear)]
    prompts = [[1, 2, 3, 4, 5], [7]]
    want, want_state = prefill(model, prompts, model.fresh_state(2))
    got, got_state = prefill(packed, prompts, packed.fresh_state(2))
    assert_same([got], [want], dtype)
    ids_TR = torch.tensor([[1, 5], [2, 6], [3, 7]])
    want, _ = walk(RecurrentStep(model).step, want_state, ids_TR)
    got, _ = walk(RecurrentStep(packed).step, got_state, ids_TR)
    assert_same(got, want, dtype)


@torch.inference_mode()
def test_packing_merges_adapters_and_leaves_fp64_alone(make_model):
    model = make_model(60, dtype=torch.float32)
    plain = model.blocks[0].att.key
    lora = LoraLinear(plain.in_features, plain.out_features, AdapterSpec(rank=4, alpha=2.0))
    lora.set_up(plain.weight, torch.float32, torch.float32, 0, "x")
    lora.lora_B.normal_()
    model.blocks[0].att.key = lora
    x = torch.randn(5, plain.in_features)
    want = lora(x)
    pack_linears(model)
    assert isinstance(model.blocks[0].att.key, PackedLinear)
    torch.testing.assert_close(model.blocks[0].att.key(x), want, rtol=1e-4, atol=1e-5)
    assert pack_linears(make_model(60)) == 0
